"""The learner through its socket, against a real server: from a worker's frames to published policies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client import CollectorRegistry

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from config.schema import Config
from learning.channel import InjectionFailed, TemplateSeen, TrajectoryBatch, encode
from learning.optimizer import SearchOptimizer
from learning.records import TemplatePolicy, Trust, Value, is_hashed
from tests.integration.learner_kit import (
    FILTERED,
    UNFILTERED,
    Vectors,
    Worker,
    clustered,
    configuration,
    create_items,
    learner,
    query,
    sample,
    template,
)

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

QUERIES = clustered(300) + 0.3


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return Path("/tmp") / f"rvl-{uuid.uuid4().hex[:12]}.sock"


def left_alone(policy: TemplatePolicy) -> bool:
    return policy.trust is Trust.OBSERVE


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def section(number: int) -> Value:
    return Value(0, str(number).encode())


def test_unfiltered_template_gets_the_cheapest_arm_that_keeps_the_target(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))
    registry = CollectorRegistry()

    # More than "as is" (ef_search 40) reaches on this index.
    config = configuration(postgres, state, learning={"target_recall": 0.97})

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(config, socket_path, registry) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            policy = await worker.policy(found, lambda p: p.trust is Trust.STATIC)
            chosen = policy.arms[policy.fallback]
            assert policy.table == "public.items"
            assert policy.fallback == policy.contexts["10"].arm
            assert policy.contexts["10"].expected_recall >= 0.95
            assert chosen.kind == "hnsw"
            assert chosen.effort < max(arm.effort for arm in policy.arms)
            assert {arm.kind for arm in policy.arms} == {"as-is", "hnsw", "exact"}
            await asyncio.sleep(1.1)  # gauges are brought up to date once a second
        assert sample("ruvector_labels_total", labels={"table": "public.items"}, registry=registry) >= 20
        assert sample("ruvector_trajectories_received_total", registry=registry) == len(QUERIES)
        assert 0 < sample("ruvector_probe_seconds_total", registry=registry) < 60
        assert sample("ruvector_learner_policy_version", registry=registry) >= 1
        assert sample("ruvector_templates", labels={"trust": "static"}, registry=registry) == 1
        audited = sample("ruvector_audited_recall_ratio", labels={"table": "public.items"}, registry=registry)
        assert 0.5 < audited < 1.0  # "as is" was served, which misses neighbours on this index

    run(scenario())


def test_filter_value_of_middling_selectivity_gets_an_arm_that_finds_every_row(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    vectors = create_items(postgres.dsn(database))
    run(_filtered_scenario(postgres, database, state, socket_path, vectors))


async def _filtered_scenario(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path, vectors: Vectors
) -> None:
    found = template(FILTERED, database)
    contexts = {f"10\x1f{number}" for number in (0, 1, 2)}
    async with learner(configuration(postgres, state), socket_path) as worker:
        await worker.announce(found, [query(found, v, section(i % 3)) for i, v in enumerate(QUERIES)])
        policy = await worker.policy(
            found,
            lambda p: (
                p.trust is Trust.CONTEXT
                and contexts <= p.contexts.keys()
                and all(p.contexts[c].labels >= 5 for c in contexts)
            ),
        )
    middle = policy.contexts["10\x1f2"]
    assert middle.expected_recall >= 0.95
    assert policy.arms[middle.arm].kind != "as-is"
    assert policy.filter_slots == (0,)
    assert 0.03 < policy.selectivity["2"] < 0.07
    with psycopg.connect(postgres.dsn(database)) as connection:
        ask = "SELECT id FROM items WHERE section = 2 ORDER BY embedding <-> %s::vector LIMIT 10"
        vector = str(vectors[7].tolist())
        assert len(connection.execute(ask, (vector,)).fetchall()) < 10  # pgvector alone
        for name, value in policy.arms[middle.arm].settings:
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        assert len(connection.execute(ask, (vector,)).fetchall()) == 10


BARRED = {
    "row-level security is enabled on public.items": (
        UNFILTERED,
        "ALTER TABLE items ENABLE ROW LEVEL SECURITY",
    ),
    "there is no vector index on public.items": (UNFILTERED, "DROP INDEX items_hnsw"),
    "the function random is volatile": (
        "SELECT id FROM items WHERE random() < 0.5 ORDER BY embedding <-> $1 LIMIT 10",
        "SELECT 1",
    ),
    "serves <=>; those there serve <->": (
        "SELECT id FROM items ORDER BY embedding <=> $1 LIMIT 10",
        "SELECT 1",
    ),
    "public.looks is a view": (
        "SELECT id FROM looks ORDER BY embedding <-> $1 LIMIT 10",
        "CREATE VIEW looks AS SELECT * FROM items",
    ),
    "the relation nowhere does not exist": (
        "SELECT id FROM nowhere ORDER BY embedding <-> $1 LIMIT 10",
        "SELECT 1",
    ),
}


@pytest.mark.parametrize("reason", BARRED)
def test_template_that_cannot_be_confirmed_is_left_alone_with_the_reason(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path, reason: str
) -> None:
    sql, preparation = BARRED[reason]
    create_items(postgres.dsn(database), rows=500)
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute(preparation)

    async def scenario() -> None:
        found = template(sql, database)
        async with learner(configuration(postgres, state), socket_path) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES[:20]])
            policy = await worker.policy(found, left_alone)
            assert reason in policy.reason
            assert [arm.kind for arm in policy.arms] == ["as-is"]

    run(scenario())


def test_index_built_later_is_noticed(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database), index=False)

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(configuration(postgres, state), socket_path) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES[:50]])
            assert "no vector index" in (await worker.policy(found, left_alone)).reason
            with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
                connection.execute("CREATE INDEX ON items USING hnsw (embedding vector_l2_ops)")
            async with asyncio.timeout(90):
                while worker.snapshots[-1].templates[found.key].trust is Trust.OBSERVE:
                    await worker.announce(found, [query(found, vector) for vector in QUERIES[:50]])
                    with contextlib.suppress(TimeoutError):
                        await worker.snapshot(1.0)

    run(scenario())


def test_nothing_is_kept_of_a_table_that_is_switched_off(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database), rows=500)
    config = configuration(postgres, state, tables={"public.items": {"learning": False}})

    async def scenario() -> None:
        found = template(FILTERED, database)
        async with learner(config, socket_path) as worker:
            secret = Value(0, b"1")
            await worker.announce(found, [query(found, vector, secret) for vector in QUERIES[:50]])
            policy = await worker.policy(found, left_alone)
            assert "switched off" in policy.reason
            await worker.send(TrajectoryBatch(tuple(query(found, v, secret) for v in QUERIES[50:100])))
            await asyncio.sleep(1.2)

    run(scenario())
    stored = b"".join(path.read_bytes() for path in state.iterdir())
    assert not any(vector.astype("<f4").tobytes() in stored for vector in QUERIES[:100])


def test_refused_setting_switches_the_template_off_for_good(
    postgres: EmbeddedPostgres,
    database: str,
    state: Path,
    socket_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    registry = CollectorRegistry()

    async def first() -> None:
        async with learner(configuration(postgres, state), socket_path, registry) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            await worker.policy(found)
            await worker.send(InjectionFailed(found.key, "22023", "ef_search out of range"))
            policy = await worker.policy(found, left_alone)
            assert "22023: ef_search out of range" in policy.reason

    async def second() -> None:
        async with learner(configuration(postgres, state), socket_path) as worker:
            assert (await worker.snapshot()).templates[found.key].trust is Trust.OBSERVE
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            with pytest.raises(TimeoutError):
                await worker.snapshot(2.0)

    run(first())
    assert [r.levelno for r in caplog.records if "refused a setting" in r.message] == [logging.ERROR]
    assert sample("ruvector_injection_failures_total", registry=registry) == 1
    run(second())


def test_malformed_frame_costs_only_its_own_connection(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(configuration(postgres, state), socket_path) as good:
            for garbage in (
                b"\xff\xff\xff\xff",
                b"\x00\x00\x00\x05nonsense",
                encode(TemplateSeen(found))[:-1] + b"\xc1",
            ):
                bad = await Worker.connect(socket_path)
                await bad.send_bytes(garbage)
                assert await bad.closed()
                await bad.close()
            await good.announce(found, [query(found, vector) for vector in QUERIES])
            assert (await good.policy(found)).trust is not Trust.OBSERVE

    run(scenario())


def test_stopped_learner_leaves_no_session_and_no_socket(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ruvector-proxy learner'"

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(configuration(postgres, state), socket_path) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            await worker.policy(found)  # it is in the middle of measuring now

    run(scenario())
    assert not socket_path.exists()
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for _ in range(50):
            row = connection.execute(count).fetchone()
            if row == (0,):
                break
            connection.execute("SELECT pg_sleep(0.1)")
        assert row == (0,)


def test_every_worker_gets_the_policy_on_connecting(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(configuration(postgres, state), socket_path) as first:
            await first.announce(found, [query(found, vector) for vector in QUERIES])
            await first.policy(found)
            second = await Worker.connect(socket_path)
            assert (await second.snapshot(5.0)).version >= first.snapshots[-1].version
            await second.close()

    run(scenario())


def test_anonymized_learner_keeps_its_knowledge_without_keeping_values(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute("ALTER TABLE items ADD COLUMN name text")
        connection.execute("UPDATE items SET name = 'shelf-' || section")
        connection.execute("CREATE INDEX ON items (name)")
        connection.execute("VACUUM ANALYZE items")
    found = template("SELECT id FROM items WHERE name = $2 ORDER BY embedding <-> $1 LIMIT 10", database)
    config = configuration(postgres, state, learning={"anonymize": True})
    names = [Value(0, f"shelf-{number}".encode()) for number in range(3)]

    async def first() -> TemplatePolicy:
        async with learner(config, socket_path) as worker:
            await worker.announce(found, [query(found, v, names[i % 3]) for i, v in enumerate(QUERIES)])
            policy = await worker.policy(found, lambda p: len(p.contexts) == 3)
            await asyncio.sleep(1.2)
            return policy

    async def second() -> TemplatePolicy:
        async with learner(config, socket_path) as worker:
            snapshot = await worker.snapshot()
            assert all(is_hashed(context) for context in snapshot.templates[found.key].contexts)
            for value in names:  # each is served as before, from the first query on
                assert value.data is not None
                told = SearchOptimizer(snapshot).optimize(found.key, None, 10, (value.data.decode(),))
                assert told is not None
                assert told.reason == "measured"
            await worker.announce(found, [query(found, QUERIES[0], names[0])])
            return await worker.policy(found, lambda p: "10\x1fshelf-0" in p.contexts)

    before = asyncio.run(first())
    kept = b"".join(path.read_bytes() for path in state.iterdir())
    assert b"shelf-" not in kept
    assert not any(vector.astype("<f4").tobytes() in kept for vector in QUERIES)
    after = asyncio.run(second())
    name = "10\x1fshelf-0"
    assert after.contexts[name].labels >= before.contexts[name].labels  # the old labels were recognised


_CHILD = """
import asyncio, sys
from pathlib import Path
from config.schema import Config
from learning.worker import run
asyncio.run(run(Config.from_json(sys.stdin.read()), Path(sys.argv[1]), asyncio.Event()))
"""


def spawn(config: Config, socket_path: Path) -> subprocess.Popen[bytes]:
    """Start a learner in a process of its own."""
    process = subprocess.Popen([sys.executable, "-c", _CHILD, str(socket_path)], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(config.to_json().encode())
    process.stdin.close()
    return process


def test_killed_learner_publishes_its_last_policy_at_once_even_with_the_server_away(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(FILTERED, database)

    async def learn_and_die() -> TemplatePolicy:
        with spawn(configuration(postgres, state), socket_path) as process:
            worker = await Worker.connect(socket_path)
            await worker.announce(found, [query(found, v, section(i % 3)) for i, v in enumerate(QUERIES)])
            await worker.policy(found)
            await asyncio.sleep(1.5)  # labels are written once a second
            process.send_signal(signal.SIGKILL)
            process.wait()
            while not await _at_end(worker):
                pass
            await worker.close()
            return worker.snapshots[-1].templates[found.key]

    async def rise() -> None:
        away = configuration(f"postgresql://postgres@/{database}?host=/nonexistent", state)
        async with learner(away, socket_path) as worker:
            restored = await worker.snapshot(5.0)
            assert restored.templates[found.key] == before
            version = restored.version
        async with learner(configuration(postgres, state), socket_path) as worker:
            assert (await worker.snapshot(5.0)).version == version
            await worker.announce(found, [query(found, v, section(3)) for v in QUERIES])
            known = before.contexts.keys()
            later = await worker.policy(found, lambda p: "10\x1f3" in p.contexts)
            assert known <= later.contexts.keys()  # the labels of the first life still count
            assert worker.snapshots[-1].version > version

    before = asyncio.run(learn_and_die())
    run(rise())


async def _at_end(worker: Worker) -> bool:
    """Read what a dead learner had still sent; True once everything is read."""
    try:
        await worker.snapshot(2.0)
    except (AssertionError, ConnectionError):
        return True
    return False


def test_restart_of_the_server_keeps_the_policy_and_learning_goes_on(
    state: Path, socket_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "learning")
    registry = CollectorRegistry()
    with EmbeddedPostgres(settings=FAST_SETTINGS) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        create_items(server.dsn())
        run(_restart_scenario(server, configuration(server, state), socket_path, registry))
    lines = [r.message for r in caplog.records if r.name == "learning.upstream"]
    assert [line.split(" ")[1] for line in lines] == ["connected", "cannot", "connected"]


async def _restart_scenario(
    server: EmbeddedPostgres, config: Config, socket_path: Path, registry: CollectorRegistry
) -> None:
    found = template(UNFILTERED, "postgres")
    labels: Callable[[], float] = lambda: sample(  # noqa: E731
        "ruvector_labels_total", labels={"table": "public.items"}, registry=registry
    )
    async with learner(config, socket_path, registry) as worker:
        await worker.announce(found, [query(found, vector) for vector in QUERIES[:40]])
        before = await worker.policy(found)
        await asyncio.to_thread(server.stop)
        await worker.announce(found, [query(found, vector) for vector in QUERIES[40:80]])
        await asyncio.sleep(2.0)
        assert worker.snapshots[-1].templates[found.key].trust is before.trust
        counted = labels()
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(20):
            while labels() < counted + 10:
                await worker.announce(found, [query(found, vector) for vector in QUERIES[80:120]])
                await asyncio.sleep(0.3)
        assert worker.snapshots[-1].templates[found.key].trust is before.trust


def test_queries_are_measured_on_the_replica(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    """The same server under another role stands for the replica: what counts is who asks."""
    create_items(postgres.dsn(database), rows=1000)
    role = f"replica_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
        connection.execute(f"GRANT SELECT ON items TO {role}")
    replica = postgres.uri().replace("postgresql://postgres@", f"postgresql://{role}@")
    assert role in replica
    config = configuration(postgres, state, learner={"dsn": postgres.uri(), "replica_dsn": replica})

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(config, socket_path) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            await worker.policy(found)
            with psycopg.connect(postgres.dsn(database)) as connection:
                sessions = connection.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE usename = %s AND datname = %s",
                    (role, database),
                ).fetchone()
        assert sessions == (1,)  # measuring, and nothing else, opens one

    try:
        run(scenario())
    finally:
        with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")


def test_without_its_replica_the_learner_measures_on_the_primary(
    postgres: EmbeddedPostgres, database: str, state: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database), rows=1000)
    nowhere = "postgresql://postgres@127.0.0.1:1/app"
    config = configuration(postgres, state, learner={"dsn": postgres.uri(), "replica_dsn": nowhere})

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(config, socket_path) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            await worker.policy(found)

    run(scenario())
