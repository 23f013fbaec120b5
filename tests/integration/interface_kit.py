"""A proxy with a learner, a table that it learns about, and the drivers that call its functions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from bench.embedded import EmbeddedPostgres
from tests.integration.learner_kit import Vectors, create_items, text
from tests.integration.test_serve import Served, serving, tcp


@dataclass
class Interface:
    """What the tests of the SQL interface need."""

    server: EmbeddedPostgres
    served: Served
    database: str
    vectors: Vectors

    def connect(self, user: str = "postgres", **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect through the proxy, in autocommit."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.served.port,
            user=user,
            dbname=self.database,
            autocommit=True,
            **options,
        )

    def learn(self, *, table: str = "items", queries: int = 120) -> None:
        """Send queries, and wait until the learner has decided about them."""
        sql = f"SELECT id FROM {table} ORDER BY embedding <-> %s::vector LIMIT 10"
        stats = "SELECT bool_or(trust <> 'observe') FROM ruvector_learning_stats(%s)"
        with self.connect() as connection:
            for vector in self.vectors[:queries] + 0.3:
                connection.execute(sql, (text(vector),))
            deadline = time.monotonic() + 150
            while (connection.execute(stats, (table,)).fetchone() or (None,))[0] is not True:
                assert time.monotonic() < deadline, connection.execute(
                    "SELECT * FROM ruvector_learning_stats(%s)", (table,)
                ).fetchall()
                time.sleep(0.2)

    def direct(self) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect to the server itself."""
        return psycopg.connect(self.server.dsn(self.database), autocommit=True)


@contextmanager
def interface(
    server: EmbeddedPostgres, directory: Path, database: str, more: str = "", target: float = 0.95
) -> Iterator[Interface]:
    """Create a database with the table ``items``, and serve it; dropped in the end."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database} STRATEGY file_copy")
    vectors = create_items(server.dsn(database))
    configured = f"[learning]\ntarget_recall = {target}\n{more}"
    with serving(directory, tcp(server), more=configured, dsn=server.uri(database)) as served:
        served.wait_ready()
        yield Interface(server, served, database, vectors)
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {database} WITH (FORCE)")
