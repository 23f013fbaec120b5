"""Real proxies on one shared store: the leading learner is killed, and nobody notices."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.learner_kit import Vectors, create_items, text
from tests.integration.test_serve import Served, serving, tcp, until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(500)]

REPLICAS = 2
QUERY = "SELECT id FROM items ORDER BY embedding <-> %s::vector LIMIT 10"


class Client(threading.Thread):
    """Asks one query after the other on one connection until it is stopped."""

    def __init__(self, served: Served, database: str, vectors: Vectors) -> None:
        super().__init__()
        self.answered = 0
        self.failure: BaseException | None = None
        self._served, self._database, self._vectors = served, database, vectors
        self._stop_now = threading.Event()

    def run(self) -> None:
        try:
            with self._served.connect(self._database, autocommit=True) as connection:
                while not self._stop_now.wait(0.03):
                    vector = self._vectors[self.answered % len(self._vectors)]
                    assert len(connection.execute(QUERY, (text(vector),)).fetchall()) == 10
                    self.answered += 1
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        self._stop_now.set()
        self.join(60)


@pytest.fixture
def group(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[tuple[str, list[Served], Vectors]]:
    names = [f"{kind}_{uuid.uuid4().hex[:8]}" for kind in ("searched", "learned")]
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for name in names:
            connection.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
    database, store = names
    vectors = create_items(postgres.dsn(database))
    more = (
        f'[store]\nkind = "postgres"\ndsn = "{postgres.uri(store)}"\n'
        "[learning]\ntarget_recall = 0.95\nmin_samples = 60\n"
    )
    with contextlib.ExitStack() as stack:
        proxies = []
        for number in range(REPLICAS):
            directory = tmp_path / str(number)
            directory.mkdir()
            proxies.append(
                stack.enter_context(serving(directory, tcp(postgres), more, postgres.uri(database)))
            )
        for served in proxies:
            served.wait_ready()
        yield database, proxies, vectors[:600] + 0.3
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for name in names:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def leaders(proxies: list[Served]) -> list[Served]:
    return [served for served in proxies if served.metric("ruvector_replica_leading") == 1]


def adapted(served: Served) -> float:
    return served.metric("ruvector_queries_adapted_total")


def test_kill_the_leader_and_no_client_notices(group: tuple[str, list[Served], Vectors]) -> None:
    database, proxies, vectors = group
    clients = [Client(served, database, vectors[n::REPLICAS]) for n, served in enumerate(proxies)]
    for client in clients:
        client.start()
    try:
        until(lambda: all(adapted(served) > 0 for served in proxies), 200.0)
        (leader,) = leaders(proxies)
        others = [served for served in proxies if served is not leader]
        versions = {served: served.metric("ruvector_policy_version") for served in proxies}
        os.kill(leader.process.pid, signal.SIGSTOP)  # the supervisor would have it back within seconds
        try:
            os.kill(leader.pids("learner")[-1], signal.SIGKILL)
            killed = time.monotonic()
            until(lambda: bool(leaders(others)), 120.0)
            print(f"another leads after {time.monotonic() - killed:.1f} s")
        finally:
            os.kill(leader.process.pid, signal.SIGCONT)
        until(lambda: len(leader.pids("learner")) == 2, 120.0)  # it is started again, and follows
        # Nothing of the policy is lost, and all serve the same one again.
        before = {served: adapted(served) for served in proxies}
        until(lambda: all(adapted(served) > before[served] for served in proxies), 60.0)
        until(lambda: len({served.metric("ruvector_policy_version") for served in proxies}) == 1, 120.0)
        assert all(served.metric("ruvector_policy_version") >= versions[served] for served in proxies)
        assert len(leaders(proxies)) == 1
    finally:
        for client in clients:
            client.stop()
    assert [client.failure for client in clients] == [None] * REPLICAS
    assert all(client.answered > 50 for client in clients)
