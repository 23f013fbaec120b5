"""The protocol that most scenarios follow: tune, learn, measure, judge.

1. *Tuning* queries are answered under every static setting: by them a skilled person would choose.
2. A proxy that knows nothing learns from *live* traffic (`stage`).
3. *Test* queries are answered by all systems in turns (`bench.demo.measurement`).
4. Systems that follow from measured ones are derived, and every claim gets its verdict (`statistics`).

No query is in two of the three sets, but where the scenario's very subject is that queries repeat themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.demo.measurement import Judge
from bench.demo.proxy import Figures
from bench.demo.results import settings_between
from bench.suite import statistics
from bench.suite.queries import Question, Truth
from bench.suite.records import Line, Panel, Ratio, Result, Series, Style
from bench.suite.stage import Stage, Taught, proxy_name
from bench.suite.statistics import Measured
from bench.suite.systems import CONTROL, Way
from bench.suite.tables import Table

KNOWN_BEST = "best static, known afterwards"
TUNED = "best static, tuned"
TUNED_BY_GROUP = "best static of each {}, tuned"
KNOWN_BY_GROUP = "best static of each {}, chosen on other queries"
ORACLE = "oracle of each query"
_SHOWN = 5
_COUNTED = 1.2  # seconds until a worker's counts are in /metrics
PARITY = 1.05
"""No more than this times the best static setting at equal recall, anywhere."""


@dataclass(frozen=True)
class Split:
    """The queries of a scenario: what the application asks for ever, and two lists."""

    live: Iterator[Question]
    tuning: Sequence[Question]
    test: Sequence[Question]


@dataclass(frozen=True)
class Contest:
    """One comparison.

    Attributes
    ----------
    tables
        Name to table, of all that is asked.
    group
        What a person who tunes by hand may tell apart, and how it is called; None: nothing.
    targets
        Recall to keep, each by a proxy of its own; limits of what it may cost at equal recall, if any.
    parity
        Whether it is claimed that the proxy costs no more than the best static setting and 5 %.
    learning, credit
        Seconds to learn in, at most, and of these seconds of database time.
    tuning, measuring
        Seconds, at most.
    """

    name: str
    title: str
    question: str
    tables: Mapping[str, Table]
    split: Split
    ways: Mapping[str, Way]
    targets: Mapping[float, float | None] = field(default_factory=lambda: {0.98: None})
    group: tuple[str, Callable[[Question], str]] | None = None
    control: str = "ef=80"
    learning: float = 60.0
    credit: float = 45.0
    rate: float = 35.0
    tuning: float = 10.0
    measuring: float = 40.0
    more: str = ""
    parity: float = PARITY


@dataclass
class Outcome:
    """What a contest gave, before it is judged.

    By proxy: `settings`, the shares of the settings that it put in force; `overhead`, its own time for a
    query in milliseconds, as it publishes it.
    """

    contest: Contest
    truth: Judge[Question]
    taught: Taught
    tuned: Measured
    found: Measured
    kinds: dict[str, str]
    settings: dict[str, dict[str, float]] = field(default_factory=dict)
    overhead: dict[str, float] = field(default_factory=dict)

    @property
    def statics(self) -> list[str]:
        """All systems that need no learning and know nothing of the query."""
        return [name for name, kind in self.kinds.items() if kind in ("default", "static", "iterative")]


async def run(
    stage: Stage,
    contest: Contest,
    beside: Callable[[Outcome], Awaitable[None]] | None = None,
    judge: Judge[Question] | None = None,
) -> Outcome:
    """Do it; `beside` is called while the proxies that have learned still run.

    `judge` knows the exact answers where the tables are not at hand.
    """
    scale = stage.scale
    truth = judge if judge is not None else Truth(contest.tables)
    ways = {**contest.ways, CONTROL: contest.ways[contest.control]}
    async with stage.systems(contest.ways) as systems:
        samples = await stage.measure(
            systems, contest.split.tuning, truth, scale.seconds(contest.tuning), "tuning by hand"
        )
    tuned = Measured.of(samples, _groups(contest, contest.split.tuning))
    async with stage.taught(
        contest.split.live,
        seconds=scale.seconds(contest.learning),
        credit=scale.seconds(contest.credit),
        rate=contest.rate,
        targets=list(contest.targets),
        more=contest.more,
    ) as taught:
        before = {name: await proxy.figures() for name, proxy in taught.proxies.items()}
        async with stage.systems(ways, taught.proxies) as systems:
            samples = await stage.measure(
                systems, contest.split.test, truth, scale.seconds(contest.measuring)
            )
        await asyncio.sleep(_COUNTED)
        after = {name: await proxy.figures() for name, proxy in taught.proxies.items()}
        found = Measured.of(samples, _groups(contest, contest.split.test))
        kinds = {name: way.kind for name, way in contest.ways.items()} | dict.fromkeys(
            taught.proxies, "proxy"
        )
        settings = {name: settings_between(before[name], after[name]) for name in taught.proxies}
        overhead = {name: _overhead_ms(before[name], after[name]) for name in taught.proxies}
        outcome = Outcome(contest, truth, taught, tuned, found, kinds, settings, overhead)
        if beside is not None:
            await beside(outcome)
    return outcome


def _groups(contest: Contest, queries: Sequence[Question]) -> list[str]:
    if contest.group is None:
        return [""] * len(queries)
    return [contest.group[1](query) for query in queries]


def judge(outcome: Outcome) -> Result:
    """Return the scenario's record: systems, ratios, claims that all scenarios make, and the main plot."""
    contest, statics = outcome.contest, outcome.statics
    result = Result(contest.name, contest.title, contest.question, facts=facts(outcome))
    with_derived = derive(outcome)
    found = with_derived.found
    result.noise = noise(found, contest.control)
    result.lines = [found.line(name, kind) for name, kind in with_derived.kinds.items()]
    for target, limit in contest.targets.items():
        name = proxy_name(target)
        recall = next(line.recall for line in result.lines if line.name == name)
        ratio = statistics.at_equal_recall(found, name, statics)
        own = f"{outcome.overhead.get(name, 0.0):.2f} of {found.line(name, 'proxy').mean_ms:.2f} ms"
        result.ratios.append(Ratio(f"{contest.title}, target {target:g}", target, ratio, own))
        result.claims.append(
            statistics.at_least(f"recall, target {target:g}", target, recall, statistics.MARGIN)
        )
        words = f"mean latency over the best static setting's at equal recall, target {target:g}"
        result.claims.append(statistics.at_most(words, contest.parity, ratio))
        if limit is not None:
            result.claims.append(statistics.at_most(f"goal: {words}", limit, ratio))
    result.panels.append(recall_against_latency(result.lines, list(contest.targets)))
    return result


def derive(outcome: Outcome) -> Outcome:
    """Return the outcome with the systems that follow from the measured ones, for the first target."""
    contest, found, statics = outcome.contest, outcome.found, outcome.statics
    target = next(iter(contest.targets))
    kinds = dict(outcome.kinds)

    def add(name: str, choice: Mapping[str, str] | str) -> None:
        nonlocal found
        if isinstance(choice, str):
            chosen = np.full(found.queries, found.index(choice))
        else:
            chosen = np.array([found.index(choice[group]) for group in found.groups.tolist()])
        found = found.derive(name, chosen)
        kinds[name] = "derived"

    add(TUNED, statistics.best_static(outcome.tuned, statics, target))
    add(KNOWN_BEST, statistics.best_static(outcome.found, statics, target))
    if contest.group is not None:
        groups = sorted(set(found.groups.tolist()))
        add(
            TUNED_BY_GROUP.format(contest.group[0]),
            statistics.best_by_group(outcome.tuned, statics, target, groups),
        )
        other = KNOWN_BY_GROUP.format(contest.group[0])
        found = found.derive(other, statistics.cross_fitted(outcome.tuned, outcome.found, statics, target))
        kinds[other] = "derived"
    found = found.derive(ORACLE, statistics.oracle(found, statics, target))
    kinds[ORACLE] = "derived"
    return replace(outcome, found=found, kinds=kinds)


def noise(found: Measured, control: str) -> float:
    """Return how far two identical systems differ: the larger end of their ratio's interval, less one."""
    ratio = statistics.ratio(found, CONTROL, control)
    return max(abs(ratio.low - 1.0), abs(ratio.high - 1.0))


def facts(outcome: Outcome) -> dict[str, str]:
    """Return what the scenario worked on."""
    contest = outcome.contest
    return {
        "tables": ", ".join(
            f"{name}: {len(table.base):,} rows of {table.dimensions} dimensions"
            for name, table in contest.tables.items()
        ),
        **outcome.taught.facts,
        "tuning queries": f"{outcome.tuned.queries:,}",
        "test queries": f"{outcome.found.queries:,}",
        **{f"{name}: settings": _shares(shares) for name, shares in outcome.settings.items()},
        **{f"{name}: own time": f"{ms:.2f} ms a query" for name, ms in outcome.overhead.items()},
    }


def _shares(shares: Mapping[str, float]) -> str:
    """Return the commonest settings in words."""
    shown = [f"{arm} {share:.0%}" for arm, share in list(shares.items())[:_SHOWN]]
    others = len(shares) - len(shown)
    return (", ".join(shown) or "none") + (f" and {others} more" if others > 0 else "")


def _overhead_ms(before: Figures, after: Figures) -> float:
    """Return the proxy's own time between two scrapes, mean over queries, in milliseconds."""
    name = "ruvector_proxy_overhead_seconds"
    seconds, queries = (
        after.total(f"{name}_{part}") - before.total(f"{name}_{part}") for part in ("sum", "count")
    )
    return 1e3 * seconds / queries if queries else 0.0


def recall_against_latency(lines: Sequence[Line], targets: Sequence[float]) -> Panel:
    """Return the plot that everybody in the field draws."""

    def of(kind: str) -> list[Line]:
        return sorted((line for line in lines if line.kind == kind), key=lambda line: line.mean_ms)

    static = of("static")
    shown = [Series("static settings", *_points(static), "line", [line.name for line in static])]
    shown += [Series(line.name, *_points([line]), "hollow") for line in [*of("default"), *of("iterative")]]
    shown += [
        Series(line.name, *_points([line]), "points")
        for line in of("derived")
        if line.name not in (TUNED, KNOWN_BEST)
    ]
    shown += [Series(line.name, *_points([line]), "star") for line in of("proxy")]
    return Panel("recall against mean latency", "mean ms", "recall", shown, log_x=True, target=targets[0])


def _points(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    return [line.mean_ms for line in lines], [line.recall.value for line in lines]


def by_group(
    outcome: Outcome, names: Sequence[str], positions: Mapping[str, float]
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[float]]:
    """Return recall and mean latency of systems by group, in the order of the groups' positions."""
    found = outcome.found
    groups = sorted((g for g in set(found.groups.tolist()) if g in positions), key=lambda g: positions[g])
    parts = [found.only(found.groups == group) for group in groups]
    recall = {name: [float(part.recall[part.index(name)].mean()) for part in parts] for name in names}
    ms = {name: [float(part.ms[part.index(name)].mean()) for part in parts] for name in names}
    return recall, ms, [positions[group] for group in groups]


def group_panels(
    outcome: Outcome, names: Sequence[str], positions: Mapping[str, float], x: str, log_x: bool = True
) -> list[Panel]:
    """Return recall and latency by group as two plots."""
    recall, ms, at = by_group(outcome, names, positions)
    style: dict[str, Style] = {
        name: "points" if outcome.kinds.get(name) == "proxy" else "hollow" for name in names
    }
    target = next(iter(outcome.contest.targets))
    return [
        Panel(title, x, y, [Series(n, at, figures[n], style[n]) for n in names], log_x, log_y, line)
        for title, y, figures, log_y, line in (
            ("recall", "recall", recall, False, target),
            ("mean latency", "mean ms", ms, True, None),
        )
    ]
