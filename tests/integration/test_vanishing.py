"""Clients that vanish, at every point of a connection's life, by FIN and by RST, with TLS and without.

Nothing may be left: no connection in the proxy, no task, no backend of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from config.schema import Listen
from tests.integration.certificates import Authority
from tests.integration.proxied import Proxy
from tests.integration.raw import SYNC, bind, execute, message, parse, query
from tests.integration.test_relay import eventually

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SSL_REQUEST = struct.pack("!II", 8, 80877103)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def proxy(postgres: EmbeddedPostgres, authority: Authority) -> Iterator[Proxy]:
    issued = authority.issue("localhost")
    options = Listen(tls_cert=issued.cert, tls_key=issued.key)
    with Proxy(postgres.host, postgres.port, listen=options) as proxy:
        yield proxy


class Client:
    """A connection of which the test decides how far it goes."""

    def __init__(self, proxy: Proxy, root: Path, database: str) -> None:
        self.sock: socket.socket = socket.create_connection((proxy.host, proxy.port), timeout=10)
        self._root, self._database = root, database

    def encrypt(self) -> None:
        self.sock.sendall(SSL_REQUEST)
        assert self.sock.recv(1) == b"S"
        context = ssl.create_default_context(cafile=self._root)
        self.sock = context.wrap_socket(self.sock, server_hostname="localhost")

    def start(self, user: str = "postgres") -> None:
        body = struct.pack("!I", 3 << 16) + f"user\0{user}\0database\0{self._database}\0\0".encode()
        self.sock.sendall(struct.pack("!I", len(body) + 4) + body)

    def ready(self) -> None:
        last = b""
        while not last.endswith((b"Z\0\0\0\5I", b"Z\0\0\0\5T")):
            data = self.sock.recv(65536)
            assert data, last
            last = (last + data)[-100:]

    def vanish(self, *, rst: bool) -> None:
        if rst:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def nothing(client: Client) -> None:
    pass


def half_a_packet(client: Client) -> None:
    client.sock.sendall(b"\0\0\0\x50\0\3")


def password_asked(client: Client) -> None:
    client.start("auth_scram")
    assert client.sock.recv(100)[:1] == b"R"


def connecting(client: Client) -> None:
    client.start()


def idle(client: Client) -> None:
    client.start()
    client.ready()


def in_transaction(client: Client) -> None:
    idle(client)
    client.sock.sendall(query("BEGIN"))
    client.ready()


def in_query(client: Client) -> None:
    idle(client)
    client.sock.sendall(query("SELECT pg_sleep(1)"))
    time.sleep(0.1)


def in_copy_in(client: Client) -> None:
    idle(client)
    client.sock.sendall(query("CREATE TABLE t (i int)"))
    client.ready()
    client.sock.sendall(query("COPY t FROM STDIN"))
    assert client.sock.recv(100)[:1] == b"G"
    client.sock.sendall(message("d", b"1\n") + b"d\0\0\1\0unfinished")


def in_copy_out(client: Client) -> None:
    idle(client)
    client.sock.sendall(query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 100000)) TO STDOUT"))
    client.sock.recv(10_000)


def within_a_row(client: Client) -> None:
    """The server's words wait everywhere: nobody reads a row of 50 MB."""
    idle(client)
    client.sock.sendall(query("SELECT repeat('x', 50000000)"))
    client.sock.recv(10_000)
    time.sleep(0.3)


def within_a_bind(client: Client) -> None:
    idle(client)
    whole = parse("SELECT length($1)") + bind(b"y" * 5_000_000) + execute() + SYNC
    client.sock.sendall(whole[:2_000_000])


def within_a_pipeline(client: Client) -> None:
    """Much is written, nothing is read."""
    idle(client)
    client.sock.settimeout(0.5)
    segment = parse("SELECT repeat($1, 1000)") + bind(b"z" * 100) + execute() + SYNC
    with contextlib.suppress(TimeoutError):
        while True:
            client.sock.sendall(segment * 100)


STATES: list[Callable[[Client], None]] = [
    nothing,
    half_a_packet,
    connecting,
    password_asked,
    idle,
    in_transaction,
    in_query,
    in_copy_in,
    in_copy_out,
    within_a_row,
    within_a_bind,
    within_a_pipeline,
]


def asked_for_tls(client: Client) -> None:
    client.sock.sendall(SSL_REQUEST)
    assert client.sock.recv(1) == b"S"


def within_the_handshake(client: Client) -> None:
    asked_for_tls(client)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    client.sock.sendall(outgoing.read()[:-10])


def nothing_left(proxy: Proxy, postgres: EmbeddedPostgres, database: str) -> None:
    def backends() -> int:
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = %s", (database,)
            ).fetchone()
            assert row is not None
            return int(row[0])

    def tasks() -> int:
        return proxy.call(lambda: sum(not task.done() for task in asyncio.all_tasks()))

    assert eventually(lambda: not proxy.connections)
    assert eventually(lambda: backends() == 0)
    assert eventually(lambda: tasks() == 2)  # the worker itself, and the one that counts
    # One that was gone before it was accepted may still be opened, and is closed again at once.
    counters = proxy.counters
    assert eventually(lambda: counters.connections_opened == counters.connections_closed)
    assert eventually(lambda: not proxy.connections)


@pytest.mark.parametrize("rst", [True, False], ids=["RST", "FIN"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_client_that_vanishes(
    postgres: EmbeddedPostgres,
    proxy: Proxy,
    authority: Authority,
    database: str,
    state: Callable[[Client], None],
    tls: bool,
    rst: bool,
) -> None:
    for _ in range(2):
        client = Client(proxy, authority.root, database)
        if tls:
            client.encrypt()
        state(client)
        if state is in_copy_in:
            client.vanish(rst=rst)
            break
        client.vanish(rst=rst)
    nothing_left(proxy, postgres, database)


@pytest.mark.parametrize("rst", [True, False], ids=["RST", "FIN"])
@pytest.mark.parametrize("state", [asked_for_tls, within_the_handshake], ids=lambda state: state.__name__)
def test_a_client_that_vanishes_before_it_is_encrypted(
    postgres: EmbeddedPostgres,
    proxy: Proxy,
    authority: Authority,
    database: str,
    state: Callable[[Client], None],
    rst: bool,
) -> None:
    client = Client(proxy, authority.root, database)
    state(client)
    client.vanish(rst=rst)
    nothing_left(proxy, postgres, database)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_a_client_that_does_not_read_the_end_is_dropped(
    postgres: EmbeddedPostgres,
    proxy: Proxy,
    authority: Authority,
    database: str,
    tls: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the proxy ends a session, what waits for the client gets some time, and its socket no more."""
    monkeypatch.setattr("proxy.net.farewell.LINGER_SECONDS", 0.5)
    monkeypatch.setattr("proxy.net.farewell.DISCARD_SECONDS", 0.2)
    client = Client(proxy, authority.root, database)
    if tls:
        client.encrypt()
    within_a_row(client)
    transports = proxy.call(lambda: [connection.transport for connection in proxy.connections])
    for connection in list(proxy.connections):
        proxy.call(connection.abort_for_shutdown)
    nothing_left(proxy, postgres, database)
    time.sleep(1.0)
    assert [each for each in transports if each is not None and not each.is_closing()] == []
    received = 0
    with client.sock, contextlib.suppress(ConnectionError, ssl.SSLError):
        client.sock.settimeout(10)
        while data := client.sock.recv(1 << 20):
            received += len(data)
    assert received < 50_000_000
