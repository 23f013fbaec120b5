"""Calls from SQL that concern all replicas, and a leader that cannot reach the server, or another one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from config.schema import Config
from learning.channel import Answer, Ask, FrameReader, Hello, encode
from learning.records import Label, Template
from tests.integration.learner_kit import UNFILTERED, configuration, create_items, template
from tests.integration.test_replicas import (
    QUERIES,
    Replica,
    ask,
    fetch,
    replica,
    run,
    shared,
    trusted,
    until,
)

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]

LABELS = "SELECT body FROM ruvector_proxy.labels"


async def call(each: Replica, database: str, function: str, **arguments: Any) -> Any:
    """Call a function at one replica, as its workers do, and return the answer."""
    reader, writer = await asyncio.open_unix_connection(str(each.path))
    try:
        body = json.dumps({"table_name": "items", **arguments}).encode()
        question = Ask(1, function, body, database, "postgres", "public.items")
        writer.write(encode(Hello(2, 0)) + encode(question))
        frames = FrameReader()
        async with asyncio.timeout(60):
            while data := await reader.read(1 << 20):
                for frame in frames.feed(data):
                    if isinstance(frame, Answer):
                        assert frame.problem is None, frame.problem
                        return json.loads(frame.answer)
        raise AssertionError("the learner closed the connection")
    finally:
        writer.close()


def test_clearing_and_importing_at_one_replica_hold_for_all(
    postgres: EmbeddedPostgres, database: str, store: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first_stack = await stack.enter_async_context(contextlib.AsyncExitStack())
            first = await first_stack.enter_async_context(replica(shared(postgres, tmp_path / "1", store)))
            await until(lambda: first.leads)
            others = [
                await stack.enter_async_context(replica(shared(postgres, tmp_path / str(n), store)))
                for n in (2, 3)
            ]
            await until(lambda: all(each.reaches_store for each in others))
            await ask(first, found, QUERIES)
            await until(lambda: all(trusted(each, found) for each in (first, *others)))
            document = await call(first, database, "ruvector_export_patterns")
            assert len(document["templates"][0]["patterns"]) >= 100

            told = await call(others[0], database, "ruvector_clear_learning")
            assert told.startswith("the replica that leads was told")
            await until(lambda: not any(trusted(each, found) for each in (first, *others)))
            measured = {p["timestamp"] for p in document["templates"][0]["patterns"]}

            def old() -> int:
                bodies = [body for (body,) in fetch(store, LABELS)]
                return len({msgspec.msgpack.decode(body, type=Label).timestamp for body in bodies} & measured)

            await until(lambda: old() == 0)

            # Whoever leads next does not bring it back, though it may have led and measured before.
            await first_stack.aclose()
            await until(lambda: any(each.leads for each in others))
            await asyncio.sleep(1.5)
            assert old() == 0
            assert not any(trusted(each, found) for each in others)

            follower = next(each for each in others if not each.leads)
            told = await call(follower, database, "ruvector_import_patterns", patterns=document)
            assert told.endswith("given to the replica that leads")
            await until(lambda: old() == len(measured))
            assert await call(follower, database, "ruvector_extract_patterns", num_clusters=50) >= 0
            count = "SELECT count(*) FROM ruvector_proxy.notes WHERE name = 'sql:public.items'"
            await until(lambda: fetch(store, count) == [(1,)])

    run(scenario())


class Gate:
    """A way to a server that can be cut off, and led to another server."""

    def __init__(self) -> None:
        self.target: EmbeddedPostgres | None = None
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = self.target
        if target is None:
            writer.close()
            return
        beyond, out = await asyncio.open_connection("127.0.0.1", target.port)
        self._open |= {writer, out}

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(pass_on(reader, out), pass_on(beyond, writer))
        self._open -= {writer, out}

    def lead_to(self, target: EmbeddedPostgres | None) -> None:
        self.target = target
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    @contextlib.asynccontextmanager
    async def opened(self, target: EmbeddedPostgres) -> AsyncIterator[Gate]:
        self.target = target
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self.lead_to(None)
            server.close()

    def dsn(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"


async def ask_until(true: Callable[[], bool], each: Replica, found: Template) -> None:
    """Ask queries, so that there is something to be measured, until it is true."""
    for number in range(240):
        if true():
            return
        await ask(each, found, QUERIES[:10] + 0.001 * number)
        await asyncio.sleep(0.25)
    raise AssertionError("it did not come true in a minute")


def through(gate: Gate, database: str, state: Path, store: str) -> Config:
    options = {"kind": "postgres", "path": str(state), "dsn": store}
    return configuration(gate.dsn(database), state, store=options)


def test_a_leader_without_the_server_gives_way_to_one_that_reaches_it(
    postgres: EmbeddedPostgres,
    database: str,
    store: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("learning.worker.YIELD_AFTER", 2.0)
    create_items(postgres.dsn(database))
    found = template(UNFILTERED, database)

    async def scenario() -> None:
        gates = [Gate(), Gate()]
        async with gates[0].opened(postgres), gates[1].opened(postgres):
            configs = [through(gate, database, tmp_path / str(n), store) for n, gate in enumerate(gates)]
            async with replica(configs[0]) as first:
                await until(lambda: first.leads)
                async with replica(configs[1]) as second:
                    await until(lambda: second.reaches_store)
                    await ask(first, found, QUERIES[:150])
                    await until(lambda: trusted(first, found) and trusted(second, found))
                    policy = second.policy(found)

                    gates[0].lead_to(None)
                    await ask_until(lambda: second.leads and not first.leads, second, found)
                    assert policy is not None
                    assert trusted(first, found)
                    assert trusted(second, found)
                    await ask(first, found, QUERIES[:150] + 0.2)  # its queries are measured by the other
                    await until(lambda: second.labels() >= 10)

                    # Where nobody reaches it nobody leads, and the first that does is the leader again.
                    gates[1].lead_to(None)
                    await ask_until(lambda: not first.leads and not second.leads, second, found)
                    assert trusted(first, found)
                    assert trusted(second, found)
                    gates[0].lead_to(postgres)
                    await until(lambda: first.leads)
                    assert not second.leads

    run(scenario())
    assert "it cannot reach the upstream server" in caplog.text


def execute(server: EmbeddedPostgres, *statements: str) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def restarted(server: EmbeddedPostgres, read_only: str) -> None:
    """Restart a server whose transactions are read-only from now on, or are not."""
    execute(
        server,
        "SET default_transaction_read_only = off",
        f"ALTER SYSTEM SET default_transaction_read_only = {read_only}",
    )
    server.restart()


def test_the_server_fails_over_and_is_read_only_for_a_while(tmp_path: Path) -> None:
    """Learned on one server; then the address leads to another, which is read-only at first."""

    async def scenario(old: EmbeddedPostgres, new: EmbeddedPostgres) -> None:
        gate = Gate()
        async with gate.opened(old):
            found = template(UNFILTERED, "postgres")
            async with replica(configuration(gate.dsn("postgres"), tmp_path / "state")) as one:
                await ask(one, found, QUERIES[:150])
                await until(lambda: trusted(one, found))
                gate.lead_to(None)
                old.stop()
                measured = one.labels()
                await ask(one, found, QUERIES[150:160])
                await asyncio.sleep(2.0)
                assert trusted(one, found)  # nobody answers: nothing is measured, and nothing changes
                assert fetch(new.dsn(), "SHOW default_transaction_read_only") == [("on",)]
                gate.lead_to(new)
                await ask(one, found, QUERIES[160:230] + 0.1)
                await until(lambda: one.labels() >= measured + 20)
                await asyncio.to_thread(restarted, new, "off")
                measured = one.labels()
                await ask(one, found, QUERIES[230:] + 0.2)
                await until(lambda: one.labels() >= measured + 20)
                await until(lambda: trusted(one, found))

    with (
        EmbeddedPostgres(settings=FAST_SETTINGS, listen=True) as old,
        EmbeddedPostgres(settings=FAST_SETTINGS, listen=True) as new,
    ):
        for server in (old, new):
            execute(server, "CREATE EXTENSION vector")
            create_items(server.dsn())
        restarted(new, "on")
        run(scenario(old, new))
