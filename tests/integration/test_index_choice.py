"""Two vector indexes on one column: each arm reaches its own, and the cheaper one that keeps the target wins."""

from __future__ import annotations

import asyncio
from collections import Counter

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from learning.dialects import IndexInfo
from learning.distillation import Options, distill
from learning.inventory import Confirmed, confirm
from learning.probe import measure
from learning.records import Arm, Label, TemplatePolicy
from learning.schedule import LabelPlan
from learning.upstream import Upstream
from tests.integration.learner_kit import UNFILTERED, clustered, create_items, query, template, text

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

ROWS = 16_000  # so many that an exact search is no rival of a few lists
TARGET = 0.8  # with overlapping clusters more would need most of the lists
IVFFLAT = "CREATE INDEX items_ivfflat ON items USING ivfflat (embedding vector_l2_ops) WITH (lists = {})"
QUERIES = clustered(300) + 0.3


def create_both(dsn: str, *, hnsw: str, lists: int) -> None:
    create_items(dsn, ROWS, index=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE INDEX items_hnsw ON items USING hnsw (embedding vector_l2_ops) {hnsw}")
        connection.execute(IVFFLAT.format(lists))
        connection.execute("ANALYZE items")


async def learn(postgres: EmbeddedPostgres, database: str, labels: int) -> tuple[Confirmed, TemplatePolicy]:
    """Return what the server confirms and the policy that labels of k = 10 support; k = 300 is asked too."""
    upstream = Upstream(postgres.uri())
    found = template(UNFILTERED, database)
    queries = [query(found, vector) for vector in QUERIES[:labels]]
    try:
        session = await upstream.session(database)
        many = query(found, QUERIES[0], k=300)
        confirmed = await confirm(session, found, queries[0], min_k=10, max_k=300, witnesses=(many,))
        assert isinstance(confirmed, Confirmed), confirmed
        measured: list[Label] = []
        for trajectory in queries:
            one = await measure(
                session,
                found,
                confirmed.types,
                confirmed.settings,
                trajectory,
                confirmed.arms,
                context="10",
                uniform=True,
                plan=LabelPlan(),
            )
            measured.append(one.label)
    finally:
        await upstream.close()
    options = Options(target_recall=TARGET)
    policy = distill(found, confirmed.facts, confirmed.arms, measured, Counter({"10": 1}), options)
    return confirmed, policy


def scanned(connection: psycopg.Connection[tuple[object, ...]], statement: str) -> set[str]:
    return {
        name
        for (line,) in connection.execute("EXPLAIN " + statement)
        for name in ("items_hnsw", "items_ivfflat")
        if name in str(line)
    }


def test_every_arm_reaches_its_own_index_even_where_a_generic_plan_is_cached(
    postgres: EmbeddedPostgres, database: str
) -> None:
    create_both(postgres.dsn(database), hnsw="", lists=40)
    confirmed, _ = asyncio.run(learn(postgres, database, 1))
    arms = [arm for arm in confirmed.arms if arm.effort]
    kinds = Counter(arm.kind for arm in arms)
    assert kinds["hnsw"] >= 8
    assert kinds["ivfflat"] >= 8
    assert {index.method for index in confirmed.indexes} == {"hnsw", "ivfflat"}
    assert all(index.oid and index.filenode for index in confirmed.indexes)
    vector = text(QUERIES[1])
    with psycopg.connect(postgres.dsn(database)) as connection:
        connection.execute(
            "PREPARE ask (vector, int) AS SELECT id FROM items ORDER BY embedding <-> $1 LIMIT $2"
        )
        connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        default = scanned(connection, f"EXECUTE ask ('{vector}', 10)")
        for k in (10, 300):
            for arm in arms:
                with connection.transaction(force_rollback=True):
                    put_in_force(connection, arm)
                    used = scanned(connection, f"EXECUTE ask ('{vector}', {k})")
                    assert used == {f"items_{arm.kind}"}, (arm, k)
        assert len(default) == 1  # so half of the arms had to change the plan


def put_in_force(connection: psycopg.Connection[tuple[object, ...]], arm: Arm) -> None:
    for name, value in arm.settings:
        connection.execute("SELECT set_config(%s, %s, true)", (name, value))


@pytest.mark.parametrize(
    ("hnsw", "lists", "cheaper"),
    [
        ("WITH (m = 2, ef_construction = 4)", 64, "ivfflat"),  # a graph that loses its way
        ("WITH (m = 16, ef_construction = 64)", 2, "hnsw"),  # lists as large as half the table
    ],
)
def test_cheaper_index_that_keeps_the_target_is_chosen(
    postgres: EmbeddedPostgres, database: str, hnsw: str, lists: int, cheaper: str
) -> None:
    create_both(postgres.dsn(database), hnsw=hnsw, lists=lists)
    confirmed, policy = asyncio.run(learn(postgres, database, 110))
    chosen = policy.arms[policy.contexts["10"].arm]
    assert chosen.kind == cheaper, policy.reason
    assert policy.contexts["10"].expected_recall >= TARGET
    assert confirmed.used[chosen.name] == (f"items_{cheaper}",)


def test_identity_of_an_index_changes_with_its_file(postgres: EmbeddedPostgres, database: str) -> None:
    create_both(postgres.dsn(database), hnsw="", lists=10)

    def inventory() -> tuple[IndexInfo, ...]:
        return asyncio.run(learn(postgres, database, 1))[0].indexes

    before = inventory()
    assert inventory() == before
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute("REINDEX INDEX items_hnsw")
    after = inventory()
    assert after[0].definition == before[0].definition
    assert after[0] != before[0]
    assert after[1] == before[1]
