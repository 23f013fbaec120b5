"""What a worker counts arrives at /metrics, under stable names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.parser import text_string_to_metric_families

from proxy.admin.metrics import MAX_TABLES, OTHER, QUERY_BUCKETS, Times, WorkerMetrics
from proxy.child import child_environment

STABLE = {
    "ruvector_connections",
    "ruvector_connections_open",
    "ruvector_connections_refused",
    "ruvector_injection_errors",
    "ruvector_learner_connected",
    "ruvector_limit_hits",
    "ruvector_logins_failed",
    "ruvector_policy_version",
    "ruvector_proxy_overhead_seconds",
    "ruvector_queries",
    "ruvector_queries_adapted",
    "ruvector_queries_left_alone",
    "ruvector_queries_recognised",
    "ruvector_query_duration_seconds",
    "ruvector_statements",
    "ruvector_trajectory_queue_drops",
    "ruvector_trajectories_sent",
}


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Return every sample of a scrape, parsed as Prometheus would, by name and labels."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_the_names_are_stable_and_explained() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(registry)
    families = [
        family
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        if not family.name.endswith("_created")
    ]
    assert {family.name for family in families} == STABLE
    assert all(family.documentation.endswith(".") for family in families)


def test_flush_adds_what_is_new_and_only_that() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    counters = metrics.counters
    counters.connections_opened, counters.connections_closed, counters.statements = 5, 2, 10
    counters.recognised["public.items"] += 4
    counters.adapted["public.items", "ef=96"] += 3
    counters.left_alone["transaction"] += 1
    counters.policy_version, counters.learner_connected = 7, 1
    metrics.flush()
    metrics.flush()
    counters.connections_closed, counters.statements = 4, 11
    counters.adapted["public.items", "ef=96"] += 1
    counters.trajectories_sent, counters.trajectories_dropped, counters.injection_errors = 6, 2, 1
    counters.connections_refused = 9
    counters.logins_failed["password"] += 2
    metrics.flush()
    found = samples(registry)
    expected = {
        "ruvector_connections_total{}": 5,
        "ruvector_connections_open{}": 1,
        "ruvector_connections_refused_total{}": 9,
        "ruvector_logins_failed_total{cause=password}": 2,
        "ruvector_statements_total{}": 11,
        "ruvector_queries_recognised_total{table=public.items}": 4,
        "ruvector_queries_adapted_total{arm=ef=96,table=public.items}": 4,
        "ruvector_queries_left_alone_total{reason=transaction}": 1,
        "ruvector_injection_errors_total{}": 1,
        "ruvector_trajectories_sent_total{}": 6,
        "ruvector_trajectory_queue_drops_total{}": 2,
        "ruvector_policy_version{}": 7,
        "ruvector_learner_connected{}": 1,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("arm", "adapted"), [("as is", "no"), ("exact", "yes")])
def test_a_query_is_timed_by_table_and_by_whether_it_was_adapted(arm: str, adapted: str) -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.observe("public.items", arm, "static", 0.0025, 30e-6)
    metrics.flush()
    found = samples(registry)
    duration = "ruvector_query_duration_seconds"
    assert found[f"{duration}_sum{{adapted={adapted},table=public.items}}"] == 0.0025
    assert found[f"{duration}_bucket{{adapted={adapted},le=0.002,table=public.items}}"] == 0
    assert found[f"{duration}_bucket{{adapted={adapted},le=0.003,table=public.items}}"] == 1
    assert found["ruvector_proxy_overhead_seconds_count{}"] == 1
    assert found["ruvector_queries_total{table=public.items,trust=static}"] == 1


DURATIONS = st.sampled_from([*QUERY_BUCKETS, 0.0, 11.0, 1e9]) | st.floats(0.0, 100.0)


@given(st.lists(DURATIONS), st.integers(0))
def test_batches_add_up_to_what_observing_one_by_one_gives(durations: list[float], cut: int) -> None:
    one_by_one, batched = CollectorRegistry(), CollectorRegistry()
    expected = Histogram("x_seconds", "X.", buckets=QUERY_BUCKETS, registry=one_by_one)
    histogram = Histogram("x_seconds", "X.", buckets=QUERY_BUCKETS, registry=batched)
    times = Times(QUERY_BUCKETS)
    cut %= len(durations) + 1
    for part in (durations[:cut], durations[cut:]):
        for duration in part:
            times.observe(duration)
            expected.observe(duration)
        times.move_to(histogram)
    found, wanted = samples(batched), samples(one_by_one)
    for values in (found, wanted):
        values.pop("x_seconds_created{}", None)
    assert found.pop("x_seconds_sum{}") == pytest.approx(wanted.pop("x_seconds_sum{}"))
    assert found == wanted


def test_clients_cannot_make_up_tables_without_end() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    for number in range(MAX_TABLES + 5):
        metrics.counters.recognised[f"public.t{number}"] += 1
    metrics.flush()
    found = {name: value for name, value in samples(registry).items() if "queries_recognised_total" in name}
    assert len(found) == MAX_TABLES + 1
    assert found[f"ruvector_queries_recognised_total{{table={OTHER}}}"] == 5


WORKER = """
from proxy.admin.metrics import WorkerMetrics
metrics = WorkerMetrics()
metrics.counters.statements = 3
metrics.counters.connections_opened = 2
metrics.counters.policy_version = {version}
metrics.observe("public.items", "exact", "context", 0.001, 0.00002)
metrics.flush()
"""


@pytest.mark.slow
def test_the_totals_of_dead_workers_stay_and_their_gauges_go(tmp_path: Path) -> None:
    pids = []
    for version in (4, 6):
        with subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER.format(version=version)], env=child_environment(tmp_path)
        ) as worker:
            assert worker.wait(30) == 0
        pids.append(worker.pid)
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]
    found = samples(registry)
    assert found["ruvector_statements_total{}"] == 6
    assert found["ruvector_connections_open{}"] == 4
    assert found["ruvector_policy_version{}"] == 4
    assert found["ruvector_query_duration_seconds_count{adapted=yes,table=public.items}"] == 2
    mark_process_dead(pids[0], str(tmp_path))  # type: ignore[no-untyped-call]
    found = samples(registry)
    assert found["ruvector_statements_total{}"] == 6
    assert found["ruvector_connections_open{}"] == 2
    assert found["ruvector_policy_version{}"] == 6
