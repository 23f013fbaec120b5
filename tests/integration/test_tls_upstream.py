"""A server with TLS, Debian's: every word of `upstream.sslmode` against every kind of server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from config.schema import SYSTEM, Listen, SSLMode, Upstream
from tests.integration.certificates import Authority, Issued
from tests.integration.debian_postgres import MISSING, DebianPostgres, programs
from tests.integration.proxied import Proxy
from tests.integration.test_relay import eventually

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(programs() is None, reason=MISSING),
]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> Issued:
    return authority.issue("proxy.example", common_name="postgres")


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[DebianPostgres]:
    """Return a server with TLS whose rules depend on the database."""
    issued = authority.issue("localhost")
    hba = [
        "hostssl only_tls all 127.0.0.1/32 trust",
        "hostnossl only_plain all 127.0.0.1/32 trust",
        "hostssl certified all 127.0.0.1/32 cert",
        "host postgres all 127.0.0.1/32 trust",
    ]
    with DebianPostgres(certificate=issued.cert, key=issued.key, root=authority.root, hba=hba) as server:
        for name in ("only_tls", "only_plain", "certified"):
            server.execute(f"CREATE DATABASE {name}")
        yield server


@pytest.fixture(scope="module")
def plain_server() -> Iterator[DebianPostgres]:
    with DebianPostgres() as server:
        yield server


CANCEL_CODE = struct.pack("!I", 80877102)


def through(server: DebianPostgres, sslmode: SSLMode | None = None, **options: Any) -> Proxy:
    """Return a proxy; the server's certificate is for the name "localhost"."""
    return Proxy("", 1, upstream=Upstream(host="localhost", port=server.port, sslmode=sslmode, **options))


def encrypted(proxy: Proxy, dbname: str = "postgres", more: str = "") -> bool:
    """Connect and tell whether the server was reached with TLS."""
    sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    with psycopg.connect(f"{proxy.dsn(dbname, 'postgres')} {more}") as connection:
        row = connection.execute(sql).fetchone()
        assert row is not None
        return bool(row[0])


class TestModes:
    @pytest.mark.parametrize(
        ("sslmode", "dbname", "expected"),
        [
            (None, "postgres", True),
            (None, "only_plain", False),
            ("disable", "postgres", False),
            ("allow", "postgres", False),
            ("allow", "only_tls", True),
            ("prefer", "postgres", True),
            ("prefer", "only_tls", True),
            ("prefer", "only_plain", False),
            ("require", "postgres", True),
        ],
    )
    def test_encryption(
        self, server: DebianPostgres, sslmode: SSLMode | None, dbname: str, expected: bool
    ) -> None:
        with through(server, sslmode) as proxy:
            assert encrypted(proxy, dbname) is expected

    @pytest.mark.parametrize(
        ("sslmode", "dbname"), [("disable", "only_tls"), ("require", "only_plain"), ("prefer", "nowhere")]
    )
    def test_where_no_way_is_left_the_server_has_the_last_word(
        self, server: DebianPostgres, sslmode: SSLMode, dbname: str
    ) -> None:
        with through(server, sslmode) as proxy:
            with pytest.raises(psycopg.OperationalError, match=r"pg_hba\.conf"):
                encrypted(proxy, dbname)
            assert eventually(lambda: not proxy.connections)

    @pytest.mark.parametrize("sslmode", [None, "disable", "allow", "prefer"])
    def test_a_server_without_tls(self, plain_server: DebianPostgres, sslmode: SSLMode | None) -> None:
        with through(plain_server, sslmode) as proxy:
            assert encrypted(proxy) is False

    def test_a_server_without_tls_where_it_is_required(self, plain_server: DebianPostgres) -> None:
        with (
            through(plain_server, "require") as proxy,
            pytest.raises(psycopg.OperationalError, match="the server does not support it") as caught,
        ):
            encrypted(proxy)
        assert "upstream.sslmode" in str(caught.value)


class TestTrust:
    """What libpq's own documentation says about sslrootcert, mode by mode."""

    @pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full", "prefer"])
    def test_the_right_root(self, server: DebianPostgres, authority: Authority, sslmode: SSLMode) -> None:
        with through(server, sslmode, sslrootcert=authority.root) as proxy:
            assert encrypted(proxy)

    @pytest.mark.parametrize("sslmode", ["require", "verify-ca", "verify-full"])
    def test_the_wrong_root(self, server: DebianPostgres, strangers: Authority, sslmode: SSLMode) -> None:
        with (
            through(server, sslmode, sslrootcert=strangers.root) as proxy,
            pytest.raises(psycopg.OperationalError, match="certificate verify failed"),
        ):
            encrypted(proxy)

    def test_the_wrong_root_with_prefer_means_no_encryption(
        self, server: DebianPostgres, strangers: Authority
    ) -> None:
        """As libpq does: "prefer" goes on without TLS when the handshake fails."""
        with through(server, "prefer", sslrootcert=strangers.root) as proxy:
            assert encrypted(proxy) is False

    @pytest.mark.parametrize(("sslmode", "accepted"), [("verify-ca", True), ("verify-full", False)])
    def test_another_host_name(
        self, server: DebianPostgres, authority: Authority, sslmode: SSLMode, accepted: bool
    ) -> None:
        upstream = Upstream(host="127.0.0.1", port=server.port, sslmode=sslmode, sslrootcert=authority.root)
        with Proxy("", 1, upstream=upstream) as proxy:
            if accepted:
                assert encrypted(proxy)
            else:
                with pytest.raises(psycopg.OperationalError, match="IP address mismatch"):
                    encrypted(proxy)

    def test_the_systems_roots_do_not_know_it(self, server: DebianPostgres) -> None:
        with (
            through(server, sslrootcert=SYSTEM) as proxy,
            pytest.raises(psycopg.OperationalError, match="certificate verify failed"),
        ):
            encrypted(proxy)

    def test_a_certificate_of_the_proxys_own(self, server: DebianPostgres, own: Issued) -> None:
        with through(server, "require", sslcert=own.cert, sslkey=own.key) as proxy:
            assert encrypted(proxy, "certified")
        with (
            through(server, "require") as proxy,
            pytest.raises(psycopg.OperationalError, match="valid client certificate"),
        ):
            encrypted(proxy, "certified")

    def test_new_roots_are_for_new_connections(
        self, server: DebianPostgres, authority: Authority, strangers: Authority, tmp_path: Path
    ) -> None:
        root = tmp_path / "root.crt"
        shutil.copy(authority.root, root)
        with (
            through(server, "verify-ca", sslrootcert=root) as proxy,
            psycopg.connect(proxy.dsn("postgres", "postgres")) as connection,
        ):
            shutil.copy(strangers.root, root)
            assert proxy.upstream.keeper is not None
            assert proxy.upstream.keeper.refresh()
            with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
                encrypted(proxy)
            assert connection.execute("SELECT 1").fetchone() == (1,)


class Wire:
    """Stands between proxy and server, and delays what goes up by `delay` seconds; a context manager.

    `first` has the beginning of each connection, `closed_at` the times at which the server has closed one.
    """

    def __init__(self, port: int, delay: float = 0.0) -> None:
        self._port, self._delay = port, delay
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.port = self._listening.getsockname()[1]
        self.first: list[bytes] = []
        self.closed_at: list[float] = []

    def __enter__(self) -> Wire:
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            down = threading.Thread(target=self._down, args=(server, client))
            down.start()
            seen = b""
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    seen += data[: 200 - len(seen)]
                    time.sleep(self._delay)
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)
            self.first.append(seen)
            down.join()

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
        self.closed_at.append(time.monotonic())
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


class TestCancel:
    @pytest.mark.parametrize("sslmode", ["require", "prefer", "allow"])
    def test_it_is_encrypted_as_the_sessions_are(self, server: DebianPostgres, sslmode: SSLMode) -> None:
        with Wire(server.port) as wire:
            upstream = Upstream(host="127.0.0.1", port=wire.port, sslmode=sslmode)
            with Proxy("", 1, upstream=upstream) as proxy:
                with psycopg.connect(proxy.dsn("only_tls", "postgres"), autocommit=True) as connection:
                    timer = threading.Timer(0.3, connection.cancel_safe)
                    timer.start()
                    with pytest.raises(psycopg.errors.QueryCanceled):
                        connection.execute("SELECT pg_sleep(20)")
                    timer.join()
                assert eventually(lambda: not proxy.connections)
        assert len(wire.first) == (3 if sslmode == "allow" else 2)
        assert not any(CANCEL_CODE in first for first in wire.first)

    def test_the_clients_socket_is_closed_after_the_servers(self, server: DebianPostgres) -> None:
        """With a slow wire: a client that has seen its cancel socket close can send the next statement."""
        with Wire(server.port, delay=0.3) as wire:
            upstream = Upstream(host="127.0.0.1", port=wire.port, sslmode="disable")
            with (
                Proxy("", 1, upstream=upstream) as proxy,
                psycopg.connect(proxy.dsn("postgres", "postgres"), autocommit=True) as connection,
            ):
                for count in range(1, 4):
                    over: list[float] = []

                    def cancel(over: list[float] = over) -> None:
                        connection.cancel_safe(timeout=10)
                        over.append(time.monotonic())

                    timer = threading.Timer(0.2, cancel)
                    timer.start()
                    with pytest.raises(psycopg.errors.QueryCanceled):
                        connection.execute("SELECT pg_sleep(20)")
                    timer.join()
                    assert len(wire.closed_at) == count
                    assert over[0] >= wire.closed_at[-1]
                    assert connection.execute("SELECT 1").fetchone() == (1,)
        assert sum(CANCEL_CODE in first for first in wire.first) == 3


class TestBothLegs:
    def test_a_client_with_tls_and_a_server_with_tls(
        self, server: DebianPostgres, authority: Authority
    ) -> None:
        issued = authority.issue("localhost")
        proxy = Proxy(
            "",
            1,
            upstream=Upstream(host="localhost", port=server.port, sslmode="require"),
            listen=Listen(tls_cert=issued.cert, tls_key=issued.key, tls_mode="require"),
        )
        with proxy:
            assert encrypted(proxy, more=f"sslmode=verify-ca sslrootcert={authority.root}")
            with psycopg.connect(proxy.dsn("postgres", "postgres")) as connection:
                value = "x" * 5_000_000
                assert connection.execute("SELECT %s::text", (value,)).fetchone() == (value,)
                with connection.cursor().copy(
                    "COPY (SELECT repeat('y', 1000) FROM generate_series(1, 5000)) TO STDOUT"
                ) as copy:
                    assert sum(len(data) for data in copy) == 5000 * 1001
            assert eventually(lambda: not proxy.connections)
