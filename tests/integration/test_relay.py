"""Drivers and tools run through the proxy unchanged: ordinary traffic, no vector query anywhere."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator

import asyncpg
import psycopg
import pytest

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from tests.conftest import PASSWORD_ROLES
from tests.integration.proxied import Proxy
from tests.integration.raw import SYNC, RawClient, bind, execute, message, parse, query, rows, tags

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def proxy(postgres: EmbeddedPostgres) -> Iterator[Proxy]:
    with Proxy(postgres.host, postgres.port) as proxy:
        yield proxy


@pytest.fixture
def dsn(proxy: Proxy, postgres: EmbeddedPostgres, database: str) -> str:
    return proxy.dsn(database, postgres.user)


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


class TestPsycopg:
    def test_sync_with_server_side_binding(self, dsn: str) -> None:
        with psycopg.connect(dsn) as connection:
            connection.execute("CREATE TABLE t (i int, t text)")
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO t VALUES (%s, %s)", [(i, str(i)) for i in range(100)])
                cursor.execute("SELECT count(*), sum(i) FROM t WHERE i < %s", (50,))
                assert cursor.fetchone() == (50, 1225)

    def test_binary_results_and_prepared_statements(self, dsn: str) -> None:
        with psycopg.connect(dsn) as connection, connection.cursor(binary=True) as cursor:
            for i in range(10):
                cursor.execute("SELECT %s::int8, now()", (i,), prepare=True)
                row = cursor.fetchone()
                assert row is not None
                assert row[0] == i

    def test_pipeline_with_an_error_in_the_middle(self, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            with connection.pipeline() as pipeline:
                first = connection.execute("SELECT 1")
                pipeline.sync()
                connection.execute("SELECT 1/0")
                with pytest.raises(psycopg.errors.DivisionByZero):
                    pipeline.sync()
                last = connection.execute("SELECT 2")
            assert (first.fetchone(), last.fetchone()) == ((1,), (2,))

    def test_async(self, dsn: str) -> None:
        async def run() -> int:
            async with await psycopg.AsyncConnection.connect(dsn) as connection:
                cursor = await connection.execute("SELECT sum(i) FROM generate_series(1, 1000) i")
                row = await cursor.fetchone()
                assert row is not None
                return int(row[0])

        assert asyncio.run(run()) == 500500

    def test_copy_both_ways(self, dsn: str) -> None:
        with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE t (i int, t text)")
            with cursor.copy("COPY t FROM STDIN") as copy:
                for i in range(50_000):
                    copy.write_row((i, "x" * 20))
            with cursor.copy("COPY t TO STDOUT") as copy:
                assert sum(1 for _ in copy.rows()) == 50_000
            with (
                pytest.raises(psycopg.errors.InvalidTextRepresentation),
                cursor.copy("COPY t FROM STDIN") as copy,
            ):
                copy.write(b"no number\tx\n")
            connection.rollback()
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_notifications_while_idle(self, dsn: str) -> None:
        with (
            psycopg.connect(dsn, autocommit=True) as listening,
            psycopg.connect(dsn, autocommit=True) as notifying,
        ):
            listening.execute("LISTEN news")
            notifying.execute("SELECT pg_notify('news', 'hello')")
            assert [n.payload for n in listening.notifies(timeout=5, stop_after=1)] == ["hello"]

    def test_cancel_ends_the_running_statement_and_nothing_else(self, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            timer = threading.Timer(0.3, connection.cancel_safe)
            timer.start()
            with pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute("SELECT pg_sleep(20)")
            timer.join()
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_large_values_pass_both_ways(self, dsn: str) -> None:
        value = os.urandom(1 << 20) * 30
        with psycopg.connect(dsn) as connection:
            row = connection.execute("SELECT %b::bytea, length(%b::bytea)", (value, value)).fetchone()
            assert row == (value, len(value))


class TestAsyncpg:
    def run(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str, use: Callable[..., Awaitable[None]]
    ) -> None:
        async def main() -> None:
            connection = await asyncpg.connect(
                host=proxy.host, port=proxy.port, user=postgres.user, database=database
            )
            try:
                await use(connection)
            finally:
                await connection.close()

        asyncio.run(main())

    def test_statements_cursors_and_transactions(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str
    ) -> None:
        async def use(connection: asyncpg.Connection) -> None:
            await connection.execute("CREATE TABLE t (i int); INSERT INTO t SELECT generate_series(1, 500)")
            assert await connection.fetchval("SELECT count(*) FROM t WHERE i > $1", 100) == 400
            async with connection.transaction():
                seen = [
                    row["i"] async for row in connection.cursor("SELECT i FROM t ORDER BY i", prefetch=50)
                ]
            assert seen == list(range(1, 501))
            with pytest.raises(asyncpg.DivisionByZeroError):
                await connection.fetch("SELECT 1/0")
            await connection.executemany("INSERT INTO t VALUES ($1)", [(i,) for i in range(1000)])
            assert await connection.fetchval("SELECT count(*) FROM t") == 1500

        self.run(postgres, proxy, database, use)

    def test_copy_and_listen(self, postgres: EmbeddedPostgres, proxy: Proxy, database: str) -> None:
        async def use(connection: asyncpg.Connection) -> None:
            await connection.execute("CREATE TABLE t (i int, t text)")
            await connection.copy_records_to_table("t", records=[(i, "x") for i in range(5000)])
            assert await connection.fetchval("SELECT count(*) FROM t") == 5000
            heard: asyncio.Queue[str] = asyncio.Queue()
            await connection.add_listener("news", lambda *arguments: heard.put_nowait(str(arguments[-1])))
            await connection.execute("NOTIFY news, 'hello'")
            async with asyncio.timeout(5):
                assert await heard.get() == "hello"

        self.run(postgres, proxy, database, use)

    def test_a_timeout_cancels(self, postgres: EmbeddedPostgres, proxy: Proxy, database: str) -> None:
        async def use(connection: asyncpg.Connection) -> None:
            with pytest.raises(TimeoutError):
                await connection.fetch("SELECT pg_sleep(20)", timeout=0.3)
            assert await connection.fetchval("SELECT 1") == 1

        self.run(postgres, proxy, database, use)


class TestAuthentication:
    @pytest.mark.parametrize("role", PASSWORD_ROLES)
    def test_every_method_is_relayed(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str, role: str
    ) -> None:
        dsn = proxy.dsn(database, role)
        with psycopg.connect(f"{dsn} password={role}") as connection:
            assert connection.execute("SELECT current_user").fetchone() == (role,)

    @pytest.mark.parametrize("role", PASSWORD_ROLES)
    def test_a_wrong_password_gives_the_servers_own_error(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str, role: str
    ) -> None:
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(f"{proxy.dsn(database, role)} password=wrong")


class TestTools:
    @pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
    def test_pgbench(self, postgres: EmbeddedPostgres, proxy: Proxy, database: str, mode: str) -> None:
        pgbench = str(postgres.bin("pgbench"))
        where = ["-h", proxy.host, "-p", str(proxy.port), "-U", postgres.user, database]
        subprocess.run([pgbench, "-i", "-q", *where], check=True, capture_output=True)
        command = [pgbench, "-n", "-M", mode, "-c", "4", "-t", "100", *where]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "number of transactions actually processed: 400/400" in done.stdout
        assert "number of failed transactions: 0" in done.stdout

    @pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
    def test_psql_says_the_same(self, postgres: EmbeddedPostgres, proxy: Proxy, database: str) -> None:
        script = """
            CREATE TABLE t (i int, v vector(3));
            \\copy t (i, v) FROM stdin
1\t[1,2,3]
2\t[4,5,6]
\\.
            SELECT i FROM t ORDER BY v <-> '[1,1,1]' LIMIT 1 \\gset near_
            \\echo :near_i
            SELECT i, v FROM t ORDER BY v <-> '[1,1,1]' LIMIT 2 \\gdesc
            SELECT i / 0 FROM t ORDER BY v <-> '[1,1,1]' LIMIT 2;
            DROP TABLE t;
        """
        outputs = [
            subprocess.run(
                ["psql", "-X", "-h", host, "-p", str(port), "-U", postgres.user, database],
                input=script,
                capture_output=True,
                text=True,
                check=True,
            )
            for host, port in ((postgres.host, postgres.port), (proxy.host, proxy.port))
        ]
        direct, proxied = outputs
        assert (proxied.stdout, proxied.stderr) == (direct.stdout, direct.stderr)
        assert "division by zero" in proxied.stderr
        assert "COPY 2\n1\n" in proxied.stdout

    def test_pg_dump_writes_the_same(self, postgres: EmbeddedPostgres, proxy: Proxy, database: str) -> None:
        with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
            connection.execute(
                "CREATE TABLE t (i int PRIMARY KEY, v vector(3)); INSERT INTO t VALUES (1, '[1,2,3]')"
            )
        dump = str(postgres.bin("pg_dump"))
        outputs = [
            subprocess.run(
                [dump, "--restrict-key=x", "-h", host, "-p", str(port), "-U", postgres.user, database],
                check=True,
                capture_output=True,
            ).stdout
            for host, port in ((postgres.host, postgres.port), (proxy.host, proxy.port))
        ]
        assert outputs[0] == outputs[1]
        assert b"[1,2,3]" in outputs[0]


class TestEdges:
    def test_encryption_is_declined_and_the_socket_goes_on(self, proxy: Proxy) -> None:
        with socket.create_connection((proxy.host, proxy.port)) as sock:
            for code in (80877103, 80877104):
                sock.sendall(struct.pack("!II", 8, code))
                assert sock.recv(1) == b"N"

    def test_plain_text_behind_an_encryption_request_is_refused(self, proxy: Proxy) -> None:
        with socket.create_connection((proxy.host, proxy.port)) as sock:
            sock.sendall(struct.pack("!II", 8, 80877103) + b"x" * 20)
            answer = b"".join(iter(lambda: sock.recv(4096), b""))
        assert b"08P01" in answer
        assert b"unencrypted data" in answer

    @pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\7\0\0\0", b"\xff" * 40])
    def test_garbage_gets_a_clear_error(self, proxy: Proxy, garbage: bytes) -> None:
        with socket.create_connection((proxy.host, proxy.port)) as sock:
            sock.sendall(garbage)
            sock.settimeout(5)
            answer = b"".join(iter(lambda: sock.recv(4096), b""))
        assert b"FATAL" in answer
        assert b"08P01" in answer

    def test_half_close_still_gets_the_reply(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str
    ) -> None:
        with RawClient((proxy.host, proxy.port), database, postgres.user) as client:
            client.send(query("SELECT 1"))
            client.socket.shutdown(socket.SHUT_WR)
            assert rows(client.until_ready()) == 1
            with pytest.raises(EOFError):
                client.receive()

    def test_a_client_that_vanishes_ends_its_query(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str
    ) -> None:
        client = RawClient((proxy.host, proxy.port), database, postgres.user)
        client.send(query("SELECT pg_sleep(30) /* vanishing */"))
        time.sleep(0.2)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
        assert eventually(lambda: not proxy.connections)

    def test_a_pipeline_larger_than_all_buffers_does_not_lock_up(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str
    ) -> None:
        """The client writes everything before it reads anything."""
        count, size = 200, 100_000
        with RawClient((proxy.host, proxy.port), database, postgres.user) as client:
            client.socket.settimeout(60)
            segment = parse("SELECT $1") + bind(b"x" * size) + execute() + SYNC
            writer = threading.Thread(target=lambda: client.send(*[segment] * count))
            writer.start()
            time.sleep(0.5)
            replies = client.until_ready(count)
            writer.join()
        assert rows(replies) == count
        assert sum(len(body) for tag, body in replies if tag == "D") > count * size

    def test_copy_in_with_a_sync_sent_too_early(
        self, postgres: EmbeddedPostgres, proxy: Proxy, database: str
    ) -> None:
        """Sync behind the Execute of a COPY FROM STDIN is ignored by the server and has no answer."""
        with RawClient((proxy.host, proxy.port), database, postgres.user) as client:
            client.run(query("CREATE TABLE t (i int)"))
            client.send(parse("COPY t FROM STDIN"), bind(), execute(), SYNC)
            assert [client.receive()[0] for _ in range(3)] == ["1", "2", "G"]
            replies = client.run(message("d", b"1\n"), message("d", b"2\n"), message("c"), SYNC)
            assert tags(replies) == "CZ"
            assert tags(client.run(query("SELECT i FROM t"))) == "TDDCZ"
            assert all(connection.session.is_idle for connection in proxy.connections if connection.session)

    def test_the_servers_own_words_on_termination(self, postgres: EmbeddedPostgres, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            pid = connection.info.backend_pid
            with psycopg.connect(postgres.dsn(), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", (pid,))
            with pytest.raises(psycopg.OperationalError, match="terminating connection due to administrator"):
                connection.execute("SELECT 1")


def test_nothing_is_left_of_closed_connections(
    postgres: EmbeddedPostgres, proxy: Proxy, database: str
) -> None:
    for _ in range(20):
        RawClient((proxy.host, proxy.port), database, postgres.user).socket.close()
    assert eventually(lambda: not proxy.connections)
    counters = proxy.counters
    assert counters.connections_opened == counters.connections_closed


@pytest.mark.slow
def test_upstream_stopped_and_started_again() -> None:
    with EmbeddedPostgres(settings=FAST_SETTINGS) as server, Proxy(server.host, server.port) as proxy:
        dsn = proxy.dsn("postgres", server.user)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SELECT 1")
            server.stop("immediate")
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError, match="cannot reach the upstream server"):
            psycopg.connect(dsn)
        server.start()
        with psycopg.connect(dsn) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.slow
def test_a_killed_backend_gives_a_clear_error() -> None:
    with (
        EmbeddedPostgres(settings=FAST_SETTINGS) as server,
        Proxy(server.host, server.port) as proxy,
        RawClient((proxy.host, proxy.port), "postgres", server.user) as client,
    ):
        server.kill()
        tag, body = client.receive()
        assert tag == "E"
        assert b"FATAL" in body
