"""``ruvector-proxy status``: the state of a running proxy as one record, for people and as JSON.

What it says comes from the proxy's own HTTP: /api/overview for what is known of the tables, /metrics for what
was counted.  `top` shows the same again and again, and what has happened in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from proxy.admin.client import AdminClient, UnreachableError

_WIDTH = 100  # columns of a statement

Labels = tuple[tuple[str, str], ...]
Series = Mapping[str, Mapping[Labels, float]]
"""Values of metrics by name and labels."""


class Kind(msgspec.Struct, frozen=True):
    """One kind of query on a table; latencies in milliseconds, None where nothing is known."""

    statement: str
    trust: str
    reason: str
    arm: str  # what a query gets that nothing special is known about
    recall: float | None
    recall_low: float | None
    recall_high: float | None
    audited_queries: int
    labels: int
    latency_before_ms: float | None
    latency_after_ms: float | None
    holding: str | None  # why a safe setting is served meanwhile


class Table(msgspec.Struct, frozen=True):
    """One table that vector queries were seen on."""

    table: str
    target_recall: float
    kinds: tuple[Kind, ...]
    hints: tuple[str, ...]


class Status(msgspec.Struct, frozen=True):
    """The state of a proxy; counts are since its start."""

    version: str
    ready: bool
    reasons: tuple[str, ...]  # why not ready
    relay_only: str | None  # who has thrown the kill switch; None: nobody
    config_refused: str  # why the configuration file is not in force; "": it is
    learner_away: str | None
    policy_version: int
    workers_up: int
    connections_open: int
    statements: int
    queries_recognised: int
    queries_adapted: int
    budget: float | None  # share of one connection's time
    credit_seconds: float | None
    tables: tuple[Table, ...]


def status(overview: Mapping[str, Any], metrics: Series) -> Status:
    """Return the record of what the proxy answered."""
    learner = overview["learner"] or {"tables": (), "policy_version": 0, "spending": {}}
    return Status(
        version=overview["version"],
        ready=not overview["reasons"],
        reasons=tuple(overview["reasons"]),
        relay_only=overview["relay_only"],
        config_refused=overview["config_refused"],
        learner_away=overview["learner_away"],
        policy_version=learner["policy_version"],
        workers_up=round(total(metrics, "ruvector_workers_up")),
        connections_open=round(total(metrics, "ruvector_connections_open")),
        statements=round(total(metrics, "ruvector_statements_total")),
        queries_recognised=round(total(metrics, "ruvector_queries_recognised_total")),
        queries_adapted=round(total(metrics, "ruvector_queries_adapted_total")),
        budget=learner["spending"].get("budget"),
        credit_seconds=learner["spending"].get("credit_seconds"),
        tables=tuple(_table(table) for table in learner["tables"]),
    )


def _table(table: Mapping[str, Any]) -> Table:
    return Table(
        table=table["table"] or "(not known yet)",
        target_recall=table["target_recall"],
        kinds=tuple(_kind(kind) for kind in table["templates"]),
        hints=tuple(hint["text"] for hint in table["hints"]),
    )


def _kind(kind: Mapping[str, Any]) -> Kind:
    given = {name: kind[name] for name in Kind.__struct_fields__ if name not in ("statement", "holding")}
    holding = kind["holding"]
    return Kind(statement=kind["template"], holding=None if holding is None else holding["words"], **given)


def ask(client: AdminClient) -> tuple[dict[str, Any], Series]:
    """Return what /api/overview and /metrics answer.

    Raises
    ------
    UnreachableError
        There is no proxy that answers.
    """
    overview = client.json("/api/overview")
    if not isinstance(overview, dict) or "config_refused" not in overview:
        raise UnreachableError(f"{client.url} does not answer as a ruvector-proxy of this version does")
    return overview, read_metrics(client.request("/metrics").decode())


def read_metrics(text: str) -> Series:
    """Read Prometheus' text format."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def total(metrics: Series, name: str) -> float:
    """Return the sum of a metric over its labels."""
    return sum(metrics.get(name, {}).values())


def as_text(found: Status) -> str:
    """Return the state for people."""
    state = "ready" if found.ready else f"NOT READY: {'; '.join(found.reasons)}"
    lines = [
        f"ruvector-proxy {found.version}: {state}",
        f"workers     {found.workers_up} up, {found.connections_open} clients connected",
        f"traffic     {found.statements} statements, {found.queries_recognised} vector queries, "
        f"{found.queries_adapted} with measured settings",
        f"learner     {_learner(found)}",
    ]
    if found.relay_only is not None:
        lines.append(f"PURE RELAY: the kill switch is thrown: {found.relay_only}")
    if found.config_refused:
        lines.append(f"configuration: the file is not in force: {found.config_refused}")
    for table in found.tables:
        lines += ["", f"{table.table}, target recall {table.target_recall:g}"]
        for kind in table.kinds:
            lines += [f"  {cut(kind.statement, _WIDTH)}", *(f"    {line}" for line in _lines(kind))]
        lines += [f"  hint: {hint}" for hint in table.hints]
    if not found.tables:
        lines += ["", "no vector query has been seen yet"]
    return "\n".join(lines)


def _learner(found: Status) -> str:
    if found.learner_away is not None:
        return found.learner_away
    budget = (
        "" if found.budget is None else f", budget {found.budget:.1%}, credit {found.credit_seconds:.1f} s"
    )
    return f"policy {found.policy_version} in force{budget}"


def _lines(kind: Kind) -> list[str]:
    lines = [
        f"recall {recall(kind)} over {kind.audited_queries} audited queries; {kind.labels} measured",
        f"latency {milliseconds(kind.latency_before_ms)} before, {milliseconds(kind.latency_after_ms)} now; "
        f"gets {kind.arm} (trust: {kind.trust})",
        kind.reason,
    ]
    return [*lines, f"holding a safe setting: {kind.holding}"] if kind.holding else lines


def recall(kind: Kind) -> str:
    """Return the audited recall with its 95 % interval in words."""
    if kind.recall is None:
        return "not known yet"
    if kind.recall_low is None:
        return f"{kind.recall:.3f}"
    return f"{kind.recall:.3f} [{kind.recall_low:.3f}, {kind.recall_high:.3f}]"


def milliseconds(value: float | None) -> str:
    """Return a latency in words."""
    return "-" if value is None else f"{value:.2f} ms"


def cut(text: str, width: int) -> str:
    """Return a text on one line, at most `width` wide."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
