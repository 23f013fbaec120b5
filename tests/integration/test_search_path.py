"""Names on the learner's side connections: a schema that somebody else writes to changes nothing of its own SQL.

The trap is a schema in front of pg_catalog that holds a stand-in for everything that the learner, or asyncpg by
itself, calls.  Each stand-in raises an error, so that one that is called is seen.
"""

from __future__ import annotations

import asyncio

import numpy as np
import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from learning import benchmarks
from learning.inventory import Confirmed, Rejected, confirm, look
from learning.names import OWN_PATH
from learning.probe import Probed, measure_one, measure_together
from learning.records import Template, Trajectory, Value
from learning.schedule import LabelPlan
from learning.tablestats import sketch
from learning.upstream import Session
from tests.integration.learner_kit import (
    FILTERED,
    UNFILTERED,
    clustered,
    connected,
    create_items,
    query,
    template,
)

pytestmark = pytest.mark.integration

QUERY = clustered(60)[3] + 0.3
HOSTILE = "trap, pg_catalog, public"

FUNCTIONS = (
    "count(anyelement)", "now()", "unnest(anyarray)", "set_config(text, text, bool)", "current_setting(text)",
    "current_setting(text, bool)", "json_agg(anyelement)", "to_regclass(text)", "quote_ident(text)", "quote_ident(name)",
    "strpos(text, text)", "format_type(oid, int)", "pg_relation_size(regclass)", "pg_relation_filenode(regclass)",
    "pg_get_indexdef(oid)", "random()", "array_agg(anyelement)", "pg_backend_pid()",
)  # fmt: skip
OPERATORS = (("=", "oid", "oid"), ("=", "name", "name"), ("=", "name", "text"), ("=", "text", "text"), ("~", "text", "text"),
             ("~~", "text", "text"), ("<>", "oid", "oid"), ("=", '"char"', '"char"'), ("||", "text", "text"),
             (">", "int2", "int4"), ("=", "int2", "int2"), ("<=", "float8", "float8"))  # fmt: skip
CATALOGS = (
    "pg_class",
    "pg_type",
    "pg_namespace",
    "pg_proc",
    "pg_index",
    "pg_settings",
    "pg_stats",
    "pg_roles",
)


def trap() -> list[str]:
    """Return the statements that make the schema."""
    body = "LANGUAGE plpgsql STABLE AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$"
    made = ["CREATE SCHEMA trap", "GRANT USAGE ON SCHEMA trap TO PUBLIC"]
    for signature in FUNCTIONS:
        result = "anyelement" if "any" in signature and "array" not in signature else "text"
        made.append(f"CREATE FUNCTION trap.{signature} RETURNS {result} {body}")
    for number, (operator, left, right) in enumerate(OPERATORS):
        made.append(f"CREATE FUNCTION trap.operator_{number}({left}, {right}) RETURNS bool {body}")
        made.append(
            f"CREATE OPERATOR trap.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = trap.operator_{number})"
        )
    # A row of the stand-in cannot be read without an error.
    made.append(f"CREATE FUNCTION trap.sprung() RETURNS oid {body}")
    made += [f"CREATE VIEW trap.{name} AS SELECT trap.sprung() AS oid" for name in CATALOGS]
    made += [
        f"CREATE DOMAIN trap.{name} AS pg_catalog.{name} CHECK (trap.sprung() IS NULL)"
        for name in ("text", "oid")
    ]
    return made


def execute(postgres: EmbeddedPostgres, database: str, *statements: str) -> None:
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


async def current(session: Session) -> str:
    return str(await session.connection.fetchval("SHOW search_path"))


def test_the_trap_springs(postgres: EmbeddedPostgres, database: str) -> None:
    """The test's own means: names that bear no schema are caught."""
    execute(postgres, database, *trap())
    caught = (
        "SELECT now()", "SELECT random()", "SELECT 'a'::name = 'b'::name", "SELECT * FROM pg_class",
        "SELECT 'a'::text", "SELECT set_config('work_mem', '5MB', true)",
    )  # fmt: skip
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute("SET search_path = trap, pg_catalog, public")
        for statement in caught:
            with pytest.raises(psycopg.errors.RaiseException, match="trapped"):
                connection.execute(statement)


@pytest.mark.slow
@pytest.mark.parametrize("sql", [UNFILTERED, FILTERED])
def test_the_learners_own_sql_is_not_caught(postgres: EmbeddedPostgres, database: str, sql: str) -> None:
    """Everything that the learner asks for one template, while the client's search_path begins with the trap.

    The client's own statement calls nothing of the trap: its operators are of other types.
    """
    create_items(postgres.dsn(database), rows=1000)
    execute(postgres, database, *trap(), "DROP OPERATOR trap.= (int2, int2)")
    found = template(sql, database, search_path=HOSTILE)
    values = [Value(0, b"1")] if sql == FILTERED else []
    samples = [query(found, QUERY + 0.01 * n, *values) for n in range(3)]

    async def work(session: Session) -> tuple[list[float], list[float], str]:
        known = await confirmed(session, found, samples[0])
        assert dict(known.settings)["search_path"] == HOSTILE
        plan = LabelPlan()
        probes = [Probed(sample, known.arms, "", True, plan) for sample in samples]
        alone = await measure_one(session, found, known.types, known.settings, probes[0])
        together = (
            await measure_together(
                session, found, known.types, known.settings, probes, exact_ms=alone.exact_ms
            )
            if sql == UNFILTERED
            else []
        )
        assert (await look(session, known.relation)).rows > 0
        assert await session.active_sessions() >= 0
        vectors = await sketch(session, known.relation, "embedding", known.facts.rows)
        assert vectors is not None
        exact = [each.label.results["exact"].recall for each in (alone, *together)]
        return exact, [alone.label.results["as is"].recall], await current(session)

    exact, as_is, path = connected(postgres, database, work)
    assert set(exact) == {1.0}
    assert as_is[0] > 0.0
    assert path == OWN_PATH


def test_names_of_the_clients_statement_are_the_clients(postgres: EmbeddedPostgres, database: str) -> None:
    """The same text means another table, and another function, by another search_path: both are measured."""
    create_items(postgres.dsn(database), rows=1000)
    execute(
        postgres,
        database,
        "CREATE SCHEMA other",
        "CREATE TABLE other.items (LIKE items)",
        "INSERT INTO other.items SELECT * FROM items LIMIT 700",
        "CREATE INDEX ON other.items USING hnsw (embedding vector_l2_ops)",
        "CREATE FUNCTION other.wanted(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN false; END'",
        "CREATE FUNCTION wanted(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS 'BEGIN RETURN true; END'",
        "ANALYZE other.items",
    )
    text = "SELECT id FROM items WHERE wanted(id) ORDER BY embedding <-> $1 LIMIT 10"

    async def work(session: Session) -> list[tuple[str, int, str]]:
        seen = []
        for path in ("public", "other, public", "public"):
            found = template(text, database, search_path=path)
            known = await confirmed(session, found, query(found, QUERY))
            probe = Probed(query(found, QUERY), known.arms, "", True, LabelPlan())
            measured = await measure_one(session, found, known.types, known.settings, probe)
            seen.append((known.facts.table, measured.label.found, await current(session)))
        return seen

    assert connected(postgres, database, work) == [
        ("public.items", 10, OWN_PATH),
        ("other.items", 0, OWN_PATH),
        ("public.items", 10, OWN_PATH),
    ]


@pytest.mark.parametrize(
    ("volatility", "owner", "reason"),
    [
        ("VOLATILE", "postgres", "operator <-> is volatile"),
        ("IMMUTABLE", "author", "operator <-> belongs to"),
    ],
)
def test_an_operator_in_front_is_not_run_by_a_superuser_or_if_volatile(
    postgres: EmbeddedPostgres, database: str, volatility: str, owner: str, reason: str
) -> None:
    create_items(postgres.dsn(database), rows=600)
    role = owner if owner == "postgres" else f"{owner}_{database}"
    make = [] if owner == "postgres" else [f"CREATE ROLE {role}"]
    execute(
        postgres,
        database,
        *make,
        "CREATE SCHEMA front",
        "CREATE FUNCTION front.distance(vector, vector) RETURNS float8 LANGUAGE plpgsql "
        f"{volatility} AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$",
        "CREATE OPERATOR front.<-> (LEFTARG = vector, RIGHTARG = vector, FUNCTION = front.distance)",
        f"ALTER FUNCTION front.distance OWNER TO {role}",
    )
    found = template(UNFILTERED, database, search_path="front, public")
    behind = template(UNFILTERED, database, search_path="public")

    async def work(session: Session) -> tuple[object, object]:
        return (
            await confirm(session, found, query(found, QUERY), max_k=10),
            await confirm(session, behind, query(behind, QUERY), max_k=10),
        )

    try:
        refused, taken = connected(postgres, database, work)
    finally:
        if make:
            execute(postgres, database, f"DROP OWNED BY {role} CASCADE", f"DROP ROLE {role}")
    assert isinstance(refused, Rejected)
    assert reason in refused.reason
    assert "trapped" not in refused.reason
    assert isinstance(taken, Confirmed)


def test_without_one_of_the_clients_the_servers_default_holds_not_the_learners(
    postgres: EmbeddedPostgres, database: str
) -> None:
    """What ALTER ROLE has set for the learner's role is no setting of the application's."""
    create_items(postgres.dsn(database), rows=600)
    found = template(UNFILTERED, database)

    async def work(session: Session) -> tuple[str, object]:
        return session.default_path, await confirm(session, found, query(found, QUERY), max_k=10)

    assert connected(postgres, database, work)[0] == '"$user", public'
    execute(postgres, database, f"ALTER ROLE postgres IN DATABASE {database} SET search_path = pg_catalog")
    path, answer = connected(postgres, database, work)
    assert path == '"$user", public'
    assert isinstance(answer, Rejected)  # here the application has the same role
    execute(postgres, database, f"ALTER ROLE postgres IN DATABASE {database} RESET search_path")
    assert isinstance(connected(postgres, database, work)[1], Confirmed)


def test_benchmarks_have_names_of_their_own(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database), rows=600)
    execute(
        postgres,
        database,
        *trap(),
        f"ALTER ROLE postgres IN DATABASE {database} SET search_path = trap, pg_catalog, public",
    )

    async def work() -> tuple[str, list[float]]:
        async with benchmarks.connection(postgres.uri(), database) as server:
            relation = await server.fetchval("SELECT 'public.items'::regclass::oid")
            column = await benchmarks.column_of(server, relation)
            vectors = await benchmarks.sample_rows(server, column, 2)
            rows = await benchmarks.ground_truth(server, column, vectors, 5, lambda words: None)
            return str(await server.fetchval("SHOW search_path")), [row["distances"][0] for row in rows]

    path, nearest = asyncio.run(work())
    assert path == OWN_PATH
    assert np.allclose(nearest, 0.0)


async def confirmed(session: Session, found: Template, sample: Trajectory) -> Confirmed:
    answer = await confirm(session, found, sample, max_k=sample.k + sample.offset)
    assert isinstance(answer, Confirmed), answer
    return answer
