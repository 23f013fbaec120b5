"""Limits against a real server: what a client gets at each, and that others do not notice."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from config.schema import Limits
from proxy.net.admission import sessions_for
from proxy.wire.diagnostics import ErrorResponse
from tests.integration.proxied import Proxy
from tests.integration.raw import RawClient, message, query
from tests.integration.test_edges import cancel
from tests.integration.test_serve import serving

pytestmark = pytest.mark.integration

OPEN_FILES = 65_536


def limited(postgres: EmbeddedPostgres, files: int = OPEN_FILES, **limits: float) -> Proxy:
    return Proxy(postgres.host, postgres.port, limits=Limits(**limits), files=files)  # type: ignore[arg-type]


def connect(proxy: Proxy, user: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(proxy.dsn("postgres", user), autocommit=True)


def refused(proxy: Proxy) -> ErrorResponse:
    """Connect, and return the error that comes instead of a session."""
    with socket.create_connection((proxy.host, proxy.port), timeout=60) as sock:
        body = struct.pack("!HH", 3, 0) + b"user\0postgres\0database\0postgres\0\0"
        sock.sendall(struct.pack("!I", len(body) + 4) + body)
        return only_error(sock)


def only_error(sock: socket.socket) -> ErrorResponse:
    """Read to the end of the stream; return the error that was all of it."""
    data = b""
    while part := sock.recv(1 << 16):
        data += part
    assert data[:1] == b"E", data
    assert struct.unpack_from("!I", data, 1)[0] + 1 == len(data)
    return ErrorResponse.decode(data[5:])


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def dribble(sock: socket.socket, data: bytes) -> None:
    """Send a byte at a time, forever on the point of saying something."""
    for byte in data:
        sock.sendall(bytes((byte,)))
        time.sleep(0.01)


@pytest.fixture
def silent() -> Iterator[Callable[[Proxy], socket.socket]]:
    """Open connections that say nothing."""
    with ExitStack() as stack:

        def open_one(proxy: Proxy) -> socket.socket:
            return stack.enter_context(socket.create_connection((proxy.host, proxy.port), timeout=60))

        yield open_one


def test_the_last_place_is_taken_and_given_back(postgres: EmbeddedPostgres) -> None:
    with limited(postgres, max_connections=2) as proxy:
        with closing(connect(proxy)) as first, closing(connect(proxy)) as second:
            error = refused(proxy)
            assert error.code == b"53300"
            assert error.severity == b"FATAL"
            assert b"too many clients" in (error.message or b"")
            assert b"limits.max_connections" in (error.hint or b"")
            cancel((proxy.host, proxy.port), struct.pack("!II", 1, 1))  # is let through all the same
            assert first.execute("SELECT 1").fetchone() == second.execute("SELECT 1").fetchone() == (1,)
        until(lambda: not proxy.connections)
        with closing(connect(proxy)) as again:
            assert again.execute("SELECT 1").fetchone() == (1,)
        assert proxy.counters.limits_hit == {"connections": 1}


def test_a_driver_gets_the_servers_own_code(postgres: EmbeddedPostgres) -> None:
    words = 'too many connections for role "postgres"'
    with (
        limited(postgres, max_connections_per_user=1) as proxy,
        closing(connect(proxy)),
        pytest.raises(psycopg.OperationalError, match=words),
    ):
        connect(proxy)


def test_a_refused_login_leaves_no_place_taken(postgres: EmbeddedPostgres) -> None:
    with limited(postgres, max_connections=1) as proxy:
        for _ in range(5):
            with pytest.raises(psycopg.OperationalError, match="does not exist"):
                connect(proxy, "nobody_of_that_name")
            until(lambda: not proxy.connections)
        with closing(connect(proxy)):
            pass


def test_silent_connections_crowd_nobody_out(
    postgres: EmbeddedPostgres, silent: Callable[[Proxy], socket.socket]
) -> None:
    """Slowloris: ten places for those that say nothing, forty come, and who speaks is served."""
    with limited(postgres, max_logins=10) as proxy:
        for number in range(40):
            sock = silent(proxy)
            if number % 2:
                sock.sendall(b"\0")  # a start-up packet that will never be whole
        with closing(connect(proxy)) as client:
            assert client.execute("SELECT 1").fetchone() == (1,)
        until(lambda: len(proxy.connections) <= 10)
        assert proxy.counters.limits_hit["logins"] >= 30


def test_a_silent_connection_is_closed_in_the_end(
    postgres: EmbeddedPostgres, silent: Callable[[Proxy], socket.socket]
) -> None:
    with limited(postgres, authentication_timeout=0.3) as proxy:
        assert silent(proxy).recv(1) == b""
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe
            dribble(silent(proxy), struct.pack("!I", 5000) + bytes(5000))
        until(lambda: not proxy.connections)


def test_a_server_that_says_nothing_is_not_waited_for_without_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()[:2]
        with Proxy(host, port, limits=Limits(authentication_timeout=0.3)) as proxy:
            error = refused(proxy)
    assert error.code == b"57P03"
    assert b"did not answer within 0.3 s" in (error.message or b"")


def test_a_session_outlives_the_time_for_its_login(postgres: EmbeddedPostgres) -> None:
    with limited(postgres, authentication_timeout=1.0) as proxy, closing(connect(proxy)) as client:
        assert client.execute("SELECT pg_sleep(1.3)").fetchone() == ("",)
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_a_message_that_is_too_long_ends_the_connection_with_its_own_code(postgres: EmbeddedPostgres) -> None:
    with limited(postgres, max_message=0.2) as proxy:
        address = (proxy.host, proxy.port)
        with RawClient(address, "postgres", "postgres") as client:
            client.run(query("SELECT '" + "x" * 199_900 + "'"))
            client.send(query("SELECT '" + "x" * 200_000 + "'"))
            error = only_error(client.socket)
        assert error.code == b"54000"
        assert b"200000 are allowed" in (error.message or b"")
        assert proxy.counters.limits_hit == {"message": 1}


def test_a_login_message_that_is_too_long_is_no_login_message() -> None:
    """The server asks for a password and gets 70 KB: they never reach it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()[:2]
        with Proxy(host, port) as proxy, socket.create_connection((proxy.host, proxy.port), 60) as client:
            body = struct.pack("!HH", 3, 0) + b"user\0u\0\0"
            client.sendall(struct.pack("!I", len(body) + 4) + body)
            upstream, _ = server.accept()
            with upstream:
                upstream.settimeout(60)
                assert len(upstream.recv(1 << 16)) == 8  # SSLRequest
                upstream.sendall(b"N")
                assert upstream.recv(1 << 16).endswith(body)
                upstream.sendall(message("R", struct.pack("!I", 3)))
                assert client.recv(9) == message("R", struct.pack("!I", 3))
                client.sendall(message("p", b"x" * 70_000))
                error = only_error(client)
                assert error.code == b"08P01"
                assert upstream.recv(1 << 16) == b""


def test_clients_beyond_the_open_files_get_an_error_and_not_silence(postgres: EmbeddedPostgres) -> None:
    with limited(postgres, files=80) as proxy, ExitStack() as stack:
        for _ in range(sessions_for(80, Limits().max_logins)):
            stack.enter_context(closing(connect(proxy)))
        with pytest.raises(psycopg.OperationalError, match=r"80 open files \(ulimit -n\)"):
            connect(proxy)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="Linux names them so")
def test_both_sides_are_asked_whether_they_are_still_there(postgres: EmbeddedPostgres) -> None:
    limits = {"keepalive_idle": 33, "keepalive_interval": 7, "keepalive_count": 4}
    with limited(postgres, **limits) as proxy, RawClient((proxy.host, proxy.port), "postgres", "postgres"):
        (connection,) = proxy.connections
        assert connection.transport is not None
        assert connection.upstream is not None
        for transport in (connection.transport, connection.upstream.transport):
            sock = transport.get_extra_info("socket")
            if sock.family == socket.AF_UNIX:
                continue  # the embedded server's
            got = [
                sock.getsockopt(level, name)
                for level, name in (
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
                )
            ]
            assert got == [1, 33, 7, 4]


@pytest.mark.slow
def test_workers_share_one_limit(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """The kernel spreads clients unevenly: three places are three, and a crashed worker's come back."""
    more = "[workers]\ncount = 2\n[limits]\nmax_connections = 3\n"
    with serving(tmp_path, (postgres.host, postgres.port), more) as served, ExitStack() as stack:
        served.wait_ready()
        until(lambda: served.metric("ruvector_workers_up") == 2)

        def fill() -> int:
            for taken in range(4):
                try:
                    stack.enter_context(closing(served.connect()))
                except psycopg.OperationalError as error:
                    assert "too many clients" in str(error)  # noqa: PT017
                    return taken
            raise AssertionError("a fourth was let in")

        assert fill() == 3
        for number in (1, 2):
            os.kill(served.pids(f"worker {number}")[0], signal.SIGKILL)
        until(lambda: served.metric("ruvector_child_exits_total") == 2)
        until(lambda: served.metric("ruvector_workers_up") == 2)
        assert fill() == 3
