"""What the supervisor itself tells Prometheus: which processes run, and whether the server answers."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from proxy.version import version


class SupervisorMetrics:
    """The metrics of the supervisor.

    Parameters
    ----------
    registry
        Where to register; the same that collects what the other processes write.
    workers_up
        Returns how many workers accept clients.
    upstream_up
        Returns whether the server answered when it was asked last.
    learner
        Returns whether a learner is configured.
    relay_only
        Returns whether the kill switch is thrown.
    config_in_force
        Returns whether the configuration in force is that of its file.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        workers_up: Callable[[], int],
        upstream_up: Callable[[], bool],
        learner: Callable[[], bool],
        config_in_force: Callable[[], bool],
        relay_only: Callable[[], bool] = bool,
    ) -> None:
        self.exits = Counter(
            "ruvector_child_exits", "Ends of child processes.", ("process",), registry=registry
        )
        up = Gauge("ruvector_workers_up", "Worker processes that accept clients.", registry=registry)
        up.set_function(workers_up)
        upstream = Gauge(
            "ruvector_upstream_up",
            "1 if the server answered when it was asked last, which each scrape does; else 0.",
            registry=registry,
        )
        upstream.set_function(upstream_up)
        relaying = Gauge(
            "ruvector_relay_only",
            "1 while the kill switch is thrown and the proxy is a pure relay, else 0.",
            registry=registry,
        )
        relaying.set_function(relay_only)
        configured = Gauge(
            "ruvector_learner_configured", "1 where a learner is configured, else 0.", registry=registry
        )
        configured.set_function(learner)
        reloaded = Gauge(
            "ruvector_config_last_reload_successful",
            "1 while the configuration in force is that of its file; 0 where the file was refused.",
            registry=registry,
        )
        reloaded.set_function(config_in_force)
        build = Gauge(
            "ruvector_build_info", "Always 1; the label says what runs.", ("version",), registry=registry
        )
        build.labels(version()).set(1)
