"""A pooler behind the proxy gives every transaction whatever server is free: nothing may be remembered of one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from bench.pooler import pgbouncer
from tests.integration.pair import DEFAULT, DICTATED, LITERAL, SETTINGS, SQL, VECTOR, B, E, P
from tests.integration.proxied import Proxy
from tests.integration.raw import SYNC, RawClient, first_values, query, rows, tags

pytestmark = pytest.mark.integration

PID = query("SELECT pg_backend_pid()")


@pytest.fixture(scope="module")
def pooled(postgres: EmbeddedPostgres, items: str) -> Iterator[Proxy]:
    """Return a proxy before pgbouncer in transaction mode."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ruvector-pooler-")))
        pooler = stack.enter_context(pgbouncer(postgres, directory, "transaction"))
        if pooler is None:
            pytest.skip("pgbouncer is not installed")
        yield stack.enter_context(Proxy("127.0.0.1", pooler.port, SETTINGS))


@pytest.fixture
def pair(pooled: Proxy, postgres: EmbeddedPostgres, items: str) -> Iterator[tuple[RawClient, RawClient]]:
    clients = [RawClient((pooled.host, pooled.port), items, postgres.user) for _ in range(2)]
    yield clients[0], clients[1]
    for client in clients:
        client.socket.close()


def search(client: RawClient) -> int:
    replies = client.run(P, B, E, SYNC)
    assert tags(replies).replace("D", "") == "12CZ"
    return rows(replies)


def test_settings_are_in_force_on_whichever_server(pair: tuple[RawClient, RawClient]) -> None:
    one, other = pair
    servers = set()
    for _ in range(5):
        assert search(one) == DICTATED
        servers.add(first_values(one.run(PID))[0])
        one.run(query("BEGIN"))
        servers.add(first_values(one.run(PID))[0])
        assert search(other) == DICTATED  # on another server than its last time
        servers.add(first_values(other.run(PID))[0])
        assert search(one) == DICTATED
        assert rows(one.run(query(LITERAL))) == DICTATED
        assert first_values(one.run(query("SHOW hnsw.ef_search"))) == [b"40"]
        other.run(query("BEGIN"))
        assert search(other) == DICTATED
        one.run(query("COMMIT"))
        assert rows(one.run(query(LITERAL))) == DICTATED
        other.run(query("ROLLBACK"))
    assert len(servers) > 1


def test_nothing_stays_behind_on_a_server(pair: tuple[RawClient, RawClient]) -> None:
    one, other = pair
    for client in (one, other, one):
        assert search(client) == DICTATED
        assert first_values(client.run(query("SHOW hnsw.ef_search"))) == [b"40"]


def test_refused_settings_cost_the_client_nothing(pooled: Proxy, pair: tuple[RawClient, RawClient]) -> None:
    pooled.dictate((("hnsw.ef_search", "0"),))
    try:
        assert search(pair[0]) == DEFAULT
        assert search(pair[1]) == DEFAULT
    finally:
        pooled.dictate(SETTINGS)
        pooled.call(pooled.adapter._switched_off.clear)


def test_a_driver_with_transactions(pooled: Proxy, postgres: EmbeddedPostgres, items: str) -> None:
    with psycopg.connect(pooled.dsn(items, postgres.user), prepare_threshold=None) as connection:
        for _ in range(3):
            with connection.transaction():
                sql = SQL.replace("$1", "%s::vector")
                assert len(connection.execute(sql, (VECTOR,)).fetchall()) == DICTATED
                assert connection.execute("SHOW hnsw.ef_search").fetchone() == ("40",)
