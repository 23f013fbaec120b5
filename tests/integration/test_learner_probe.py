"""Confirmation and labels against a real server: what is bound, what is in force, what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import numpy as np
import psycopg
import pytest
from msgspec.structs import replace

from bench.embedded import EmbeddedPostgres
from learning import truth
from learning.binding import parameter_types
from learning.inventory import Confirmed, Rejected, confirm
from learning.probe import (
    BoundError,
    Measured,
    Probed,
    measure,
    measure_by_sample,
    measure_one,
    measure_together,
    snapshot,
)
from learning.records import Arm, Label, Template, Trajectory, Value
from learning.schedule import LabelPlan
from learning.tablestats import SKETCH_ROWS, sketch
from learning.upstream import DISCONNECTED, Session, UnavailableError, Upstream
from tests.integration.learner_kit import (
    DIMENSIONS,
    FILTERED,
    UNFILTERED,
    Vectors,
    clustered,
    connected,
    create_items,
    query,
    template,
    text,
)

pytestmark = pytest.mark.integration

QUERY = clustered(60)[3] + 0.3


async def confirmed(session: Session, found: Template, sample: Trajectory) -> Confirmed:
    answer = await confirm(session, found, sample, max_k=sample.k + sample.offset)
    assert isinstance(answer, Confirmed), answer
    return answer


async def label(
    session: Session, found: Template, sample: Trajectory, arms: tuple[Arm, ...] | None = None
) -> Measured:
    known = await confirmed(session, found, sample)
    return await measure(
        session, found, known.types, known.settings, sample, arms or known.arms,
        context="", uniform=True, plan=LabelPlan(),
    )  # fmt: skip


def execute(postgres: EmbeddedPostgres, database: str, *statements: str) -> None:
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def by_hand(
    postgres: EmbeddedPostgres, database: str, arm: Arm, vector: Vectors, where: str = "true"
) -> list[int]:
    """Return the ids that a user gets who sets the arm's settings by hand."""
    with psycopg.connect(postgres.dsn(database)) as connection:
        for name, value in arm.settings:
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        sql = f"SELECT id FROM items WHERE {where} ORDER BY embedding <-> '{text(vector)}' LIMIT 10"
        return [row[0] for row in connection.execute(sql)]


@pytest.mark.slow
def test_every_arm_is_measured_as_a_user_would_see_it(postgres: EmbeddedPostgres, database: str) -> None:
    vectors = create_items(postgres.dsn(database))
    order = np.argsort(((vectors - QUERY) ** 2).sum(axis=1), kind="stable")

    async def work(session: Session) -> tuple[Confirmed, Measured]:
        found = template(UNFILTERED, database)
        return await confirmed(session, found, query(found, QUERY)), await label(
            session, found, query(found, QUERY)
        )

    known, measured = connected(postgres, database, work)
    results = measured.label.results
    assert set(results) == {arm.name for arm in known.arms}
    assert measured.label.found == 10
    for arm in known.arms:
        ids = by_hand(postgres, database, arm, QUERY)
        assert results[arm.name].recall == len(set(ids) & set(order[:10].tolist())) / 10, arm.name
        assert results[arm.name].rows == len(ids)
    assert results["as is"].recall == results["ef=40"].recall  # the setting of the arm before is gone
    assert 0 < results["exact"].ms < measured.seconds * 1000


@pytest.mark.slow
def test_rungs_above_one_that_found_everything_are_not_run_but_the_served_one_is(
    postgres: EmbeddedPostgres, database: str
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)

    async def work(session: Session) -> tuple[str, Measured, Measured]:
        known = await confirmed(session, found, query(found, QUERY))
        top = [arm.name for arm in known.arms if arm.effort][-1]
        plan = LabelPlan(thorough=False)
        labels = [
            await measure(
                session, found, known.types, known.settings, sample, known.arms,
                context="", uniform=True, plan=plan,
            )
            for sample in (query(found, QUERY), query(found, QUERY, arm=top))
        ]  # fmt: skip
        return top, labels[0], labels[1]

    top, as_is, higher = connected(postgres, database, work)
    rungs = [result.recall for name, result in as_is.label.results.items() if name.startswith("ef=")]
    assert rungs[-1] == 1.0
    assert all(recall < 1.0 for recall in rungs[:-1])
    assert top not in as_is.label.results
    assert higher.label.results[top].recall == 1.0


BINDINGS: dict[str, tuple[str, list[Value]]] = {
    "int4": ("n = $2", [Value(0, b"7"), Value(1, struct.pack("!i", 7)), Value(1, struct.pack("!h", 7))]),
    "text": ("t = $2", [Value(0, b"it's \xe2\x82\xac 7"), Value(1, b"it's \xe2\x82\xac 7")]),
    "uuid": ("u = $2", [Value(0, str(uuid.UUID(int=7)).encode()), Value(1, uuid.UUID(int=7).bytes)]),
    "timestamptz": (
        "at = $2",
        [Value(0, b"2026-01-08 00:00:00+00"), Value(1, struct.pack("!q", 821_145_600 * 1_000_000))],
    ),
    "date": ("d = $2", [Value(0, b"2026-01-08"), Value(1, struct.pack("!i", 9504))]),
    "numeric": ("p = $2", [Value(0, b"7.5"), Value(1, struct.pack("!hhhhhh", 2, 0, 0, 1, 7, 5000))]),
    "enum": ("e = $2", [Value(0, b"some"), Value(1, b"some")]),
    "bool": ("b = $2", [Value(0, b"t"), Value(1, b"\x01")]),
    "int4[]": (
        "n = ANY ($2)",
        [Value(0, b"{7,NULL}"), Value(1, struct.pack("!iiIiiiii", 1, 0, 23, 2, 1, 4, 7, -1))],
    ),
    "text[]": (
        "t = ANY ($2)",
        [Value(0, '{"it\'s € 7"}'.encode()), Value(1, struct.pack("!iiIiii", 1, 0, 25, 1, 1, 10) + "it's € 7".encode())],
    ),
    "null": ("n = $2", [Value(0, None), Value(1, None)]),
}  # fmt: skip


@pytest.fixture
def typed(postgres: EmbeddedPostgres, database: str) -> str:
    """Return a database with a table of 12 rows with a column of each type; row 7 holds what is asked for."""
    execute(
        postgres,
        database,
        "CREATE TYPE amount AS ENUM ('none', 'some')",
        f"""CREATE TABLE typed AS SELECT i AS n, 'it''s € ' || i AS t, lpad(to_hex(i), 32, '0')::uuid AS u,
            '2026-01-01 00:00:00+00'::timestamptz + i * interval '1 day' AS at, '2026-01-01'::date + i AS d,
            i + 0.5 AS p, (CASE i WHEN 7 THEN 'some' ELSE 'none' END)::amount AS e, i = 7 AS b,
            array_fill(i, ARRAY[{DIMENSIONS}])::vector({DIMENSIONS}) AS embedding FROM generate_series(0, 11) AS i""",
        "CREATE INDEX ON typed USING hnsw (embedding vector_l2_ops)",
        "ANALYZE typed",
    )
    return database


@pytest.mark.parametrize("kind", BINDINGS)
def test_values_of_every_type_and_format_are_bound_as_the_client_bound_them(
    postgres: EmbeddedPostgres, typed: str, kind: str
) -> None:
    condition, values = BINDINGS[kind]
    found = template(f"SELECT n FROM typed WHERE {condition} ORDER BY embedding <-> $1 LIMIT 5", typed)
    exact = (Arm("exact", (("plan_cache_mode", "force_custom_plan"), ("enable_indexscan", "off")), "exact"),)

    async def work(session: Session) -> list[int]:
        known = await confirm(session, found, query(found, QUERY, values[0], k=5), max_k=5)
        # On twelve rows no plan uses the index; what matters here is that the values were understood.
        assert isinstance(known, Confirmed) or "vector index under any setting" in known.reason, known
        return [await _found(session, found, query(found, QUERY, value, k=5), exact) for value in values]

    rows = connected(postgres, typed, work)
    assert rows == [0 if kind == "null" else 1] * len(values)


async def _found(session: Session, found: Template, sample: Trajectory, arms: tuple[Arm, ...]) -> int:
    path = (("search_path", "public"),)
    async with snapshot(session, path):
        types = parameter_types(await session.connection.prepare(found.probe_sql))
    measured = await measure(
        session, found, types, path, sample, arms, context="", uniform=True, plan=LabelPlan()
    )
    return measured.label.found


def test_offset_is_part_of_what_has_to_be_found(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database), rows=1000)
    found = template("SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 10 OFFSET 20", database)
    sample = query(found, QUERY)
    measured = connected(postgres, database, lambda s: label(s, found, replace(sample, offset=20)))
    assert (measured.label.k, measured.label.found) == (30, 30)
    assert measured.label.results["as is"].rows == 30


def test_settings_of_the_applications_role_are_those_of_as_is(
    postgres: EmbeddedPostgres, database: str
) -> None:
    create_items(postgres.dsn(database), rows=1000)
    role = f"app_{database}"
    execute(
        postgres,
        database,
        f"CREATE ROLE {role}",
        f"ALTER ROLE {role} SET hnsw.ef_search = 10",
        f"ALTER ROLE {role} SET log_min_messages = 'error'",
        f"ALTER DATABASE {database} SET hnsw.ef_search = 500",
        f"ALTER DATABASE {database} SET hnsw.iterative_scan = off",
    )
    found = template("SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 30", database, user=role)
    try:
        known = connected(postgres, database, lambda s: confirmed(s, found, query(found, QUERY, k=30)))
        measured = connected(postgres, database, lambda s: label(s, found, query(found, QUERY, k=30)))
    finally:
        execute(postgres, database, f"DROP ROLE {role}")
    assert dict(known.settings) == {
        "hnsw.ef_search": "10",
        "hnsw.iterative_scan": "off",
        "search_path": f'"{role}", public',
    }
    assert measured.label.results["as is"].rows == 10  # what ef_search = 10 gives
    assert measured.label.results["ef=40"].rows == 30


@pytest.mark.parametrize(
    ("path", "user"), [('"o""k", public', "postgres"), ('"$user", public', 'o"k'), ("$user,public", 'o"k')]
)
def test_relation_is_looked_up_on_the_search_path_of_the_application(
    postgres: EmbeddedPostgres, database: str, path: str, user: str
) -> None:
    create_items(postgres.dsn(database), rows=600)
    execute(postgres, database, 'CREATE SCHEMA "o""k"', 'ALTER TABLE items SET SCHEMA "o""k"')
    found = template(UNFILTERED, database, user=user, search_path=path)
    known = connected(postgres, database, lambda s: confirmed(s, found, query(found, QUERY)))
    assert known.facts.table == 'o"k.items'
    lost = template(UNFILTERED, database, user=user, search_path="public")
    answer = connected(postgres, database, lambda s: confirm(s, lost, query(lost, QUERY), max_k=10))
    assert isinstance(answer, Rejected)
    assert "search_path" in answer.reason


def test_both_kinds_of_index_give_arms_that_use_them(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database), index=False)
    execute(
        postgres,
        database,
        "CREATE INDEX items_ivf ON items USING ivfflat (embedding vector_l2_ops) WITH (lists = 30)",
    )
    found = template(UNFILTERED, database)
    known = connected(postgres, database, lambda s: confirmed(s, found, query(found, QUERY)))
    assert {arm.kind for arm in known.arms} == {"as-is", "ivfflat", "exact"}
    assert known.indexes[0].lists == 30
    execute(postgres, database, "CREATE INDEX items_hnsw ON items USING hnsw (embedding vector_l2_ops)")
    known = connected(postgres, database, lambda s: confirmed(s, found, query(found, QUERY)))
    assert {index.method for index in known.indexes} == {"hnsw", "ivfflat"}
    measured = connected(postgres, database, lambda s: label(s, found, query(found, QUERY)))
    assert set(measured.label.results) == {arm.name for arm in known.arms}


def test_halfvec_index_on_an_expression_is_confirmed(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database), index=False)
    half = f"halfvec({DIMENSIONS})"
    execute(postgres, database, f"CREATE INDEX ON items USING hnsw ((embedding::{half}) halfvec_l2_ops)")
    found = template(f"SELECT id FROM items ORDER BY embedding::{half} <-> $1::{half} LIMIT 10", database)
    known = connected(postgres, database, lambda s: confirmed(s, found, query(found, QUERY)))
    assert "hnsw" in {arm.kind for arm in known.arms}


def test_filter_statistics_are_read_by_canonical_value(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database))
    found = template(FILTERED, database)
    known = connected(postgres, database, lambda s: confirmed(s, found, query(found, QUERY, Value(0, b"2"))))
    assert known.facts.selectivity.keys() <= {"0", "1", "2", "3"}
    assert sum(known.facts.selectivity.values()) == pytest.approx(1.0, abs=0.01)
    assert known.facts.rare_selectivity >= 1 / 4000
    assert known.facts.rows == 4000


def test_sketch_is_a_sample_of_the_column(postgres: EmbeddedPostgres, database: str) -> None:
    vectors = create_items(postgres.dsn(database), rows=800)
    execute(postgres, database, "ALTER TABLE items ADD COLUMN other vector(3)")

    async def work(session: Session) -> tuple[Any, Any, Any]:
        found = template(UNFILTERED, database)
        known = await confirmed(session, found, query(found, QUERY))
        return (
            await sketch(session, known.relation, "embedding", 800),
            await sketch(session, known.relation, "embedding", 8.0 * SKETCH_ROWS),
            await sketch(session, known.relation, "other", 800),
        )

    every, eighth, nothing = connected(postgres, database, work)
    assert sorted(map(tuple, every.tolist())) == sorted(map(tuple, vectors.tolist()))
    assert 50 < len(eighth) < 160
    assert nothing is None  # all NULL


def test_locked_table_is_no_reason_to_reject_it(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database), rows=600)
    found = template(UNFILTERED, database)
    with psycopg.connect(postgres.dsn(database)) as other:
        other.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(asyncpg.LockNotAvailableError):
            connected(postgres, database, lambda s: confirm(s, found, query(found, QUERY), max_k=10))
        other.rollback()
    connected(postgres, database, lambda s: confirmed(s, found, query(found, QUERY)))


def test_table_that_the_learner_may_not_read_is_rejected_in_words(
    postgres: EmbeddedPostgres, database: str
) -> None:
    create_items(postgres.dsn(database), rows=600)
    found = template(UNFILTERED, database)
    role = f"blind_{database}"
    execute(postgres, database, f"CREATE ROLE {role} LOGIN")

    async def work() -> Confirmed | Rejected:
        upstream = Upstream(postgres.uri().replace("postgres@", f"{role}@"))
        try:
            return await confirm(await upstream.session(database), found, query(found, QUERY), max_k=10)
        finally:
            await upstream.close()

    try:
        answer = asyncio.run(work())
    finally:
        execute(postgres, database, f"DROP ROLE {role}")
    assert isinstance(answer, Rejected)
    assert "permission denied for table items" in answer.reason


def test_superuser_does_not_run_what_others_have_written(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database), rows=600)
    role = f"author_{database}"
    execute(
        postgres,
        database,
        f"CREATE ROLE {role}",
        "CREATE FUNCTION mine(int) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT $1 >= 0'",
        "CREATE FUNCTION theirs(int) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT $1 >= 0'",
        f"ALTER FUNCTION theirs OWNER TO {role}",
    )
    answers = []
    try:
        for name in ("mine", "theirs"):
            found = template(
                f"SELECT id FROM items WHERE {name}(id) ORDER BY embedding <-> $1 LIMIT 5", database
            )
            sample = query(found, QUERY, k=5)
            answers.append(connected(postgres, database, _confirming(found, sample)))
    finally:
        execute(postgres, database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")
    assert isinstance(answers[0], Confirmed)
    assert f"belongs to {role}" in answers[1].reason


def _confirming(found: Template, sample: Trajectory) -> Callable[[Session], Awaitable[Confirmed | Rejected]]:
    return lambda session: confirm(session, found, sample, max_k=5)


def test_unreachable_or_unwilling_server_is_logged_once_and_without_the_password(
    postgres: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    host = postgres.uri().partition("?")[2]
    dsns = (
        f"postgresql://auth_scram:geheim@/postgres?{host}",
        "postgresql://u:geheim@/postgres?host=/nonexistent",
    )

    async def work() -> None:
        for dsn in dsns:
            upstream = Upstream(dsn)
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    await upstream.session("postgres")
                await asyncio.sleep(0.3)
            await upstream.close()

    asyncio.run(work())
    first, second = [record.message for record in caplog.records if "cannot use database" in record.message]
    assert "password authentication failed" in first
    assert "geheim" not in first + second


@pytest.mark.parametrize("turns", range(4))
def test_connection_that_the_server_ended_between_two_statements_is_lost(
    postgres: EmbeddedPostgres, database: str, turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    """`turns` of the event loop: the FATAL and the end of the stream may or may not have been seen."""

    async def ended_meanwhile(session: Session) -> None:
        async with snapshot(session, ()):
            backend = await session.connection.fetchval("SELECT pg_backend_pid()")
            with psycopg.connect(postgres.dsn(database), autocommit=True) as other:
                other.execute("SELECT pg_terminate_backend(%s)", (backend,))
            for _ in range(turns):
                await asyncio.sleep(0)
            await session.connection.fetch("SELECT 1")

    async def work() -> None:
        upstream = Upstream(postgres.uri())
        session = await upstream.session(database)
        with pytest.raises((*DISCONNECTED, asyncpg.InterfaceError)) as caught:
            await ended_meanwhile(session)
        assert upstream.is_lost(database, caught.value)
        await upstream.lost(database, caught.value)
        await upstream.close()

    asyncio.run(work())
    (said,) = [record.message for record in caplog.records if "cannot use database" in record.message]
    assert "state" not in said  # of asyncpg's own


@pytest.mark.parametrize("error", [asyncio.CancelledError, TimeoutError])
def test_a_connection_that_is_given_up_while_it_is_prepared_is_closed(
    postgres: EmbeddedPostgres, database: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    async def fails(session: Session) -> None:
        opened.append(session.connection)
        raise error

    async def work() -> None:
        monkeypatch.setattr(Session, "measure_round_trip", fails)
        upstream = Upstream(postgres.uri())
        with pytest.raises(asyncio.CancelledError if error is asyncio.CancelledError else UnavailableError):
            await upstream.session(database)
        (connection,) = opened
        assert connection.is_closed()
        await upstream.close()

    asyncio.run(work())


@pytest.mark.slow
def test_rows_of_a_larger_limit_are_a_label_for_a_smaller_one(
    postgres: EmbeddedPostgres, database: str
) -> None:
    create_items(postgres.dsn(database))
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute(
            "CREATE INDEX items_ivf ON items USING ivfflat (embedding vector_l2_ops) WITH (lists = 20)"
        )
    found = template(UNFILTERED, database)

    async def work(session: Session) -> tuple[Label, Label]:
        known = await confirm(session, found, query(found, QUERY), min_k=10, max_k=100)
        assert isinstance(known, Confirmed)
        hundred, ten = [
            await measure(
                session, found, known.types, known.settings, query(found, QUERY, k=k), known.arms,
                context="", uniform=True, plan=LabelPlan(), ks=(10, 100),
            )
            for k in (100, 10)
        ]  # fmt: skip
        return hundred.label, ten.label

    hundred, ten = connected(postgres, database, work)
    assert ten.smaller == {}
    assert set(hundred.smaller) == {10}
    directly = {name: result.recall for name, result in ten.results.items() if name != "exact"}
    assert {name: hundred.smaller[10][name] for name in directly} == directly
    assert {arm[:2] for arm in directly} >= {"ef", "pr"}
    assert min(directly.values()) < 1.0


@pytest.mark.slow
def test_one_pass_over_the_table_gives_the_labels_of_several_searches(
    postgres: EmbeddedPostgres, database: str
) -> None:
    vectors = create_items(postgres.dsn(database))
    execute(postgres, database, "INSERT INTO items VALUES (-1, 0, NULL)")
    found = template(UNFILTERED, database)
    asked = [
        query(found, vector, k=k) for vector, k in zip(vectors[:6] + 0.3, (1, 10, 10, 40, 10, 3), strict=True)
    ]
    ef_10 = (("hnsw.ef_search", "10"),)
    asked.append(query(found, vectors[9] + 0.3, arm="by hand", settings=ef_10))

    async def work(session: Session) -> tuple[list[Label], list[Label]]:
        known = await confirm(session, found, asked[0], min_k=1, max_k=40)
        assert isinstance(known, Confirmed)
        served = Arm("by hand", ef_10)
        queries = [Probed(one, (*known.arms, served), "", True, LabelPlan()) for one in asked]
        base = (session, found, known.types, known.settings)
        alone = [(await measure_one(*base, one, ks=(1, 10))).label for one in queries]
        together = await measure_together(*base, queries, exact_ms=123.0, ks=(1, 10))
        assert truth.can_batch(found, known.types)
        return alone, [one.label for one in together]

    def recalls(label: Label) -> dict[str, object]:
        each = {name: (result.recall, result.rows) for name, result in label.results.items()}
        return {**each, "found": label.found, "smaller": label.smaller, "k": label.k, "vector": label.vector}

    alone, together = connected(postgres, database, work)
    assert [recalls(label) for label in together] == [recalls(label) for label in alone]
    assert {label.results["exact"].ms for label in together} == {123.0}
    assert min(label.results["by hand"].recall for label in together) < 1.0


@pytest.mark.slow
def test_recall_by_a_sample_of_the_pages_is_right_on_average(
    postgres: EmbeddedPostgres, database: str
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    asked = [query(found, vector) for vector in clustered(150, seed=7)]

    async def work(session: Session) -> tuple[list[Label], list[Label]]:
        known = await confirmed(session, found, asked[0])
        arms = tuple(arm for arm in known.arms if arm.name in ("ef=10", "ef=40", "ef=200"))
        base = (session, found, known.types, known.settings)
        fully, sampled = [], []
        for number, one in enumerate(asked):
            probed = Probed(one, arms, "", True, LabelPlan())
            fully.append((await measure_one(*base, probed)).label)
            for seed in range(3):
                with contextlib.suppress(BoundError):
                    made = await measure_by_sample(*base, probed, share=0.3, seed=1000 * seed + number)
                    sampled.append(made.label)
        return fully, sampled

    fully, sampled = connected(postgres, database, work)
    assert 300 < len(sampled) <= 450
    assert {label.sampled for label in sampled} == {0.3}
    for arm in ("ef=10", "ef=40", "ef=200"):
        right = np.mean([label.results[arm].recall for label in fully])
        estimated = [label.results[arm].recall for label in sampled]
        error = np.std(estimated) / np.sqrt(len(estimated)) + 0.01
        assert np.mean(estimated) == pytest.approx(right, abs=3 * error), arm
    assert np.mean([label.results["ef=10"].recall for label in fully]) < 0.9
