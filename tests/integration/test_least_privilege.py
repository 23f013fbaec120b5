"""The learner's role: the grants in docs/security.md are enough, and each of them is needed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from learning.records import TemplatePolicy, Trust
from tests.integration.learner_kit import (
    UNFILTERED,
    clustered,
    configuration,
    create_items,
    learner,
    query,
    template,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "security.md"


def grants() -> list[str]:
    """Return the statements on the page, for this database, role and table."""
    block = re.search(r"```sql\n(CREATE ROLE ruvector.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    text = block[1].replace(" app ", " least ").replace(" items ", " items ")
    statements = [line.partition("--")[0].strip().rstrip(";") for line in text.splitlines()]
    return [statement for statement in statements if statement]


@pytest.fixture(scope="module")
def database(postgres: EmbeddedPostgres) -> Iterator[str]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE least STRATEGY file_copy")
    create_items(postgres.dsn("least"), 1500)
    with psycopg.connect(postgres.dsn("least"), autocommit=True) as connection:
        connection.execute("REVOKE ALL ON DATABASE least FROM PUBLIC")
        connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    yield "least"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("DROP DATABASE least WITH (FORCE)")
        connection.execute("DROP ROLE IF EXISTS ruvector")


def granted(postgres: EmbeddedPostgres, statements: list[str]) -> str:
    """Make the role anew with these grants; return the learner's connection URI."""
    with psycopg.connect(postgres.dsn("least"), autocommit=True) as connection:
        row = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'ruvector'").fetchone()
        if row is not None:
            connection.execute("DROP OWNED BY ruvector")
            connection.execute("DROP ROLE ruvector")
        for statement in statements:
            connection.execute(statement)
    return postgres.uri("least").replace("postgres@", "ruvector@")


async def first_policy(
    uri: str, tmp_path: Path, socket_path: Path, wanted: Callable[[TemplatePolicy], bool]
) -> TemplatePolicy:
    """Return the first policy that is as wanted of a learner with this URI."""
    found = template(UNFILTERED, "least")
    vectors = clustered(1500, seed=3)[:60]
    config = configuration(uri, tmp_path, learning={"target_recall": 0.9, "min_samples": 20})
    async with learner(config, socket_path) as worker:
        await worker.announce(found, [query(found, vector) for vector in vectors])
        return await worker.policy(found, wanted, timeout=150.0)


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_the_grants_on_the_page_are_enough(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    uri = granted(postgres, grants())
    policy = asyncio.run(
        first_policy(uri, tmp_path, socket_path, lambda policy: policy.trust is not Trust.OBSERVE)
    )
    assert policy.table == "public.items"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("missing", ["USAGE ON SCHEMA", "SELECT ON"])
def test_without_one_of_them_queries_are_left_alone(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path, missing: str
) -> None:
    statements = [statement for statement in grants() if missing not in statement]
    assert len(statements) == len(grants()) - 1
    uri = granted(postgres, statements)
    policy = asyncio.run(first_policy(uri, tmp_path, socket_path, lambda policy: bool(policy.reason)))
    assert policy.trust is Trust.OBSERVE
    assert "permission denied" in policy.reason or "does not exist" in policy.reason


def test_without_connect_there_is_no_connection(postgres: EmbeddedPostgres, database: str) -> None:
    uri = granted(postgres, [statement for statement in grants() if "CONNECT" not in statement])
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(uri)


def test_the_role_can_change_nothing(postgres: EmbeddedPostgres, database: str) -> None:
    with psycopg.connect(granted(postgres, grants()), autocommit=True) as connection:
        for statement in (
            "INSERT INTO items (id, section) VALUES (-1, 0)",
            "DELETE FROM items",
            "CREATE TABLE public.own (i int)",
            "CREATE SCHEMA own",
            "DROP TABLE items",
            "SELECT * FROM pg_authid",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)
