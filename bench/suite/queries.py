"""What is asked, how it is sent, and what the exact answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import asyncpg
import numpy as np
from numpy.typing import NDArray

from bench.demo.workload import Query, binary_vector, distances, normalised
from bench.suite.tables import Table

K = 10
_BATCH = 128  # queries searched exactly at once; bounds the memory
TOLERANCE = 1e-6
"""Of distances: ties, and the server's own rounding, are no misses."""


@dataclass(frozen=True)
class Statement:
    """A query shape: nearest rows of a table, of those with a value in `column` where one is given.

    `k` None sends the number of rows as a parameter.
    """

    table: str
    column: str | None = None
    k: int | None = K

    @property
    def sql(self) -> str:
        """The statement; $1 is the vector, then the filter value, then k."""
        number = iter(range(2, 4))
        where = f" WHERE {self.column} = ${next(number)}" if self.column else ""
        limit = str(self.k) if self.k is not None else f"${next(number)}"
        return f"SELECT id FROM {self.table}{where} ORDER BY embedding <=> $1 LIMIT {limit}"


@dataclass(frozen=True, eq=False)
class Question(Query):
    """One query of the application; `category` is the value of the statement's filter column."""

    statement: Statement = Statement("items")
    k: int = K

    def arguments(self) -> list[object]:
        """Return the statement's parameters."""
        found: list[object] = [self.vector]
        if self.statement.column is not None:
            found.append(self.category)
        if self.statement.k is None:
            found.append(self.k)
        return found


class Client:
    """One asyncpg connection that prepares each statement once.  Open it with `connect`; a context manager.

    `rename` sends what is meant for one table to another that holds the same rows.
    """

    driver = "asyncpg"

    def __init__(self, connection: asyncpg.Connection[Any], rename: Mapping[str, str]) -> None:
        self._connection = connection
        self._rename = rename
        self._prepared: dict[Statement, Any] = {}

    @classmethod
    async def connect(
        cls,
        address: Mapping[str, Any],
        settings: Mapping[str, str] | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> Self:
        """Connect to `address` (asyncpg's arguments) and put `settings` in force for the session."""
        connection = await asyncpg.connect(**address)
        try:
            await cls._set_up(connection, settings or {})
        except BaseException:
            connection.terminate()
            raise
        return cls(connection, rename or {})

    @classmethod
    async def _set_up(cls, connection: asyncpg.Connection[Any], settings: Mapping[str, str]) -> None:
        await connection.set_type_codec("vector", encoder=binary_vector, decoder=bytes, format="binary")
        for name, value in settings.items():
            await connection.execute(f"SET {name} = {value}")

    async def ask(self, query: Question) -> list[int]:
        """Run the query; return the ids in the order they came."""
        statement = self._prepared.get(query.statement)
        if statement is None:
            table = self._rename.get(query.statement.table, query.statement.table)
            sql = Statement(table, query.statement.column, query.statement.k).sql
            statement = self._prepared[query.statement] = await self._connection.prepare(sql)
        return [row[0] for row in await statement.fetch(*query.arguments())]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._connection.terminate()


class Truth:
    """Exact answers by distance, computed here from the vectors that were loaded, whatever the server says.

    A returned row is right if it is no farther than the k-th nearest one, once, and passes the filter.
    """

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._tables = tables
        self._unit = {name: normalised(table.base) for name, table in tables.items()}
        self._known: dict[Question, float] = {}
        self._passing: dict[tuple[str, str, int], NDArray[np.intp]] = {}

    def passing(self, statement: Statement, value: int | None) -> NDArray[np.intp] | None:
        """Return the numbers of the rows that pass the filter; None: all."""
        if statement.column is None or value is None:
            return None
        key = (statement.table, statement.column, value)
        if key not in self._passing:
            column = self._tables[statement.table].columns[statement.column]
            self._passing[key] = np.flatnonzero(column == value)
        return self._passing[key]

    def found(self, query: Question) -> int:
        """Return how many rows the query should return: k, or all there are."""
        rows = self.passing(query.statement, query.category)
        return min(query.k, len(self._unit[query.statement.table]) if rows is None else len(rows))

    def limits(self, queries: Sequence[Question]) -> NDArray[np.float64]:
        """Return for each query the distance of the last row of its exact answer, remembered."""
        self._search([query for query in dict.fromkeys(queries) if query not in self._known])
        return np.array([self._known[query] for query in queries])

    def _search(self, queries: Sequence[Question]) -> None:
        limits = np.empty(len(queries))
        alike: dict[tuple[Statement, int | None, int], list[int]] = {}
        for i, query in enumerate(queries):
            alike.setdefault((query.statement, query.category, query.k), []).append(i)
        for (statement, value, _), members in alike.items():
            if not self.found(queries[members[0]]):
                limits[members] = np.inf  # nothing passes the filter
                continue
            rows = self.passing(statement, value)
            unit = self._unit[statement.table]
            within = unit if rows is None else unit[rows]
            for start in range(0, len(members), _BATCH):
                batch = members[start : start + _BATCH]
                near = -(normalised(np.stack([queries[i].vector for i in batch])) @ within.T)
                found = self.found(queries[batch[0]])
                nearest = np.argpartition(near, found - 1, axis=1)[:, :found]
                for i, candidates in zip(batch, nearest, strict=True):
                    limits[i] = distances(within[candidates], queries[i].vector).max()
        self._known |= zip(queries, limits.tolist(), strict=True)

    def recall(self, query: Question, ids: list[int], limit: float) -> float:
        """Return the share of the exact answer that `ids` covers; `limit` as given by `limits`."""
        if not self.found(query):
            return 1.0
        unique = np.unique(np.asarray(ids, dtype=np.int64))
        rows = self.passing(query.statement, query.category)
        if rows is not None:
            unique = unique[np.isin(unique, rows)]
        hits = int(
            (distances(self._unit[query.statement.table][unique], query.vector) <= limit + TOLERANCE).sum()
        )
        return min(hits, self.found(query)) / self.found(query)
