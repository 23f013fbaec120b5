"""How the demo measures: every system gets the same queries in one run, interleaved, against exact search.

Theory
------
A *system* is a way to run the query: a connection with certain settings, direct or through the proxy.
Systems take turns, `BLOCK` queries at a time and in an order that rotates, so that noise on the machine,
warm caches and a slower minute hit all of them alike, even where a run is cut short.  A block, not a single
query: an application sends its stream of queries one way, and a process that waits for four others between
two queries begins each of them with cold caches.  One query runs at a time; latency is what the application
sees around the driver's call; recall is computed between the blocks.  Each system answers some warm-up
queries first: statements are prepared, caches filled, and the server has decided about its generic plans.

Recall is the share of the exact answer that was returned; rows that are missing count as misses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bench.demo.workload import Query

BLOCK = 15
"""Queries that a system answers in a row before the next system has its turn."""


Asked = TypeVar("Asked", bound=Query)
AskedIn = TypeVar("AskedIn", bound=Query, contravariant=True)


class Asker(Protocol[AskedIn]):
    """What runs a query: see `bench.demo.workload.AsyncpgClient`."""

    async def ask(self, query: AskedIn) -> list[int]:
        """Run the query; return the ids."""


class Judge(Protocol[AskedIn]):
    """What knows the exact answers: see `bench.demo.workload.Truth`."""

    def limits(self, queries: Sequence[AskedIn]) -> NDArray[np.float64]:
        """Return the distance of the last row of each exact answer."""

    def found(self, query: AskedIn) -> int:
        """Return how many rows the query should return."""

    def recall(self, query: AskedIn, ids: list[int], limit: float) -> float:
        """Return the share of the exact answer that `ids` covers."""


@dataclass
class System(Generic[Asked]):
    """One way to run the queries, and on which of them it is measured (every `stride`-th)."""

    name: str
    client: Asker[Asked]
    stride: int = 1


@dataclass
class Samples:
    """What one system gave, query by query, in the order of asking."""

    category: list[int] = field(default_factory=list)  # -1: unfiltered
    family: list[str] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)  # rows that exist and were not returned
    ms: list[float] = field(default_factory=list)

    def add(self, query: Query, recall: float, rows: int, missing: int, ms: float) -> None:
        """Append one measured query."""
        self.category.append(-1 if query.category is None else query.category)
        self.family.append(query.family)
        self.recall.append(recall)
        self.rows.append(rows)
        self.missing.append(missing)
        self.ms.append(ms)

    def of_category(self, category: int) -> Samples:
        """Return the samples of one category."""
        return self._where([c == category for c in self.category])

    def of_family(self, family: str) -> Samples:
        """Return the samples of one query family."""
        return self._where([f == family for f in self.family])

    def _where(self, keep: list[bool]) -> Samples:
        return Samples(
            list(compress(self.category, keep)),
            list(compress(self.family, keep)),
            list(compress(self.recall, keep)),
            list(compress(self.rows, keep)),
            list(compress(self.missing, keep)),
            list(compress(self.ms, keep)),
        )

    def summary(self) -> Summary:
        """Return the figures of the table.

        Raises
        ------
        ValueError
            Nothing was measured.
        """
        if not self.ms:
            raise ValueError("no samples")
        ms: NDArray[np.float64] = np.array(self.ms)
        return Summary(
            queries=len(self.ms),
            recall=float(np.mean(self.recall)),
            recall_error=float(np.std(self.recall) / np.sqrt(len(self.recall))),
            rows=float(np.mean(self.rows)),
            incomplete=int(np.count_nonzero(self.missing)),
            mean_ms=float(ms.mean()),
            p50_ms=float(np.quantile(ms, 0.5)),
            p99_ms=float(np.quantile(ms, 0.99)),
        )


@dataclass(frozen=True)
class Summary:
    """One line of the table: latencies in milliseconds, `recall_error` one standard error of the mean."""

    queries: int
    recall: float
    recall_error: float
    rows: float
    incomplete: int  # queries that returned fewer rows than exist (up to k)
    mean_ms: float
    p50_ms: float
    p99_ms: float


async def measure(
    systems: Sequence[System[Asked]],
    queries: Sequence[Asked],
    truth: Judge[Asked],
    *,
    warm_up: Sequence[Asked] = (),
    advance: Callable[[], None] = lambda: None,
    seconds: float = float("inf"),
) -> dict[str, Samples]:
    """Run every query on every system, in blocks and rotating order; return the samples by system.

    `advance` is called once for each query, for a progress bar.  No block is begun after `seconds`.
    """
    for query in warm_up:
        for system in systems:
            await system.client.ask(query)
    samples = {system.name: Samples() for system in systems}
    limits = truth.limits(queries)  # beforehand: it would take the processor from the systems
    deadline = time.monotonic() + seconds
    for number, first in enumerate(range(0, len(queries), BLOCK)):
        if time.monotonic() > deadline:
            break
        block = range(first, min(first + BLOCK, len(queries)))
        turn = number % len(systems)
        for system in (*systems[turn:], *systems[:turn]):
            answers = await _ask(system, queries, [i for i in block if i % system.stride == 0])
            for i, ids, ms in answers:
                query = queries[i]
                missing = max(0, truth.found(query) - len(ids))
                samples[system.name].add(query, truth.recall(query, ids, limits[i]), len(ids), missing, ms)
        for _ in block:
            advance()
    return samples


async def _ask(
    system: System[Asked], queries: Sequence[Asked], numbers: Sequence[int]
) -> list[tuple[int, list[int], float]]:
    """Return number, ids and milliseconds of each query, asked in a row."""
    answers = []
    for i in numbers:
        start = time.perf_counter()
        ids = await system.client.ask(queries[i])
        answers.append((i, ids, (time.perf_counter() - start) * 1e3))
    return answers
