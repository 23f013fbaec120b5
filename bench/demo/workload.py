"""What the demo's application asks, and how it asks: two statements, three query families, two drivers.

The queries of the data set are split once, by a seeded shuffle, so that nothing is measured with a query that
anything was chosen by:

learning    what the application asks while the proxy learns
tuning      some of those, by which the static settings to compare with are chosen
test        asked for the first time when everything is measured, by asyncpg
second      the same for the second driver, psycopg, so that each test query passes the proxy once

A filtered query pairs a query vector with a category drawn evenly from all 45, the large and the small alike.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import numpy as np
import psycopg
from numpy.typing import NDArray

from bench.dataset import FAMILIES, Dataset, Vectors

K = 10
UNFILTERED = f"SELECT id FROM items ORDER BY embedding <=> $1 LIMIT {K}"
FILTERED = f"SELECT id FROM items WHERE category = $1 ORDER BY embedding <=> $2 LIMIT {K}"
_BATCH = 128  # queries searched exactly at once; bounds the memory


@dataclass(frozen=True)
class Scale:
    """How much the demo does; `rows` None means the whole data set.  Counts are per family where not said."""

    rows: int | None = None
    tuning: int = 80
    test: int = 500
    second: int = 100
    filtered_per_category: int = 60
    tuning_per_category: int = 10
    learning_seconds: float = 90.0
    rate: float = 60.0  # application queries a second and connection while learning


FULL = Scale()
FAST = Scale(
    rows=6_000,
    tuning=12,
    test=20,
    second=5,
    filtered_per_category=3,
    tuning_per_category=2,
    learning_seconds=10.0,
)


@dataclass(frozen=True, eq=False)
class Query:
    """One query of the application; `category` None means unfiltered."""

    family: str
    vector: NDArray[np.float32]
    category: int | None = None


@dataclass(frozen=True)
class QuerySets:
    """Disjoint sets of query vectors, and the filtered queries made of them; see the module's docstring."""

    learning: list[Query]
    tuning: list[Query]
    test: list[Query]
    second: list[Query]
    tuning_filtered: list[Query]
    test_filtered: list[Query]
    second_filtered: list[Query]


def split(dataset: Dataset, scale: Scale, seed: int = 0) -> QuerySets:
    """Divide the data set's queries; the same seed gives the same sets.

    Raises
    ------
    ValueError
        A family has fewer queries than `scale` asks for.
    """
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Query]] = {"learning": [], "tuning": [], "test": [], "second": []}
    for family in FAMILIES:
        queries = [Query(family, vector) for vector in rng.permutation(dataset.queries[family])]
        held_out = scale.test + scale.second
        if len(queries) < held_out + scale.tuning:
            raise ValueError(f"{len(queries)} queries of family {family!r} are too few for {scale}")
        parts["test"] += queries[: scale.test]
        parts["second"] += queries[scale.test : held_out]
        parts["learning"] += queries[held_out:]
        parts["tuning"] += queries[held_out : held_out + scale.tuning]
    for queries in parts.values():
        rng.shuffle(queries)
    categories = np.unique(dataset.category)
    return QuerySets(
        **parts,
        tuning_filtered=_pair(parts["tuning"], categories, scale.tuning_per_category, rng),
        test_filtered=_pair(parts["test"], categories, scale.filtered_per_category, rng),
        second_filtered=_pair(parts["second"], categories, 1, rng),
    )


def _pair(
    queries: list[Query], categories: NDArray[np.int16], each: int, rng: np.random.Generator
) -> list[Query]:
    """Return `each` rounds of filtered queries, every category once a round in random order."""
    order = np.concatenate([rng.permutation(categories) for _ in range(each)])
    return [
        Query(queries[i % len(queries)].family, queries[i % len(queries)].vector, int(category))
        for i, category in enumerate(order)
    ]


def traffic(queries: list[Query], categories: NDArray[np.int16], seed: int = 0) -> Iterator[Query]:
    """Yield the application's queries for ever: unfiltered and filtered ones in turn, vectors at random."""
    rng = np.random.default_rng(seed)
    while True:
        plain, filtered = (queries[i] for i in rng.integers(len(queries), size=2))
        yield plain
        yield Query(filtered.family, filtered.vector, int(rng.choice(categories)))


class Truth:
    """Exact answers, by distance: a returned row is right if it is no farther than the k-th nearest one.

    Both distances are computed here, from the same float32 vectors in float64, so that ties and the server's
    own rounding do not count as misses (`TOLERANCE`).
    """

    TOLERANCE = 1e-6

    def __init__(self, dataset: Dataset) -> None:
        self._base = normalised(dataset.base)
        self._members = {int(c): np.flatnonzero(dataset.category == c) for c in np.unique(dataset.category)}
        self._subsets = {category: self._base[rows] for category, rows in self._members.items()}

    def category_sizes(self) -> dict[int, int]:
        """Return the number of rows of each category."""
        return {category: len(rows) for category, rows in self._members.items()}

    def found(self, query: Query) -> int:
        """Return how many rows the query should return: K, or all there are."""
        return min(K, len(self._base) if query.category is None else len(self._members[query.category]))

    def limits(self, queries: Sequence[Query]) -> NDArray[np.float64]:
        """Return for each query the cosine distance of the last row of its exact answer, [len(queries)]."""
        limits = np.empty(len(queries))
        groups: dict[int | None, list[int]] = {}
        for i, query in enumerate(queries):
            groups.setdefault(query.category, []).append(i)
        for category, members in groups.items():
            rows = self._base if category is None else self._subsets[category]
            for start in range(0, len(members), _BATCH):
                batch = members[start : start + _BATCH]
                near = -(normalised(np.stack([queries[i].vector for i in batch])) @ rows.T)
                found = self.found(queries[batch[0]])
                nearest = np.argpartition(near, found - 1, axis=1)[:, :found]
                for i, candidates in zip(batch, nearest, strict=True):
                    limits[i] = distances(rows[candidates], queries[i].vector).max()
        return limits

    def recall(self, query: Query, ids: list[int], limit: float) -> float:
        """Return the share of the exact answer that `ids` covers; `limit` as given by `limits`.

        A row outside the query's category, or returned twice, is not a hit.
        """
        unique = np.unique(np.asarray(ids, dtype=np.int64))
        if query.category is not None:
            unique = unique[np.isin(unique, self._members[query.category])]
        hits = int((distances(self._base[unique], query.vector) <= limit + self.TOLERANCE).sum())
        return min(hits, self.found(query)) / self.found(query)


def normalised(vectors: NDArray[np.float32]) -> Vectors:
    """Return the vectors with length 1."""
    result: Vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return result


def distances(rows: Vectors, vector: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine distances of rows of length 1 to a vector, in double precision."""
    precise = vector.astype(np.float64)
    result: NDArray[np.float64] = 1.0 - rows.astype(np.float64) @ (precise / np.linalg.norm(precise))
    return result


def binary_vector(vector: NDArray[np.float32]) -> bytes:
    """Return pgvector's binary form: dimensions, a zero, then float32, all big-endian (``vector_send``)."""
    return struct.pack("!HH", len(vector), 0) + vector.astype(">f4").tobytes()


def text_vector(vector: NDArray[np.float32]) -> str:
    """Return pgvector's text form; nine digits give back the same float32."""
    return "[" + ",".join(f"{x:.9g}" for x in vector) + "]"


class AsyncpgClient:
    """One asyncpg connection with both statements prepared; vectors and categories travel in binary.

    Open it with `connect`; use it as an async context manager.
    """

    driver = "asyncpg"

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection
        self._statements: dict[bool, Any] = {}

    @classmethod
    async def connect(
        cls, address: Mapping[str, Any], settings: Mapping[str, str] | None = None
    ) -> AsyncpgClient:
        """Connect to `address` (asyncpg's arguments) and put `settings` in force for the session."""
        connection = await asyncpg.connect(**address)
        try:
            await connection.set_type_codec("vector", encoder=binary_vector, decoder=bytes, format="binary")
            for name, value in (settings or {}).items():
                await connection.execute(f"SET {name} = {value}")
            client = cls(connection)
            client._statements = {
                False: await connection.prepare(UNFILTERED),
                True: await connection.prepare(FILTERED),
            }
        except BaseException:
            connection.terminate()
            raise
        return client

    async def ask(self, query: Query) -> list[int]:
        """Run the query; return the ids in the order they came."""
        if query.category is None:
            rows = await self._statements[False].fetch(query.vector)
        else:
            rows = await self._statements[True].fetch(query.category, query.vector)
        return [row[0] for row in rows]

    async def __aenter__(self) -> AsyncpgClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._connection.terminate()


class PsycopgClient:
    """One psycopg connection that prepares its statements; values travel as psycopg sends them.

    `connect` as for `AsyncpgClient`.
    """

    driver = "psycopg"

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    @classmethod
    async def connect(
        cls, address: Mapping[str, Any], settings: Mapping[str, str] | None = None
    ) -> PsycopgClient:
        """Connect to `address` (as for asyncpg) and put `settings` in force for the session."""
        parameters = {("dbname" if key == "database" else key): value for key, value in address.items()}
        connection = await psycopg.AsyncConnection.connect(**parameters, autocommit=True)
        for name, value in (settings or {}).items():
            await connection.execute(f"SET {name} = {value}".encode())
        return cls(connection)

    async def ask(self, query: Query) -> list[int]:
        """Run the query; return the ids in the order they came."""
        vector = text_vector(query.vector)
        if query.category is None:
            arguments: list[object] = [vector]
            sql = UNFILTERED.replace("$1", "%s")
        else:
            arguments = [query.category, vector]
            sql = FILTERED.replace("$1", "%s").replace("$2", "%s")
        cursor = await self._connection.execute(sql.encode(), arguments, prepare=True)
        return [row[0] for row in await cursor.fetchall()]

    async def __aenter__(self) -> PsycopgClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._connection.close()


Client = AsyncpgClient | PsycopgClient
