"""``ruvector-proxy top``: what a running proxy does, live in a terminal, from the same source as `status`.

Each frame compares two readings: rates and percentiles are about the seconds between them, recall and what is
known about the tables are as of now.  Percentiles are interpolated within the buckets of a histogram.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from proxy.admin.client import AdminClient
from proxy.status import Kind, Labels, Series, Status, ask, cut, milliseconds, recall, status, total

_QUERIES = 8  # recent ones that are shown
_STATEMENT = 60  # columns
_HINTS = 4


class Reading(NamedTuple):
    """One look at the proxy."""

    at: float  # seconds of a steady clock
    overview: dict[str, Any]
    metrics: Series


def show(client: AdminClient, console: Console, *, interval: float, count: int | None) -> None:
    """Show frames until `count` were shown (None: until interrupted).

    Raises
    ------
    UnreachableError
        There is no proxy that answers.
    """
    frames = _frames(client, interval, count)
    with Live(next(frames), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        for frame in frames:
            live.update(frame, refresh=True)


def _frames(client: AdminClient, interval: float, count: int | None) -> Iterator[RenderableType]:
    before = _read(client)
    shown = 0
    while True:
        if shown:
            time.sleep(interval)
        now = _read(client)
        yield frame(before if before.at < now.at else now, now)
        before, shown = now, shown + 1
        if count is not None and shown >= count:
            return


def _read(client: AdminClient) -> Reading:
    return Reading(time.monotonic(), *ask(client))


def frame(before: Reading, now: Reading) -> RenderableType:
    """Return one frame."""
    found = status(now.overview, now.metrics)
    parts: list[RenderableType] = [Panel(_head(found, before, now), title=f"ruvector-proxy {found.version}")]
    parts += [_table(found, before, now)] if found.tables else [Text("no vector query has been seen yet")]
    hints = [f"{table.table}: {hint}" for table in found.tables for hint in table.hints]
    if hints:
        parts.append(Panel("\n".join(escape(hint) for hint in hints[:_HINTS]), title="hints"))
    recent = _recent(now.overview)
    if recent:
        parts.append(_queries(recent))
    return Group(*parts)


def _head(found: Status, before: Reading, now: Reading) -> Text:
    state = Text("ready", "green") if found.ready else Text("; ".join(found.reasons), "red")
    lines = [
        state.append(
            f"   workers {found.workers_up}   clients {found.connections_open}"
            f"   policy {found.policy_version}"
            + ("" if found.credit_seconds is None else f"   credit {found.credit_seconds:.1f} s"),
            "default",
        ),
        Text(
            f"{_rate(before, now, 'ruvector_statements_total'):.0f} statements/s   "
            f"{_rate(before, now, 'ruvector_queries_recognised_total'):.0f} vector queries/s   "
            f"{_rate(before, now, 'ruvector_queries_adapted_total'):.0f} with measured settings/s"
        ),
    ]
    if found.learner_away is not None:
        lines.append(Text(found.learner_away, "yellow"))
    if found.relay_only is not None:
        lines.append(Text(f"pure relay, the kill switch is thrown: {found.relay_only}", "red"))
    if found.config_refused:
        lines.append(Text(f"the configuration file is not in force: {found.config_refused}", "red"))
    return Text("\n").join(lines)


def _table(found: Status, before: Reading, now: Reading) -> Table:
    view = Table(expand=True)
    for title in ("table", "statement", "trust", "gets"):
        view.add_column(title, overflow="fold")
    for title in ("target", "recall", "before", "now", "p50", "p99"):
        view.add_column(title, justify="right", no_wrap=True)
    for table in found.tables:
        p50, p99 = percentiles(before, now, table.table)
        for kind in table.kinds:
            low = kind.recall_high is not None and kind.recall_high < table.target_recall
            view.add_row(
                escape(table.table),
                escape(cut(kind.statement, _STATEMENT)),
                "safe" if kind.holding else kind.trust,
                escape(kind.arm),
                f"{table.target_recall:g}",
                Text(recall(kind), "red" if low else ""),
                *_latencies(kind),
                milliseconds(p50),
                milliseconds(p99),
            )
    return view


def _latencies(kind: Kind) -> tuple[str, str]:
    return milliseconds(kind.latency_before_ms), milliseconds(kind.latency_after_ms)


def _recent(overview: dict[str, Any]) -> list[dict[str, Any]]:
    tables = (overview["learner"] or {"tables": ()})["tables"]
    found = [each for table in tables for kind in table["templates"] for each in kind["recent"]]
    return sorted(found, key=lambda each: -float(each["at"]))[:_QUERIES]


def _queries(recent: Sequence[dict[str, Any]]) -> Table:
    view = Table(expand=True, title="recent queries", title_justify="left")
    for title in ("at", "k", "rows", "ms", "got", "why"):
        view.add_column(title, overflow="fold")
    for each in recent:
        view.add_row(
            datetime.fromtimestamp(each["at"]).strftime("%H:%M:%S"),
            str(each["k"]),
            str(each["rows"]),
            f"{each['ms']:.2f}",
            escape(each["arm"]),
            escape(each["why"]),
        )
    return view


def _rate(before: Reading, now: Reading, name: str) -> float:
    seconds = now.at - before.at
    return max(0.0, total(now.metrics, name) - total(before.metrics, name)) / seconds if seconds else 0.0


def percentiles(before: Reading, now: Reading, table: str) -> tuple[float | None, float | None]:
    """Return p50 and p99 in milliseconds of a table's queries between two readings; None: there were none."""
    buckets: dict[float, float] = {}  # upper bound in seconds -> queries up to it

    def add(metrics: Series, sign: float) -> None:
        for labels, value in metrics.get("ruvector_query_duration_seconds_bucket", {}).items():
            if _of(labels, "table") == table:
                bound = float(_of(labels, "le"))
                buckets[bound] = buckets.get(bound, 0.0) + sign * value

    add(now.metrics, 1.0)
    add(before.metrics, -1.0)
    bounds = sorted(buckets)
    return _quantile(bounds, buckets, 0.5), _quantile(bounds, buckets, 0.99)


def _quantile(bounds: Sequence[float], counts: dict[float, float], share: float) -> float | None:
    if not bounds or counts[bounds[-1]] <= 0:
        return None
    wanted = share * counts[bounds[-1]]
    low = below = 0.0
    for bound in bounds:
        if counts[bound] >= wanted:
            if bound == float("inf"):
                return 1e3 * low
            within = counts[bound] - below
            return 1e3 * (low + (bound - low) * (wanted - below) / within if within else bound)
        low, below = bound, counts[bound]
    return None


def _of(labels: Labels, name: str) -> str:
    return next((value for label, value in labels if label == name), "")
