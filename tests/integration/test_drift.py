"""The world changes under a learner: it notices, serves a safe arm at once, and learns anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import psycopg
import pytest
from prometheus_client import CollectorRegistry

from bench.embedded import EmbeddedPostgres
from learning.records import Template, TemplatePolicy, Trust
from tests.integration.learner_kit import (
    DIMENSIONS,
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
    text,
)

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

QUERIES = clustered(300) + 0.3
TABLE = {"table": "public.items"}


async def statement(dsn: str, sql: str) -> None:
    """Run a statement in a thread: it may wait for a lock of the learner's, which lives in this event loop."""

    def run() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(sql)

    await asyncio.to_thread(run)


class Traffic:
    """A worker that asks one query after another under the policy that it has."""

    def __init__(self, worker: Worker, found: Template, queries: Vectors) -> None:
        self._worker = worker
        self._found = found
        self.queries = queries
        self._asked = 0
        self._looked_at = 0  # snapshots

    async def until(self, wanted: Callable[[TemplatePolicy], bool], timeout: float = 150.0) -> TemplatePolicy:
        """Ask until a policy is as wanted; every policy received is in ``worker.snapshots``."""
        snapshots = self._worker.snapshots
        async with asyncio.timeout(timeout):
            while True:
                for number in range(self._looked_at, len(snapshots)):
                    new = snapshots[number].templates.get(self._found.key)
                    self._looked_at = number + 1
                    if new is not None and wanted(new):
                        return new
                policy = snapshots[-1].templates.get(self._found.key) if snapshots else None
                await self._ask(policy, snapshots[-1].version if snapshots else 0)
                try:
                    await self._worker.snapshot(0.2)
                except TimeoutError:
                    continue

    async def _ask(self, policy: TemplatePolicy | None, version: int) -> None:
        served = policy.arms[policy.fallback] if policy is not None else None
        batch = []
        for _ in range(20):
            vector = self.queries[self._asked % len(self.queries)]
            self._asked += 1
            one = query(self._found, vector)
            if served is not None:
                one = msgspec.structs.replace(
                    one, arm=served.name, settings=served.settings, policy_version=version
                )
            batch.append(one)
        await self._worker.announce(self._found, batch)


def learned(policy: TemplatePolicy) -> bool:
    return policy.trust is not Trust.OBSERVE and "until it is measured anew" not in policy.reason


def held(policy: TemplatePolicy) -> bool:
    return "until it is measured anew" in policy.reason


def effort(policy: TemplatePolicy) -> float:
    arm = policy.arms[policy.fallback]
    return np.inf if arm.kind == "exact" else arm.effort


def test_reindex_is_answered_with_a_safe_arm_and_new_measurements(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))
    registry = CollectorRegistry()

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(configuration(postgres, tmp_path), socket_path, registry) as worker:
            traffic = Traffic(worker, found, QUERIES)
            before = await traffic.until(learned)
            await statement(postgres.dsn(database), "REINDEX INDEX items_hnsw")
            began = time.monotonic()
            safe = await traffic.until(held)
            assert time.monotonic() - began < 45.0  # about 2 seconds on a machine with nothing else to do
            assert "index items_hnsw rebuilt" in safe.reason
            assert effort(safe) >= effort(before)
            assert not safe.contexts  # nothing that was measured before speaks any more
            after = await traffic.until(learned)
            assert after.contexts["10"].labels >= 40
            assert after.contexts["10"].expected_recall >= 0.95
            await asyncio.sleep(1.1)
        drifts = sample("ruvector_drifts_total", labels={**TABLE, "kind": "index"}, registry=registry)
        assert drifts == 1
        assert sample("ruvector_drift_holding", labels=TABLE, registry=registry) == 0
        assert sample("ruvector_drift_recovery_seconds", labels=TABLE, registry=registry) > 0

    asyncio.run(scenario())


def test_growth_and_deletion_are_noticed_from_the_rows(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database), rows=2000)
    more = clustered(2000, seed=5)

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(configuration(postgres, tmp_path), socket_path) as worker:
            traffic = Traffic(worker, found, QUERIES)
            await traffic.until(learned)
            with (
                psycopg.connect(postgres.dsn(database), autocommit=True) as connection,
                connection.cursor().copy("COPY items FROM STDIN") as copy,
            ):
                for number, vector in enumerate(more):
                    copy.write_row((10_000 + number, 0, text(vector)))
            grown = await traffic.until(held)
            assert "rows and has" in grown.reason
            await traffic.until(learned)
            await statement(postgres.dsn(database), "DELETE FROM items WHERE id >= 1000")
            shrunk = await traffic.until(held)
            assert "rows and has" in shrunk.reason
            await traffic.until(learned)

    asyncio.run(scenario())


def test_other_queries_are_noticed_by_their_recall(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    vectors = create_items(postgres.dsn(database))
    rng = np.random.default_rng(3)
    easy = vectors[:300] + rng.normal(scale=0.01, size=(300, DIMENSIONS)).astype(np.float32)
    # Between all clusters: everything is about equally far, and a graph finds little of it.
    hard = (rng.normal(scale=0.05, size=(400, DIMENSIONS)) + 1.5).astype(np.float32)
    registry = CollectorRegistry()

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        config = configuration(postgres, tmp_path)
        async with learner(config, socket_path, registry) as worker:
            traffic = Traffic(worker, found, easy)
            before = await traffic.until(learned)
            traffic.queries = hard
            # A safe arm is held meanwhile, but for no time at all where the labels since the change are enough.
            await traffic.until(lambda policy: learned(policy) and effort(policy) > effort(before))
        # Which of the two detectors is first depends on how many audits came before the mix was suspected.
        noticed = [
            sample("ruvector_drifts_total", labels={**TABLE, "kind": kind}, registry=registry)
            for kind in ("mix", "recall")
        ]
        assert sum(noticed) >= 1

    asyncio.run(scenario())


def test_index_rebuilt_while_the_learner_was_down_is_noticed(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database), rows=2000)

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        config = configuration(postgres, tmp_path)
        async with learner(config, socket_path) as worker:
            traffic = Traffic(worker, found, QUERIES)
            await traffic.until(learned)
            await asyncio.sleep(1.5)  # what was seen goes to the disk once a second
        await statement(postgres.dsn(database), "REINDEX INDEX items_hnsw")
        async with learner(config, socket_path) as worker:
            traffic = Traffic(worker, found, QUERIES)
            safe = await traffic.until(held)
            assert "rebuilt" in safe.reason

    asyncio.run(scenario())
