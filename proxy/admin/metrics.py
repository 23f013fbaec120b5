"""What the proxy tells Prometheus.

The hot path raises plain integers (`proxy.session.counters`, `Times`), which takes about a microsecond per
query; prometheus_client's own ``observe`` takes ten.  Once a second `WorkerMetrics.flush` adds what is new
to the metrics.  Every process writes its values to memory-mapped files in ``PROMETHEUS_MULTIPROC_DIR``,
which must be set before prometheus_client is imported, and the supervisor adds them up
(https://prometheus.github.io/client_python/multiprocess/): a worker's totals outlive it.

Names are part of the interface: units in the name, no label whose values a client could make up without end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Hashable
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from proxy.session.counters import Counters

AS_IS = "as is"
"""Name of the arm of a query that ran as it came."""

_Key = TypeVar("_Key", bound=Hashable)

MAX_TABLES = 500
"""Distinct values of the label `table` per worker; further tables are counted together as `OTHER`."""

OTHER = "(other)"

QUERY_BUCKETS = (
    *(0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02),
    *(0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
"""Seconds; finest from 1 to 20 ms, where vector queries that use an index lie."""

OVERHEAD_BUCKETS = (10e-6, 20e-6, 35e-6, 50e-6, 75e-6, 100e-6, 150e-6, 250e-6, 500e-6, 1e-3, 5e-3, 25e-3)
"""Seconds; a dictionary lookup and one write take some tens of microseconds."""


class Times:
    """Durations since the last flush, counted by bucket; the last bucket is for what exceeds all bounds."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def move_to(self, histogram: Histogram) -> None:
        """Add what was counted to a histogram with the same bounds, and begin anew."""
        # There is no public way to add a batch; a test compares the result with that of observe().
        histogram._sum.inc(self._total)
        for bucket, count in zip(histogram._buckets, self._counts, strict=True):
            if count:
                bucket.inc(count)
        self._counts = [0] * len(self._counts)
        self._total = 0.0


class WorkerMetrics:
    """The metrics of one worker process.

    `counters` belongs to the worker's event loop, which raises it freely; `flush` is to be called from the
    same loop, about once a second and once at the end.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.counters = Counters()
        self._flushed = Counters()
        self._tables: set[str] = set()
        self._durations: dict[tuple[str, str], Times] = {}
        self._overheads = Times(OVERHEAD_BUCKETS)
        self._trusts: Tally[tuple[str, str]] = Tally()
        registry = registry or CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ruvector_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, mode: Literal["livesum", "livemin"]) -> Gauge:
            return Gauge(f"ruvector_{name}", text, registry=registry, multiprocess_mode=mode)

        self._opened = counter("connections", "Client connections accepted.")
        self._open = gauge("connections_open", "Client connections that are open now.", "livesum")
        self._refused = counter(
            "connections_refused",
            "Client connections refused: server unreachable, or not the PostgreSQL protocol.",
        )
        self._limits_hit = counter(
            "limit_hits",
            "Clients that met a limit: connections, user, database, logins (the oldest silent connection was "
            "closed), files, memory, message.",
            "limit",
        )
        self._logins_failed = counter(
            "logins_failed",
            'Logins that failed, by cause; "server": the server refused one that was relayed to it.',
            "cause",
        )
        self._statements = counter("statements", "Statements executed: Query and Execute messages.")
        self._recognised = counter("queries_recognised", "Vector queries recognised.", "table")
        self._adapted = counter("queries_adapted", "Vector queries given measured settings.", "table", "arm")
        self._left_alone = counter(
            "queries_left_alone", "Vector queries recognised but run as they came.", "reason"
        )
        self._trusted = counter(
            "queries", "Vector queries finished, by how far their settings go.", "table", "trust"
        )
        self._injection_errors = counter("injection_errors", "Settings that the server refused.")
        self._sent = counter("trajectories_sent", "Recorded queries sent to the learner.")
        self._dropped = counter(
            "trajectory_queue_drops", "Recorded queries dropped because the queue was full."
        )
        self._policy = gauge(
            "policy_version", "Version of the policy in force; the oldest among the workers.", "livemin"
        )
        self._learner = gauge("learner_connected", "Workers that are connected to the learner.", "livesum")
        self._duration = Histogram(
            "ruvector_query_duration_seconds",
            "Time from a vector query's arrival at the proxy to the end of its result.",
            ("table", "adapted"),
            buckets=QUERY_BUCKETS,
            registry=registry,
        )
        self._overhead = Histogram(
            "ruvector_proxy_overhead_seconds",
            "Time that the proxy itself spent on a vector query, without waiting for the server.",
            buckets=OVERHEAD_BUCKETS,
            registry=registry,
        )

    def observe(self, table: str, arm: str, trust: str, seconds: float, overhead_seconds: float) -> None:
        """Record a finished vector query: table, arm and trust in force, times in seconds."""
        key = (self._bounded(table), "no" if arm == AS_IS else "yes")
        durations = self._durations.get(key)
        if durations is None:
            durations = self._durations[key] = Times(QUERY_BUCKETS)
        durations.observe(seconds)
        self._overheads.observe(overhead_seconds)
        self._trusts[key[0], trust] += 1

    def flush(self) -> None:
        """Add to the metrics what was counted and observed since the last call."""
        now, before = self.counters, self._flushed
        for metric, name in (
            (self._opened, "connections_opened"),
            (self._refused, "connections_refused"),
            (self._statements, "statements"),
            (self._injection_errors, "injection_errors"),
            (self._sent, "trajectories_sent"),
            (self._dropped, "trajectories_dropped"),
        ):
            metric.inc(getattr(now, name) - getattr(before, name))
            setattr(before, name, getattr(now, name))
        for limit, count in _gained(now.limits_hit, before.limits_hit):
            self._limits_hit.labels(limit).inc(count)
        for cause, count in _gained(now.logins_failed, before.logins_failed):
            self._logins_failed.labels(cause).inc(count)
        for table, count in _gained(now.recognised, before.recognised):
            self._recognised.labels(self._bounded(table)).inc(count)
        for (table, arm), count in _gained(now.adapted, before.adapted):
            self._adapted.labels(self._bounded(table), arm).inc(count)
        for reason, count in _gained(now.left_alone, before.left_alone):
            self._left_alone.labels(reason).inc(count)
        for (table, trust), count in self._trusts.items():
            self._trusted.labels(table, trust).inc(count)
        self._trusts.clear()
        for labels, durations in self._durations.items():
            durations.move_to(self._duration.labels(*labels))
        self._overheads.move_to(self._overhead)
        self._open.set(now.connections_opened - now.connections_closed)
        self._policy.set(now.policy_version)
        self._learner.set(now.learner_connected)

    def _bounded(self, table: str) -> str:
        if table not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                return OTHER
            self._tables.add(table)
        return table


def _gained(now: Tally[_Key], before: Tally[_Key]) -> list[tuple[_Key, int]]:
    """Return what each key gained, and note it in `before`."""
    gained = [(key, count - before[key]) for key, count in now.items() if count != before.get(key, 0)]
    before.update(dict(gained))  # a Counter adds
    return gained
