"""Filtered queries: real categories, selectivities from 0.1 % to 50 %, tenants of very different sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bench.suite import contest, statistics, traffic
from bench.suite.contest import Contest, Outcome, Split, run
from bench.suite.queries import Question, Statement
from bench.suite.records import Claim, Result
from bench.suite.scenarios.shared import items, small
from bench.suite.stage import Stage, proxy_name
from bench.suite.statistics import Measured, at_least, at_most, exactly
from bench.suite.systems import AS_IT_COMES, EXACT, FILTERED, RELAXED_BY_INDEX
from bench.suite.tables import SHARES, TENANTS

TARGET = 0.99
BAND = (0.01, 0.03)
_SHOWN = (AS_IT_COMES, "strict ef=100", "relaxed ef=40", EXACT)


async def categories(stage: Stage) -> list[Result]:
    """WHERE category = $1 on the largest table: correlated with the vectors, 0.04 % to 12 % of the rows."""
    table = await items(stage)
    values = np.unique(table.columns["category"])
    split = _rounds(stage, Statement("items", "category"), values, 10, 3)
    wanted = Contest(
        "categories",
        "Filtered by category",
        "WHERE category = $1, 45 real categories, small and large alike. Which plan is right depends "
        "on the value.",
        {"items": table},
        split,
        FILTERED,
        targets={TARGET: None},
        group=("category", lambda query: str(query.category)),
        control=EXACT,
        learning=50.0,
        credit=35.0,
        tuning=15.0,
        measuring=45.0,
    )
    band: list[Claim] = []

    async def beside(outcome: Outcome) -> None:
        band.append(await _band(stage, outcome))

    outcome = await run(stage, wanted, beside)
    result = contest.judge(outcome)
    result.claims += [*_complete(outcome), _to_each_best(outcome, 1.15), *band]
    rows = {str(value): float((table.columns["category"] == value).sum()) for value in values}
    shown = [*_SHOWN, proxy_name(TARGET)]
    result.panels += contest.group_panels(outcome, shown, rows, "rows in the category")
    return [result]


async def selectivity(stage: Stage) -> list[Result]:
    """Random and correlated filters of the same selectivities."""
    table = await small(stage)
    results = []
    for column, title in (("part", "random"), ("region", "correlated with the vectors")):
        split = _rounds(stage, Statement("small", column), np.arange(len(SHARES)), 40, 10)
        wanted = Contest(
            f"selectivity, {title.split()[0]}",
            f"Filters of 0.1 % to 50 %, {title}",
            "One column whose values have 0.1 % to 50 % of the rows; "
            + (
                "which rows, is random."
                if column == "part"
                else "the rows of a value lie together, so a query's nearest rows are in it or, "
                "mostly, are not."
            ),
            {"small": table},
            split,
            FILTERED,
            targets={TARGET: None},
            group=("value", lambda query: str(query.category)),
            control=EXACT,
            learning=18.0,
            credit=12.0,
            tuning=6.0,
            measuring=16.0,
        )
        outcome = await run(stage, wanted)
        result = contest.judge(outcome)
        result.claims += [*_complete(outcome), _to_each_best(outcome, 1.15)]
        share = {str(value): 100 * share for value, share in enumerate(SHARES)}
        result.panels += contest.group_panels(outcome, [*_SHOWN, proxy_name(TARGET)], share, "% of the rows")
        results.append(result)
    return results


async def tenants(stage: Stage) -> list[Result]:
    """WHERE tenant = $1, tenants and their traffic by Zipf's law."""
    table = await small(stage)
    sizes = np.bincount(table.columns["tenant"], minlength=TENANTS)
    share = 1.0 / np.arange(1, TENANTS + 1)
    share = np.where(sizes > 0, share, 0.0)
    share /= share.sum()
    statement = Statement("small", "tenant")

    def make(family: str, vector: NDArray[np.float32], rng: np.random.Generator) -> Question:
        return Question(family, vector, int(rng.choice(TENANTS, p=share)), statement)

    split = traffic.distinct(
        stage.data, make, tuning=stage.scale.queries(150), test=stage.scale.queries(400), seed=4
    )
    wanted = Contest(
        "tenants",
        "Tenant skew",
        f"{TENANTS} tenants in one table, sizes and traffic by Zipf's law: a few large ones, many "
        "small ones, some "
        "never seen while learning.",
        {"small": table},
        split,
        FILTERED,
        targets={TARGET: None},
        group=("size of tenant", lambda query: str(int(np.log2(max(1, sizes[query.category or 0]))))),
        control=EXACT,
        learning=22.0,
        credit=15.0,
        tuning=5.0,
        measuring=18.0,
    )
    outcome = await run(stage, wanted)
    result = contest.judge(outcome)
    result.claims += [*_complete(outcome), _to_each_best(outcome, 1.15)]
    rows = {str(power): 1.4 * 2.0**power for power in range(20)}
    result.panels += contest.group_panels(outcome, [*_SHOWN, proxy_name(TARGET)], rows, "rows of the tenant")
    return [result]


def _rounds(stage: Stage, statement: Statement, values: NDArray[np.int64], test: int, tuning: int) -> Split:
    """Return splits in which each value comes equally often, in random order."""
    test, tuning = (max(2, round(each / stage.scale.shrink)) for each in (test, tuning))
    turns: dict[str, Iterator[int]] = {}

    def endless(seed: int) -> Iterator[int]:
        rng = np.random.default_rng([seed, 5])
        while True:
            yield from rng.permutation(values).tolist()

    turns["held out"], turns["live"] = endless(0), endless(1)
    held_out = (test + tuning) * len(values)
    made = 0

    def make(family: str, vector: NDArray[np.float32], rng: np.random.Generator) -> Question:
        nonlocal made
        made += 1
        which = turns["held out" if made <= held_out else "live"]
        return Question(family, vector, next(which), statement)

    return traffic.distinct(stage.data, make, tuning=tuning * len(values), test=test * len(values), seed=3)


def _complete(outcome: Outcome) -> list[Claim]:
    """Claim that no row is missing."""
    found, ours = outcome.found, proxy_name(TARGET)
    short = int(np.count_nonzero(found.missing[found.index(ours)]))
    plain = int(np.count_nonzero(found.missing[found.index(AS_IT_COMES)]))
    return [
        at_most(
            f"queries that got fewer rows than there are (as it comes: {plain} of {found.queries})",
            0,
            exactly(float(short)),
        )
    ]


def _to_each_best(outcome: Outcome, limit: float) -> Claim:
    """Claim that the proxy costs little more than the best static setting of each group, known afterwards."""
    derived = contest.derive(outcome)
    assert outcome.contest.group is not None
    group = outcome.contest.group[0]
    other = contest.KNOWN_BY_GROUP.format(group)
    return at_most(
        f"mean latency over that of the best static setting of each {group}, chosen on other queries",
        limit,
        statistics.ratio(derived.found, proxy_name(TARGET), other),
    )


async def _band(stage: Stage, outcome: Outcome) -> Claim:
    """Measure relaxed_order beside the proxy in the categories of 1 to 3 %."""
    column = outcome.contest.tables["items"].columns["category"]
    share = {value: float((column == value).mean()) for value in np.unique(column).tolist()}
    inside = [q for q in outcome.contest.split.test if BAND[0] <= share[q.category or 0] <= BAND[1]]
    ways = {name: way for name, way in FILTERED.items() if name.startswith("relaxed")} | RELAXED_BY_INDEX
    async with stage.systems(ways, outcome.taught.proxies) as systems:
        samples = await stage.measure(
            systems, inside, outcome.truth, stage.scale.seconds(18.0), "categories of 1 to 3 %"
        )
    found = Measured.of(samples, [""] * len(inside))
    ours = proxy_name(TARGET)
    recall = {name: float(found.recall[found.index(name)].mean()) for name in ways}
    mean = {name: float(found.ms[found.index(name)].mean()) for name in ways}
    as_good = [name for name in ways if recall[name] >= recall_of(found, ours) - statistics.MARGIN]
    best = min(as_good, key=lambda n: mean[n]) if as_good else max(ways, key=lambda n: recall[n])
    words = "at equal recall" if as_good else f"which has a recall of {recall[best]:.3f} at most"
    return at_least(
        f"categories of 1 to 3 %: mean latency of relaxed_order ({best}), {words}, over the proxy's",
        10.0,
        statistics.ratio(found, best, ours),
    )


def recall_of(found: Measured, name: str) -> float:
    """Return a system's mean recall."""
    return float(found.recall[found.index(name)].mean())
