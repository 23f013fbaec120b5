"""A deliberately poisoned policy: the learner is made to believe in an arm that is bad, and takes it back.

The smallest ef_search finds too little, the exact search finds everything and takes its time.

A real server, a real worker's relay, a real learner; only the computation of policies lies, from a moment on.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psycopg
import pytest
from prometheus_client import CollectorRegistry

from bench.embedded import EmbeddedPostgres
from config.schema import Config
from learning import canary, policy, worker
from learning.metrics import LearnerMetrics
from learning.records import ContextPolicy, TemplatePolicy, Trust
from learning.watch import Watch
from proxy.net.learner_link import LearnerLink
from tests.integration.learner_kit import configuration, create_items, sample, text
from tests.integration.proxied import Proxy
from tests.integration.test_serve import until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

SEARCH = "SELECT id FROM items ORDER BY embedding <-> $1::vector LIMIT 10"


def poisoned(honest: TemplatePolicy, name: str) -> TemplatePolicy:
    """Return a policy that gives every query the arm of this name, and claims that it finds everything."""
    bad = next(number for number, arm in enumerate(honest.arms) if arm.name == name)
    return msgspec.structs.replace(
        honest,
        trust=Trust.STATIC,
        reason="a lie",
        fallback=bad,
        contexts={"10": ContextPolicy(bad, 0.999, 1000)},
        query=None,
    )


@contextmanager
def learner(config: Config, path: Path, registry: CollectorRegistry) -> Iterator[None]:
    """Run a learner in a thread."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        ready.set()
        await worker.run(config, path, stop, metrics=LearnerMetrics(registry))

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


@contextmanager
def linked(proxy: Proxy, path: Path) -> Iterator[None]:
    """Connect the proxy's worker to a learner."""
    link = proxy.call(lambda: LearnerLink(path, proxy.adapter, buffer_size=10_000))
    task = proxy.call(lambda: asyncio.get_running_loop().create_task(link.run()))
    try:
        yield
    finally:
        proxy.call(task.cancel)


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(
    ("arm", "rows", "index", "fault"),
    [
        ("ef=10", 4000, "m = 4, ef_construction = 16", "recall"),
        ("exact", 12_000, "m = 12, ef_construction = 40", "latency"),
    ],
)
def test_it_is_withdrawn_by_itself(
    postgres: EmbeddedPostgres,
    tmp_path: Path,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    arm: str,
    rows: int,
    index: str,
    fault: str,
) -> None:
    lies = threading.Event()
    honest = policy.derivation

    def derivation(*given: object) -> Callable[[], TemplatePolicy]:
        derive = honest(*given)  # type: ignore[arg-type]
        return lambda: poisoned(derive(), arm) if lies.is_set() else derive()

    monkeypatch.setattr(worker, "derivation", derivation)
    # What notices drift would see it as well, in the end, and let other policies in without a trial.
    monkeypatch.setattr(Watch, "audited", lambda *given, **more: None)
    # On a slow machine audits take their time, and without them a trial would end in favour of the new policy.
    monkeypatch.setattr(canary, "NOBODY", 1e6)
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS poisoned WITH (FORCE)")
        connection.execute("CREATE DATABASE poisoned STRATEGY file_copy")
    vectors = create_items(postgres.dsn("poisoned"), rows, index=False)
    with psycopg.connect(postgres.dsn("poisoned"), autocommit=True) as connection:
        connection.execute(f"CREATE INDEX ON items USING hnsw (embedding vector_l2_ops) WITH ({index})")
    config = configuration(
        postgres.uri("poisoned"),
        tmp_path,
        learning={"target_recall": 0.9, "min_samples": 40, "canary_share": 0.2, "canary_seconds": 3600.0},
    )
    registry = CollectorRegistry()
    queries = itertools.cycle(vectors[:400] + 0.3)
    with (
        Proxy(postgres.host, postgres.port) as proxy,
        learner(config, socket_path, registry),
        linked(proxy, socket_path),
        psycopg.connect(
            proxy.dsn("poisoned", "postgres"), autocommit=True, cursor_factory=psycopg.RawCursor
        ) as connection,
    ):

        def serving() -> TemplatePolicy | None:
            def first() -> TemplatePolicy | None:
                known = proxy.adapter._optimizer._templates.values()
                return next((prepared.policy for prepared in known), None)

            return proxy.call(first)

        def outcome(name: str) -> float:
            labels = {"table": "public.items", "outcome": name}
            return sample("ruvector_canaries_total", labels=labels, registry=registry)

        def traffic_until(condition: Callable[[], bool]) -> None:
            def step() -> bool:
                for vector in itertools.islice(queries, 40):
                    assert len(connection.execute(SEARCH, (text(vector),)).fetchall()) == 10
                return condition()

            until(step, 300)

        def trusted() -> bool:
            found = serving()
            on_trial = sample(
                "ruvector_canary_templates", labels={"table": "public.items"}, registry=registry
            )
            learned = found is not None and not found.reason.startswith("dictated")
            return learned and found is not None and found.trust is not Trust.OBSERVE and not on_trial

        def served() -> set[str]:
            return {name for _, name in proxy.call(lambda: dict(proxy.counters.adapted))}

        traffic_until(trusted)
        lies.set()
        traffic_until(lambda: outcome(f"rolled back: {fault}") >= 1.0)
        assert arm in served()  # part of the traffic had it
        traffic_until(lambda: (found := serving()) is not None and found.reason != "a lie")
        assert f"the new policy is worse, rolled back: {fault}" in caplog.text
        for _ in range(10):  # though the learner derives it again and again
            traffic_until(lambda: True)
            assert (found := serving()) is not None
            assert found.reason != "a lie"
            assert proxy.call(lambda: proxy.adapter._optimizer.baseline) is None
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("DROP DATABASE poisoned WITH (FORCE)")
