"""The ways to run a query that are compared: settings of a session, and the proxy.

KINDS
-----
default     PostgreSQL and pgvector as they come
static      one ef_search (or ivfflat.probes, or the exact search) for all queries
iterative   pgvector's iterative scans
derived     chosen among the measured static ones: per group, by an oracle
proxy       through the proxy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.demo.search import PLAN_EACH, Settings

KINDS = ("default", "static", "iterative", "derived", "proxy")
AS_IT_COMES = "as it comes"
CONTROL = "control"
"""A second connection with the settings of a measured system: how far both differ is the run's noise."""
EXACT = "exact"


@dataclass(frozen=True)
class Way:
    """One way: its kind, settings of the session, and which tables stand in for which."""

    kind: str
    settings: Settings = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)


def ef(effort: int) -> str:
    """Return the name of a static ef_search."""
    return f"ef={effort}"


LADDER = (10, 20, 40, 60, 80, 120, 160, 200, 280, 400, 640, 1000)


def _iterative(mode: str, effort: int, **more: str) -> Way:
    return Way("iterative", {"hnsw.iterative_scan": f"{mode}_order", "hnsw.ef_search": str(effort), **more})


def ladder(efforts: tuple[int, ...] = LADDER) -> dict[str, Way]:
    """Return static values of ef_search."""
    return {ef(effort): Way("static", {"hnsw.ef_search": str(effort)}) for effort in efforts}


PLAIN: dict[str, Way] = {
    AS_IT_COMES: Way("default"),
    **ladder(),
    "strict ef=40": _iterative("strict", 40),
    "relaxed ef=40": _iterative("relaxed", 40),
}
"""For queries without a filter."""

FILTERED: dict[str, Way] = {
    AS_IT_COMES: Way("default"),
    **{ef(e): Way("static", {"hnsw.ef_search": str(e), **PLAN_EACH}) for e in (40, 100, 200, 400, 1000)},
    **{
        f"{mode} ef={effort}": _iterative(mode, effort, **PLAN_EACH)
        for mode in ("strict", "relaxed")
        for effort in (40, 100, 200, 400)
    },
    EXACT: Way("static", {"enable_indexscan": "off", **PLAN_EACH}),
}
"""For filtered queries; all but the default are planned for each value, else one plan serves them all."""

RELAXED_BY_INDEX: dict[str, Way] = {
    f"relaxed by index ef={effort}": _iterative("relaxed", effort, enable_sort="off", **PLAN_EACH)
    for effort in (40, 200, 1000)
}
"""relaxed_order where it is really used: where ef is high the planner prefers an exact search."""
