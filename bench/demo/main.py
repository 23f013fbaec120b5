"""The demonstration from beginning to end: ``ruvector-proxy demo``.

1. An embedded PostgreSQL gets the data and the indexes, once; later runs find them.
2. Static settings are searched for, as a skilled person would.
3. The proxy starts with nothing learned, and an application works through it while it learns.
4. All systems answer queries that were never asked before, in turns.

Results go to ``demo-results/``, everything else to ``.demo/``, both in the current directory.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import numpy as np
import psycopg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import dataset
from bench.demo import database, plot, report, search
from bench.demo.application import Learned, go_on, learn
from bench.demo.measurement import Samples, System, measure
from bench.demo.proxy import STATE, Figures, Proxy, ProxyError, serve
from bench.demo.results import (
    AS_IT_COMES,
    BEST_ARM,
    BEST_STATIC,
    PROXY,
    PSYCOPG,
    RELAXED,
    TARGET,
    Results,
    by_category,
    learning_curves,
    learning_figures,
    overhead_ms,
    settings_between,
    verdicts,
)
from bench.demo.workload import (
    FAST,
    FULL,
    AsyncpgClient,
    PsycopgClient,
    Query,
    QuerySets,
    Scale,
    Truth,
    split,
    traffic,
)
from bench.embedded import EmbeddedError, EmbeddedPostgres, free_port

HOME = Path(".demo")
RESULTS = Path("demo-results")
SEARCH_SECONDS = 20.0  # at most, for each of the two workloads
MEASURING_SECONDS = 40.0  # the same
WARM_UP = 12  # queries; the server decides about a generic plan after five
_LADDER = (20, 60, 100, 160, 280)  # ef_search values drawn as the static curve
_LADDER_STRIDE = 4


_FAILURES = (
    EmbeddedError,
    ProxyError,
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    psycopg.Error,
)


def main(keep: bool = False, fast: bool = False, home: Path = HOME, results: Path = RESULTS) -> int:
    """Run the demo; return the exit code: 0 done, 1 failed, 130 interrupted.

    `keep` leaves database and proxy running until Ctrl-C, which then is no failure.  `fast` uses a fifth of
    the rows and few queries: a rehearsal, whose figures mean little.  What was measured does not change the
    exit code.
    """
    console = Console()
    demo: Demo | None = None
    try:
        home.mkdir(exist_ok=True)
        results.mkdir(exist_ok=True)
        data = database.data_directory(home)
        with EmbeddedPostgres(data, settings=database.SETTINGS) as server:
            demo = Demo(console, server, FAST if fast else FULL, home, results)
            asyncio.run(demo.run(keep))
    except KeyboardInterrupt:
        if demo is not None and demo.finished:
            return 0
        console.print("\nStopped; nothing is left running. The next run goes on with the data loaded so far.")
        return 130
    except _FAILURES as error:
        console.print(f"[bold red]The demo failed:[/] {type(error).__name__}", highlight=False)
        console.print(str(error), markup=False, highlight=False)
        console.print(f"Logs: {home / 'proxy.log'}, {home / 'postgres' / 'server.log'}", highlight=False)
        return 1
    return 0


class Demo:
    """One run: what its steps share."""

    def __init__(
        self, console: Console, server: EmbeddedPostgres, scale: Scale, home: Path, directory: Path
    ) -> None:
        self.console = console
        self.server = server
        self.scale = scale
        self.home = home
        self.directory = directory
        self.started = time.monotonic()
        self.finished = False
        self.data = dataset.load(rows=scale.rows)
        self.truth = Truth(self.data)
        self.sets: QuerySets = split(self.data, scale)
        self.direct = database.address(server)

    async def run(self, keep: bool) -> None:
        """Do all steps and tell the results."""
        admin_port = free_port()
        stays = "stays up until Ctrl-C" if keep else "stays up with make demo KEEP=1"
        self._say(f"The dashboard, from step 3 on: http://127.0.0.1:{admin_port}/ ({stays})")
        self._step("1", f"PostgreSQL 18 with pgvector, {len(self.data.base):,} rows of real embeddings")
        with self._progress() as progress:
            reused = await database.prepare(self.server, self.data, progress)
        if reused:
            self._say("The table and its indexes are still there from an earlier run.")
        self._step("2", "The best static settings, searched for as a skilled person would")
        static, static_filtered, arms = await self._search()
        self._step("3", "An application works through the proxy, which learns")
        shutil.rmtree(self.home / STATE, ignore_errors=True)
        async with serve(self.server, self.home, admin_port=admin_port) as proxy:
            self._say(f"The dashboard shows what happens: http://127.0.0.1:{proxy.admin_port}/")
            learned = await self._learn(proxy)
            self._step("4", "Everybody answers queries that were never asked before")
            results = await self._measure(proxy, learned, static, static_filtered, arms)
            results.seconds = time.monotonic() - self.started
            results.verdicts = verdicts(results)
            await asyncio.to_thread(plot.draw, results, self.directory / "demo.png")
            report.write(results, self.directory)
            self.console.print()
            report.tell(results, self.console)
            self._farewell(results)
            self.finished = True
            if keep:
                await self._stay(proxy)

    async def _search(self) -> tuple[str, str, dict[int, str]]:
        """Return the best static setting for each workload, and the best one for each category."""
        with self._progress() as progress:
            plain = await self._try(progress, "Unfiltered", search.UNFILTERED_CANDIDATES, self.sets.tuning)
            filtered = await self._try(
                progress, "Filtered", search.FILTERED_CANDIDATES, self.sets.tuning_filtered
            )
        static, static_filtered = search.best(plain, TARGET), search.best(filtered, TARGET)
        arms = search.best_by_category(filtered, list(self.truth.category_sizes()), TARGET)
        self._say(
            f"Unfiltered: {static}. Filtered: {static_filtered}. As a yardstick, also each category's best."
        )
        return static, static_filtered, arms

    async def _try(
        self,
        progress: Progress,
        name: str,
        candidates: Mapping[str, search.Settings],
        queries: Sequence[Query],
    ) -> dict[str, Samples]:
        task = progress.add_task(f"{name}: {len(candidates)} settings", total=len(queries))
        samples = await search.try_all(
            self.direct, candidates, queries, self.truth, lambda: progress.advance(task), SEARCH_SECONDS
        )
        progress.stop_task(task)
        return samples

    async def _learn(self, proxy: Proxy) -> Learned:
        self._say(
            f"It runs as: ruvector-proxy serve --config {self.home / 'proxy.toml'}\n"
            f"The application connects to port {proxy.port} with asyncpg and psycopg: its only change."
        )
        queries = traffic(self.sets.learning, np.unique(self.data.category))
        with self._progress() as progress:
            task = progress.add_task("Learning", total=round(self.scale.learning_seconds))

            def show(seconds: float, figures: Figures) -> None:
                labels, policy = (
                    figures.total("ruvector_labels_total"),
                    figures.total("ruvector_policy_version"),
                )
                text = f"Learning: {labels:.0f} queries measured, policy {policy:.0f}"
                progress.update(task, completed=round(seconds), description=text)

            learned = await learn(
                proxy, queries, rate=self.scale.rate, limit=self.scale.learning_seconds, show=show
            )
        figures = learning_figures(learned)
        self._say(
            f"Learning ended after {learned.seconds:.0f} s: {learned.reason}. "
            f"{figures['queries']:,.0f} queries were answered, {figures['labels']:,.0f} of them measured, "
            f"in {figures['probe seconds']:.0f} s of database time."
        )
        return learned

    async def _measure(
        self, proxy: Proxy, learned: Learned, static: str, static_filtered: str, arms: dict[int, str]
    ) -> Results:
        ladder = {f"ef={ef}": search.UNFILTERED_CANDIDATES[f"ef={ef}"] for ef in _LADDER}
        sets = self.sets
        with self._progress() as progress:
            best = search.UNFILTERED_CANDIDATES[static]
            async with self._systems(proxy, best) as systems, search.clients(self.direct, ladder) as rungs:
                systems += [System(name, client, _LADDER_STRIDE) for name, client in rungs.items()]
                plain = await self._rounds(progress, "Unfiltered", systems, sets.test)
            best = search.FILTERED_CANDIDATES[static_filtered]
            needed = {name: search.FILTERED_CANDIDATES[name] for name in set(arms.values())}
            async with self._systems(proxy, best) as systems, search.clients(self.direct, needed) as opened:
                systems.append(System(BEST_ARM, search.BestByCategory(opened, arms)))
                filtered = await self._rounds(progress, "Filtered", systems, sets.test_filtered)
            async with await PsycopgClient.connect(proxy.address) as client:
                systems = [System(PSYCOPG, client)]
                plain |= await self._rounds(progress, "Unfiltered, psycopg", systems, sets.second)
                filtered |= await self._rounds(progress, "Filtered, psycopg", systems, sets.second_filtered)
        curve = {name: plain.pop(name).summary() for name in ladder}
        curve |= {"ef=40": plain[AS_IT_COMES].summary(), static: plain[BEST_STATIC].summary()}
        families = {
            family: {name: samples.of_family(family).summary() for name, samples in plain.items()}
            for family in dataset.FAMILIES
        }
        figures = await proxy.figures()
        compared = {name: samples for name, samples in filtered.items() if name != PSYCOPG}
        return Results(
            environment=await self._environment(),
            static_unfiltered=static,
            static_filtered=static_filtered,
            unfiltered={name: samples.summary() for name, samples in plain.items()},
            families=families,
            ladder=curve,
            filtered={name: samples.summary() for name, samples in filtered.items()},
            categories=by_category(compared, arms, self.truth),
            learning_seconds=learned.seconds,
            learning_reason=learned.reason,
            learning_figures=learning_figures(learned),
            learning_curves=await asyncio.to_thread(learning_curves, learned.answers, self.truth),
            overhead_ms=overhead_ms(figures),
            settings=settings_between(learned.figures, figures),
        )

    @asynccontextmanager
    async def _systems(self, proxy: Proxy, static: search.Settings) -> AsyncIterator[list[System[Query]]]:
        """Open the four systems of the comparison."""
        candidates = {AS_IT_COMES: search.AS_IT_COMES, BEST_STATIC: static, RELAXED: search.RELAXED}
        async with (
            search.clients(self.direct, candidates) as opened,
            await AsyncpgClient.connect(proxy.address) as through,
        ):
            yield [*(System(name, client) for name, client in opened.items()), System(PROXY, through)]

    async def _rounds(
        self, progress: Progress, name: str, systems: Sequence[System[Query]], queries: Sequence[Query]
    ) -> dict[str, Samples]:
        task = progress.add_task(name, total=len(queries))
        filtered = queries[0].category is not None
        warm_up = (self.sets.tuning_filtered if filtered else self.sets.tuning)[:WARM_UP]
        samples = await measure(
            systems,
            queries,
            self.truth,
            warm_up=warm_up,
            advance=lambda: progress.advance(task),
            seconds=MEASURING_SECONDS,
        )
        progress.stop_task(task)
        return samples

    async def _environment(self) -> dict[str, str | int]:
        async with database.connection(self.server) as connection:
            server = await connection.fetchval("SELECT current_setting('server_version')")
            vector = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        return {
            "rows": len(self.data.base),
            "dimensions": self.data.dimensions,
            "PostgreSQL": server,
            "pgvector": vector,
            "Python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
        }

    def _step(self, number: str, text: str) -> None:
        self.console.print(f"\n[bold cyan]{number}[/]  [bold]{text}[/]", highlight=False)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, style="dim")

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("   {task.description:<44}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )

    def _farewell(self, results: Results) -> None:
        before, after = results.filtered[AS_IT_COMES], results.filtered[PROXY]
        self.console.print(
            f"\n[bold]What you have seen.[/] Of {before.queries:,} filtered queries PostgreSQL alone left "
            f"{before.incomplete:,} incomplete; through the proxy it was {after.incomplete:,}, at a recall "
            f"of {after.recall:.3f}. The application changed its port, nothing else.\n"
            f"Picture: [bold]{self.directory / 'demo.png'}[/]   Figures: {self.directory / 'demo.md'}, "
            f"{self.directory / 'demo.json'}   {results.seconds:.0f} s in all\n\n"
            "[bold]Next: your own application.[/] Write proxy.toml,\n\n" + _NEXT,
            highlight=False,
        )

    async def _stay(self, proxy: Proxy) -> None:
        self.console.print(
            f"Still running: the proxy on 127.0.0.1:{proxy.port}, PostgreSQL in {self.server.host}; an "
            f"application goes on asking. Dashboard: http://127.0.0.1:{proxy.admin_port}/. Ctrl-C ends it.",
            highlight=False,
        )
        queries = traffic(self.sets.learning, np.unique(self.data.category))
        asking = asyncio.create_task(go_on(proxy, queries, rate=_KEPT_RATE))
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=1.0)
                proxy.check()
            asking.result()
        finally:
            asking.cancel()


_KEPT_RATE = 5.0  # queries a second, so that there is something to see

_NEXT = """\
    \\[upstream]
    host = "your.database.host"
    port = 5432
    \\[learner]
    dsn = "postgresql://user:password@your.database.host/your_database"

start [bold]ruvector-proxy serve --config proxy.toml[/], and let the application connect to port 6432 instead.
"""
