"""Recall by a sample of the rows: its bias is the one that is documented, and nothing sampled says nothing."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from learning.binding import ParameterType
from learning.records import Template
from learning.truth import can_batch, estimated_recall, sampled_share
from proxy.sql import Recogniser, Scope

K, ROWS = 10, 2000


def found(sql: str) -> Template:
    statement = Recogniser().recognise(sql.encode(), Scope("app", "app", None))
    assert statement.vector is not None
    return statement.vector.template


PLAIN = found("SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 10")
FILTERED = found("SELECT id FROM items WHERE a = $2 ORDER BY embedding <-> $1 LIMIT 10")
JOINED = found("SELECT i.id FROM items i JOIN d USING (id) ORDER BY i.embedding <-> $1 LIMIT 10")
VECTOR = ParameterType(1, "vector", "public")
LIMIT = ParameterType(20, "int8", "pg_catalog")


@pytest.mark.parametrize("missed", [0, 1, 2])
def test_estimate_is_what_the_documentation_says(missed: int) -> None:
    """The best arm misses the rows of rank 2, 4, ...; a worse one misses two more."""
    rng = np.random.default_rng(0)
    distances = np.arange(ROWS, dtype=float)
    gone = {2.0 * i for i in range(1, missed + 1)}
    best = [d for d in distances if d not in gone][:K]
    worse = [d for d in distances if d not in gone | {1.0, 3.0}][:K]
    estimates = []
    for _ in range(20_000):
        sample = distances[rng.random(ROWS) < 0.2]
        both = [estimated_recall(sample.tolist(), arm, best[-1]) for arm in (best, worse)]
        if both[0] is not None:
            estimates.append(both)
    mean_best, mean_worse = np.mean(np.array(estimates, dtype=float), axis=0)
    within = K + missed
    assert mean_best == pytest.approx(K / within, abs=0.005)
    true_best = (K - missed) / K
    assert 0 <= K / within - true_best <= missed**2 / (K * within) + 1e-9
    assert mean_worse == pytest.approx((K - 2) / within, abs=0.006)


def test_nothing_sampled_near_the_query_says_nothing_and_ties_count_once() -> None:
    assert estimated_recall([5.0, 6.0], [1.0, 2.0], 2.0) is None
    assert estimated_recall([], [1.0], 1.0) is None
    assert estimated_recall([1.0, 1.0], [1.0, 2.0], 2.0) == 0.5
    assert estimated_recall([1.0, float("inf")], [1.0], 1.0) == 1.0


def test_only_large_tables_without_filter_are_sampled() -> None:
    assert sampled_share(PLAIN, 4e6, 5_000_000) == 1.0
    assert sampled_share(PLAIN, 5e7, 5_000_000) == pytest.approx(0.1)
    assert sampled_share(FILTERED, 5e7, 5_000_000) == 1.0
    assert sampled_share(JOINED, 5e7, 5_000_000) == 1.0


def test_only_statements_whose_one_argument_is_the_vector_share_a_pass() -> None:
    assert can_batch(PLAIN, (VECTOR, LIMIT))
    assert can_batch(JOINED, (VECTOR, LIMIT))
    bits = ParameterType(1560, "bit", "pg_catalog")
    assert not can_batch(PLAIN, (bits, LIMIT))
    assert not can_batch(FILTERED, (LIMIT, VECTOR, LIMIT))
    old = msgspec.structs.replace(PLAIN, scan_sql="")  # kept by an earlier version
    assert not can_batch(old, (VECTOR, LIMIT))
