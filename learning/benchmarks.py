"""Benchmarks that a client asks for: recall against a ground truth, latency, and making the truth.

A benchmark has a connection of its own, read only, which is closed at the end whatever happens: a cancelled
call takes its statement on the server with it.  Every query is run in turn with the settings that the server
has by itself ("default") and with those that the proxy would choose for it ("adaptive"), so that both see the
same server.

Recall is counted by distance (`learning.probe.recall`), so a ground truth holds distances: a table with a
column ``query`` (anything that casts to text and is a vector then) and ``distances`` (float8[], ascending, at
least k of them, or as many as there are rows).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np

from learning.answers import Row, interval
from learning.binding import vector_text
from learning.names import OWN_PATH
from learning.probe import EXACT, number, recall
from learning.records import Settings
from learning.service import ProblemError, Report
from learning.upstream import SESSION_SETTINGS

MAX_QUERIES = 100_000
_TELL_EVERY = 2.0  # seconds between reports of progress
_OPERATORS = {
    "l2": "<->", "ip": "<#>", "cosine": "<=>", "l1": "<+>", "hamming": "<~>", "jaccard": "<%>",
}  # fmt: skip

Chooser = Callable[[str, int], Settings]
"""From a query vector, as text, and k to the settings that the proxy would choose."""


@dataclass(frozen=True, slots=True)
class Column:
    """The column that is searched; names are quoted."""

    table: str
    name: str
    type: str
    operator: str

    def search(self, k: int) -> str:
        """Return a query for the k nearest distances to ``$1``."""
        distance = f"{self.name} {self.operator} $1::text::{self.type}"
        return f"SELECT ({distance})::float8 FROM {self.table} ORDER BY {distance} LIMIT {k}"  # noqa: S608


@asynccontextmanager
async def connection(dsn: str, database: str) -> AsyncIterator[Any]:
    """Open a side connection for one benchmark."""
    found = await asyncpg.connect(
        dsn,
        database=database,
        statement_cache_size=8,
        server_settings={**SESSION_SETTINGS, "search_path": OWN_PATH},
    )
    try:
        yield found
    finally:
        found.terminate()


async def column_of(server: Any, relation: int) -> Column:
    """Return the vector column of a table, the one with an index if there is one.

    Raises
    ------
    ProblemError
        The table has none.
    """
    row = await server.fetchrow(_COLUMN, relation)
    if row is None:
        raise ProblemError(
            "42703", "the table has no vector column", hint="Types known: vector, halfvec, sparsevec, bit."
        )
    opclass = (row["opclass"] or "vector_l2_ops").split("_")
    operator = _OPERATORS.get(opclass[1] if len(opclass) > 1 else "l2", "<->")
    return Column(row["table"], row["column"], row["type"], f"OPERATOR({row['schema']}.{operator})")


async def sample_rows(server: Any, column: Column, n: int) -> list[str]:
    """Return the vectors of up to `n` rows, drawn at random, as text."""
    query = (
        f"SELECT {column.name}::text FROM {column.table} "  # noqa: S608
        f"WHERE {column.name} IS NOT NULL ORDER BY random() LIMIT {n}"
    )
    return [row[0] for row in await server.fetch(query)]


def queries_of(vectors: Sequence[bytes | None], n: int) -> list[str]:
    """Return distinct vectors of recent queries, the newest first, as text."""
    found = dict.fromkeys(vector_text(vector) for vector in reversed(vectors) if vector is not None)
    return list(found)[:n]


async def ground_truth(
    server: Any, column: Column, queries: Sequence[str], k: int, report: Report
) -> list[Row]:
    """Return the exact nearest distances of each query."""
    progress = Progress(len(queries), report, "exact searches")
    rows = []
    async with under(server, EXACT):
        statement = await server.prepare(column.search(k))
        for query in queries:
            distances = [number(row[0]) for row in await statement.fetch(query) if row[0] is not None]
            rows.append({"query": query, "k": k, "distances": distances})
            await progress.step()
    return rows


async def read_truth(server: Any, table: str, n: int) -> list[tuple[str, list[float]]]:
    """Return the queries of a ground truth with their distances.

    Raises
    ------
    ProblemError
        The table has another format.
    """
    try:
        rows = await server.fetch(
            f"SELECT query::text, distances::float8[] FROM {table} LIMIT {n}"  # noqa: S608
        )
    except (asyncpg.UndefinedColumnError, asyncpg.CannotCoerceError) as error:
        raise ProblemError(
            "42703",
            f"{table} is no ground truth: {error}",
            hint="It has the columns query and distances; CREATE TABLE ... AS "
            "SELECT * FROM ruvector_ground_truth(...) makes one.",
        ) from None
    return [(row[0], [number(d) for d in row[1] or ()]) for row in rows if row[0] is not None]


async def recall_rows(
    server: Any,
    column: Column,
    truth: Sequence[tuple[str, list[float]]],
    k: int,
    choose: Chooser | None,
    report: Report,
) -> list[Row]:
    """Return a row for the default settings and one for the adaptive ones."""
    runs = await _run(server, column, [query for query, _ in truth], k, choose, report)
    rows = []
    for name, run in runs.items():
        recalls = [recall(exact[:k], found, k) for (_, exact), (found, _) in zip(truth, run, strict=True)]
        mean, low, high = interval(recalls)
        rows.append(
            {
                "settings": name, "queries": len(run), "k": k, "recall": mean, "recall_low": low,
                "recall_high": high, "mean_ms": float(np.mean([ms for _, ms in run])) if run else None,
            }
        )  # fmt: skip
    return rows


async def latency_rows(
    server: Any,
    column: Column,
    queries: Sequence[str],
    k: int,
    percentiles: Sequence[float],
    choose: Chooser | None,
    report: Report,
) -> list[Row]:
    """Return a row for each percentile, with the default settings and with the adaptive ones."""
    runs = await _run(server, column, queries, k, choose, report)
    return [
        {
            "settings": name, "queries": len(run), "k": k, "percentile": p,
            "latency_ms": float(np.percentile([ms for _, ms in run], p)),
        }
        for name, run in runs.items() if run for p in percentiles
    ]  # fmt: skip


Run = list[tuple[list[float], float]]


async def _run(
    server: Any, column: Column, queries: Sequence[str], k: int, choose: Chooser | None, report: Report
) -> dict[str, Run]:
    """Run each query with both kinds of settings in turn; return distances and milliseconds."""
    progress = Progress(len(queries), report, "queries")
    statement = await server.prepare(column.search(k))
    runs: dict[str, Run] = {"default": [], **({"adaptive": []} if choose is not None else {})}
    for i, query in enumerate(queries):
        names = list(runs) if i % 2 else list(reversed(runs))  # neither is always the one with a warm cache
        for name in names:
            settings = choose(query, k) if name == "adaptive" and choose is not None else ()
            async with under(server, settings):
                started = time.perf_counter()
                rows = await statement.fetch(query)
                elapsed = (time.perf_counter() - started) * 1e3
            runs[name].append(([number(row[0]) for row in rows if row[0] is not None], elapsed))
        await progress.step()
    return runs


@asynccontextmanager
async def under(server: Any, settings: Settings) -> AsyncIterator[None]:
    """Open a transaction with settings; it is rolled back.

    After an error, or when the client cancels, the benchmark's connection ends, and the transaction with it.
    """
    transaction = server.transaction(readonly=True)
    await transaction.start()
    for name, value in settings:
        await server.execute("SELECT set_config($1, $2, true)", name, value)
    yield
    await transaction.rollback()


class Progress:
    """Reports how far a loop has got, every few seconds."""

    def __init__(self, total: int, report: Report, what: str) -> None:
        self._total, self._report, self._what = total, report, what
        self._done = 0
        self._told_at = time.monotonic()

    async def step(self) -> None:
        """Count one; let others have their turn."""
        self._done += 1
        if time.monotonic() - self._told_at >= _TELL_EVERY:
            self._told_at = time.monotonic()
            self._report(f"{self._done} of {self._total} {self._what} done")
        await asyncio.sleep(0)


_COLUMN = """
SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS "table", quote_ident(a.attname) AS "column",
       quote_ident(tn.nspname) || '.' || t.typname AS type, quote_ident(tn.nspname) AS schema,
       o.opcname AS opclass
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
JOIN pg_type t ON t.oid = a.atttypid JOIN pg_namespace tn ON tn.oid = t.typnamespace
LEFT JOIN pg_index i ON i.indrelid = c.oid AND i.indkey[0] = a.attnum AND i.indisvalid
LEFT JOIN pg_opclass o ON o.oid = i.indclass[0]
WHERE c.oid = $1::oid AND t.typname IN ('vector', 'halfvec', 'sparsevec')
ORDER BY o.opcname IS NULL, a.attnum LIMIT 1
"""
