"""Logging in through the proxy: relayed, and ended in the proxy; real server, real drivers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from bench.embedded import EmbeddedPostgres
from config.schema import Auth
from proxy.auth.verifier import Keys
from tests.conftest import PASSWORD_ROLES
from tests.integration.proxied import Proxy

pytestmark = pytest.mark.integration

SCRAM_ROLE = "auth_scram"
"""Asked for scram-sha-256 by the server; its password is its name."""


def stored_verifier(postgres: EmbeddedPostgres, role: str) -> str:
    with psycopg.connect(postgres.dsn()) as connection:
        row = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = %s", (role,)).fetchone()
    assert row is not None
    return str(row[0])


@pytest.fixture(scope="module")
def users_file(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("users") / "users.txt"
    trusted = Keys.derive(b"any", b"0123456789abcdef", 4096).verifier(b"0123456789abcdef", 4096)
    path.write_text(
        f"""
; the users of these tests
"{SCRAM_ROLE}" "{stored_verifier(postgres, SCRAM_ROLE)}"
"auth_password" "auth_password"
"auth_md5" "auth_md5" ; in plain text, because the server asks for md5
"{postgres.user}" "{trusted.encode()}"
"""
    )
    return path


@pytest.fixture(scope="module")
def by_file(postgres: EmbeddedPostgres, users_file: Path) -> Iterator[Proxy]:
    auth = Auth(mode="scram", users_file=users_file)
    with Proxy(postgres.host, postgres.port, auth=auth) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def by_query(postgres: EmbeddedPostgres) -> Iterator[Proxy]:
    dsn = f"postgresql://{postgres.user}@/postgres?host={postgres.host}&port={postgres.port}"
    with Proxy(postgres.host, postgres.port, auth=Auth(mode="scram", query_dsn=SecretStr(dsn))) as proxy:
        yield proxy


class TestByFile:
    @pytest.mark.parametrize("role", PASSWORD_ROLES)
    def test_the_server_may_ask_for_anything_that_the_file_has_an_answer_for(
        self, by_file: Proxy, database: str, role: str
    ) -> None:
        with psycopg.connect(f"{by_file.dsn(database, role)} password={role}") as connection:
            assert connection.execute("SELECT current_user").fetchone() == (role,)
