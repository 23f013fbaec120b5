"""Cold start: from the first query on the product is at least as good as the server alone."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.learner_kit import Vectors, clustered, create_items, text
from tests.integration.test_serve import serving

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]

QUERIES = clustered(240, seed=11) + 0.3
ASK = "SELECT id FROM items ORDER BY embedding <-> %s::vector LIMIT 10"
TARGET = 0.95


def ask(connection: psycopg.Connection[tuple[object, ...]], vector: Vectors) -> list[object]:
    return [row[0] for row in connection.execute(ASK, [text(vector)])]


def recall(found: list[list[object]], nearest: list[set[object]]) -> float:
    shares = [len(best.intersection(ids)) / len(best) for ids, best in zip(found, nearest, strict=True)]
    return sum(shares) / len(shares)


def test_no_query_is_worse_for_a_proxy_that_knows_nothing_yet(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    rows = create_items(postgres.dsn(database))
    nearest: list[set[object]] = [
        set(np.argsort(((rows - vector) ** 2).sum(axis=1))[:10].tolist()) for vector in QUERIES
    ]

    more = f"[learning]\ntarget_recall = {TARGET}\nmin_samples = 40\n"
    with serving(tmp_path, ("127.0.0.1", postgres.port), more, postgres.uri()) as served:
        served.wait_ready()
        with (
            served.connect(database, autocommit=True) as proxied,
            served.connect(database, autocommit=True) as own,
            psycopg.connect(postgres.dsn(database), autocommit=True) as direct,
            psycopg.connect(postgres.dsn(database), autocommit=True) as direct_own,
        ):
            for connection in (own, direct_own):
                connection.execute("SET hnsw.ef_search = 200")
            through: list[list[object]] = []
            alone: list[list[object]] = []
            for vector in QUERIES:
                through.append(ask(proxied, vector))
                alone.append(ask(direct, vector))
                assert len(through[-1]) == len(alone[-1]) == 10
                # Who has set it wins, from the first query to the last.
                assert ask(own, vector) == ask(direct_own, vector)
            assert through[:20] == alone[:20]  # forty labels are needed before anything is touched
            for first in range(0, len(QUERIES), 60):
                some = slice(first, first + 60)
                ours, theirs = (recall(found[some], nearest[some]) for found in (through, alone))
                assert ours >= min(theirs, TARGET) - 0.01, first
            assert proxied.execute("SHOW hnsw.ef_search").fetchone() == ("40",)
            assert own.execute("SHOW hnsw.ef_search").fetchone() == ("200",)
            ours, theirs = recall(through, nearest), recall(alone, nearest)
            assert ours >= min(theirs, TARGET) - 0.005


def test_a_limit_above_what_the_index_returns_gets_all_its_rows_though_nothing_was_measured(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    hundred = ASK.replace("LIMIT 10", "LIMIT 100")
    more = "starting_credit = 0\nbudget = 0.0\n"
    with serving(tmp_path, ("127.0.0.1", postgres.port), more, postgres.uri()) as served:
        served.wait_ready()
        with (
            served.connect(database, autocommit=True) as proxied,
            served.connect(database, autocommit=True) as own,
            psycopg.connect(postgres.dsn(database), autocommit=True) as direct,
        ):
            own.execute("SET hnsw.ef_search = 60")

            def rows(connection: psycopg.Connection[tuple[object, ...]]) -> int:
                return len(connection.execute(hundred, [text(QUERIES[0])]).fetchall())

            assert rows(direct) <= 40
            deadline = time.monotonic() + 120.0
            while rows(proxied) < 100:  # until the learner has seen the index
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert rows(own) <= 60  # who has set it wins
            assert ask(proxied, QUERIES[1]) == ask(direct, QUERIES[1])
