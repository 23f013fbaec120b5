"""Logging in through a proxy that authenticates by itself: real server, real drivers."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path
from threading import Timer

import asyncpg
import psycopg
import pytest
from pydantic import SecretStr

from bench.embedded import EmbeddedPostgres
from config.schema import Auth
from proxy.auth.users import parse
from proxy.auth.verifier import Keys
from tests.conftest import PASSWORD_ROLES
from tests.integration.logins import DATABASE, SCRAM_ROLE, Talk, address, direct, error_of, eventually
from tests.integration.proxied import Proxy

pytestmark = pytest.mark.integration


class TestDrivers:
    def test_psycopg(self, ending: Proxy) -> None:
        dsn = f"{ending.dsn(DATABASE, SCRAM_ROLE)} password={SCRAM_ROLE} application_name=me options='-c geqo=off'"
        with psycopg.connect(dsn) as connection:
            row = connection.execute(
                "SELECT current_user, current_setting('application_name'), current_setting('geqo')"
            )
            assert row.fetchone() == (SCRAM_ROLE, "me", "off")
            assert connection.info.parameter_status("server_version") is not None

    def test_asyncpg(self, ending: Proxy) -> None:
        async def run(password: str) -> str:
            connection = await asyncpg.connect(
                host=ending.host, port=ending.port, user=SCRAM_ROLE, password=password, database=DATABASE
            )
            try:
                return str(await connection.fetchval("SELECT current_user"))
            finally:
                await connection.close()

        assert asyncio.run(run(SCRAM_ROLE)) == SCRAM_ROLE
        with pytest.raises(asyncpg.InvalidPasswordError, match='failed for user "auth_scram"'):
            asyncio.run(run("wrong"))

    @pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
    @pytest.mark.parametrize("password", [SCRAM_ROLE, "wrong"])
    def test_psql_says_the_same(self, postgres: EmbeddedPostgres, ending: Proxy, password: str) -> None:
        outputs = []
        for host, port in (direct(postgres), address(ending)):
            command = [
                "psql",
                "-X",
                "-At",
                "-h",
                host,
                "-p",
                str(port),
                "-U",
                SCRAM_ROLE,
                "-c",
                "SELECT 1",
                DATABASE,
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, env={"PGPASSWORD": password, "PATH": "/usr/bin:/bin"}
            )
            outputs.append((done.returncode, done.stdout, done.stderr.replace(str(port), "PORT")))
        assert outputs[0] == outputs[1]
        assert outputs[0][1] == ("1\n" if password == SCRAM_ROLE else "")

    def test_cancel(self, ending: Proxy) -> None:
        dsn = f"{ending.dsn(DATABASE, SCRAM_ROLE)} password={SCRAM_ROLE}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SELECT 1")
            timer = Timer(0.2, connection.cancel_safe)
            timer.start()
            with pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute("SELECT pg_sleep(20)")
            timer.join()
            assert connection.execute("SELECT 1").fetchone() == (1,)


class TestByFile:
    @pytest.mark.parametrize("role", PASSWORD_ROLES)
    def test_the_server_may_ask_for_anything_that_the_file_has_an_answer_for(
        self, by_file: Proxy, role: str
    ) -> None:
        with psycopg.connect(f"{by_file.dsn(DATABASE, role)} password={role}") as connection:
            assert connection.execute("SELECT current_user").fetchone() == (role,)

    @pytest.mark.parametrize("role", PASSWORD_ROLES)
    def test_a_wrong_password(self, by_file: Proxy, role: str) -> None:
        with pytest.raises(
            psycopg.OperationalError, match=f'password authentication failed for user "{role}"'
        ):
            psycopg.connect(f"{by_file.dsn(DATABASE, role)} password=wrong")

    def test_a_server_that_trusts_lets_in_whom_the_proxy_lets_in(
        self, postgres: EmbeddedPostgres, by_file: Proxy
    ) -> None:
        dsn = by_file.dsn(DATABASE, postgres.user)
        with psycopg.connect(f"{dsn} password=any") as connection:
            assert connection.execute("SELECT current_user").fetchone() == (postgres.user,)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(f"{dsn} password=other")

    def test_a_changed_file_holds_within_seconds(
        self, postgres: EmbeddedPostgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "users.txt"
        path.write_text('"nobody" "x"')

        def lets_in(dsn: str) -> bool:
            try:
                psycopg.connect(dsn).close()
            except psycopg.OperationalError:
                return False
            return True

        with Proxy(postgres.host, postgres.port, auth=Auth(mode="scram", users_file=path)) as proxy:
            dsn = f"{proxy.dsn(DATABASE, postgres.user)} password=hush"
            assert not lets_in(dsn)
            path.write_text(f'"{postgres.user}" "hush"')
            assert eventually(lambda: lets_in(dsn))
            path.write_text(f'"{postgres.user}" hush')
            assert eventually(lambda: "line 1" in caplog.text)
            assert lets_in(dsn), "a file that cannot be used leaves the old users in force"
            path.unlink()
            assert eventually(lambda: "cannot be read" in caplog.text)
            assert lets_in(dsn)
        assert "hush" not in caplog.text

    def test_a_stale_verifier_is_named(self, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
        """The password is right, the salt another one: the server's verifier was made anew."""
        path = tmp_path / "users.txt"
        verifier = Keys.derive(SCRAM_ROLE.encode(), b"another salt....", 4096).verifier(
            b"another salt....", 4096
        )
        path.write_text(f'"{SCRAM_ROLE}" "{verifier.encode()}"\n"auth_md5" "{verifier.encode()}"')
        with Proxy(postgres.host, postgres.port, auth=Auth(mode="scram", users_file=path)) as proxy:
            with pytest.raises(psycopg.OperationalError, match=r"another SCRAM verifier[^\0]*out of date"):
                psycopg.connect(f"{proxy.dsn(DATABASE, SCRAM_ROLE)} password={SCRAM_ROLE}")
            with pytest.raises(psycopg.OperationalError, match=r"asks for an md5 hash[^\0]*plain text"):
                psycopg.connect(f"{proxy.dsn(DATABASE, 'auth_md5')} password={SCRAM_ROLE}")
            assert proxy.counters.logins_failed == {"upstream": 2}

    def test_a_stale_password_gets_the_servers_error_with_a_hint(
        self, postgres: EmbeddedPostgres, tmp_path: Path
    ) -> None:
        path = tmp_path / "users.txt"
        path.write_text(f'"{SCRAM_ROLE}" "old"')
        with (
            Proxy(postgres.host, postgres.port, auth=Auth(mode="scram", users_file=path)) as proxy,
            pytest.raises(psycopg.OperationalError) as caught,
        ):
            psycopg.connect(f"{proxy.dsn(DATABASE, SCRAM_ROLE)} password=old")
        assert 'password authentication failed for user "auth_scram"' in str(caught.value)
        assert "ruvector-proxy accepted the password, the server did not" in str(caught.value)


class TestByQuery:
    def lets_in(self, proxy: Proxy, role: str, password: str = "secret") -> bool:
        try:
            psycopg.connect(f"{proxy.dsn(DATABASE, role)} password={password}").close()
        except psycopg.OperationalError as error:
            if f'password authentication failed for user "{role}"' not in str(error):
                raise
            return False
        return True

    @pytest.mark.parametrize(
        ("change", "allowed"),
        [
            ("VALID UNTIL 'infinity'", True),
            ("VALID UNTIL 'tomorrow'", True),
            ("VALID UNTIL 'yesterday'", False),
            ("NOLOGIN", False),
            ("PASSWORD NULL", False),
        ],
    )
    def test_who_may_not_log_in_at_the_server_may_not_here(
        self,
        postgres: EmbeddedPostgres,
        by_query: Proxy,
        changing_role: str,
        change: str,
        allowed: bool,
    ) -> None:
        """The server trusts this changing_role: nothing but the proxy stands in the way."""
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"ALTER ROLE {changing_role} {change}")
        assert self.lets_in(by_query, changing_role) is allowed

    def test_a_changed_password_works_soon(
        self, postgres: EmbeddedPostgres, by_query: Proxy, changing_role: str
    ) -> None:
        assert self.lets_in(by_query, changing_role)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"ALTER ROLE {changing_role} PASSWORD 'changed'")
        assert eventually(lambda: self.lets_in(by_query, changing_role, "changed"), 3.0)
        assert not self.lets_in(by_query, changing_role)

    def test_an_md5_password_is_named_in_the_log_only(
        self, postgres: EmbeddedPostgres, by_query: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert not self.lets_in(by_query, "auth_md5", "auth_md5")
        assert "it has an md5 password; set it anew" in caplog.text

    def test_a_name_is_no_sql(self, by_query: Proxy) -> None:
        with Talk(address(by_query), "x' OR '1'='1", DATABASE) as talk:
            talk.prove("x", talk.challenge())
            assert error_of(talk.all())["M"] == "password authentication failed for user \"x' OR '1'='1\""

    @pytest.mark.parametrize(
        ("query", "problem"),
        [
            ("SELECT 1/(length($1::text) - length($1::text)), ''", "division by zero"),
            ("SELECT $1::text, pg_sleep(5)::text", "no answer within 0.3 s"),
            ("SELECT $1::text", "name as asked, and its verifier"),
            ("SELECT 'other', $1::text", "name as asked, and its verifier"),
            ("SELECT $1::text, x FROM (VALUES ('a'), ('b')) AS v (x)", "one row at most"),
        ],
    )
    def test_a_query_that_does_not_work_is_named_in_the_log_only(
        self,
        postgres: EmbeddedPostgres,
        query: str,
        problem: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        dsn = SecretStr(
            f"postgresql://{postgres.user}:hush@/postgres?host={postgres.host}&port={postgres.port}"
        )
        auth = Auth(mode="scram", query_dsn=dsn, query=query, query_timeout=0.3)
        with Proxy(postgres.host, postgres.port, auth=auth) as proxy:
            with Talk(address(proxy), SCRAM_ROLE, DATABASE) as talk:
                error = error_of(talk.all())
            assert proxy.counters.logins_failed == {"lookup": 1}
        assert (error["S"], error["C"]) == ("FATAL", "57P03")
        assert "auth.query" in error["H"]
        assert problem not in str(error)
        assert problem in caplog.text
        assert "hush" not in caplog.text

    def test_a_server_that_cannot_be_asked(
        self, postgres: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
    ) -> None:
        auth = Auth(mode="scram", query_dsn=SecretStr("postgresql://u:hush@127.0.0.1:1/postgres"))
        with (
            Proxy(postgres.host, postgres.port, auth=auth) as proxy,
            Talk(address(proxy), "u", DATABASE) as talk,
        ):
            assert error_of(talk.all())["C"] == "57P03"
        assert "Connect call failed" in caplog.text or "refused" in caplog.text
        assert "hush" not in caplog.text

    def test_many_logins_share_few_side_connections(
        self, postgres: EmbeddedPostgres, by_query: Proxy
    ) -> None:
        async def log_in(number: int) -> None:
            user = SCRAM_ROLE if number % 2 else "auth_password"
            connection = await asyncpg.connect(
                host=by_query.host, port=by_query.port, user=user, password=user, database=DATABASE
            )
            await connection.close()

        async def run() -> int:
            watching = await asyncpg.connect(
                host=postgres.host, port=postgres.port, user=postgres.user, database="postgres"
            )
            await asyncio.gather(*[log_in(i) for i in range(40)], return_exceptions=True)
            sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ruvector-proxy auth'"
            count = await watching.fetchval(sql)
            await watching.close()
            return int(count)

        assert 1 <= asyncio.run(run()) <= 2 * 2  # two connections, and those of a test before that are ending


MANUAL = Path(__file__).parents[2] / "docs" / "authentication.md"


class TestTheManual:
    """What docs/authentication.md shows is what works."""

    def test_the_statement_for_a_users_file_writes_one(self, postgres: EmbeddedPostgres) -> None:
        (sql,) = re.findall(r"```sql\n(SELECT.*?)```", MANUAL.read_text(encoding="utf-8"), re.DOTALL)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute('CREATE ROLE "auth ""quoted""" LOGIN PASSWORD $$x$$')
            try:
                lines = [row[0] for row in connection.execute(sql).fetchall()]
            finally:
                connection.execute('DROP ROLE "auth ""quoted"""')
        users = parse("\n".join(lines))
        assert {b"auth_scram", b"auth_password", b'auth "quoted"'} <= set(users)
        assert b"auth_md5" not in users

    def test_the_lookup_function_needs_no_superuser_and_gives_its_role_nothing_else(
        self, postgres: EmbeddedPostgres
    ) -> None:
        text = MANUAL.read_text(encoding="utf-8")
        (sql,) = re.findall(r"```sql\n(CREATE ROLE.*?)```", text, re.DOTALL)
        (query,) = re.findall(r'^query = "(.*)"$', text, re.MULTILINE)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(sql)
            try:
                dsn = f"postgresql://ruvector_lookup@/postgres?host={postgres.host}&port={postgres.port}"
                auth = Auth(mode="scram", query_dsn=SecretStr(dsn), query=query)
                with Proxy(postgres.host, postgres.port, auth=auth) as proxy:
                    dsn = proxy.dsn(DATABASE, SCRAM_ROLE)
                    with psycopg.connect(f"{dsn} password={SCRAM_ROLE}") as through:
                        assert through.execute("SELECT current_user").fetchone() == (SCRAM_ROLE,)
                    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                        psycopg.connect(f"{dsn} password=wrong")
                for role, statement in (
                    ("ruvector_lookup", "SELECT rolpassword FROM pg_authid"),
                    (SCRAM_ROLE, "SELECT * FROM ruvector_auth.verifier('x')"),
                ):
                    connection.execute(f"SET ROLE {role}")
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        connection.execute(statement)
                    connection.execute("RESET ROLE")
                superusers = connection.execute(
                    "SELECT count(*) FROM ruvector_auth.verifier(%s)", (postgres.user,)
                ).fetchone()
                assert superusers == (0,)
            finally:
                connection.execute("DROP SCHEMA IF EXISTS ruvector_auth CASCADE")
                connection.execute("DROP ROLE ruvector_lookup")
