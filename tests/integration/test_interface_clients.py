"""Every SQL statement of the published plan, and of the interface, from every client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.interface_clients import CLIENTS
from tests.integration.interface_kit import Interface, interface
from tests.integration.learner_kit import text

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

PLAN = """
SELECT ruvector_enable_learning('embeddings',
    trajectory_window := 1000,
    learning_rate := 0.01,
    min_samples := 100
)
---
SELECT * FROM ruvector_learning_stats('embeddings')
---
SELECT ruvector_export_patterns('embeddings') AS patterns_json
---
SELECT ruvector_import_patterns('embeddings', (SELECT patterns_json FROM saved))
---
SELECT ruvector_auto_tune('embeddings_idx',
    optimize_for := 'recall',  -- or 'latency', 'balanced'
    sample_queries := 20
)
---
SELECT * FROM ruvector_recommend_params('embeddings')
---
SELECT * FROM items
ORDER BY embedding <-> QUERY
LIMIT 10 /*query_id='abc123'*/
---
SELECT ruvector_record_feedback(
    query_id := 'abc123',
    relevant_ids := ARRAY[1, 5, 7],
    irrelevant_ids := ARRAY[2, 3]
)
---
SET ruvector.ef_search = 40
---
SELECT * FROM items ORDER BY embedding <-> QUERY LIMIT 10
---
SELECT * FROM items
ORDER BY embedding <-> QUERY
LIMIT 10
WITH (adaptive_search := true)
---
SELECT ruvector_benchmark_recall(
    table_name := 'embeddings',
    ground_truth_table := 'embeddings_ground_truth',
    num_queries := 20,
    k := 10
)
---
SELECT ruvector_benchmark_latency(
    table_name := 'embeddings',
    num_queries := 20,
    k := 10,
    percentiles := ARRAY[50, 90, 99]
)
---
SELECT ruvector_get_search_params('embeddings', QUERY)
---
SELECT ruvector_last_query_id()
---
SELECT ruvector_extract_patterns('embeddings', 10)
---
SELECT ruvector_consolidate_patterns('embeddings', 0.95)
---
SELECT ruvector_prune_patterns('embeddings', 1, 0.0)
---
SELECT * FROM items ORDER BY embedding <-> QUERY LIMIT 10 WITH (adaptive_search := false, target_recall := 0.99)
---
SET ruvector.adaptive_search = off
---
SET SESSION ruvector.target_recall = 0.99
---
SET LOCAL ruvector.optimize_for = 'recall'
---
SHOW ruvector.target_recall
---
RESET ruvector.target_recall
---
SELECT ruvector_enable_learning('embeddings', '{"max_trajectories": 2000}'::jsonb)
---
SELECT ruvector_record_feedback('items', QUERY, ARRAY[1, 5]::bigint[], ARRAY[2]::bigint[])
---
SELECT ruvector_clear_learning('items')
---
SELECT ruvector_disable_learning('items')
---
SELECT ruvector_enable_learning('items')
"""


@pytest.fixture(scope="module")
def planned(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interface]:
    with interface(postgres, tmp_path_factory.mktemp("clients"), "interface_clients") as found:
        with found.direct() as connection:
            connection.execute("CREATE TABLE embeddings AS SELECT * FROM items")
            connection.execute("ALTER TABLE embeddings ADD PRIMARY KEY (id)")
            connection.execute(
                "CREATE INDEX embeddings_idx ON embeddings USING hnsw (embedding vector_l2_ops) WITH (m = 6)"
            )
            connection.execute("ANALYZE embeddings")
        found.learn(table="embeddings")
        with found.connect() as connection:
            connection.execute(
                "CREATE TABLE embeddings_ground_truth AS "
                "SELECT * FROM ruvector_ground_truth('embeddings', num_queries := 20, k := 10)"
            )
            connection.execute(
                "CREATE TABLE saved AS SELECT ruvector_export_patterns('embeddings') AS patterns_json"
            )
        yield found


@pytest.mark.parametrize("client", list(CLIENTS))
def test_every_statement_of_the_plan(planned: Interface, client: str) -> None:
    query = f"'{text(planned.vectors[7])}'::vector"
    texts = [statement.strip().replace("QUERY", query) for statement in PLAN.split("\n---\n")]
    outcomes = CLIENTS[client](planned.served.port, planned.database, texts)
    assert dict(zip(texts, outcomes, strict=True)) == dict.fromkeys(texts, "ok")


@pytest.mark.parametrize("client", list(CLIENTS))
def test_errors_arrive_as_errors(planned: Interface, client: str) -> None:
    texts = {
        "SELECT * FROM ruvector_learning_stats('nowhere')": "42P01",
        "SELECT ruvector_learning_stats()": "42883",
        "SELECT ruvector_no_such_function()": "42883",
        "CREATE VIEW v AS SELECT * FROM ruvector_learning_stats('items')": "0A000",
        "SELECT ruvector_import_patterns('embeddings', '{}')": "22023",
        "SELECT ruvector_get_search_params('items', 'no vector')": "22P02",
        "SET ruvector.target_recall = 'high'": "22023",
        "SELECT ruvector_learning_stats(relname::text) FROM pg_class": "0A000",
        "SELECT 1": "ok",
    }
    outcomes = CLIENTS[client](planned.served.port, planned.database, list(texts))
    assert dict(zip(texts, outcomes, strict=True)) == texts
