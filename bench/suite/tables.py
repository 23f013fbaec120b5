"""The tables that are measured: real vectors, filter columns made for a purpose, loaded and indexed once.

Every table and its indexes are kept in the data directory for the next run.  A stamp, a comment on the table,
names the data, the indexes and the versions; it is written last, so what was interrupted is built again.

Filter columns
--------------
category  the data set's own: correlated with the vectors, 45 values
part      random: value ``i`` has `SHARES[i]` of the rows, whatever their vectors
region    correlated: the rows in the order of their projection on the first principal direction, cut into
          pieces of the same shares; a query's nearest rows are in it or, more often, are not
tenant    random, sizes by Zipf's law over `TENANTS` values: a few large ones, many small ones
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from bench.dataset import Dataset, Vectors
from bench.demo.workload import binary_vector

SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
OTHERS = len(SHARES)
"""The value of all rows that no share covers."""
TENANTS = 200
HNSW = "USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64)"
_BATCH = 1_000


@dataclass(frozen=True, eq=False)
class Table:
    """Rows [rows, dimensions] with ids from 0, filter columns [rows], and what follows CREATE INDEX ON."""

    name: str
    base: Vectors
    columns: Mapping[str, NDArray[np.int64]]
    indexes: tuple[str, ...] = (HNSW,)

    @property
    def dimensions(self) -> int:
        """Length of every vector."""
        return int(self.base.shape[1])

    @property
    def statements(self) -> list[str]:
        """The indexes as SQL."""
        filters = [f'("{column}")' for column in self.columns]
        return [f"CREATE INDEX ON {self.name} {each}" for each in (*self.indexes, *filters)]

    def stamp(self, versions: str) -> str:
        """Return what names the table's contents."""
        digest = hashlib.sha256(np.ascontiguousarray(self.base[::37]).tobytes())
        for column in self.columns.values():
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update("\n".join(self.statements).encode())
        return f"bench 1 {len(self.base)} {digest.hexdigest()[:24]} {versions}"


def filter_columns(data: Dataset, seed: int = 0) -> dict[str, NDArray[np.int64]]:
    """Return all filter columns of the module's docstring."""
    rng = np.random.default_rng(seed)
    rows = len(data.base)
    sample = data.base[:: max(1, rows // 5_000)]
    direction = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2][0]
    along = np.argsort(data.base @ direction)
    share = 1.0 / np.arange(1, TENANTS + 1)
    return {
        "category": data.category.astype(np.int64),
        "part": _cut(rng.permutation(rows)),
        "region": _cut(along),
        "tenant": rng.choice(TENANTS, size=rows, p=share / share.sum()),
    }


def _cut(order: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return the values of `SHARES` for rows in this order, the smallest share first."""
    values = np.full(len(order), OTHERS)
    start = 0
    for value, share in sorted(enumerate(SHARES), key=lambda each: each[1]):
        end = start + max(1, round(share * len(order)))
        values[order[start:end]] = value
        start = end
    return values


def widened(vectors: Vectors, dimensions: int) -> Vectors:
    """Return the vectors turned by a fixed orthonormal map into a space of more dimensions.

    All distances, so all neighbours and recall curves, stay what they were; every coordinate is used.  What
    differs between dimensions is therefore only what they cost: bytes, distance computations, decoding.
    """
    random = np.random.default_rng(7).standard_normal((dimensions, vectors.shape[1]))
    onto = np.linalg.qr(random)[0].T.astype(np.float32)
    result: Vectors = np.asarray(vectors @ onto, dtype=np.float32)
    return result


async def ensure(connection: asyncpg.Connection[Any], table: Table, say: Callable[[str], None]) -> None:
    """Make sure that the database holds the table as described."""
    await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    versions = await connection.fetchval(
        "SELECT current_setting('server_version_num') || ' ' || extversion FROM pg_extension WHERE "
        "extname = 'vector'"
    )
    stamp = table.stamp(versions)
    found = await connection.fetchval("SELECT obj_description(to_regclass($1), 'pg_class')", table.name)
    if found == stamp:
        return
    say(f"loading and indexing {table.name}: {len(table.base):,} rows of {table.dimensions} dimensions, once")
    await create(connection, table)
    await connection.execute(f"COMMENT ON TABLE {table.name} IS '{stamp}'")


async def create(connection: asyncpg.Connection[Any], table: Table, rows: int | None = None) -> None:
    """Create the table anew with its first `rows` rows, and its indexes."""
    await connection.set_type_codec("vector", encoder=binary_vector, decoder=bytes, format="binary")
    columns = "".join(f', "{column}" int NOT NULL' for column in table.columns)
    await connection.execute(
        f"DROP TABLE IF EXISTS {table.name}; "
        f"CREATE TABLE {table.name} (id bigint PRIMARY KEY{columns}, embedding vector({table.dimensions}))"
    )
    await insert(connection, table, range(len(table.base) if rows is None else rows))
    for statement in table.statements:
        await connection.execute(statement)
    await connection.execute(f"VACUUM ANALYZE {table.name}")
    await connection.execute("CHECKPOINT")


async def insert(connection: asyncpg.Connection[Any], table: Table, rows: range) -> None:
    """Copy rows into the table; the connection knows the type vector."""
    columns = list(table.columns.values())
    for start in range(rows.start, rows.stop, _BATCH):
        batch = range(start, min(start + _BATCH, rows.stop))
        records = [(i, *(int(column[i]) for column in columns), table.base[i]) for i in batch]
        await connection.copy_records_to_table(table.name, records=records)
