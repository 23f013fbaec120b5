"""Write docs/metrics.md from the code: ``python -m proxy.admin.docs``.

The file is kept in the repository for readers; a test fails when it differs from what this module would
write, and when alerts or dashboard name a series that is not in `catalogue`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from learning.metrics import LearnerMetrics
from proxy.admin.metrics import MAX_TABLES, OTHER, WorkerMetrics
from proxy.admin.supervision import SupervisorMetrics

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"

_INTRODUCTION = """\
# Metrics

<!-- Written by "python -m proxy.admin.docs" from the code; change it there. -->

`http://127.0.0.1:9464/metrics` (`admin.host`, `admin.port`) answers in Prometheus' text format with what all
processes of one proxy have counted, added up; a worker's totals outlive it. Names and labels are part of the
interface. Units are in the names: seconds, or a ratio from 0 to 1. No label takes values without end: of the
label `table` each worker keeps the first {tables}, further ones are counted together as `{other}`.

Ready to use, in [helm/ruvector-proxy/monitoring](../helm/ruvector-proxy/monitoring):

- `alerts.yaml`: rules for Prometheus (`rule_files`): recall below its target by more than chance, server
  unreachable, no worker, learner away or behind, settings refused by the server, queries lost on the way
  to the learner, a configuration that was refused, processes that keep ending.
  [Cases](../tests/monitoring/alerts.test.yaml) for `promtool test rules` show when each fires, and when not.
- `dashboard.json`: for Grafana (Dashboards, Import). It asks for the data source. A test runs its queries
  in Prometheus; nobody has looked at it in Grafana yet, which could not be installed where it was made.

The Helm chart installs both on request (`monitoring` in its values).
"""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name without suffixes, its type in Prometheus' words, its labels and what it says."""

    name: str
    type: str
    labels: tuple[str, ...]
    text: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus stores it."""
        if self.type == "histogram":
            return tuple(f"{self.name}{suffix}" for suffix in ("_bucket", "_sum", "_count"))
        return (f"{self.name}_total",) if self.type == "counter" else (self.name,)


class _Listing(CollectorRegistry):
    """Remembers what is registered, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.families: list[Family] = []

    def register(self, collector: Any) -> None:
        super().register(collector)
        (metric,) = collector.describe()
        labels = tuple(collector._labelnames)  # there is no public way to a metric's labels
        self.families.append(Family(metric.name, metric.type, labels, metric.documentation))


def catalogue() -> dict[str, list[Family]]:
    """Return every metric, by the process that counts it."""
    workers, learner, supervisor = _Listing(), _Listing(), _Listing()
    WorkerMetrics(workers)
    LearnerMetrics(learner)
    SupervisorMetrics(supervisor, workers_up=int, upstream_up=bool, learner=bool, config_in_force=bool)
    return {
        "Counted by the workers": workers.families,
        "Counted by the learner": learner.families,
        "Counted by the supervisor": supervisor.families,
    }


def reference() -> str:
    """Return the text of docs/metrics.md."""
    parts = [_INTRODUCTION.format(tables=MAX_TABLES, other=OTHER)]
    for title, families in catalogue().items():
        parts.append(f"## {title}\n")
        parts.append("| metric | type | labels | |\n|---|---|---|---|\n" + "".join(_rows(families)))
    return "\n".join(parts)


def _rows(families: Iterable[Family]) -> Iterable[str]:
    for family in families:
        name = family.name if family.type == "histogram" else family.series[0]
        labels = ", ".join(f"`{label}`" for label in family.labels)
        yield f"| `{name}` | {family.type} | {labels} | {family.text} |\n"


if __name__ == "__main__":
    REFERENCE.write_text(reference(), encoding="utf-8")
