"""Several learners and one store in PostgreSQL: one measures, all serve the same, and nothing learned is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from prometheus_client import CollectorRegistry

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from bench.pooler import pgbouncer
from config.schema import Config
from learning.channel import TemplateSeen, TrajectoryBatch
from learning.exchange import evidence
from learning.optimizer import SearchOptimizer
from learning.records import Label, Snapshot, Template, TemplatePolicy, Trust, Value, is_hashed
from proxy.explaining import explain_statement
from proxy.patterns import export_patterns, import_patterns
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


class Replica:
    """One learner, a worker of its, and what it measured."""

    def __init__(
        self, worker: Worker, registry: CollectorRegistry, received: list[tuple[float, Snapshot]], path: Path
    ) -> None:
        self.worker, self.registry, self.received, self.path = worker, registry, received, path

    @property
    def leads(self) -> bool:
        return sample("ruvector_replica_leading", registry=self.registry) == 1.0

    @property
    def reaches_store(self) -> bool:
        return sample("ruvector_shared_store_up", registry=self.registry) == 1.0

    def labels(self) -> float:
        return sample("ruvector_labels_total", labels={"table": "public.items"}, registry=self.registry)

    def policy(self, found: Template) -> TemplatePolicy | None:
        return self.received[-1][1].templates.get(found.key) if self.received else None


def shared(postgres: EmbeddedPostgres, state: Path, store: str, **sections: object) -> Config:
    options = {"kind": "postgres", "path": str(state), "dsn": store}
    return configuration(postgres, state, store=options, **sections)


@contextlib.asynccontextmanager
async def replica(config: Config) -> AsyncIterator[Replica]:
    registry = CollectorRegistry()
    received: list[tuple[float, Snapshot]] = []
    path = Path("/tmp") / f"rvl-{uuid.uuid4().hex[:12]}.sock"

    async def listen(worker: Worker) -> None:
        while True:
            snapshot = await worker.snapshot(600.0)
            received.append((time.monotonic(), snapshot))

    async with learner(config, path, registry) as worker:
        listening = asyncio.create_task(listen(worker))
        try:
            yield Replica(worker, registry, received, path)
        finally:
            listening.cancel()


@contextlib.asynccontextmanager
async def replicas(configs: list[Config]) -> AsyncIterator[list[Replica]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(replica(config)) for config in configs]


async def until(true: Callable[[], bool], seconds: float = 150.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ask(each: Replica, found: Template, vectors: Vectors) -> None:
    await each.worker.send(TemplateSeen(found), TrajectoryBatch(tuple(query(found, v) for v in vectors)))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def trusted(each: Replica, found: Template) -> bool:
    policy = each.policy(found)
    return policy is not None and policy.trust is not Trust.OBSERVE


def fetch(store: str, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(store, autocommit=True) as connection:
        return connection.execute(sql).fetchall()


def test_three_replicas_learn_from_each_others_queries_and_serve_the_same(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    configs = [shared(postgres, tmp_path / str(n), store) for n in range(3)]
    vectors = {bytes(vector.astype("<f4").tobytes()): n % 3 for n, vector in enumerate(QUERIES)}

    def labels() -> list[Label]:
        bodies = fetch(store, "SELECT body FROM ruvector_proxy.labels")
        return [msgspec.msgpack.decode(body, type=Label) for (body,) in bodies]

    def owners() -> list[int]:
        return [vectors[label.vector] for label in labels() if label.vector is not None]

    async def scenario() -> None:
        async with replicas(configs) as all_three:
            await until(lambda: all(each.reaches_store for each in all_three))
            assert sum(each.leads for each in all_three) == 1
            for n, each in enumerate(all_three):
                await ask(each, found, QUERIES[n::3])
            await until(lambda: all(trusted(each, found) for each in all_three))
            await until(lambda: len({each.received[-1][1].version for each in all_three}) == 1)
            last = [each.received[-1] for each in all_three]
            assert last[0][1] == last[1][1] == last[2][1]
            assert max(at for at, _ in last) - min(at for at, _ in last) < 2.0
            assert sum(each.labels() > 0 for each in all_three) == 1  # one measures for all
            # Everybody's queries are measured; how many of whom depends on when the followers' mail comes.
            await until(lambda: min(owners().count(n) for n in range(3)) >= 5)

    run(scenario())
    assert any(label.uniform for label in labels())


def test_another_replica_takes_over_at_once_where_the_leader_leaves_and_loses_no_policy(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
            first = await first_stack.enter_async_context(replica(shared(postgres, tmp_path / "1", store)))
            await until(lambda: first.leads)
            second = await stack.enter_async_context(replica(shared(postgres, tmp_path / "2", store)))
            await ask(first, found, QUERIES)
            await until(lambda: trusted(second, found))
            before = second.policy(found)
            version = second.received[-1][1].version
            left = time.monotonic()
            await first_stack.aclose()
            await until(lambda: second.leads)
            assert time.monotonic() - left < 3.0
            assert second.policy(found) == before
            await ask(second, found, QUERIES)  # and learning goes on, from all that is known
            await until(lambda: second.labels() > 0)
            await until(lambda: second.received[-1][1].version > version)
            assert trusted(second, found)
            contexts = second.received[-1][1].templates[found.key].contexts
            assert before is not None
            assert contexts["10"].labels >= before.contexts["10"].labels

    run(scenario())


def test_without_the_store_the_last_policy_goes_on_and_what_is_learned_is_added_later(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    caplog.set_level(logging.INFO)

    async def scenario(server: EmbeddedPostgres) -> None:
        configs = [shared(postgres, tmp_path / str(n), server.uri()) for n in range(2)]
        async with replicas(configs) as both:
            await until(lambda: all(each.reaches_store for each in both))
            leader = next(each for each in both if each.leads)
            (follower,) = (each for each in both if each is not leader)
            await ask(follower, found, QUERIES[:150])
            await until(lambda: all(trusted(each, found) for each in both))
            server.stop()
            await until(lambda: not any(each.reaches_store for each in both))
            served, measured = follower.policy(found), leader.labels()
            await ask(leader, found, QUERIES[150:])
            await until(lambda: leader.labels() >= measured + 20)  # it goes on measuring
            assert leader.leads
            assert follower.policy(found) == served
        # Both were stopped meanwhile: what was learned is in the state directory of the one that led.
        server.start()
        count = "SELECT count(*) FROM ruvector_proxy.labels"
        before = fetch(server.dsn(), count)[0][0]
        async with replicas(configs) as both:
            await until(lambda: any(each.leads for each in both))
            await until(lambda: int(fetch(server.dsn(), count)[0][0]) >= before + 20)

    with EmbeddedPostgres(settings=FAST_SETTINGS, listen=True) as server:
        run(scenario(server))
    assert "the shared store cannot be used" in caplog.text


def test_a_start_without_the_store_serves_the_policy_kept_here(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)

    async def scenario() -> None:
        configs = [shared(postgres, tmp_path / str(n), store) for n in range(2)]
        async with replicas(configs) as both:
            await until(lambda: any(each.leads for each in both))
            await ask(both[0], found, QUERIES)
            await until(lambda: all(trusted(each, found) for each in both))
        nowhere = "postgresql://nobody:secret@127.0.0.1:1/nothing"
        async with replicas([shared(postgres, tmp_path / str(n), nowhere) for n in range(2)]) as both:
            await until(lambda: all(trusted(each, found) for each in both))
            await until(lambda: "the shared store cannot be used" in caplog.text)

    run(scenario())
    assert "secret" not in caplog.text


def test_a_store_that_is_read_only_for_a_while_changes_nothing_for_the_policies(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    name = fetch(store, "SELECT current_database()")[0][0]

    def read_only(value: str) -> None:
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
            )

    async def scenario() -> None:
        async with replicas([shared(postgres, tmp_path / str(n), store) for n in range(2)]) as both:
            await until(lambda: any(each.leads for each in both))
            await ask(both[0], found, QUERIES[:150])
            await until(lambda: all(trusted(each, found) for each in both))
            await asyncio.to_thread(read_only, "on")
            leader = next(each for each in both if each.leads)
            await until(lambda: not leader.reaches_store)
            measured = leader.labels()
            await ask(leader, found, QUERIES[150:])
            await until(lambda: leader.labels() >= measured + 10)
            assert all(trusted(each, found) for each in both)
            await asyncio.to_thread(read_only, "off")
            await until(lambda: all(each.reaches_store for each in both))
            await until(lambda: sum(each.leads for each in both) == 1)
            await until(lambda: both[0].received[-1][1] == both[1].received[-1][1])

    run(scenario())


def test_a_role_that_may_not_create_the_schema_is_told_the_exact_statements(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    role = f"keeper_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(store, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
    uri = store.replace("//postgres@", f"//{role}@") if "//postgres@" in store else store
    assert role in uri

    async def refused() -> str:
        async with replica(shared(postgres, tmp_path / "1", uri)) as one:
            await until(lambda: "CREATE SCHEMA" in caplog.text)
            assert not one.leads
        return next(r.getMessage() for r in caplog.records if "CREATE SCHEMA" in r.getMessage())

    async def granted() -> None:
        async with replica(shared(postgres, tmp_path / "1", uri)) as one:
            await until(lambda: one.leads)

    statements = asyncio.run(refused()).split("\n\n", 1)[1].rpartition(";")[0]
    try:
        with psycopg.connect(store, autocommit=True) as connection:
            connection.execute(statements)
        asyncio.run(granted())
    finally:
        with psycopg.connect(store, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")


def test_a_policy_of_a_newer_version_is_used_as_far_as_it_is_understood_and_carried_on(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)

    def doctor() -> None:
        """Publish what a newer version might: unknown fields, and a policy of an unknown kind."""
        with psycopg.connect(store, autocommit=True) as connection, connection.transaction():
            row = connection.execute("SELECT body FROM ruvector_proxy.manifests").fetchone()
            assert row is not None
            manifest = msgspec.msgpack.decode(row[0])
            part = manifest["templates"][found.key]
            piece = connection.execute(
                "SELECT body FROM ruvector_proxy.pieces WHERE digest = %s", (part["policy"],)
            ).fetchone()
            assert piece is not None
            policy = msgspec.msgpack.decode(piece[0]) | {"seasonal": {"summer": 3}}
            strange = policy | {"trust": "clairvoyant", "template": "strange"}
            for key, body in ((found.key, policy), ("strange", strange)):
                digest = uuid.uuid4().bytes
                data = msgspec.msgpack.encode(body)
                connection.execute(
                    "INSERT INTO ruvector_proxy.pieces VALUES ('default', %s, %s)", (digest, data)
                )
                manifest["templates"][key] = {"policy": digest, "extra": {}, "mood": "good"}
            manifest["version"] += 1
            manifest["weather"] = "fair"
            connection.execute(
                "UPDATE ruvector_proxy.manifests SET body = %s", (msgspec.msgpack.encode(manifest),)
            )
            connection.execute("UPDATE ruvector_proxy.groups SET version = version + 1")

    async def scenario() -> None:
        async with replica(shared(postgres, tmp_path / "1", store)) as one:
            await until(lambda: one.leads)
            await ask(one, found, QUERIES)
            await until(lambda: trusted(one, found))
            await until(lambda: bool(fetch(store, "SELECT 1 FROM ruvector_proxy.manifests")))
        await asyncio.to_thread(doctor)
        async with replica(shared(postgres, tmp_path / "2", store)) as other:  # an older version leads now
            await until(lambda: other.leads)
            await until(lambda: trusted(other, found))
            assert "strange" not in other.received[-1][1].templates
            another = template(FILTERED, database)
            asked = tuple(query(another, vector, Value(0, b"1")) for vector in QUERIES[:50])
            await other.worker.send(TemplateSeen(another), TrajectoryBatch(asked))  # publishes something new
            await until(lambda: fetch(store, "SELECT published_term FROM ruvector_proxy.groups") == [(2,)])

    run(scenario())
    ((body,),) = fetch(store, "SELECT body FROM ruvector_proxy.manifests")
    manifest = msgspec.msgpack.decode(body)
    pieces = dict(fetch(store, "SELECT digest, body FROM ruvector_proxy.pieces"))
    assert manifest["weather"] == "fair"
    assert manifest["templates"].keys() >= {found.key, "strange"}
    strange = msgspec.msgpack.decode(pieces[manifest["templates"]["strange"]["policy"]])
    kept = msgspec.msgpack.decode(pieces[manifest["templates"][found.key]["policy"]])
    assert strange["trust"] == "clairvoyant"
    assert kept["seasonal"] == {"summer": 3}


def test_a_policy_of_an_unknown_format_leaves_the_last_one_in_force(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)

    def doctor() -> None:
        with psycopg.connect(store, autocommit=True) as connection:
            ((body,),) = connection.execute("SELECT body FROM ruvector_proxy.manifests").fetchall()
            manifest = msgspec.msgpack.decode(body) | {"format": 2, "templates": "elsewhere"}
            connection.execute(
                "UPDATE ruvector_proxy.manifests SET body = %s", (msgspec.msgpack.encode(manifest),)
            )
            connection.execute("UPDATE ruvector_proxy.groups SET version = version + 1")

    async def scenario() -> None:
        async with replicas([shared(postgres, tmp_path / str(n), store) for n in range(2)]) as both:
            await until(lambda: any(each.leads for each in both))
            await ask(both[0], found, QUERIES)
            await until(lambda: all(trusted(each, found) for each in both))
            before = [each.policy(found) for each in both]
            await asyncio.to_thread(doctor)
            await until(lambda: "of format 2" in caplog.text)
            assert [each.policy(found) for each in both] == before

    run(scenario())


def test_nothing_of_a_table_that_is_off_reaches_the_store_and_what_was_there_goes(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    off = {"public.items": {"learning": False}}

    def traces() -> list[str]:
        tables = ("templates", "labels", "mail", "notes", "pieces", "manifests")
        rows = {name: fetch(store, f"SELECT * FROM ruvector_proxy.{name}") for name in tables}
        texts = (found.key, found.sql, "public.items", *(v.astype("<f4").tobytes() for v in QUERIES[:150]))
        needles = [text.encode() if isinstance(text, str) else text for text in texts]
        flat = {
            name: b"".join(v if isinstance(v, bytes) else str(v).encode() for row in found_rows for v in row)
            for name, found_rows in rows.items()
        }
        return [name for name, data in flat.items() if any(needle in data for needle in needles)]

    async def learned() -> None:
        async with replicas([shared(postgres, tmp_path / str(n), store) for n in range(2)]) as both:
            await until(lambda: any(each.leads for each in both))
            await ask(both[0], found, QUERIES[:150])
            await until(lambda: all(trusted(each, found) for each in both))

    async def switched_off() -> None:
        configs = [shared(postgres, tmp_path / str(n), store, tables=off) for n in range(2)]
        async with replicas(configs) as both:
            await until(lambda: any(each.leads for each in both))
            for each in both:
                await ask(each, found, QUERIES[:150])
            await until(lambda: set(traces()) <= {"pieces", "manifests"})
            await asyncio.sleep(3.0)
            assert all(each.labels() == 0 for each in both)

    run(learned())
    assert {"templates", "labels"} <= set(traces())
    run(switched_off())
    # What is left is the policy that leaves the table alone: its name, and that it is off.
    policies = fetch(store, "SELECT body FROM ruvector_proxy.pieces")
    assert all(b"switched off" in body and b"\x1f" not in body for (body,) in policies)
    kept = b"".join(path.read_bytes() for n in range(2) for path in (tmp_path / str(n)).iterdir())
    assert not any(v.astype("<f4").tobytes() in kept for v in QUERIES[:150])


def test_anonymized_replicas_share_no_vector_and_no_value(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found, filtered = template(UNFILTERED, database), template(FILTERED, database)
    learning = {"anonymize": True, "target_recall": 0.95}

    def served(each: Replica) -> bool:
        """Tell whether a value gets its own settings from this replica, which knows it by its hash."""
        if not each.received:
            return False
        choice = SearchOptimizer(each.received[-1][1]).optimize(filtered.key, None, 10, ("2",))
        return choice is not None and choice.reason == "measured"

    async def scenario() -> None:
        configs = [shared(postgres, tmp_path / str(n), store, learning=learning) for n in range(2)]
        async with replicas(configs) as both:
            await until(lambda: any(each.leads for each in both))
            for each in both:
                await ask(each, found, QUERIES)
                queries = [query(filtered, v, Value(0, b"2")) for v in QUERIES[:40]]
                await each.worker.send(TemplateSeen(filtered), TrajectoryBatch(tuple(queries)))
            await until(lambda: all(trusted(each, found) for each in both))
            await until(lambda: all(served(each) for each in both))
            follower = next(each for each in both if not each.leads)
            contexts = follower.received[-1][1].templates[filtered.key].contexts
            assert contexts
            assert all(is_hashed(context) for context in contexts)

    run(scenario())
    names = ("templates", "labels", "mail", "notes", "pieces", "manifests")
    data = b"".join(
        body for name in names for (body,) in fetch(store, f"SELECT body FROM ruvector_proxy.{name}")
    )
    assert len(data) > 1000
    assert not any(vector.astype("<f4").tobytes() in data for vector in QUERIES)


def test_patterns_are_exported_from_the_shared_store_and_imported_by_whoever_leads(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    config = shared(postgres, tmp_path / "1", store)

    async def learned() -> None:
        async with replica(config) as one:
            await until(lambda: one.leads)
            await ask(one, found, QUERIES)
            await until(lambda: one.labels() >= 30)

    run(learned())
    # No proxy runs, and the state directory is not asked: everything comes from the shared store.
    vector = "[" + ",".join(map(str, QUERIES[0].tolist())) + "]"
    elsewhere = config.model_copy(
        update={"store": config.store.model_copy(update={"path": tmp_path / "none"})}
    )
    explained = explain_statement(elsewhere, UNFILTERED, [vector], database=None, user=None, live=False)
    assert (explained.table, explained.live, explained.labels >= 30) == ("public.items", False, True)
    document = export_patterns(config, tables={"public.items"}, anonymize=False)
    (known,) = evidence(document)
    assert known.template == found
    assert len(known.labels) >= 30
    with psycopg.connect(store, autocommit=True) as connection:
        connection.execute("DROP SCHEMA ruvector_proxy CASCADE")
    elsewhere = shared(postgres, tmp_path / "2", store)

    async def taken_in() -> None:
        async with replica(elsewhere) as one:
            await until(lambda: one.leads)
            await asyncio.to_thread(import_patterns, elsewhere, document, database=None, user=None)
            count = "SELECT count(*) FROM ruvector_proxy.labels"
            await until(lambda: fetch(store, count) == [(len(known.labels),)])
            assert one.labels() == 0

    run(taken_in())


def test_a_pooler_in_transaction_mode_costs_the_notification_and_nothing_else(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)
    name = fetch(store, "SELECT current_database()")[0][0]

    async def scenario(uri: str) -> None:
        async with replicas([shared(postgres, tmp_path / str(n), uri) for n in range(2)]) as both:
            await until(lambda: sum(each.leads for each in both) == 1)
            follower = next(each for each in both if not each.leads)
            await ask(follower, found, QUERIES)
            await until(lambda: all(each.policy(found) is not None for each in both))
            await until(lambda: bool(fetch(store, "SELECT 1 FROM ruvector_proxy.labels LIMIT 1")))

    directory = Path(tempfile.mkdtemp(prefix="ruvector-pooler-"))
    with pgbouncer(postgres, directory, "transaction") as pooler:
        if pooler is None:
            pytest.skip("pgbouncer is not installed")
        run(scenario(f"postgresql://{postgres.user}@127.0.0.1:{pooler.port}/{name}"))
    assert "through a connection pooler" in caplog.text
    shutil.rmtree(directory)
