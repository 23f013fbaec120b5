"""What all scenarios of a run share: the server, the tables, the clock, a place for the proxy's files.

Learning and measuring are apart.  A proxy that knows nothing first learns from live traffic, within its own
budget of database time.  Then it is stopped, and what it learned is handed to proxies whose learner may spend
nothing more: they are what is measured, one for each target, side by side with the static settings.  So the
figures compare policies, and what learning costs is a scenario of its own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from rich.console import Console

from bench.dataset import Dataset
from bench.demo.application import Learned, learn
from bench.demo.measurement import Judge, Samples, System, measure
from bench.demo.proxy import STATE, Figures, Proxy, Upstream, serve
from bench.embedded import EmbeddedPostgres
from bench.suite import tables
from bench.suite.queries import Client, Question
from bench.suite.systems import Way
from bench.suite.tables import Table

CONNECTIONS = 3  # of the application while the proxy learns
WARM_UP = 12  # queries; the server decides about a generic plan after five
_SAY_EVERY = 15.0
_READY_SECONDS, _UNLEARNED_SECONDS = 60.0, 5.0
_LEAST_LEARNING = 5.0  # seconds, in a rehearsal too


@dataclass(frozen=True)
class Scale:
    """How much is done; `shrink` divides numbers of queries and rows, `hurry` seconds."""

    small: int = 30_000  # rows of all tables but the largest
    wide: int = 10_000  # rows of the tables of many dimensions
    shrink: float = 1.0
    hurry: float = 1.0
    limit: float = 420.0  # seconds after which a scenario is given up

    def queries(self, count: int) -> int:
        """Return a number of queries at this scale."""
        return max(30, round(count / self.shrink))

    def seconds(self, seconds: float) -> float:
        """Return a length of time at this scale."""
        return seconds / self.hurry


FULL = Scale()
QUICK = Scale(small=2_000, wide=800, shrink=20.0, hurry=20.0)


@dataclass
class Moment:
    """The learner's accounts at one moment of learning."""

    seconds: float
    labels: float
    probe_seconds: float


@dataclass
class Taught:
    """Proxies that have learned, by name; what the application saw meanwhile, and what learning cost."""

    learned: Learned
    moments: list[Moment] = field(default_factory=list)
    proxies: dict[str, Proxy] = field(default_factory=dict)
    bare_megabytes: float = 0.0  # of a worker before the first query

    @property
    def facts(self) -> dict[str, str]:
        """What is worth telling."""
        figures = self.learned.figures
        labels, spent = figures.total("ruvector_labels_total"), figures.total("ruvector_probe_seconds_total")
        return {
            "learning": f"{self.learned.seconds:.0f} s, {len(self.learned.answers):,} queries asked, "
            f"{labels:,.0f} of them measured in {spent:.0f} s of database time",
        }


def proxy_name(target: float) -> str:
    """Return the name of the proxy that keeps a target."""
    return f"proxy, target {target:g}"


class Stage:
    """One run's surroundings; `upstream` is the server that is measured, `server` itself where it is ours."""

    def __init__(
        self,
        upstream: Upstream,
        data: Dataset,
        home: Path,
        scale: Scale,
        console: Console,
        server: EmbeddedPostgres | None = None,
        client: type[Client] = Client,
    ) -> None:
        self.upstream = upstream
        self.data = data
        self.home = home
        self.scale = scale
        self.console = console
        self._server = server
        self._client = client
        self._deadline: asyncio.Timeout | None = None
        self._started = time.monotonic()
        self._tables: dict[str, Table] = {}
        self._title = ""
        self._said = 0.0

    # -- telling what goes on --------------------------------------------------------------------------------
    def begin(self, title: str) -> None:
        """Name the scenario that is under way."""
        self._title = title

    def say(self, text: str) -> None:
        """Print a line with the time since the run began."""
        self._said = time.monotonic()
        minutes, seconds = divmod(int(self._said - self._started), 60)
        name = f"{self._title}: " if self._title else ""
        self.console.print(f"[{minutes:02}:{seconds:02}] {name}{text}", markup=False, highlight=False)

    def _say_sometimes(self, text: Callable[[], str]) -> None:
        if time.monotonic() - self._said > _SAY_EVERY:
            self.say(text())

    # -- the server ------------------------------------------------------------------------------------------
    def restart(self) -> None:
        """Restart the server, so that its buffers are empty."""
        assert self._server is not None
        self._server.restart()

    def revive(self) -> None:
        """Start the server again if a scenario has ended it."""
        if self._server is not None and self._server.pid is None:
            self._server.start()

    # -- tables ----------------------------------------------------------------------------------------------
    async def table(self, name: str, make: Callable[[], Table]) -> Table:
        """Return a table, which is then in the database."""
        if name not in self._tables:
            with self._without_deadline():
                table = await asyncio.to_thread(make)
                async with self.connection() as connection:
                    await tables.ensure(connection, table, self.say)
            self._tables[name] = table
        return self._tables[name]

    @asynccontextmanager
    async def deadline(self, seconds: float) -> AsyncIterator[None]:
        """Raise TimeoutError in what takes longer, the building of tables not counted."""
        async with asyncio.timeout(seconds) as self._deadline:
            yield

    @contextmanager
    def _without_deadline(self) -> Iterator[None]:
        deadline, now = self._deadline, asyncio.get_running_loop().time
        until = deadline.when() if deadline is not None else None
        if deadline is None or until is None:
            yield
            return
        left = until - now()
        deadline.reschedule(None)
        try:
            yield
        finally:
            deadline.reschedule(now() + left)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Connect past the proxy."""
        opened = await asyncpg.connect(**self.upstream.address)
        try:
            yield opened
            await opened.close()
        finally:
            opened.terminate()

    # -- systems ---------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def systems(
        self, ways: Mapping[str, Way], proxies: Mapping[str, Proxy] | None = None
    ) -> AsyncIterator[list[System[Question]]]:
        """Open a connection for every way and every proxy."""
        async with AsyncExitStack() as stack:
            opened: list[System[Question]] = []
            for name, way in ways.items():
                client = await self._client.connect(self.upstream.address, way.settings, way.rename)
                opened.append(System(name, await stack.enter_async_context(client)))
            for name, proxy in (proxies or {}).items():
                client = await self._client.connect(proxy.address)
                opened.append(System(name, await stack.enter_async_context(client)))
            yield opened

    async def measure(
        self,
        systems: Sequence[System[Question]],
        queries: Sequence[Question],
        truth: Judge[Question],
        seconds: float,
        what: str = "measuring",
    ) -> dict[str, Samples]:
        """Let all systems answer all queries in turns, for so many seconds at most."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._say_sometimes(lambda: f"{what}, {done:,} of {len(queries):,} queries")

        self.say(f"{what}: {len(systems)} systems, up to {len(queries):,} queries")
        return await measure(
            systems, queries, truth, warm_up=queries[:WARM_UP], advance=advance, seconds=seconds
        )

    # -- the proxy -------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def taught(
        self,
        live: Iterator[Question],
        *,
        seconds: float,
        credit: float,
        rate: float = 35.0,
        targets: Sequence[float] = (0.98,),
        more: str = "",
    ) -> AsyncIterator[Taught]:
        """Let a proxy learn from live traffic; yield proxies with what it learned, one for each target.

        `rate` is in queries a second and connection, `more` is configuration put behind [learning].
        """
        shutil.rmtree(self.home / "proxies", ignore_errors=True)
        school = self.home / "proxies" / "school"
        school.mkdir(parents=True)
        taught = Taught(Learned())

        def show(now: float, figures: Figures) -> None:
            labels, spent = (
                figures.total("ruvector_labels_total"),
                figures.total("ruvector_probe_seconds_total"),
            )
            taught.moments.append(Moment(now, labels, spent))
            self._say_sometimes(lambda: f"learning, {now:.0f} s, {labels:,.0f} queries measured")

        seconds = max(seconds, _LEAST_LEARNING)
        self.say(f"learning, {seconds:.0f} s at most")
        async with serve(self.upstream, school, _configuration(credit, None, targets[0], more)) as proxy:
            taught.bare_megabytes = resident_megabytes(proxy)
            taught.learned = await learn(
                proxy,
                live,
                rate=rate,
                limit=seconds,
                show=show,
                connections=[lambda proxy: self._client.connect(proxy.address)] * CONNECTIONS,
            )
        async with AsyncExitStack() as stack:
            for target in targets:
                home = school.with_name(f"target-{target:g}")
                home.mkdir()
                shutil.copytree(school / STATE, home / STATE)
                opened = await stack.enter_async_context(
                    serve(self.upstream, home, _configuration(0.0, 0.0, target, _NO_TRIAL + more))
                )
                known = taught.learned.figures.total("ruvector_policy_version") > 0
                if not await _serving(opened, _READY_SECONDS if known else _UNLEARNED_SECONDS):
                    self.say(
                        f"{proxy_name(target)} learned nothing that it could serve: queries run as they come"
                    )
                taught.proxies[proxy_name(target)] = opened
            yield taught


_NO_TRIAL = "canary_share = 0\n"
"""What was learned last is measured, and not for a minute what served before on four of five queries."""


def _configuration(credit: float, budget: float | None, target: float, more: str) -> str:
    """Return what is put behind the configuration's [learner]."""
    limits = "" if budget is None else f"budget = {budget}\n"
    return f"starting_credit = {credit}\n{limits}[learning]\ntarget_recall = {target}\n{more}"


async def _serving(proxy: Proxy, seconds: float) -> bool:
    """Wait until a proxy has its policies in force again; tell whether it has any."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        figures = await proxy.figures()
        if figures.total("ruvector_policy_version") > 0 and figures.total("ruvector_templates") > 0:
            return True
        await asyncio.sleep(0.2)
    return False


def resident_megabytes(proxy: Proxy) -> float:
    """Return the resident memory of a proxy's workers, in megabytes; 0 where there is no /proc."""
    total = 0.0
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes()
            parent = (directory / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if b"_worker" in line and parent == str(proxy.pid):
                pages = int((directory / "statm").read_text().split()[1])
                total += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        except OSError:
            continue
    return total


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
