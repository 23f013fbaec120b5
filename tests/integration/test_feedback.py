"""Ratings over the channel, against a real server: what the index missed raises the target, and only that."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import numpy as np
import psycopg
import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from bench.embedded import EmbeddedPostgres
from learning.channel import Rated
from learning.records import Trajectory
from tests.integration.learner_kit import (
    UNFILTERED,
    Vectors,
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
LOW = (("hnsw.ef_search", "10"),)


async def reaches(registry: CollectorRegistry, name: str, labels: dict[str, str], value: float) -> None:
    for _ in range(100):
        if sample(name, labels=labels, registry=registry) == value:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"{name} is {sample(name, labels=labels, registry=registry)}, not {value}")


def missing_rows(dsn: str, vector: Vectors) -> tuple[list[str], list[str]]:
    """Return the keys of true neighbours that a search with ef_search = 10 misses, and of those it finds."""
    ask = f"SELECT id FROM items ORDER BY embedding <-> '{text(vector)}' LIMIT 10"
    with psycopg.connect(dsn) as connection:
        connection.execute("SET LOCAL hnsw.ef_search = 10")
        served = {str(row[0]) for row in connection.execute(ask)}
        connection.execute("SET LOCAL enable_indexscan = off")
        truth = [str(row[0]) for row in connection.execute(ask)]
    return [key for key in truth if key not in served], sorted(served & set(truth))


def test_rows_that_users_miss_raise_the_target_and_it_lasts(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database))
    registry = CollectorRegistry()
    found = template(UNFILTERED, database)
    asked = [query(found, vector) for vector in QUERIES]
    rated: list[tuple[Trajectory, list[str], list[str]]] = []
    for vector in QUERIES[:60]:
        missed, seen = missing_rows(postgres.dsn(database), vector)
        if missed:
            rated.append((replace(query(found, vector), arm="ef=10", settings=LOW), missed, seen))
    assert len(rated) >= 5

    async def scenario() -> None:
        config = configuration(postgres, tmp_path)
        async with learner(config, socket_path, registry) as worker:
            await worker.announce(found, asked)
            before = await worker.policy(found)
            assert before.target_recall == 0.95
            await worker.send(Rated(rated[0][0].query_id, tuple(rated[0][1])))  # before its query arrives
            await worker.announce(found, [trajectory for trajectory, _, _ in rated])
            await worker.send(*[Rated(t.query_id, (*missed, *seen)) for t, missed, seen in rated[1:5]])
            after = await worker.policy(found, lambda p: p.target_recall > 0.96)
            assert after.contexts["10"].expected_recall >= before.contexts["10"].expected_recall
            chosen, first = after.arms[after.fallback], before.arms[before.fallback]
            assert chosen.kind == "exact" or chosen.effort >= first.effort
            await asyncio.sleep(1.2)
        outcomes = {**TABLE, "outcome": "missed"}
        assert sample("ruvector_feedback_total", labels=outcomes, registry=registry) == 5
        aimed_at = sample("ruvector_target_recall_ratio", labels=TABLE, registry=registry)
        assert 0.97 < aimed_at <= 0.995
        again = CollectorRegistry()
        async with learner(config, socket_path, again) as worker:
            await worker.announce(found, asked[:5])
            await reaches(again, "ruvector_target_recall_ratio", TABLE, aimed_at)

    asyncio.run(scenario())


def test_ratings_that_say_nothing_about_the_index_change_no_target(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    vectors = create_items(postgres.dsn(database), rows=1000)
    registry = CollectorRegistry()
    found = template(UNFILTERED, database)
    asked = [query(found, vector) for vector in QUERIES[:30]]
    far = [str(i) for i in np.argsort(-np.linalg.norm(vectors - QUERIES[0], axis=1))[:5]]

    async def scenario() -> None:
        async with learner(configuration(postgres, tmp_path), socket_path, registry) as worker:
            await worker.announce(found, asked)
            await worker.send(
                Rated(asked[0].query_id, tuple(far)),  # relevant, says the user, but not near
                Rated(asked[1].query_id, (), ("1", "2", "3")),
                Rated(asked[2].query_id, ("no such key",)),
                Rated(uuid.uuid4().bytes, ("1",)),
            )
            unknown = {"table": "", "outcome": "unknown"}
            await reaches(registry, "ruvector_feedback_total", unknown, 1)
            await asyncio.sleep(1.2)
        good = {**TABLE, "outcome": "good"}
        assert sample("ruvector_feedback_total", labels=good, registry=registry) == 3
        assert sample("ruvector_target_recall_ratio", labels=TABLE, registry=registry) == 0.95

    asyncio.run(scenario())
