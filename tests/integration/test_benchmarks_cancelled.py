"""A benchmark that its client cancels, at any moment: the work ends, and nothing is left that nobody looked after."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import Any

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from learning import benchmarks
from tests.integration.learner_kit import create_items

pytestmark = pytest.mark.integration

MOMENTS = 60


def test_a_cancelled_benchmark_leaves_nothing_behind(postgres: EmbeddedPostgres, database: str) -> None:
    create_items(postgres.dsn(database), rows=600)
    complaints: list[dict[str, Any]] = []
    running = asyncio.Event()

    async def benchmark() -> None:
        async with benchmarks.connection(postgres.uri(), database) as server:
            relation = await server.fetchval("SELECT 'public.items'::regclass::oid")
            column = await benchmarks.column_of(server, relation)
            queries = await benchmarks.sample_rows(server, column, 50)
            while True:
                running.set()
                await benchmarks.latency_rows(
                    server, column, queries, 5, (50.0,), lambda query, k: (("hnsw.ef_search", "50"),), print
                )

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        for moment in range(MOMENTS):
            running.clear()
            task = asyncio.create_task(benchmark())
            await running.wait()
            for _ in range(moment):  # turns of the loop: each a step of some statement
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert task.cancelled()
        del task
        for _ in range(3):
            await asyncio.sleep(0.05)
            gc.collect()

    asyncio.run(scenario())
    assert complaints == []
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        for _ in range(600):
            left = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND datname = %s",
                ("ruvector-proxy learner", database),
            ).fetchone()
            if left == (0,):
                break
            connection.execute("SELECT pg_sleep(0.1)")
        assert left == (0,)
