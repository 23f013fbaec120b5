"""How the proxy reaches a server, beyond what Debian's can do: direct TLS, servers that hang, long cancel keys."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from config.schema import Listen, Upstream
from tests.integration.certificates import Authority
from tests.integration.proxied import Proxy
from tests.integration.test_relay import eventually

pytestmark = pytest.mark.integration

CANCEL = 80877102


@contextlib.contextmanager
def fake_server(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve one connection with `behave`; return the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            client, _ = listening.accept()
            client.settimeout(10)
            with client:
                behave(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(10)
        assert not thread.is_alive()


def test_direct_tls_to_the_server(postgres: EmbeddedPostgres, database: str, tmp_path: Path) -> None:
    """The server is a second proxy, which accepts it as PostgreSQL 17 does."""
    authority = Authority(tmp_path)
    issued = authority.issue("localhost")
    listen = Listen(tls_cert=issued.cert, tls_key=issued.key, tls_mode="require")
    with Proxy(postgres.host, postgres.port, listen=listen) as behind:
        upstream = Upstream(
            host="localhost",
            port=behind.port,
            sslmode="verify-full",
            sslrootcert=authority.root,
            sslnegotiation="direct",
        )
        with Proxy("", 1, upstream=upstream) as proxy:
            with psycopg.connect(proxy.dsn(database, "postgres"), autocommit=True) as connection:
                timer = threading.Timer(0.3, connection.cancel_safe)
                timer.start()
                with pytest.raises(psycopg.errors.QueryCanceled):
                    connection.execute("SELECT pg_sleep(20)")
                timer.join()
                assert connection.execute("SELECT 1").fetchone() == (1,)
            assert eventually(lambda: not proxy.connections and not behind.connections)


@pytest.mark.parametrize("answer", [b"", b"S"], ids=["silent", "hangs in the handshake"])
def test_a_server_that_hangs_is_given_up(answer: bytes) -> None:
    def behave(client: socket.socket) -> None:
        assert len(client.recv(8)) == 8
        client.sendall(answer)
        while client.recv(1000):
            pass

    with fake_server(behave) as port:
        upstream = Upstream(host="127.0.0.1", port=port, sslmode="require")
        with Proxy("", 1, upstream=upstream) as proxy:
            proxy.upstream.timeout = 0.5
            with pytest.raises(psycopg.OperationalError, match=r"cannot reach .* timed out"):
                psycopg.connect(proxy.dsn("postgres", "postgres"))
            assert eventually(lambda: not proxy.connections)


def test_plain_text_behind_the_servers_answer_is_refused() -> None:
    """As libpq does (CVE-2021-23222)."""

    def behave(client: socket.socket) -> None:
        client.recv(8)
        client.sendall(b"SR\0\0\0\x08\0\0\0\0")
        client.recv(1000)

    with fake_server(behave) as port:
        upstream = Upstream(host="127.0.0.1", port=port, sslmode="require")
        with (
            Proxy("", 1, upstream=upstream) as proxy,
            pytest.raises(psycopg.OperationalError, match="received unencrypted data"),
        ):
            psycopg.connect(proxy.dsn("postgres", "postgres"))


@pytest.mark.parametrize("size", [4, 32, 256])
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "does not wait"])
def test_a_cancel_request_arrives_as_it_was_sent(size: int, waits: bool) -> None:
    """Keys have up to 256 bytes since protocol 3.2; a client that hangs up at once has asked all the same."""
    key = bytes(range(256))[:size]
    packet = struct.pack("!III", 12 + size, CANCEL, 4711) + key
    seen: list[bytes] = []
    closed: list[float] = []

    def behave(client: socket.socket) -> None:
        seen.append(client.recv(1000))
        time.sleep(0.3)
        closed.append(time.monotonic())

    with (
        fake_server(behave) as port,
        Proxy("", 1, upstream=Upstream(host="127.0.0.1", port=port, sslmode="disable")) as proxy,
    ):
        client = socket.create_connection((proxy.host, proxy.port), timeout=10)
        client.sendall(packet)
        if waits:
            assert client.recv(1) == b""
            assert time.monotonic() >= closed[0]
        else:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.1)
        client.close()
        assert eventually(lambda: bool(closed) and not proxy.connections)
    assert seen == [packet]
