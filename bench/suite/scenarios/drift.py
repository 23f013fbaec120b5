"""The world changes while queries go on: the table grows threefold, the index is rebuilt, the queries change.

One client asks at an even rate through a proxy with its default budget, and everything that happens to the
table happens beside it, on a connection of its own:

1. learn    on a third of the rows, until the proxy serves a policy of its own
2. growth   the other two thirds are inserted
3. reindex  the same index with a coarser graph
4. mix      from all families but the hardest to the hardest alone

Some queries are also sent directly, with pgvector's defaults and with *yesterday's* setting: the best static
one, tuned by hand before anything happened.  Recall is against the rows that were there when a query was
sent: a nearer row that was inserted meanwhile is a hit as well.

An event is *recovered from* with the first query of which the next `WINDOW` have the target as their mean
recall.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import asyncpg
import numpy as np
from numpy.typing import NDArray

from bench.demo.proxy import Proxy, serve
from bench.demo.workload import normalised
from bench.suite import statistics, tables
from bench.suite.queries import TOLERANCE, Client, Question, Statement, Truth
from bench.suite.records import Interval, Panel, Result, Series
from bench.suite.stage import Stage
from bench.suite.statistics import Measured, at_least, at_most, exactly
from bench.suite.systems import AS_IT_COMES, PLAIN
from bench.suite.tables import Table

TABLE = "grown"
K, TARGET, WINDOW = 10, 0.98, 200
WITHIN = 1000  # queries in which the target has to be reached again
ROWS, AFTER, RATE = 15_000, 1_250, 60.0
LEARNING = 75.0  # seconds at most
YESTERDAY = "yesterday's best static"
_EVERY = 5  # each direct connection gets one query of so many
_BATCH = 250


@dataclass(frozen=True, slots=True)
class Asked:
    """One query: its number in the pool, the rows there were, and by system what came back and how long."""

    vector: int
    rows: int
    ids: Mapping[str, list[int]]
    ms: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, by the number of queries asked before it began and before it was over."""

    name: str
    began: int
    over: int


@dataclass
class Run:
    """The client and its counters; the number of queries asked is the clock of everything else."""

    stage: Stage
    table: Table
    proxy: Proxy
    easy: NDArray[np.float32]
    hard: NDArray[np.float32]
    rows: int
    asked: list[Asked] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    changed: bool = False
    yesterday: str = AS_IT_COMES

    @property
    def pool(self) -> NDArray[np.float32]:
        """All query vectors, the easy ones first."""
        return np.concatenate([self.easy, self.hard])

    async def traffic(self) -> None:
        """Ask until cancelled."""
        rng, pool, easy = np.random.default_rng(0), self.pool, len(self.easy)
        statement, address = Statement(TABLE), self.stage.upstream.address
        async with AsyncExitStack() as stack:
            through = await stack.enter_async_context(await Client.connect(self.proxy.address))
            direct = {
                name: await stack.enter_async_context(await Client.connect(address, PLAIN[setting].settings))
                for name, setting in ((AS_IT_COMES, AS_IT_COMES), (YESTERDAY, self.yesterday))
            }
            due = time.perf_counter()
            while True:
                number = int(rng.integers(easy, len(pool)) if self.changed else rng.integers(easy))
                query, rows = Question("", pool[number], None, statement, K), self.rows
                started = time.perf_counter()
                ids = {"": await through.ask(query)}
                ms = (time.perf_counter() - started) * 1e3
                if len(self.asked) % _EVERY == 0:
                    ids |= {name: await client.ask(query) for name, client in direct.items()}
                self.asked.append(Asked(number, rows, ids, ms))
                due = max(due + 1.0 / RATE, time.perf_counter() - 0.5)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

    async def queries(self, count: int) -> None:
        """Wait until so many more queries were asked."""
        until = len(self.asked) + count
        while len(self.asked) < until:  # noqa: ASYNC110  (the query counter is the clock)
            await asyncio.sleep(0.05)

    async def learned(self) -> None:
        """Wait until a policy rests on measurements."""
        limit = self.stage.scale.seconds(LEARNING)
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            figures = await self.proxy.figures()
            trust = figures.by("ruvector_templates", "trust")
            if sum(trust.values()) and not trust.get("observe"):
                return
            await asyncio.sleep(1.0)
        self.stage.say(f"nothing was learned within {limit:.0f} s; going on all the same")

    async def happen(self, admin: asyncpg.Connection) -> None:
        """Let everything happen."""
        after = self.stage.scale.queries(AFTER)
        await self.learned()
        await self.queries(self.stage.scale.queries(2 * WINDOW))
        async with self._event("table three times as large"):
            while self.rows < len(self.table.base):
                upto = min(len(self.table.base), self.rows + _BATCH)
                await tables.insert(admin, self.table, range(self.rows, upto))
                self.rows = upto
        await self.queries(after)
        async with self._event("index rebuilt with a coarser graph"):
            await admin.execute(f"ALTER INDEX {TABLE}_embedding_idx SET (m = 8, ef_construction = 24)")
            await admin.execute(f"REINDEX INDEX CONCURRENTLY {TABLE}_embedding_idx")
        await self.queries(after)
        async with self._event("other, harder queries"):
            self.changed = True
        await self.queries(after)

    def _event(self, name: str) -> _Happening:
        return _Happening(self, name)


class _Happening:
    """Notes when something began and when it was over."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name, self._began = run, name, 0

    async def __aenter__(self) -> None:
        self._began = len(self._run.asked)

    async def __aexit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self._run.events.append(Event(self._name, self._began, len(self._run.asked)))
            self._run.stage.say(f"{self._name}: during {len(self._run.asked) - self._began:,} queries")


async def drift(stage: Stage) -> list[Result]:
    """Run it, and return a record for growth and one for the two other events."""
    rows = min(stage.scale.small, ROWS, len(stage.data.base))
    table = Table(TABLE, stage.data.base[:rows], {})
    families = list(stage.data.queries)
    hard = "lemma" if "lemma" in families else families[-1]
    easy = np.concatenate([vectors for name, vectors in stage.data.queries.items() if name != hard])
    home = stage.home / "proxies" / "drift"
    home.mkdir(parents=True, exist_ok=True)
    async with stage.connection() as admin:
        await admin.execute("CREATE EXTENSION IF NOT EXISTS vector")
        await tables.create(admin, table, rows // 3)
        yesterday = await _tuned(stage, table, rows // 3, easy)
        async with serve(stage.upstream, home, f"[learning]\ntarget_recall = {TARGET}\n") as proxy:
            found = Run(stage, table, proxy, easy, stage.data.queries[hard], rows // 3, yesterday=yesterday)
            tasks = {asyncio.create_task(found.traffic()), asyncio.create_task(found.happen(admin))}
            done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for task in done:
                task.result()
        await admin.execute(f"DROP TABLE {TABLE}")
    return _results(found)


async def _tuned(stage: Stage, table: Table, rows: int, easy: NDArray[np.float32]) -> str:
    """Return the best static setting for the table and the queries of yesterday."""
    truth = Truth({TABLE: Table(TABLE, table.base[:rows], {})})
    rng = np.random.default_rng(1)
    queries = [
        Question("", easy[i], None, Statement(TABLE))
        for i in rng.integers(len(easy), size=stage.scale.queries(150))
    ]
    ways = {name: way for name, way in PLAIN.items() if way.kind in ("default", "static")}
    async with stage.systems(ways) as systems:
        samples = await stage.measure(systems, queries, truth, stage.scale.seconds(6.0), "tuning by hand")
    return statistics.best_static(Measured.of(samples, [""] * len(queries)), list(ways), TARGET)


def recalls(run: Run, choose: Callable[[Asked], list[int] | None]) -> NDArray[np.float64]:
    """Return each query's recall, NaN where it was not asked."""
    unit, pool = normalised(run.table.base), normalised(run.pool)
    found = np.full(len(run.asked), np.nan)
    for start in range(0, len(run.asked), 256):
        chunk = run.asked[start : start + 256]
        distances = 1.0 - unit @ pool[[asked.vector for asked in chunk]].T
        for column, asked in enumerate(chunk):
            ids = choose(asked)
            if ids is not None:
                kth = np.partition(distances[: asked.rows, column], K - 1)[K - 1]
                found[start + column] = min(1.0, float((distances[ids, column] <= kth + TOLERANCE).sum()) / K)
    return found


def recovered(recall: NDArray[np.float64], event: Event, end: int, window: int = WINDOW) -> int | None:
    """Return the queries from an event's end until the target holds again; None: not before `end`."""
    sums = np.concatenate([[0.0], np.cumsum(recall)])
    for start in range(event.over, end - window + 1):
        if (sums[start + window] - sums[start]) / window >= TARGET - 1e-9:
            return start - event.over
    return None


def _results(run: Run) -> list[Result]:
    recall = {
        name: recalls(run, lambda asked, name=name: asked.ids.get(name))  # type: ignore[misc]
        for name in ("", AS_IT_COMES, YESTERDAY)
    }
    ends = [event.began for event in run.events[1:]] + [len(run.asked)]
    spans = list(zip(run.events, ends, strict=True))
    growth = Result(
        "growth",
        "Data growth",
        "The table grows threefold while it is queried. Yesterday's hand-tuned setting stays what it was.",
    )
    change = Result(
        "drift",
        "A rebuilt index, then other queries",
        "REINDEX with a coarser graph, then other, harder queries. How long until the target holds again?",
    )
    for result, parts in ((growth, spans[:1]), (change, spans[1:])):
        result.facts = {
            "table": f"{run.table.name}: {len(run.table.base) // 3:,} rows, later {len(run.table.base):,}",
            "yesterday's best static": run.yesterday,
            "queries": f"{len(run.asked):,} at {RATE:g} a second",
        }
        for event, end in parts:
            _claim(result, run, recall, event, end)
        begin = 0 if result is growth else spans[0][0].over
        _draw(result, run, recall, range(begin, parts[-1][1]), [event for event, _ in parts])
    return [growth, change]


def _claim(
    result: Result, run: Run, recall: Mapping[str, NDArray[np.float64]], event: Event, end: int
) -> None:
    window = min(WINDOW, max(10, (end - event.over) // 3))
    needed = recovered(recall[""], event, end, window)
    late = slice(event.over + (needed or 0), end)
    during = recall[""][event.began : min(event.over + window, end)]
    result.claims += [
        at_most(
            f"{event.name}: queries until the target holds again",
            WITHIN,
            _needed(needed, end - event.over - window),
        ),
        at_least(f"{event.name}: recall from then on", TARGET, _mean(recall[""][late]), statistics.MARGIN),
    ]
    others = ", ".join(
        f"{name} {np.nanmean(recall[name][event.over : end]):.4f}" for name in (AS_IT_COMES, YESTERDAY)
    )
    when = "not reached again" if needed is None else f"reached again after {needed} queries"
    result.notes.append(
        f"{event.name}: took {event.over - event.began:,} queries; recall from its begin to {window} "
        "queries after "
        f"{during.mean():.4f}; the target was {when}; meanwhile {others}."
    )


def _needed(needed: int | None, waited: int) -> Interval:
    """Return the queries until the target held; where it never did, those waited for it, and perhaps more."""
    if needed is not None:
        return exactly(float(needed))
    return Interval(float(waited), float(waited), float(max(waited, WITHIN + 1)))


def _mean(values: NDArray[np.float64]) -> Interval:
    rng = np.random.default_rng(0)
    draws = values[rng.integers(len(values), size=(statistics.DRAWS, len(values)))].mean(axis=1)
    return statistics.interval(float(values.mean()), draws)


def _draw(
    result: Result,
    run: Run,
    recall: Mapping[str, NDArray[np.float64]],
    span: range,
    events: Sequence[Event],
) -> None:
    def smooth(values: NDArray[np.float64], window: int) -> tuple[list[float], list[float]]:
        at = np.array([i for i in span if np.isfinite(values[i])])
        window = min(window, max(1, len(at) // 4))
        mean = np.convolve(values[at], np.ones(window) / window, "valid")
        step = 1 + len(mean) // 300
        return at[window - 1 :][::step].astype(float).tolist(), mean[::step].tolist()

    marks = [
        Series(
            event.name,
            [float(event.began), float(max(event.over, event.began + 1))],
            [TARGET, TARGET],
            "line",
        )
        for event in events
    ]
    ms = np.array([asked.ms for asked in run.asked])
    result.panels = [
        Panel(
            f"recall of the last {WINDOW} queries",
            "queries asked",
            "recall",
            [
                Series("through the proxy", *smooth(recall[""], WINDOW)),
                Series(AS_IT_COMES, *smooth(recall[AS_IT_COMES], WINDOW // _EVERY)),
                Series(f"{YESTERDAY}, {run.yesterday}", *smooth(recall[YESTERDAY], WINDOW // _EVERY)),
                *marks,
            ],
            target=TARGET,
        ),
        Panel("mean latency", "queries asked", "mean ms", [Series("through the proxy", *smooth(ms, WINDOW))]),
    ]
