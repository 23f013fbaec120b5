"""Drift through the whole product: the table grows threefold, the index is rebuilt, the queries change.

A real proxy in front of the embedded server; one client asks at an even rate, and everything that happens to
the table happens beside it, on a connection of its own:

1. learn    on a third of the rows, until the proxy serves a policy of its own
2. growth   the other two thirds are inserted while queries go on
3. reindex  the same index name with a coarser graph (ALTER INDEX ... SET, REINDEX)
4. mix      from sentences and glosses to single lemmas, which are harder

Recall is computed afterwards with numpy on the vectors as they were loaded, by distance, against the rows
that were there when the query was sent: a nearer row that was inserted meanwhile is a hit as well.  One query
in five is also sent directly to the server, with pgvector's defaults, for comparison.

An event is *recovered from* with the first query of which the next `WINDOW` have the target as their mean
recall.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench import dataset
from bench.dataset import Dataset, Vectors
from bench.demo.database import DATABASE
from bench.demo.proxy import Proxy, serve
from bench.embedded import FAST_SETTINGS, EmbeddedPostgres

K, TARGET, WINDOW = 10, 0.98, 200
WITHIN = 1000  # queries in which the target has to be reached again
_SQL = f"SELECT id FROM items ORDER BY embedding <=> $1::vector LIMIT {K}"
_DIRECT_EVERY = 5


@dataclass(frozen=True, slots=True)
class Asked:
    """One query: its vector's number in the pool, the rows there were, what came back, and how long."""

    vector: int
    rows: int
    ids: list[int]
    ms: float
    direct: list[int] | None  # the same with pgvector's defaults


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, at the number of queries asked before it began and before it was over."""

    name: str
    began: int
    over: int


def text(vector: NDArray[np.float32]) -> str:
    """Return pgvector's text form."""
    return "[" + ",".join(f"{x:.9g}" for x in vector.tolist()) + "]"


class Run:
    """The client and its counters; the number of queries asked is the clock of everything else."""

    def __init__(self, proxy: Proxy, data: Dataset, rate: float, console: Console) -> None:
        self._proxy = proxy
        self._rate = rate
        self._console = console
        self._data = data
        easy = np.concatenate([data.queries["sentence"], data.queries["gloss"]])
        self.pool: Vectors = np.concatenate([easy, data.queries["lemma"]])
        self._families = (np.arange(len(easy)), np.arange(len(easy), len(self.pool)))
        self._family = 0
        self.rows = 0
        self.asked: list[Asked] = []
        self.events: list[Event] = []
        self._rng = np.random.default_rng(0)

    async def traffic(self, client: asyncpg.Connection, direct: asyncpg.Connection) -> None:
        """Ask until cancelled."""
        statement, plain = await client.prepare(_SQL), await direct.prepare(_SQL)
        next_at = time.perf_counter()
        while True:
            number = int(self._rng.choice(self._families[self._family]))
            vector, rows = text(self.pool[number]), self.rows
            started = time.perf_counter()
            found = [row[0] for row in await statement.fetch(vector)]
            ms = (time.perf_counter() - started) * 1e3
            other = None
            if len(self.asked) % _DIRECT_EVERY == 0:
                other = [row[0] for row in await plain.fetch(vector)]
            self.asked.append(Asked(number, rows, found, ms, other))
            next_at = max(next_at + 1.0 / self._rate, time.perf_counter() - 0.5)
            await asyncio.sleep(max(0.0, next_at - time.perf_counter()))

    async def queries(self, count: int) -> None:
        """Wait until so many more queries were asked."""
        until = len(self.asked) + count
        while len(self.asked) < until:  # noqa: ASYNC110  (the query counter is the clock)
            await asyncio.sleep(0.05)

    async def learned(self, limit: float = 240.0) -> None:
        """Wait until a policy rests on measurements, and a moment more for it to settle."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            figures = await self._proxy.figures()
            trust = figures.by("ruvector_templates", "trust")
            if (
                sum(trust.values())
                and not trust.get("observe")
                and not figures.total("ruvector_drift_holding")
            ):
                return
            await asyncio.sleep(1.0)
        raise RuntimeError("the proxy did not learn in time")

    def event(self, name: str, began: int) -> None:
        """Note that something is over."""
        self.events.append(Event(name, began, len(self.asked)))
        self._console.print(f"{name}: between query {began} and {len(self.asked)}")

    async def insert(self, connection: asyncpg.Connection, until: int, batch: int = 250) -> None:
        """Insert rows up to number `until`, batch by batch."""
        while self.rows < until:
            upto = min(until, self.rows + batch)
            vectors = [text(vector) for vector in self._data.base[self.rows : upto]]
            await connection.execute(
                "INSERT INTO items SELECT i, v::vector FROM unnest($1::int[], $2::text[]) AS r(i, v)",
                list(range(self.rows, upto)),
                vectors,
            )
            self.rows = upto

    async def scenario(self, admin: asyncpg.Connection, after: int) -> None:
        """Let everything happen, with `after` queries after each event."""
        await self.learned()
        await self.queries(WINDOW * 2)
        began = len(self.asked)
        await self.insert(admin, len(self._data.base))
        self.event("table three times as large", began)
        await self.queries(after)
        began = len(self.asked)
        await admin.execute("ALTER INDEX items_embedding SET (m = 8, ef_construction = 24)")
        await admin.execute("REINDEX INDEX CONCURRENTLY items_embedding")
        self.event("index rebuilt with a coarser graph", began)
        await self.queries(after)
        began = len(self.asked)
        self._family = 1
        self.event("other queries: single words", began)
        await self.queries(after)


def recalls(run: Run, base: Vectors, choose: Callable[[Asked], list[int] | None]) -> NDArray[np.float64]:
    """Return each query's recall, NaN where it was not asked."""
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    found = np.full(len(run.asked), np.nan)
    for start in range(0, len(run.asked), 256):
        chunk = run.asked[start : start + 256]
        vectors = run.pool[[asked.vector for asked in chunk]]
        distances = 1.0 - unit @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
        for column, asked in enumerate(chunk):
            ids = choose(asked)
            if ids is not None:
                kth = np.partition(distances[: asked.rows, column], K - 1)[K - 1]
                found[start + column] = min(1.0, float((distances[ids, column] <= kth + 1e-6).sum()) / K)
    return found


def recovered(recall: NDArray[np.float64], event: Event, end: int) -> int | None:
    """Return the queries from an event's end until the target holds again; None: not before `end`."""
    for start in range(event.over, end - WINDOW + 1):
        if recall[start : start + WINDOW].mean() >= TARGET:
            return start - event.over
    return None


def draw(run: Run, recall: NDArray[np.float64], direct: NDArray[np.float64], path: Path) -> None:
    """Draw recall and latency over the queries."""
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 10.5,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 6.5), dpi=120, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        x = np.arange(len(recall))
        mean = np.convolve(recall, np.ones(WINDOW) / WINDOW, "valid")
        above.plot(x[WINDOW - 1 :], mean, color="#30638e", label=f"through the proxy, last {WINDOW} queries")
        asked = np.flatnonzero(np.isfinite(direct))
        span = WINDOW // 2
        plain = np.convolve(direct[asked], np.ones(span) / span, "valid")
        above.plot(asked[span - 1 :], plain, color="#9aa0a6", label="pgvector as it comes")
        above.axhline(TARGET, color="#1b9e77", linewidth=1, linestyle="--", label="target")
        above.set_ylabel(f"recall@{K}")
        ms = np.array([asked.ms for asked in run.asked])
        below.plot(x[WINDOW - 1 :], np.convolve(ms, np.ones(WINDOW) / WINDOW, "valid"), color="#30638e")
        below.set_ylabel("ms, mean")
        below.set_xlabel("queries")
        for event in run.events:
            for axes in (above, below):
                axes.axvspan(event.began, max(event.over, event.began + 8), color="#e9a13b", alpha=0.35)
            height = above.get_ylim()[0] + 0.012 * (1 + run.events.index(event))
            above.annotate(event.name + " ", (event.began, height), fontsize=9, ha="right")
        above.legend(loc="lower left", bbox_to_anchor=(0, 0.15))
        figure.suptitle(f"Recall while the world changes: {len(run.asked):,} queries", x=0.01, ha="left")
        figure.savefig(path)


def report(run: Run, recall: NDArray[np.float64], direct: NDArray[np.float64], console: Console) -> bool:
    """Print the table; tell whether every event was recovered from in time."""
    table = Table(
        "event", "queries during it", "recall during and 200 after", "recovered after", "then", "as it comes"
    )
    good = True
    ends = [event.began for event in run.events[1:]] + [len(recall)]
    for event, end in zip(run.events, ends, strict=True):
        needed = recovered(recall, event, end)
        good = good and needed is not None and needed <= WITHIN
        late = slice(event.over + (needed or 0), end)
        table.add_row(
            event.name,
            str(event.over - event.began),
            f"{recall[event.began : event.over + WINDOW].mean():.3f}",
            "not" if needed is None else f"{needed} queries",
            f"{recall[late].mean():.3f}",
            f"{np.nanmean(direct[event.over : end]):.3f}",
        )
    console.print(table)
    return good


async def run(server: EmbeddedPostgres, data: Dataset, home: Path, given: argparse.Namespace) -> Run:
    """Do it all; the proxy's state and log stay in `home`."""
    console = Console(width=150)
    admin = await asyncpg.connect(server.uri())
    await admin.execute(f"CREATE DATABASE {DATABASE}")
    await admin.close()
    admin = await asyncpg.connect(server.uri(DATABASE))
    await admin.execute(
        "CREATE EXTENSION vector; "
        f"CREATE TABLE items (id int PRIMARY KEY, embedding vector({data.dimensions}))"
    )
    async with serve(server, home) as proxy:
        found = Run(proxy, data, given.rate, console)
        await found.insert(admin, len(data.base) // 3, 1000)
        await admin.execute("CREATE INDEX items_embedding ON items USING hnsw (embedding vector_cosine_ops)")
        await admin.execute("ANALYZE items")
        client = await asyncpg.connect(**proxy.address)
        direct = await asyncpg.connect(server.uri(DATABASE))
        traffic = asyncio.create_task(found.traffic(client, direct))
        scenario = asyncio.create_task(found.scenario(admin, given.after))
        done, _ = await asyncio.wait({traffic, scenario}, return_when=asyncio.FIRST_COMPLETED)
        traffic.cancel()
        scenario.cancel()
        for task in done:
            task.result()
        for connection in (client, direct, admin):
            await connection.close()
    return found


def main() -> None:
    """Run from the command line; exit code 1 where an event was not recovered from in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000, help="after the growth")
    parser.add_argument("--rate", type=float, default=40.0, help="queries a second")
    parser.add_argument("--after", type=int, default=1600, help="queries after each event")
    parser.add_argument("--data", type=Path, default=dataset.DEMO_FILE)
    parser.add_argument("--plot", type=Path, default=Path("drift.png"))
    parser.add_argument("--log", type=Path, help="keep the proxy's log here")
    given = parser.parse_args()
    data = dataset.load(given.data, given.rows)
    with (
        EmbeddedPostgres(settings={**FAST_SETTINGS, "shared_buffers": "512MB"}) as server,
        tempfile.TemporaryDirectory() as home,
    ):
        try:
            found = asyncio.run(run(server, data, Path(home), given))
        finally:
            if given.log is not None:
                given.log.write_bytes((Path(home) / "proxy.log").read_bytes())
    recall = recalls(found, data.base, lambda asked: asked.ids)
    direct = recalls(found, data.base, lambda asked: asked.direct)
    good = report(found, recall, direct, Console(width=150))
    draw(found, recall, direct, given.plot)
    given.plot.with_suffix(".json").write_text(json.dumps({"recall": recall.tolist()}))
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
