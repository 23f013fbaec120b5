"""The learning engine end to end, the proxy as a user starts it, against static settings.

Protocol
--------
Queries are split once into those that the application asks while the proxy learns, some of those by which a
skilled person would choose a static setting (*tuning*), and those that everything is measured with (*test*).
Each scenario starts a proxy that knows nothing, lets it learn from live traffic until its credit is spent,
and then lets the static ladder and the proxy answer the test queries in turns (bench.demo.measurement).
Latency is what the application sees around the driver's call, so the proxy's own time is included; recall is
against exact search.  Milliseconds say little on a shared machine; the ratios inside a run are reported:

to the best static    mean latency over that of the cheapest ef_search that kept the target when tuning
at equal recall       mean latency over that of the static curve at the recall that the proxy reached

The data set is the whole of WordNet where it lies beside the project, else the demo's 30,000 rows of it.

    python -m bench.live --scenarios mixed-98,filtered --home .demo/live
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import dataset
from bench.demo import database, search
from bench.demo.application import Learned, learn
from bench.demo.measurement import Samples, Summary, System, measure
from bench.demo.proxy import STATE, serve
from bench.demo.results import BEST_ARM, PROXY, learning_figures, settings_between
from bench.demo.workload import AsyncpgClient, Query, Truth
from bench.embedded import EmbeddedPostgres

LADDER = (20, 40, 60, 80, 100, 120, 160, 200, 280, 400, 560, 800)
CANDIDATES: dict[str, search.Settings] = {f"ef={ef}": {"hnsw.ef_search": str(ef)} for ef in LADDER}
BY_INDEX: dict[str, search.Settings] = {
    f"relaxed by index ef={ef}": {
        "hnsw.iterative_scan": "relaxed_order",
        "hnsw.ef_search": str(ef),
        "enable_sort": "off",  # else the planner leaves the index for an exact search where ef is high
        **search.PLAN_EACH,
    }
    for ef in (40, 200, 1000)
}
"""relaxed_order where it is really used: the yardstick in the categories of 1 to 3 %."""
BAND = (0.01, 0.03)
DISTINCT = 2_000  # queries of each family behind Zipf traffic
WARM_UP = 12


@dataclass(frozen=True)
class Scenario:
    """What the application asks, and which recall is to be kept."""

    name: str
    target: float
    families: tuple[str, ...] = dataset.FAMILIES
    zipf: float | None = None  # exponent; None: every query is asked about equally often
    moved_to: float = 1.0  # cosine of each repetition to the query that it repeats
    filtered: bool = False


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("mixed-98", 0.98),
        Scenario("mixed-99", 0.99),
        Scenario("sentences-98", 0.98, ("sentence",)),
        Scenario("zipf-98", 0.98, zipf=1.0),
        Scenario("zipf-99", 0.99, zipf=1.0),
        Scenario("near-98", 0.98, zipf=1.0, moved_to=0.95),
        Scenario("near-99", 0.99, zipf=1.0, moved_to=0.95),
        Scenario("filtered", 0.99, filtered=True),
    )
}


@dataclass(frozen=True)
class Scale:
    """How much is measured: queries, and seconds at most."""

    tuning: int = 300
    test: int = 900
    learning_seconds: float = 200.0
    credit: float = 120.0  # seconds of database time that the learner may spend
    measuring_seconds: float = 150.0


class Traffic:
    """The queries of one scenario, split and drawn by a seed."""

    def __init__(self, data: dataset.Dataset, scenario: Scenario, scale: Scale, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._scenario = scenario
        self._categories = np.unique(data.category)
        pool: list[tuple[str, NDArray[np.float32]]] = []
        for family in scenario.families:
            chosen = self._rng.permutation(data.queries[family])[:DISTINCT]
            pool += [(family, vector) for vector in chosen]
        pool = [pool[i] for i in self._rng.permutation(len(pool))]
        if scenario.zipf is None:
            # Never asked while learning: what is measured is how the policy carries over.
            self._pool, held_out = pool[scale.test :], pool[: scale.test]
            self.tuning = [self._query(*self._pool[i]) for i in range(scale.tuning)]
            self.test = [self._query(*each) for each in held_out]
        else:
            weights = 1.0 / np.arange(1, len(pool) + 1) ** scenario.zipf
            self._pool, self._weights = pool, weights / weights.sum()
            self.tuning = [self._draw() for _ in range(scale.tuning)]
            self.test = [self._draw() for _ in range(scale.test)]

    def live(self) -> Iterator[Query]:
        """Yield what the application asks while the proxy learns, for ever."""
        while True:
            yield self._draw()

    def _draw(self) -> Query:
        if self._scenario.zipf is None:
            return self._query(*self._pool[self._rng.integers(len(self._pool))])
        return self._query(*self._pool[self._rng.choice(len(self._pool), p=self._weights)])

    def _query(self, family: str, vector: NDArray[np.float32]) -> Query:
        category = int(self._rng.choice(self._categories)) if self._scenario.filtered else None
        return Query(family, self._moved(vector), category)

    def _moved(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn a vector in a random direction until its cosine to itself is `moved_to`."""
        cosine = self._scenario.moved_to
        if cosine == 1.0:
            return vector
        unit = vector / np.linalg.norm(vector)
        direction = self._rng.standard_normal(len(vector)).astype(np.float32)
        direction -= unit * (direction @ unit)
        direction /= np.linalg.norm(direction)
        moved: NDArray[np.float32] = cosine * unit + np.float32(np.sqrt(1 - cosine**2)) * direction
        return moved


@dataclass(frozen=True)
class Outcome:
    """What one scenario gave."""

    scenario: Scenario
    static: str  # the best one by the tuning queries
    systems: dict[str, Summary]
    learning: dict[str, float]
    settings: dict[str, float]  # shares of the settings that were put in force
    ratios: dict[str, float]
    band: dict[str, Summary]  # in the categories of 1 to 3 %, where filtered


def equal_recall_ms(curve: Sequence[Summary], recall: float) -> float:
    """Return the mean latency of the static curve at `recall`, in milliseconds, interpolated.

    Beyond the curve's ends: that of the nearest end.
    """
    points = sorted((summary.recall, summary.mean_ms) for summary in curve)
    best_beyond = [min(ms for other, ms in points if other >= found) for found, _ in points]
    return float(np.interp(recall, [found for found, _ in points], best_beyond))


class Bench:
    """One run over a server that holds the table."""

    def __init__(
        self, server: EmbeddedPostgres, data: dataset.Dataset, scale: Scale, home: Path, progress: Progress
    ) -> None:
        self._data, self._scale, self._home, self._progress = data, scale, home, progress
        self._server = server
        self._truth = Truth(data)
        self._address = database.address(server)

    async def run(self, scenario: Scenario) -> Outcome:
        """Choose a static setting, let a proxy learn, measure."""
        traffic = Traffic(self._data, scenario, self._scale)
        candidates = search.FILTERED_CANDIDATES if scenario.filtered else CANDIDATES
        async with search.clients(self._address, candidates) as opened:
            tuned = await self._measure(
                f"{scenario.name}: tuning",
                [System(name, each) for name, each in opened.items()],
                traffic.tuning,
            )
        static = search.best(tuned, scenario.target)
        shutil.rmtree(self._home / STATE, ignore_errors=True)
        more = f"starting_credit = {self._scale.credit}\n[learning]\ntarget_recall = {scenario.target}\n"
        async with serve(self._server, self._home, more) as proxy, AsyncExitStack() as stack:
            task = self._progress.add_task(f"{scenario.name}: learning", total=self._scale.learning_seconds)
            learned: Learned = await learn(
                proxy,
                traffic.live(),
                rate=60.0,
                limit=self._scale.learning_seconds,
                show=lambda seconds, figures: self._progress.update(task, completed=int(seconds)),
            )
            self._progress.stop_task(task)
            opened = await stack.enter_async_context(search.clients(self._address, candidates))
            through = await stack.enter_async_context(await AsyncpgClient.connect(proxy.address))
            systems = self._systems(scenario, tuned, static, opened)
            systems.append(System(PROXY, through))
            before = await proxy.figures()
            samples = await self._measure(f"{scenario.name}: measuring", systems, traffic.test)
            settings = settings_between(before, await proxy.figures())
            band = await self._band(scenario, opened, System(PROXY, through), traffic.test)
        ratios = self._ratios(scenario, samples, static)
        if band:
            ratios |= relaxed_over_ours(band)
        summaries = {name: each.summary() for name, each in samples.items()}
        return Outcome(scenario, static, summaries, learning_figures(learned), settings, ratios, band)

    async def _band(
        self, scenario: Scenario, opened: Mapping[str, AsyncpgClient], proxy: System, queries: Sequence[Query]
    ) -> dict[str, Summary]:
        """Measure relaxed_order beside the proxy in the categories of 1 to 3 %; nothing where unfiltered."""
        sizes = self._truth.category_sizes()
        total = sum(sizes.values())
        inside = [
            q for q in queries if q.category is not None and BAND[0] <= sizes[q.category] / total <= BAND[1]
        ]
        if not scenario.filtered or not inside:
            return {}
        async with search.clients(self._address, BY_INDEX) as by_index:
            relaxed = {name: each for name, each in opened.items() if name.startswith("relaxed")} | by_index
            systems = [*(System(name, each) for name, each in relaxed.items()), proxy]
            samples = await self._measure(f"{scenario.name}: 1 to 3 %", systems, inside)
        return {name: each.summary() for name, each in samples.items()}

    def _systems(
        self,
        scenario: Scenario,
        tuned: Mapping[str, Samples],
        static: str,
        opened: Mapping[str, AsyncpgClient],
    ) -> list[System]:
        """Return the static systems worth the time: the best one and, as a curve, its surroundings."""
        if scenario.filtered:
            categories = list(self._truth.category_sizes())
            arms = search.best_by_category(tuned, categories, scenario.target)
            relaxed = [name for name in opened if name.startswith("relaxed")]
            systems = [System(name, opened[name]) for name in dict.fromkeys([static, *relaxed])]
            return [*systems, System(BEST_ARM, search.BestByCategory(opened, arms))]
        names = list(CANDIDATES)
        place = names.index(static)
        wanted = names[max(0, place - 4) : place + 3]
        return [System(name, opened[name]) for name in wanted]

    async def _measure(self, title: str, systems: list[System], queries: list[Query]) -> dict[str, Samples]:
        task = self._progress.add_task(title, total=len(queries))
        samples = await measure(
            systems,
            queries,
            self._truth,
            warm_up=queries[:WARM_UP],
            advance=lambda: self._progress.advance(task),
            seconds=self._scale.measuring_seconds,
        )
        self._progress.stop_task(task)
        return samples

    def _ratios(self, scenario: Scenario, samples: Mapping[str, Samples], static: str) -> dict[str, float]:
        ours = samples[PROXY].summary()
        ratios = {"to the best static": ours.mean_ms / samples[static].summary().mean_ms}
        if not scenario.filtered:
            curve = [each.summary() for name, each in samples.items() if name != PROXY]
            ratios["at equal recall"] = ours.mean_ms / equal_recall_ms(curve, ours.recall)
            return ratios
        ratios["to each category's best"] = ours.mean_ms / samples[BEST_ARM].summary().mean_ms
        return ratios


def relaxed_over_ours(band: Mapping[str, Summary]) -> dict[str, float]:
    """Return how many times slower relaxed_order is at our recall, else at its own highest."""
    ours = band[PROXY]
    relaxed = [found for name, found in band.items() if name != PROXY]
    as_good = [found for found in relaxed if found.recall >= ours.recall - 0.005]
    if as_good:
        best = min(as_good, key=lambda found: found.mean_ms)
        return {"relaxed_order over ours at equal recall, categories of 1-3 %": best.mean_ms / ours.mean_ms}
    most = max(relaxed, key=lambda found: found.recall)
    words = f"relaxed_order over ours at its highest recall ({most.recall:.3f}), categories of 1-3 %"
    return {words: most.mean_ms / ours.mean_ms}


def tell(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the tables."""
    for outcome in outcomes:
        scenario = outcome.scenario
        title = f"{scenario.name}: target {scenario.target}; best static: {outcome.static}"
        console.print(_table(title, outcome.systems))
        if outcome.band:
            console.print(_table(f"{scenario.name}: categories of 1 to 3 %", outcome.band))
        console.print(", ".join(f"{name}: {ratio:.3f}" for name, ratio in outcome.ratios.items()))
        console.print({name: round(value, 1) for name, value in outcome.learning.items()})
        console.print({name: round(share, 3) for name, share in list(outcome.settings.items())[:12]})


def _table(title: str, systems: Mapping[str, Summary]) -> Table:
    table = Table(title=title)
    for heading in ("system", "queries", "recall", "+-", "short", "mean ms", "p50", "p99"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for name, found in systems.items():
        table.add_row(
            name,
            str(found.queries),
            f"{found.recall:.4f}",
            f"{found.recall_error:.4f}",
            str(found.incomplete),
            f"{found.mean_ms:.2f}",
            f"{found.p50_ms:.2f}",
            f"{found.p99_ms:.2f}",
        )
    return table


async def run(
    names: Sequence[str], scale: Scale, home: Path, rows: int | None, console: Console
) -> list[Outcome]:
    """Run the scenarios one after the other on one server; return what they gave."""
    source = dataset.LARGE_FILE if dataset.LARGE_FILE.exists() else dataset.DEMO_FILE
    data = dataset.load(source, rows)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    settings = {**database.SETTINGS, "shared_buffers": "1GB"}
    with (
        EmbeddedPostgres(database.data_directory(home), settings=settings) as server,
        Progress(*columns, console=console) as progress,
    ):
        await database.prepare(server, data, progress)
        bench = Bench(server, data, scale, home, progress)
        for name in names:
            outcomes.append(await bench.run(SCENARIOS[name]))
            tell(outcomes[-1:], console)
    return outcomes


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help=f"of {', '.join(SCENARIOS)}")
    parser.add_argument(
        "--home", type=Path, default=Path(".demo/live"), help="where the server's data is kept"
    )
    parser.add_argument("--rows", type=int, help="use the first rows only")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--fast", action="store_true", help="a rehearsal; its figures mean little")
    options = parser.parse_args()
    names = options.scenarios.split(",")
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        parser.error(f"unknown scenarios: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    options.home.mkdir(parents=True, exist_ok=True)
    scale = Scale(60, 120, 20.0, 15.0, 20.0) if options.fast else Scale()
    outcomes = asyncio.run(run(names, scale, options.home, options.rows, Console()))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
