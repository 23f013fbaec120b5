"""Fixtures of several modules.

For injection: a table of vectors, and a pair of connections to it, direct and through a proxy that dictates
settings.  For authentication: proxies that relay it, and that end it, by users file and by query.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from bench.embedded import EmbeddedPostgres
from config.schema import Auth
from proxy.auth.verifier import Keys
from tests.integration.logins import SCRAM_ROLE
from tests.integration.pair import LITERAL, SETTINGS, Pair
from tests.integration.proxied import Proxy
from tests.integration.raw import query

_numbers = itertools.count(1)


@pytest.fixture
def socket_path() -> Path:
    """Where a learner may listen: short, because a unix socket's path may have 107 bytes."""
    return Path("/tmp") / f"rvl-{uuid.uuid4().hex[:12]}.sock"


@pytest.fixture
def store(postgres: EmbeddedPostgres, database: str) -> Iterator[str]:
    """Return the connection URI of a database for the store, apart from the one that is searched."""
    name = f"store_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres.uri(name)
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def items(postgres: EmbeddedPostgres) -> Iterator[str]:
    """Return a database with a table of 600 vectors and an HNSW index, which is always used.

    The table is small: the planner would rather sort it.
    """
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE vectors STRATEGY file_copy")
        connection.execute("ALTER DATABASE vectors SET enable_seqscan = off")
    with psycopg.connect(postgres.dsn("vectors"), autocommit=True) as connection:
        connection.execute("CREATE TABLE items (id int PRIMARY KEY, category int, embedding vector(3))")
        connection.execute(
            "INSERT INTO items SELECT i, i % 3, ARRAY[sin(i), cos(i * 1.7), sin(i * 0.3)]::vector "
            "FROM generate_series(1, 600) i"
        )
        connection.execute("CREATE INDEX ON items USING hnsw (embedding vector_l2_ops)")
        connection.execute("VACUUM ANALYZE items")
    yield "vectors"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("DROP DATABASE vectors WITH (FORCE)")


@pytest.fixture(scope="module")
def dictating(postgres: EmbeddedPostgres) -> Iterator[Proxy]:
    with Proxy(postgres.host, postgres.port) as proxy:
        yield proxy


@pytest.fixture
def pair(postgres: EmbeddedPostgres, dictating: Proxy, items: str) -> Iterator[Pair]:
    dictating.dictate(SETTINGS)
    pair = Pair(postgres, dictating, items)
    with pair.direct, pair.proxied:
        pair.same(query(LITERAL.replace("500", "1") + " OFFSET 0 -- loads pgvector"))
        yield pair


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


@pytest.fixture(scope="module")
def relay(postgres: EmbeddedPostgres) -> Iterator[Proxy]:
    with Proxy(postgres.host, postgres.port) as proxy:
        yield proxy


@pytest.fixture(params=["by_file", "by_query"])
def ending(request: pytest.FixtureRequest) -> Proxy:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Proxy)
    return found


@pytest.fixture
def changing_role(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A role with the password "secret" that the server itself lets in unasked; dropped after the test."""
    name = f"auth_changing_{next(_numbers)}"  # never twice: answers are remembered for seconds
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
        yield name
        connection.execute(f"DROP ROLE {name}")
