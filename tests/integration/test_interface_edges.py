"""Where the SQL interface ends: the server's own functions, clients that vanish, psql's descriptions, cursors."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.interface_kit import Interface, interface
from tests.integration.raw import RawClient, message, query
from tests.integration.test_serve import serving, tcp, until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(400)]

CURSORS = [psycopg.ClientCursor, psycopg.Cursor]
LONG = "SELECT * FROM ruvector_benchmark_latency('items', num_queries := 100000, k := 10)"


@pytest.fixture(scope="module")
def edges(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interface]:
    options = '[sql]\nleft_to_server = "ruvector_ground_truth, ruvector_clear_learning"\n'
    with interface(postgres, tmp_path_factory.mktemp("edges"), "interface_edges", options) as found:
        with found.direct() as connection:
            for name in ("ruvector_last_query_id()", "ruvector_clear_learning(text)"):
                connection.execute(
                    f"CREATE FUNCTION {name} RETURNS text LANGUAGE sql AS $$ SELECT 'the server' $$"
                )
        yield found


@pytest.fixture(params=CURSORS)
def proxied(request: pytest.FixtureRequest, edges: Interface) -> Iterator[psycopg.Connection[Any]]:
    with edges.connect(cursor_factory=request.param) as connection:
        yield connection


def one(connection: psycopg.Connection[Any], sql: str, parameters: Any = None) -> Any:
    row = connection.execute(sql, parameters).fetchone()
    assert row is not None
    return row[0]


# -- who answers ----------------------------------------------------------------------------------------------


def test_the_servers_own_functions_of_such_names(proxied: psycopg.Connection[Any]) -> None:
    assert one(proxied, "SELECT ruvector_last_query_id()") is None  # the proxy's: nothing was asked yet
    assert one(proxied, "SELECT public.ruvector_last_query_id()") == "the server"
    assert one(proxied, "SELECT ruvector_clear_learning('items')") == "the server"  # sql.left_to_server
    with pytest.raises(psycopg.errors.UndefinedFunction, match="function ruvector_ground_truth"):
        proxied.execute("SELECT * FROM ruvector_ground_truth('items')")


def test_switched_off_the_server_answers_all(edges: Interface, tmp_path: Path) -> None:
    off = "[sql]\nenabled = false\n"
    with serving(tmp_path, tcp(edges.server), more=off, dsn=edges.server.uri(edges.database)) as served:
        served.wait_ready()
        for cursors in CURSORS:
            with psycopg.connect(
                host="127.0.0.1",
                port=served.port,
                user="postgres",
                dbname=edges.database,
                cursor_factory=cursors,
            ) as connection:
                assert one(connection, "SELECT ruvector_last_query_id()") == "the server"
                with pytest.raises(psycopg.errors.UndefinedFunction):
                    connection.execute("SELECT * FROM ruvector_learning_stats('items')")


# -- cursors, and statements that are prepared by SQL ---------------------------------------------------------


def rows(connection: psycopg.Connection[Any], sql: str, parameters: Any = None) -> list[tuple[Any, ...]]:
    return connection.execute(sql, parameters).fetchall()


def test_a_cursor_reads_its_own_answer(proxied: psycopg.Connection[Any]) -> None:
    columns = "SELECT name FROM ruvector_recommend_params('items')"
    declare = "DECLARE {} CURSOR FOR SELECT n, (SELECT count(*) FROM ruvector_learning_stats('items')) FROM generate_series(1, 3) n"
    with proxied.transaction():
        proxied.execute(declare.format("one"))
        proxied.execute('DECLARE "Two" CURSOR FOR SELECT ruvector_last_query_id() IS NULL')
        assert rows(proxied, columns) == []  # answered in between, into the same settings as ever
        assert rows(proxied, "FETCH 2 FROM one") == [(1, 0), (2, 0)]
        assert rows(proxied, 'FETCH ALL FROM "Two"') == [(True,)]
        assert rows(proxied, "FETCH ALL FROM one") == [(3, 0)]
        with pytest.raises(psycopg.errors.UndefinedTable), proxied.transaction():
            proxied.execute("DECLARE three CURSOR FOR SELECT * FROM ruvector_learning_stats('nowhere')")
        proxied.execute("CLOSE one")
        proxied.execute(declare.format("one").replace("CURSOR", "CURSOR WITH HOLD"))
    assert rows(proxied, "FETCH ALL FROM one") == [(1, 0), (2, 0), (3, 0)]
    proxied.execute("CLOSE one")


def test_server_side_cursors_of_a_driver(edges: Interface) -> None:
    with edges.connect() as connection, connection.transaction():
        with connection.cursor("named") as cursor:
            cursor.execute(
                "SELECT n, ruvector_last_query_id(), %s::text FROM generate_series(1, 5) n", ("x",)
            )
            assert cursor.fetchmany(2) == [(1, None, "x"), (2, None, "x")]
            assert len(cursor.fetchall()) == 3
        with connection.cursor("other") as cursor:
            cursor.execute("SELECT count(*) FROM ruvector_learning_stats(%s)", ("items",))
            assert cursor.fetchall() == [(0,)]


def test_prepare_and_execute(proxied: psycopg.Connection[Any]) -> None:
    proxied.execute("PREPARE told (text, int) AS SELECT count(*) + $2 FROM ruvector_learning_stats($1)")
    assert rows(proxied, "EXECUTE told ('items', 3)") == [(3,)]
    assert rows(proxied, "EXECUTE told ('public.' || 'items', 4)") == [(4,)]
    with pytest.raises(psycopg.errors.UndefinedTable):
        proxied.execute("EXECUTE told ('nowhere', 3)")
    with pytest.raises(psycopg.errors.DuplicatePreparedStatement):
        proxied.execute("PREPARE told AS SELECT ruvector_learning_stats('items')")
    assert rows(proxied, "execute TOLD ('items', 5)") == [(5,)]
    proxied.execute("CREATE TEMP TABLE kept AS EXECUTE told ('items', 6)")
    assert rows(proxied, "SELECT * FROM kept") == [(6,)]
    proxied.execute("DROP TABLE kept")
    proxied.execute("PREPARE rating AS SELECT ruvector_record_feedback($1, ARRAY['1'])")
    with proxied.transaction():
        assert rows(proxied, "EXECUTE rating ('never seen')") == [(False,)]
    proxied.execute("BEGIN READ ONLY")
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        proxied.execute("EXECUTE rating ('never seen')")
    proxied.execute("ROLLBACK")
    proxied.execute("DEALLOCATE told")
    proxied.execute("PREPARE told (text, int) AS SELECT 7, $1, $2")
    assert rows(proxied, "EXECUTE told ('nowhere', 1)") == [(7, "nowhere", 1)]  # nothing is called any more
    proxied.execute("DEALLOCATE ALL")
    with pytest.raises(psycopg.errors.InvalidSqlStatementName):
        proxied.execute("EXECUTE rating ('x')")


def test_what_stays_refused_says_what_to_do(proxied: psycopg.Connection[Any]) -> None:
    for sql in (
        "CREATE VIEW v AS SELECT * FROM ruvector_learning_stats('items')",
        "CREATE MATERIALIZED VIEW v AS SELECT * FROM ruvector_learning_stats('items')",
        "SELECT s.* FROM pg_class c, LATERAL ruvector_learning_stats(c.relname) s",
        "SELECT ruvector_learning_stats(relname) FROM pg_class",
    ):
        with pytest.raises(psycopg.errors.FeatureNotSupported) as caught:
            proxied.execute(sql)
        assert caught.value.diag.message_hint
        assert caught.value.diag.statement_position


# -- psql -----------------------------------------------------------------------------------------------------


def test_psql_describes_without_executing(edges: Interface) -> None:
    program = shutil.which("psql")
    if program is None:
        pytest.skip("psql is not installed")
    script = (
        "SELECT arm, recall, settings FROM ruvector_learning_stats('items') s \\gdesc\n"
        "SELECT ruvector_enable_learning('items', min_samples := 999) AS told \\gdesc\n"
        "SELECT count(*) AS n FROM ruvector_learning_stats('items') \\gset\n\\echo n is :n\n"
        "SELECT ruvector_last_query_id(), ruvector_get_search_params('items', '[1]') \\gdesc\n"
    )
    done = subprocess.run(
        [program, "-X", "-A", "-t", f"postgresql://postgres@127.0.0.1:{edges.served.port}/{edges.database}"],
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "arm|text", "recall|double precision", "settings|jsonb", "told|text", "n is 0",
        "ruvector_last_query_id|text", "ruvector_get_search_params|record",
    ]  # fmt: skip


# -- clients that vanish --------------------------------------------------------------------------------------


def at_work(edges: Interface) -> bool:
    """Tell whether the learner measures something for a client, by what it asks the server."""
    active = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ruvector-proxy learner' "
        "AND backend_start IS NOT NULL AND datname = %s AND state = 'active' AND query LIKE %s"
    )
    with edges.direct() as connection:
        seen = [
            connection.execute(active, (edges.database, "%OPERATOR(public.<->)%")).fetchone()
            for _ in range(40)
        ]
    return any(row is not None and row[0] for row in seen)


@pytest.mark.parametrize("way", ["reset", "closed", "goodbye"])
def test_a_long_call_ends_with_its_client(edges: Interface, way: str) -> None:
    client = RawClient(("127.0.0.1", edges.served.port), edges.database, "postgres")
    client.run(query("SET client_min_messages = error"))  # so that no NOTICE finds out that it is gone
    client.send(query(LONG))
    until(lambda: at_work(edges), 60.0)
    if way == "reset":
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if way == "goodbye":
        client.send(message("X"))
    client.socket.close()
    # Its place is free again, long before a hundred thousand queries could have been measured.
    short = LONG.replace("100000", "5")

    def works() -> bool:
        with edges.connect() as connection, contextlib.suppress(psycopg.errors.ConfigurationLimitExceeded):
            return len(rows(connection, short)) == 3
        return False

    until(works, 60.0)
    until(lambda: not at_work(edges), 60.0)


def test_a_client_that_has_only_shut_down_its_side_gets_the_answer(edges: Interface) -> None:
    with RawClient(("127.0.0.1", edges.served.port), edges.database, "postgres") as client:
        client.send(query(LONG.replace("100000", "2000")))
        client.socket.shutdown(socket.SHUT_WR)
        client.socket.settimeout(120)
        tags = [tag for tag, _ in client.until_ready()]
    assert tags.count("D") == 3
    assert tags[-2:] == ["C", "Z"]


def test_what_comes_behind_a_long_call_is_answered_behind_it(edges: Interface) -> None:
    with RawClient(("127.0.0.1", edges.served.port), edges.database, "postgres") as client:
        client.send(query(LONG.replace("100000", "500")))
        time.sleep(0.2)
        for number in range(50):
            client.send(query(f"SELECT {number}, repeat('x', 10000)"))
        client.socket.settimeout(120)
        found = client.until_ready(51)
    rows = [body for tag, body in found if tag == "D"]
    assert [int(body[6 : 6 + struct.unpack_from("!I", body, 2)[0]]) for body in rows[3:]] == list(range(50))
