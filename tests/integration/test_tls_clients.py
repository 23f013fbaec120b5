"""Clients with TLS, with real drivers: every word of `listen.tls_mode`, direct TLS, misuse, slow handshakes."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from config.schema import Listen, TLSMode
from tests.integration.certificates import Authority, Issued
from tests.integration.proxied import Proxy
from tests.integration.raw import query
from tests.integration.test_relay import eventually

pytestmark = pytest.mark.integration

SSL_REQUEST = struct.pack("!II", 8, 80877103)
GSS_REQUEST = struct.pack("!II", 8, 80877104)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Issued:
    return authority.issue("localhost", "127.0.0.1")


@pytest.fixture(scope="module")
def client(authority: Authority) -> Issued:
    return authority.issue("client.example", common_name="postgres")


@pytest.fixture(scope="module")
def strange_client(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    authority = Authority(tmp_path_factory.mktemp("strange"))
    return authority.issue("client.example", common_name="postgres")


def listen(server: Issued, mode: TLSMode | None = None, ca: Path | None = None) -> Listen:
    return Listen(tls_mode=mode, tls_cert=server.cert, tls_key=server.key, tls_ca=ca)


@pytest.fixture(scope="module")
def proxy(postgres: EmbeddedPostgres, server: Issued) -> Iterator[Proxy]:
    with Proxy(postgres.host, postgres.port, listen=listen(server)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def strict(postgres: EmbeddedPostgres, server: Issued) -> Iterator[Proxy]:
    with Proxy(postgres.host, postgres.port, listen=listen(server, "require")) as proxy:
        yield proxy


def encrypted(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Tell whether libpq speaks TLS to the proxy."""
    return bool(connection.pgconn.ssl_in_use)


def startup(database: str) -> bytes:
    body = struct.pack("!I", 3 << 16) + f"user\0postgres\0database\0{database}\0\0".encode()
    return struct.pack("!I", len(body) + 4) + body


def encrypted_socket(proxy: Proxy, authority: Authority) -> ssl.SSLSocket:
    """Return a connection on which the start-up packet comes next."""
    plain = socket.create_connection((proxy.host, proxy.port), timeout=10)
    plain.sendall(SSL_REQUEST)
    assert plain.recv(10) == b"S"
    context = ssl.create_default_context(cafile=authority.root)
    return context.wrap_socket(plain, server_hostname="localhost")


def until_ready(sock: ssl.SSLSocket) -> bytes:
    data = b""
    while not data.endswith(b"Z\0\0\0\5I"):
        received = sock.recv(65536)
        assert received, data
        data += received
    return data


class TestAllow:
    @pytest.mark.parametrize(
        ("sslmode", "expected"),
        [("disable", False), ("allow", False), ("prefer", True), ("require", True), ("verify-full", True)],
    )
    def test_the_client_chooses(
        self, proxy: Proxy, authority: Authority, database: str, sslmode: str, expected: bool
    ) -> None:
        more = f"sslmode={sslmode} sslrootcert={authority.root if sslmode == 'verify-full' else ''}"
        with psycopg.connect(f"{proxy.dsn(database, 'postgres')} {more}") as connection:
            assert encrypted(connection) is expected
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_direct_tls(self, proxy: Proxy, authority: Authority, database: str) -> None:
        if psycopg.pq.version() < 170000:
            pytest.skip("libpq is older than 17 and knows no sslnegotiation")
        more = f"sslmode=verify-full sslrootcert={authority.root} sslnegotiation=direct"
        with psycopg.connect(f"{proxy.dsn(database, 'postgres')} {more}") as connection:
            assert encrypted(connection)
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_asyncpg(self, proxy: Proxy, authority: Authority, database: str) -> None:
        async def run() -> object:
            context = ssl.create_default_context(cafile=authority.root)
            connection = await asyncpg.connect(
                host="localhost", port=proxy.port, user="postgres", database=database, ssl=context
            )
            try:
                return await connection.fetchval("SELECT sum(i) FROM generate_series(1, $1) i", 1000)
            finally:
                await connection.close()

        assert asyncio.run(run()) == 500500

    @pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
    def test_psql_says_that_it_is_encrypted(self, proxy: Proxy, database: str) -> None:
        done = subprocess.run(
            ["psql", "-X", f"{proxy.dsn(database, 'postgres')} sslmode=require", "-c", "\\conninfo"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "TLS" in done.stdout

    def test_a_certificate_is_shown_that_the_client_refuses(
        self, proxy: Proxy, strange_client: Issued, database: str
    ) -> None:
        more = f"sslmode=verify-ca sslrootcert={strange_client.cert}"
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            psycopg.connect(f"{proxy.dsn(database, 'postgres')} {more}")
        assert eventually(lambda: not proxy.connections)

    def test_a_megabyte_in_each_direction(self, proxy: Proxy, database: str) -> None:
        with psycopg.connect(f"{proxy.dsn(database, 'postgres')} sslmode=require") as connection:
            value = "x" * 3_000_000
            row = connection.execute("SELECT %s::text, length(%s)", (value, value)).fetchone()
            assert row == (value, len(value))


class TestRequire:
    def test_a_client_without_tls_is_told_what_to_do(self, strict: Proxy, database: str) -> None:
        with pytest.raises(psycopg.OperationalError, match="without TLS are not accepted") as caught:
            psycopg.connect(f"{strict.dsn(database, 'postgres')} sslmode=disable")
        assert "Connect with sslmode=require or stronger" in str(caught.value)

    @pytest.mark.parametrize("sslmode", ["allow", "prefer", "require"])
    def test_libpq_finds_the_way(self, strict: Proxy, database: str, sslmode: str) -> None:
        with psycopg.connect(f"{strict.dsn(database, 'postgres')} sslmode={sslmode}") as connection:
            assert encrypted(connection)

    @pytest.mark.parametrize("plain", [True, False])
    def test_a_cancel_request_needs_no_tls(
        self, strict: Proxy, authority: Authority, database: str, plain: bool
    ) -> None:
        """libpq before 17 never encrypts it, later ones do."""
        with encrypted_socket(strict, authority) as sock:
            sock.sendall(startup(database))
            greeting = until_ready(sock)
            key = greeting[greeting.index(b"K\0\0\0") :][5:13]
            sock.sendall(query("SELECT pg_sleep(30)"))
            time.sleep(0.2)
            request = struct.pack("!II", 16, 80877102) + key
            if plain:
                canceller: socket.socket = socket.create_connection((strict.host, strict.port), timeout=5)
            else:
                canceller = encrypted_socket(strict, authority)
            with canceller:
                canceller.sendall(request)
                assert canceller.recv(1) == b""
            assert b"canceling statement due to user request" in until_ready(sock)


@pytest.fixture(scope="module")
def checking(postgres: EmbeddedPostgres, server: Issued, authority: Authority) -> Iterator[Proxy]:
    with Proxy(postgres.host, postgres.port, listen=listen(server, "verify-ca", authority.root)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def binding(postgres: EmbeddedPostgres, server: Issued, authority: Authority) -> Iterator[Proxy]:
    options = listen(server, "verify-full", authority.root)
    with Proxy(postgres.host, postgres.port, listen=options) as proxy:
        yield proxy


class TestClientCertificates:
    @pytest.mark.parametrize("fixture", ["checking", "binding"])
    def test_a_trusted_certificate_in_the_name_of_the_user(
        self, request: pytest.FixtureRequest, fixture: str, client: Issued, database: str
    ) -> None:
        proxy: Proxy = request.getfixturevalue(fixture)
        more = f"sslmode=require sslcert={client.cert} sslkey={client.key}"
        with psycopg.connect(f"{proxy.dsn(database, 'postgres')} {more}") as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)

    @pytest.mark.parametrize("fixture", ["checking", "binding"])
    def test_no_certificate(self, request: pytest.FixtureRequest, fixture: str, database: str) -> None:
        proxy: Proxy = request.getfixturevalue(fixture)
        with pytest.raises(psycopg.OperationalError, match="requires a valid client certificate"):
            psycopg.connect(f"{proxy.dsn(database, 'postgres')} sslmode=require sslcert=none")

    @pytest.mark.parametrize("fixture", ["checking", "binding"])
    def test_a_certificate_of_strangers(
        self, request: pytest.FixtureRequest, fixture: str, strange_client: Issued, database: str
    ) -> None:
        proxy: Proxy = request.getfixturevalue(fixture)
        more = f"sslmode=require sslcert={strange_client.cert} sslkey={strange_client.key}"
        with pytest.raises(psycopg.OperationalError, match="unknown ca"):
            psycopg.connect(f"{proxy.dsn(database, 'postgres')} {more}")

    def test_another_users_certificate(
        self, checking: Proxy, binding: Proxy, authority: Authority, database: str
    ) -> None:
        other = authority.issue("client.example", common_name="somebody")
        more = f"sslmode=require sslcert={other.cert} sslkey={other.key}"
        with psycopg.connect(f"{checking.dsn(database, 'postgres')} {more}") as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="certificate authentication failed for user"):
            psycopg.connect(f"{binding.dsn(database, 'postgres')} {more}")


class TestRawClient:
    """Without a driver: what drivers do not do."""

    def context(self, authority: Authority, *alpn: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=authority.root)
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    @pytest.mark.parametrize("requests", [[SSL_REQUEST], [GSS_REQUEST, SSL_REQUEST]])
    def test_negotiated(
        self, proxy: Proxy, authority: Authority, database: str, requests: list[bytes]
    ) -> None:
        with socket.create_connection((proxy.host, proxy.port)) as plain:
            for request in requests:
                plain.sendall(request)
                assert plain.recv(10) == (b"S" if request == SSL_REQUEST else b"N")
            with self.context(authority).wrap_socket(plain, server_hostname="localhost") as sock:
                sock.sendall(startup(database))
                until_ready(sock)

    def test_direct_with_the_start_up_packet_right_behind_the_handshake(
        self, proxy: Proxy, authority: Authority, database: str
    ) -> None:
        with socket.create_connection((proxy.host, proxy.port)) as plain:
            context = self.context(authority, "postgresql")
            with context.wrap_socket(plain, server_hostname="localhost") as sock:
                assert sock.selected_alpn_protocol() == "postgresql"
                sock.sendall(startup(database) + query("SELECT 1"))
                until_ready(sock)

    @pytest.mark.parametrize("alpn", [[], ["http/1.1"]])
    def test_direct_without_the_right_alpn(self, proxy: Proxy, authority: Authority, alpn: list[str]) -> None:
        with socket.create_connection((proxy.host, proxy.port), timeout=5) as plain:
            context = self.context(authority, *alpn)
            with context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=True) as sock:
                assert sock.recv(100) == b""
        assert eventually(lambda: not proxy.connections)

    @pytest.mark.parametrize("second", [SSL_REQUEST, GSS_REQUEST])
    def test_no_second_request_inside(self, proxy: Proxy, authority: Authority, second: bytes) -> None:
        with socket.create_connection((proxy.host, proxy.port), timeout=5) as plain:
            plain.sendall(SSL_REQUEST)
            assert plain.recv(1) == b"S"
            with self.context(authority).wrap_socket(plain, server_hostname="localhost") as sock:
                sock.sendall(second)
                assert b"unsupported frontend protocol 1234" in sock.recv(1000)

    def test_plain_text_behind_the_request_is_refused(self, proxy: Proxy, database: str) -> None:
        with socket.create_connection((proxy.host, proxy.port), timeout=5) as sock:
            sock.sendall(SSL_REQUEST + startup(database))
            answer = b"".join(iter(lambda: sock.recv(4096), b""))
        assert answer.startswith(b"E")
        assert b"unencrypted data" in answer

    def test_garbage_in_place_of_a_handshake(self, proxy: Proxy) -> None:
        with socket.create_connection((proxy.host, proxy.port), timeout=5) as sock:
            sock.sendall(SSL_REQUEST)
            assert sock.recv(1) == b"S"
            sock.sendall(b"no handshake at all" * 10)
            b"".join(iter(lambda: sock.recv(4096), b""))
        assert eventually(lambda: not proxy.connections)

    def test_half_close_still_gets_the_reply(self, proxy: Proxy, authority: Authority, database: str) -> None:
        """close_notify and FIN from the client; what the server still says comes through."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.context(authority, "postgresql").wrap_bio(incoming, outgoing, server_hostname="localhost")
        with socket.create_connection((proxy.host, proxy.port), timeout=10) as sock:

            def pump(step: object) -> object:
                while True:
                    try:
                        return step()  # type: ignore[operator]
                    except ssl.SSLWantReadError:
                        if outgoing.pending:
                            sock.sendall(outgoing.read())
                        data = sock.recv(65536)
                        if data:
                            incoming.write(data)
                        else:
                            incoming.write_eof()

            pump(tls.do_handshake)
            tls.write(startup(database) + query("SELECT pg_sleep(0.3), 'late'"))
            with pytest.raises(ssl.SSLWantReadError):
                tls.unwrap()
            sock.sendall(outgoing.read())
            sock.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while data := pump(lambda: tls.read(65536)):
                    assert isinstance(data, bytes)
                    received += data
            except ssl.SSLZeroReturnError:
                pass
        assert b"late" in received
        assert received.endswith(b"Z\0\0\0\5I")
        assert eventually(lambda: not proxy.connections)


@pytest.mark.slow
def test_a_handshake_that_stops_is_ended(postgres: EmbeddedPostgres, server: Issued) -> None:
    with (
        Proxy(postgres.host, postgres.port, listen=listen(server), authentication_timeout=0.5) as proxy,
        socket.create_connection((proxy.host, proxy.port), timeout=5) as sock,
    ):
        sock.sendall(SSL_REQUEST)
        assert sock.recv(1) == b"S"
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert sock.recv(100) == b""
        assert eventually(lambda: not proxy.connections)


def test_the_new_certificate_is_for_new_connections(
    postgres: EmbeddedPostgres, authority: Authority, database: str, tmp_path: Path
) -> None:
    first, second = authority.issue("localhost"), authority.issue("localhost")
    used = Issued(tmp_path / "server.crt", tmp_path / "server.key")

    def put(issued: Issued) -> None:
        shutil.copy(issued.cert, used.cert)
        shutil.copy(issued.key, used.key)

    def shown(proxy: Proxy) -> bytes:
        with socket.create_connection((proxy.host, proxy.port), timeout=5) as plain:
            plain.sendall(SSL_REQUEST)
            assert plain.recv(1) == b"S"
            context = ssl.create_default_context(cafile=authority.root)
            with context.wrap_socket(plain, server_hostname="localhost") as sock:
                return sock.getpeercert(binary_form=True) or b""

    def der(issued: Issued) -> bytes:
        return ssl.PEM_cert_to_DER_cert(
            issued.cert.read_text().partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"
        )

    put(first)
    with Proxy(postgres.host, postgres.port, listen=listen(used)) as proxy:
        assert proxy.certificates is not None
        with psycopg.connect(f"{proxy.dsn(database, 'postgres')} sslmode=require") as connection:
            assert shown(proxy) == der(first)
            shutil.copy(second.cert, used.cert)  # the key is still the old one
            assert not proxy.certificates.refresh()
            assert shown(proxy) == der(first)
            put(second)
            assert proxy.certificates.refresh()
            assert shown(proxy) == der(second)
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_rows_arrive_while_a_pipeline_is_written(proxy: Proxy, database: str) -> None:
    """Back-pressure of each direction for itself: everything is written before anything is read."""
    with psycopg.connect(f"{proxy.dsn(database, 'postgres')} sslmode=require") as connection:
        with connection.pipeline():
            cursors = [connection.execute("SELECT %s::text", ("y" * 50_000,)) for _ in range(200)]
        assert all(len(str(cursor.fetchone())) > 50_000 for cursor in cursors)
