"""What the server's own catalogs say about a table: shares of filter values, filter columns without an index,
settings in force, and a sample of the vectors.

All are read with the learner's rights.  ``pg_stats`` shows a column only to roles that may read it; a role
that may not gets no statistics here, and the policy then knows no selectivities.

The sample is uniform over rows (BERNOULLI): SYSTEM takes whole pages, and rows that were loaded together are
often similar.  It reads the table once, but not the vectors of rows that were not chosen where those are
stored out of line.

Source: PostgreSQL documentation, "pg_stats" and "SELECT ... TABLESAMPLE"; pgvector's ``vector_send``,
``halfvec_send``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learning.upstream import Session
from learning.values import canonical

SKETCH_ROWS, SKETCH_BYTES = 20_000, 64_000_000
_MAX_SYSTEM_ROWS = 20_000_000  # above, reading every page once costs too much for a sketch


async def selectivity(
    session: Session, schema: str, table: str, column: str, type_oid: int
) -> tuple[dict[str, float], float]:
    """Return the share of rows of the commonest values, by canonical text, and that of any other value.

    The latter is one row at least.  ``({}, 0.0)`` where the server has no statistics or does not show them.
    """
    rows = await session.catalog(_STATISTICS, schema, table, column)
    if not rows:
        return {}, 0.0
    found = rows[0]
    common: dict[str, float] = {}
    for value, share in zip(found["values"] or (), found["shares"] or (), strict=True):
        name = canonical(type_oid, 0, value.encode())
        if name is not None:
            common[name] = float(share)
    distinct = found["distinct"]
    if distinct < 0:  # a share of the rows
        distinct = -distinct * max(found["rows"], 1.0)
    rest = (1.0 - found["nulls"] - sum(common.values())) / max(1.0, distinct - len(common))
    return common, max(rest, 1.0 / max(found["rows"], 1.0))


async def unindexed(session: Session, relation: int, columns: Sequence[str]) -> tuple[str, ...]:
    """Return which of these columns no valid index begins with: a filter on them reads the whole table."""
    rows = await session.catalog(_UNINDEXED, str(relation), list(dict.fromkeys(columns)))
    return tuple(row["column"] for row in rows)


async def usual_settings(session: Session) -> dict[str, str]:
    """Return the search settings of a session that sets nothing, by the server's configuration."""
    return {row["name"]: row["value"] for row in await session.catalog(_USUAL)}


async def sketch(
    session: Session, relation: int, column: str, rows: float, wanted: int = SKETCH_ROWS
) -> NDArray[np.float32] | None:
    """Return about `wanted` vectors of a column, drawn uniformly: float32 [n, dimensions].

    Fewer where they would take more than `SKETCH_BYTES`.
    None where the column does not hold vectors of one dimension as ``vector`` or ``halfvec``, or too few of
    them.

    Raises
    ------
    asyncpg.PostgresError
        The server refused or cancelled the statement.
    """
    found = await session.catalog(_COLUMN, str(relation), column)
    if not found or found[0]["type"] not in _ELEMENT:
        return None
    source = found[0]
    wanted = min(wanted, SKETCH_BYTES // (4 * max(1, source["dimensions"])))  # -1: not declared
    percent = min(100.0, 100.0 * wanted / max(rows, 1.0))
    method = "BERNOULLI" if rows < _MAX_SYSTEM_ROWS else "SYSTEM"
    query = f"SELECT {source['column']} FROM {source['table']} TABLESAMPLE {method} ({percent:.6f})"  # noqa: S608
    received: list[bytes] = []

    async def collect(data: bytes) -> None:
        received.append(bytes(data))

    await session.connection.copy_from_query(query, output=collect, format="binary")
    return unpack_vectors(b"".join(received), _ELEMENT[source["type"]])


_ELEMENT: dict[str, np.dtype[Any]] = {"vector": np.dtype(">f4"), "halfvec": np.dtype(">f2")}
_COPY_HEADER = 19  # signature (11 bytes), flags (4), length of the extension area (4), which is empty


def unpack_vectors(data: bytes, element: np.dtype[Any]) -> NDArray[np.float32] | None:
    """Read the rows of a binary COPY of one vector column; NULLs and rows of another dimension are left out.

    A row is a 16-bit number of columns, a 32-bit length (-1: NULL) and a vector: 16-bit dimension, 16 unused
    bits, the elements, all big endian.
    """
    rows: list[NDArray[Any]] = []
    position = _COPY_HEADER
    while position + 6 <= len(data):
        length = int.from_bytes(data[position + 2 : position + 6], "big", signed=True)
        position += 6
        if length >= 4:
            rows.append(np.frombuffer(data, element, (length - 4) // element.itemsize, position + 4))
        position += max(0, length)
    if not rows:
        return None
    dimensions = rows[0].shape[0]
    return np.stack([row for row in rows if row.shape[0] == dimensions]).astype(np.float32)


_STATISTICS = """
SELECT s.null_frac AS nulls, s.n_distinct AS distinct, s.most_common_vals::text::text[] AS values,
       s.most_common_freqs AS shares, greatest(c.reltuples, 0) AS rows
FROM pg_stats s JOIN pg_namespace n ON n.nspname = s.schemaname
JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = s.tablename
WHERE s.schemaname = $1::text AND s.tablename = $2::text AND s.attname = $3::text AND NOT s.inherited
"""
_UNINDEXED = """
SELECT a.attname AS column FROM unnest($2::text[]) WITH ORDINALITY AS w(name, place)
JOIN pg_attribute a ON a.attrelid = $1::text::oid AND a.attname = w.name AND NOT a.attisdropped
WHERE NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisvalid
                  AND i.indpred IS NULL AND i.indkey[0] = a.attnum)
ORDER BY w.place
"""
_USUAL = """
SELECT name, reset_val AS value FROM pg_settings
WHERE name ~ '^(hnsw|ivfflat|ruvector|diskann|vchordrq|vchordg|lantern_hnsw|scann)[.]'
"""
_COLUMN = """
SELECT t.typname AS type, a.atttypmod AS dimensions, quote_ident(a.attname) AS column,
quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS table
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE a.attrelid = $1::text::oid AND a.attname = $2::text
"""
