"""The search for good settings that a skilled person would do by hand, for the demo to compare itself with.

Every candidate is measured on tuning queries against exact search; the best is the fastest one that reaches
the target.  Filtered candidates are planned afresh for each execution (``plan_cache_mode``): otherwise
PostgreSQL soon keeps one plan for all categories, and settings that steer the planner lose their effect.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from bench.demo.measurement import Samples, System, measure
from bench.demo.workload import AsyncpgClient, Query, Truth

Settings = dict[str, str]

AS_IT_COMES: Settings = {}
RELAXED: Settings = {"hnsw.iterative_scan": "relaxed_order"}
PLAN_EACH: Settings = {"plan_cache_mode": "force_custom_plan"}

UNFILTERED_CANDIDATES: dict[str, Settings] = {
    f"ef={ef}": {"hnsw.ef_search": str(ef)} for ef in (20, 40, 60, 80, 100, 120, 160, 200, 280, 400)
}
FILTERED_CANDIDATES: dict[str, Settings] = (
    {f"ef={ef}": {"hnsw.ef_search": str(ef), **PLAN_EACH} for ef in (100, 200, 400)}
    | {
        f"{mode} ef={ef}": {"hnsw.iterative_scan": f"{mode}_order", "hnsw.ef_search": str(ef), **PLAN_EACH}
        for mode in ("relaxed", "strict")
        for ef in (40, 100, 200, 400)
    }
    | {"exact": {"enable_indexscan": "off", **PLAN_EACH}}
)


@asynccontextmanager
async def clients(
    address: Mapping[str, Any], candidates: Mapping[str, Settings]
) -> AsyncIterator[dict[str, AsyncpgClient]]:
    """Open one connection for each candidate."""
    async with AsyncExitStack() as stack:
        opened: dict[str, AsyncpgClient] = {}
        for name, settings in candidates.items():
            opened[name] = await stack.enter_async_context(await AsyncpgClient.connect(address, settings))
        yield opened


async def try_all(
    address: Mapping[str, Any],
    candidates: Mapping[str, Settings],
    queries: Sequence[Query],
    truth: Truth,
    advance: Callable[[], None],
    seconds: float,
) -> dict[str, Samples]:
    """Measure every candidate on the tuning queries, as many as `seconds` allow, on a connection each."""
    async with clients(address, candidates) as opened:
        systems = [System(name, client) for name, client in opened.items()]
        return await measure(systems, queries, truth, warm_up=queries[:6], advance=advance, seconds=seconds)


def best(samples: Mapping[str, Samples], target: float) -> str:
    """Return the candidate with the lowest mean latency of those whose mean recall reaches `target`.

    Where none does: the one with the highest recall.
    """
    summaries = {name: s.summary() for name, s in samples.items()}
    good = {name: s for name, s in summaries.items() if s.recall >= target}
    if good:
        return min(good, key=lambda name: good[name].mean_ms)
    return max(summaries, key=lambda name: summaries[name].recall)


def best_by_category(
    samples: Mapping[str, Samples], categories: Sequence[int], target: float
) -> dict[int, str]:
    """Return for each category the candidate with the lowest median latency that reaches `target` in it."""
    result: dict[int, str] = {}
    for category in categories:
        if not all(s.of_category(category).ms for s in samples.values()):
            result[category] = "exact"  # the search was cut short before it came to this category
            continue
        summaries = {name: s.of_category(category).summary() for name, s in samples.items()}
        good = [name for name, s in summaries.items() if s.recall >= target] or ["exact"]
        result[category] = min(good, key=lambda name: summaries[name].p50_ms)
    return result


class BestByCategory:
    """Asks each query with the settings that are best for its category; a yardstick that knows everything."""

    def __init__(self, opened: Mapping[str, AsyncpgClient], choice: Mapping[int, str]) -> None:
        self._clients = {category: opened[name] for category, name in choice.items()}

    async def ask(self, query: Query) -> list[int]:
        """Run the filtered query; return the ids."""
        assert query.category is not None
        return await self._clients[query.category].ask(query)
