"""Where the SQL interface ends: the server's own functions, clients that vanish, psql's descriptions, cursors."""

from __future__ import annotations

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
    until(lambda: not at_work(edges), 60.0)
    with edges.connect() as connection:  # and its place is free again
        rows = connection.execute(
            "SELECT * FROM ruvector_benchmark_latency('items', num_queries := 5, k := 10)"
        ).fetchall()
    assert len(rows) == 3


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
