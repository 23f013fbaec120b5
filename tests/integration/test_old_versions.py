"""PostgreSQL 16 with pgvector 0.6.2: no iterative scans, no search_path in ParameterStatus.

The wheel ``pgserver`` carries it; there is none for Python 3.13 and later.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from tests.integration.pair import DEFAULT, DICTATED, LITERAL, SETTINGS, B, E, P, Pair
from tests.integration.proxied import Proxy
from tests.integration.raw import SYNC, query, rows

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def old_server() -> Iterator[EmbeddedPostgres]:
    spec = importlib.util.find_spec("pgserver")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel pgserver is not installed (there is none for this Python)")
    programs = Path(spec.origin).parent / "pginstall" / "bin"
    with EmbeddedPostgres(settings=FAST_SETTINGS, listen=True, programs=programs) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            connection.execute("ALTER DATABASE postgres SET enable_seqscan = off")
            connection.execute("CREATE TABLE items (id int PRIMARY KEY, embedding vector(3))")
            connection.execute(
                "INSERT INTO items SELECT i, ARRAY[sin(i), cos(i * 1.7), sin(i * 0.3)]::vector "
                "FROM generate_series(1, 600) i"
            )
            connection.execute("CREATE INDEX ON items USING hnsw (embedding vector_l2_ops)")
        yield server


@pytest.fixture
def old(old_server: EmbeddedPostgres) -> Iterator[tuple[Pair, Proxy]]:
    with Proxy(old_server.host, old_server.port, SETTINGS) as proxy:
        pair = Pair(old_server, proxy, "postgres")
        with pair.direct, pair.proxied:
            yield pair, proxy


def test_it_is_as_old_as_the_module_says(old_server: EmbeddedPostgres) -> None:
    with psycopg.connect(old_server.dsn()) as connection:
        version = connection.execute(
            "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
        ).fetchone()
        assert version == ("0.6.2",)
        assert connection.info.server_version // 10000 == 16


def test_settings_that_it_has(old: tuple[Pair, Proxy]) -> None:
    pair, _ = old
    pair.adapted(P, B, E, SYNC)
    pair.adapted(query(LITERAL))
    pair.same(query("BEGIN"))
    pair.adapted(P, B, E, SYNC)
    assert pair.setting() == b"40"
    pair.adapted(query(LITERAL))
    pair.same(query("SAVEPOINT a"))
    pair.adapted(P, B, E, SYNC)
    pair.same(query("ROLLBACK TO a"))
    assert pair.setting() == b"40"
    pair.same(query("COMMIT"))
    assert pair.setting() == b"40"


@pytest.mark.parametrize("loaded", [False, True])
def test_settings_that_it_does_not_have(old: tuple[Pair, Proxy], loaded: bool) -> None:
    """Once the library is loaded it refuses unknown names of its own; before, they are placeholders."""
    pair, proxy = old
    if loaded:
        pair.both(query(LITERAL))
    proxy.dictate((("hnsw.iterative_scan", "strict_order"), ("hnsw.ef_search", str(DICTATED))))
    for messages in ((P, B, E, SYNC), (query(LITERAL),)):
        direct, proxied = pair.both(*messages)
        assert rows(direct) == DEFAULT
        assert rows(proxied) in (DEFAULT, DICTATED)
        assert [tag for tag, _ in proxied if tag != "D"] == [tag for tag, _ in direct if tag != "D"]
    assert proxy.counters.injection_errors == 1


def test_a_changed_search_path_is_not_reported(old: tuple[Pair, Proxy]) -> None:
    """So nobody knows what the names mean from then on, and queries are left alone."""
    pair, _ = old
    pair.adapted(P, B, E, SYNC)
    pair.same(query("SET search_path = public"))
    pair.same(P, B, E, SYNC)
    pair.same(query(LITERAL))
