"""Authentication with TLS on either connection, on both and on none: Debian's PostgreSQL, libpq, asyncpg."""

from __future__ import annotations

import asyncio
import base64
import shutil
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer

import asyncpg
import psycopg
import pytest
from asn1crypto.x509 import Certificate
from pydantic import SecretStr

from config.schema import Auth, Listen, Upstream
from proxy.auth import login
from proxy.auth.scram import Client
from tests.integration.certificates import Authority, Issued
from tests.integration.debian_postgres import MISSING, DebianPostgres, programs
from tests.integration.logins import Talk, error_of, initial
from tests.integration.proxied import Proxy
from tests.integration.raw import message
from tests.integration.test_serve import serving, until

pytestmark = [pytest.mark.integration, pytest.mark.skipif(programs() is None, reason=MISSING)]

ROLES = {
    "with_scram": "scram-sha-256",
    "with_md5": "md5",
    "with_password": "password",
    "with_trust": "trust",
    "with_cert": "cert",  # with TLS only
}
"""Role to what the server asks of it; its password is its name."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[DebianPostgres]:
    issued = authority.issue("127.0.0.1")
    hba = [
        f"{'hostssl' if method == 'cert' else 'host'} all {role} 127.0.0.1/32 {method}"
        for role, method in ROLES.items()
    ]
    with DebianPostgres(
        certificate=issued.cert,
        key=issued.key,
        root=authority.root,
        hba=hba,
        settings={"max_wal_senders": "4"},
    ) as postgres:
        for role, method in ROLES.items():
            encryption = "md5" if method == "md5" else "scram-sha-256"
            postgres.execute(
                f"SET password_encryption = '{encryption}'; "
                f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD '{role}'"
            )
        yield postgres


@pytest.fixture(scope="module")
def shown(authority: Authority) -> Issued:
    """The certificate that clients are shown: not the server's."""
    return authority.issue("127.0.0.1")


@pytest.fixture(scope="module")
def users_file(server: DebianPostgres, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("users") / "users.txt"
    secrets = dict(server.execute("SELECT rolname, rolpassword FROM pg_authid WHERE rolname LIKE 'with%'"))
    secrets |= {"with_md5": "with_md5", "with_password": "with_password"}
    path.write_text("".join(f'"{role}" "{secret}"\n' for role, secret in secrets.items()))
    path.chmod(0o600)
    return path


class Legs:
    """Makes proxies with TLS on the connections named, and keeps them for the module."""

    def __init__(self, server: DebianPostgres, shown: Issued, root: Path) -> None:
        self._server, self._shown, self._root = server, shown, root
        self._proxies: dict[tuple[bool, bool, str], Proxy] = {}

    def proxy(self, client_tls: bool, server_tls: bool, auth: Auth) -> Proxy:
        key = (client_tls, server_tls, auth.model_dump_json())
        if key not in self._proxies:
            self._proxies[key] = Proxy(
                self._server.host,
                self._server.port,
                listen=self._listen(client_tls),
                upstream=self._upstream(server_tls),
                auth=auth,
            ).__enter__()
        return self._proxies[key]

    def _listen(self, tls: bool) -> Listen:
        return Listen(tls_cert=self._shown.cert, tls_key=self._shown.key) if tls else Listen()

    def _upstream(self, tls: bool) -> Upstream:
        host, port = self._server.host, self._server.port
        if not tls:
            return Upstream(host=host, port=port, sslmode="disable")
        return Upstream(host=host, port=port, sslmode="verify-full", sslrootcert=self._root)

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.__exit__()


@pytest.fixture(scope="module")
def legs(server: DebianPostgres, shown: Issued, authority: Authority) -> Iterator[Legs]:
    legs = Legs(server, shown, authority.root)
    yield legs
    legs.close()


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def by_libpq(proxy: Proxy, role: str, tls: bool, binding: str = "prefer", password: str | None = None) -> str:
    """Log in and return the name of the user in the session."""
    options = (
        f"sslmode={'require' if tls else 'disable'} channel_binding={binding} password={password or role}"
    )
    with psycopg.connect(f"{proxy.dsn('postgres', role)} {options}") as connection:
        assert bool(connection.pgconn.ssl_in_use) is tls
        row = connection.execute("SELECT current_user").fetchone()
    assert row is not None
    return str(row[0])


def by_asyncpg(proxy: Proxy, role: str, tls: bool) -> str:
    """The same with a driver that does not support channel binding."""
    context = trusting() if tls else False

    async def run() -> str:
        connection = await asyncpg.connect(
            host=proxy.host, port=proxy.port, user=role, password=role, database="postgres", ssl=context
        )
        try:
            return str(await connection.fetchval("SELECT current_user"))
        finally:
            await connection.close()

    return asyncio.run(run())


LEGS = pytest.mark.parametrize(
    ("client_tls", "server_tls"),
    [
        pytest.param(False, False, id="plain-plain"),
        pytest.param(True, False, id="tls-plain"),
        pytest.param(False, True, id="plain-tls"),
        pytest.param(True, True, id="tls-tls"),
    ],
)


class TestRelayed:
    @LEGS
    @pytest.mark.parametrize("role", ["with_md5", "with_password", "with_trust"])
    def test_everything_but_scram_always_works(
        self, legs: Legs, client_tls: bool, server_tls: bool, role: str
    ) -> None:
        assert by_libpq(legs.proxy(client_tls, server_tls, Auth()), role, client_tls) == role

    @LEGS
    def test_scram_works_but_with_tls_on_both(self, legs: Legs, client_tls: bool, server_tls: bool) -> None:
        proxy = legs.proxy(client_tls, server_tls, Auth())
        before = proxy.counters.logins_failed["channel binding"]
        if not (client_tls and server_tls):
            assert by_libpq(proxy, "with_scram", client_tls) == "with_scram"
            return
        with pytest.raises(psycopg.OperationalError, match="SCRAM cannot be relayed") as caught:
            by_libpq(proxy, "with_scram", client_tls)
        for remedy in ('auth.mode = "scram"', "upstream.sslmode", "channel_binding=disable"):
            assert remedy in str(caught.value)
        assert proxy.counters.logins_failed["channel binding"] == before + 1

    @LEGS
    def test_scram_always_works_without_channel_binding(
        self, legs: Legs, client_tls: bool, server_tls: bool
    ) -> None:
        proxy = legs.proxy(client_tls, server_tls, Auth())
        assert by_libpq(proxy, "with_scram", client_tls, "disable") == "with_scram"
        assert by_asyncpg(proxy, "with_scram", client_tls) == "with_scram"

    @LEGS
    def test_a_wrong_password_gives_the_servers_own_error(
        self, legs: Legs, server: DebianPostgres, client_tls: bool, server_tls: bool
    ) -> None:
        proxy = legs.proxy(client_tls, server_tls, Auth())
        with pytest.raises(psycopg.OperationalError) as direct:
            psycopg.connect(
                host=server.host, port=server.port, user="with_scram", password="wrong", dbname="postgres"
            )
        with pytest.raises(psycopg.OperationalError) as through:
            by_libpq(proxy, "with_scram", client_tls, "disable", "wrong")
        fatal = 'FATAL:  password authentication failed for user "with_scram"'
        assert fatal in str(direct.value)
        assert fatal in str(through.value)


class TestEnded:
    @pytest.fixture
    def auth(self, users_file: Path) -> Auth:
        return Auth(mode="scram", users_file=users_file)

    @LEGS
    @pytest.mark.parametrize("role", [role for role in ROLES if role != "with_cert"])
    def test_every_method_of_the_server(
        self, legs: Legs, auth: Auth, client_tls: bool, server_tls: bool, role: str
    ) -> None:
        proxy = legs.proxy(client_tls, server_tls, auth)
        assert by_libpq(proxy, role, client_tls) == role
        assert by_asyncpg(proxy, role, client_tls) == role

    def test_a_certificate_of_the_proxys_own(
        self, server: DebianPostgres, authority: Authority, auth: Auth
    ) -> None:
        own = authority.issue("proxy.example", common_name="with_cert")
        upstream = Upstream(
            host=server.host,
            port=server.port,
            sslmode="verify-full",
            sslrootcert=authority.root,
            sslcert=own.cert,
            sslkey=own.key,
        )
        with Proxy(server.host, server.port, upstream=upstream, auth=auth) as proxy:
            assert by_libpq(proxy, "with_cert", False) == "with_cert"
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                by_libpq(proxy, "with_cert", False, password="wrong")

    @LEGS
    def test_replication(self, legs: Legs, auth: Auth, client_tls: bool, server_tls: bool) -> None:
        proxy = legs.proxy(client_tls, server_tls, auth)
        dsn = f"{proxy.dsn('postgres', 'with_scram')} password=with_scram replication=database"
        with psycopg.connect(dsn, autocommit=True) as connection:
            row = connection.pgconn.exec_(b"IDENTIFY_SYSTEM")
            assert row.status == psycopg.pq.ExecStatus.TUPLES_OK
            assert row.get_value(0, 3) == b"postgres"

    @pytest.mark.parametrize("server_tls", [False, True])
    def test_channel_binding_can_be_required(
        self, legs: Legs, auth: Auth, server_tls: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On each encrypted connection to its own certificate."""
        used: list[bytes] = []

        class Watched(Client):
            def first(self) -> bytes:
                used.append(self.mechanism)
                return super().first()

        monkeypatch.setattr(login, "Client", Watched)
        proxy = legs.proxy(True, server_tls, auth)
        assert by_libpq(proxy, "with_scram", True, "require") == "with_scram"
        assert used == [b"SCRAM-SHA-256-PLUS" if server_tls else b"SCRAM-SHA-256"]

    @LEGS
    def test_by_query(self, legs: Legs, server: DebianPostgres, client_tls: bool, server_tls: bool) -> None:
        dsn = f"postgresql://postgres@/postgres?host={server.socket_directory}&port={server.port}"
        proxy = legs.proxy(client_tls, server_tls, Auth(mode="scram", query_dsn=SecretStr(dsn)))
        assert by_libpq(proxy, "with_scram", client_tls) == "with_scram"
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            by_libpq(proxy, "with_scram", client_tls, password="wrong")

    @LEGS
    def test_a_wrong_password(self, legs: Legs, auth: Auth, client_tls: bool, server_tls: bool) -> None:
        proxy = legs.proxy(client_tls, server_tls, auth)
        with pytest.raises(psycopg.OperationalError) as caught:
            by_libpq(proxy, "with_scram", client_tls, password="wrong")
        assert 'FATAL:  password authentication failed for user "with_scram"' in str(caught.value)

    def test_taking_the_offer_away_is_found_out(self, legs: Legs, auth: Auth, shown: Issued) -> None:
        """A second proxy in between, which relays: the client's binding is to another certificate."""
        ending = legs.proxy(True, True, auth)
        upstream = Upstream(host=ending.host, port=ending.port, sslmode="require")
        with Proxy(ending.host, ending.port, upstream=upstream) as between:
            assert by_libpq(between, "with_scram", False) == "with_scram"
            with pytest.raises(psycopg.OperationalError, match="channel binding"):
                by_libpq(between, "with_scram", False, "require")


class TestErrors:
    """What PostgreSQL says about channel binding, the proxy says."""

    @pytest.mark.parametrize(
        ("mechanism", "first"),
        [
            (b"SCRAM-SHA-256", b"y,,n=,r=a"),
            (b"SCRAM-SHA-256", b"p=tls-server-end-point,,n=,r=a"),
            (b"SCRAM-SHA-256-PLUS", b"n,,n=,r=a"),
            (b"SCRAM-SHA-256-PLUS", b"y,,n=,r=a"),
            (b"SCRAM-SHA-256-PLUS", b"p=tls-unique,,n=,r=a"),
            (b"SCRAM-SHA-256-PLUS", b"p=,,n=,r=a"),
            (b"SCRAM-SHA-256-PLUS", b"p,,n=,r=a"),
            (b"SCRAM-SHA-256-PLUS", b"p=tls-server-end-point"),
            (b"SCRAM-SHA-256-PLUS", b"p=tls-server-end-point,a=x,n=,r=a"),
            (b"SCRAM-SHA-256-PLUS", b""),
        ],
    )
    def test_a_wrong_first_message(
        self, legs: Legs, server: DebianPostgres, users_file: Path, mechanism: bytes, first: bytes
    ) -> None:
        self.both(legs, server, users_file, lambda talk: talk.send(initial(first, mechanism)))

    @pytest.mark.parametrize(
        "binding", [b"", b"biws", b"another", base64.b64encode(b"p=tls-server-end-point,,x")]
    )
    def test_a_binding_to_another_certificate(
        self, legs: Legs, server: DebianPostgres, users_file: Path, binding: bytes
    ) -> None:
        def act(talk: Talk) -> None:
            talk.send(initial(b"p=tls-server-end-point,,n=,r=a", b"SCRAM-SHA-256-PLUS"))
            challenge = talk.receive()
            assert challenge is not None
            nonce = challenge[1][4:].split(b",")[0]
            proof = base64.b64encode(bytes(32))
            talk.send(message("p", b"c=" + binding + b"," + nonce + b",p=" + proof))

        error = self.both(legs, server, users_file, act)
        assert error["M"] == "SCRAM channel binding check failed"

    def both(
        self, legs: Legs, server: DebianPostgres, users_file: Path, act: Callable[[Talk], None]
    ) -> dict[str, str]:
        proxy = legs.proxy(True, True, Auth(mode="scram", users_file=users_file))
        errors = []
        for where in ((server.host, server.port), (proxy.host, proxy.port)):
            with Talk(where, "with_scram", "postgres", tls=trusting()) as talk:
                offer = talk.receive()
                assert offer == ("R", b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0")
                act(talk)
                errors.append(error_of(talk.all()))
        assert errors[0] == errors[1]
        return errors[1]


@pytest.mark.slow
def test_a_proxy_in_service_with_tls_on_both_sides_and_a_certificate_that_changes(
    server: DebianPostgres, authority: Authority, users_file: Path, tmp_path: Path
) -> None:
    """Channel binding is to the certificate that the client was shown, the old one or the new."""
    cert, key = tmp_path / "proxy.pem", tmp_path / "proxy.key"

    def show(issued: Issued) -> None:
        for source, target in ((issued.key, key), (issued.cert, cert)):
            shutil.copy(source, tmp_path / "new")
            (tmp_path / "new").replace(target)

    show(authority.issue("127.0.0.1"))
    more = (
        f'sslmode = "verify-full"\nsslrootcert = "{authority.root}"\n'
        f'[listen]\ntls_mode = "require"\ntls_cert = "{cert}"\ntls_key = "{key}"\n'
        f'[auth]\nmode = "scram"\nusers_file = "{users_file}"\n'
    )
    with serving(tmp_path, (server.host, server.port), more) as served:
        served.wait_ready()
        dsn = (
            f"host=127.0.0.1 port={served.port} dbname=postgres user=with_scram sslmode=verify-full "
            f"sslrootcert={authority.root} channel_binding=require"
        )

        def serial() -> int:
            with psycopg.connect(f"{dsn} password=with_scram", autocommit=True) as connection:
                sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
                assert connection.execute(sql).fetchone() == (True,)
                timer = Timer(0.2, connection.cancel_safe)
                timer.start()
                with pytest.raises(psycopg.errors.QueryCanceled):
                    connection.execute("SELECT pg_sleep(20)")
                timer.join()
            with socket.create_connection(("127.0.0.1", served.port), timeout=10) as plain:
                plain.sendall(struct.pack("!II", 8, 80877103))
                assert plain.recv(1) == b"S"
                with trusting().wrap_socket(plain) as tls:
                    shown = tls.getpeercert(binary_form=True)
            assert shown is not None
            return int(Certificate.load(shown).serial_number)

        first = serial()
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(f"{dsn} password=wrong")
        show(authority.issue("127.0.0.1"))
        until(lambda: serial() != first)
