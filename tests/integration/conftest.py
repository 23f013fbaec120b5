"""A table of vectors, and a pair of connections to it: direct, and through a proxy that dictates settings."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.pair import LITERAL, SETTINGS, Pair
from tests.integration.proxied import Proxy
from tests.integration.raw import query


@pytest.fixture(scope="session")
def items(postgres: EmbeddedPostgres) -> Iterator[str]:
    """Return a database with a table of 600 vectors and an HNSW index, which is always used.

    The table is small: the planner would rather sort it.
    """
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE vectors STRATEGY file_copy")
        connection.execute("ALTER DATABASE vectors SET enable_seqscan = off")
    with psycopg.connect(postgres.dsn("vectors"), autocommit=True) as connection:
        connection.execute("CREATE TABLE items (id int PRIMARY KEY, category int, embedding vector(3))")
        connection.execute(
            "INSERT INTO items SELECT i, i % 3, ARRAY[sin(i), cos(i * 1.7), sin(i * 0.3)]::vector "
            "FROM generate_series(1, 600) i"
        )
        connection.execute("CREATE INDEX ON items USING hnsw (embedding vector_l2_ops)")
        connection.execute("VACUUM ANALYZE items")
    yield "vectors"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("DROP DATABASE vectors WITH (FORCE)")


@pytest.fixture(scope="module")
def dictating(postgres: EmbeddedPostgres) -> Iterator[Proxy]:
    with Proxy(postgres.host, postgres.port) as proxy:
        yield proxy


@pytest.fixture
def pair(postgres: EmbeddedPostgres, dictating: Proxy, items: str) -> Iterator[Pair]:
    dictating.dictate(SETTINGS)
    pair = Pair(postgres, dictating, items)
    with pair.direct, pair.proxied:
        pair.same(query(LITERAL.replace("500", "1") + " OFFSET 0 -- loads pgvector"))
        yield pair
