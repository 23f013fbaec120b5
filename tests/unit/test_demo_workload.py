"""The demo's queries are split cleanly, and its judge of recall is right."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from numpy.typing import NDArray

from bench import dataset
from bench.dataset import FAMILIES, Dataset
from bench.demo.workload import K, Query, QuerySets, Scale, Truth, binary_vector, split, text_vector, traffic

SCALE = Scale(tuning=5, test=20, second=4, filtered_per_category=3, tuning_per_category=2)


@pytest.fixture(scope="module")
def data() -> Dataset:
    rng = np.random.default_rng(7)
    category = rng.permutation(np.repeat(np.arange(4, dtype=np.int16), [3, 47, 150, 200]))
    return Dataset(
        base=rng.normal(size=(400, 8)).astype(np.float32),
        category=category,
        queries={family: rng.normal(size=(60, 8)).astype(np.float32) for family in FAMILIES},
        fingerprint="test",
    )


@pytest.fixture(scope="module")
def sets(data: Dataset) -> QuerySets:
    return split(data, SCALE)


def _vectors(queries: list[Query]) -> set[bytes]:
    return {query.vector.tobytes() for query in queries}


def test_shipped_data_set_holds_what_its_readme_says() -> None:
    data = dataset.load()
    assert data.base.shape == (30_000, 384)
    assert data.base.dtype == np.float32
    assert {family: len(queries) for family, queries in data.queries.items()} == dict.fromkeys(
        FAMILIES, 2_000
    )
    assert len(np.unique(data.category)) == 45
    np.testing.assert_allclose(np.linalg.norm(data.base, axis=1), 1.0, atol=0.01)
    assert dataset.DEMO_FILE.stat().st_size <= 12_000_000


def test_row_limit_takes_the_first_rows_and_changes_the_fingerprint() -> None:
    whole, part = dataset.load(), dataset.load(rows=100)
    np.testing.assert_array_equal(part.base, whole.base[:100])
    assert part.fingerprint != whole.fingerprint


def test_no_test_query_is_used_for_learning_or_tuning(sets: QuerySets) -> None:
    used = _vectors(sets.learning) | _vectors(sets.tuning) | _vectors(sets.tuning_filtered)
    unseen = _vectors(sets.test) | _vectors(sets.test_filtered)
    second = _vectors(sets.second) | _vectors(sets.second_filtered)
    assert not used & unseen
    assert not used & second
    assert not unseen & second
    assert _vectors(sets.tuning) <= _vectors(sets.learning)


def test_families_and_categories_have_equal_shares(sets: QuerySets) -> None:
    assert {f: sum(q.family == f for q in sets.test) for f in FAMILIES} == dict.fromkeys(FAMILIES, SCALE.test)
    for start in range(0, len(sets.test_filtered), 4):
        assert {q.category for q in sets.test_filtered[start : start + 4]} == {0, 1, 2, 3}


def test_split_is_reproducible(data: Dataset, sets: QuerySets) -> None:
    again = split(data, SCALE)
    assert [q.vector.tobytes() for q in again.test] == [q.vector.tobytes() for q in sets.test]
    assert [q.category for q in again.test_filtered] == [q.category for q in sets.test_filtered]


def test_too_few_queries_are_refused(data: Dataset) -> None:
    with pytest.raises(ValueError, match="too few"):
        split(data, Scale(test=1_000))


def test_traffic_takes_turns_and_uses_learning_queries_only(sets: QuerySets) -> None:
    stream = traffic(sets.learning, np.arange(4, dtype=np.int16))
    queries = [next(stream) for _ in range(200)]
    assert [q.category is None for q in queries] == [True, False] * 100
    assert {q.category for q in queries} == {None, 0, 1, 2, 3}
    assert _vectors(queries) <= _vectors(sets.learning)


def _cosine_distances(data: Dataset, query: Query) -> NDArray[np.float64]:
    base, vector = data.base.astype(np.float64), query.vector.astype(np.float64)
    distances: NDArray[np.float64] = 1 - base @ vector / np.linalg.norm(base, axis=1) / np.linalg.norm(vector)
    if query.category is not None:
        distances[data.category != query.category] = np.inf
    return distances


@pytest.mark.parametrize("category", [None, 0, 1, 3])
def test_exact_answer_has_full_recall_and_each_lost_row_counts(data: Dataset, category: int | None) -> None:
    truth = Truth(data)
    query = Query("gloss", data.queries["gloss"][0], category)
    found = truth.found(query)
    assert found == (3 if category == 0 else K)
    exact = np.argsort(_cosine_distances(data, query))[:found].tolist()
    limit = truth.limits([query])[0]
    assert limit == pytest.approx(np.sort(_cosine_distances(data, query))[found - 1], abs=1e-6)
    assert truth.recall(query, exact, limit) == 1.0
    assert truth.recall(query, exact[:-1], limit) == pytest.approx((found - 1) / found)
    assert truth.recall(query, [], limit) == 0.0


def test_wrong_repeated_and_foreign_rows_are_no_hits(data: Dataset) -> None:
    truth = Truth(data)
    query = Query("gloss", data.queries["gloss"][1], 2)
    order = np.argsort(_cosine_distances(data, query)).tolist()
    limit = truth.limits([query])[0]
    assert truth.recall(query, [*order[:9], order[30]], limit) == pytest.approx(0.9)
    assert truth.recall(query, [order[0]] * K, limit) == pytest.approx(0.1)
    unfiltered = np.argsort(_cosine_distances(data, Query("gloss", query.vector))).tolist()
    foreign = [row for row in unfiltered[:K] if data.category[row] != 2]
    assert foreign
    assert truth.recall(query, foreign, limit) == 0.0


def test_a_tie_with_the_last_row_is_a_hit() -> None:
    base = np.eye(12, dtype=np.float32)
    data = Dataset(base, np.zeros(12, dtype=np.int16), {}, "ties")
    query = Query("gloss", np.ones(12, dtype=np.float32))
    truth = Truth(data)
    assert truth.recall(query, list(range(2, 12)), truth.limits([query])[0]) == 1.0


def test_vector_forms_keep_every_float() -> None:
    vector = np.random.default_rng(3).normal(size=384).astype(np.float32)
    body = binary_vector(vector)
    assert struct.unpack_from("!HH", body) == (384, 0)
    np.testing.assert_array_equal(np.frombuffer(body, dtype=">f4", offset=4), vector)
    parsed = np.array(text_vector(vector).strip("[]").split(","), dtype=np.float32)
    np.testing.assert_array_equal(parsed, vector)


def test_limits_come_in_the_order_of_the_queries_whatever_their_categories(data: Dataset) -> None:
    truth = Truth(data)
    vectors = [vector for family in FAMILIES for vector in data.queries[family]] * 2
    queries = [Query("gloss", vector, (None, 0, 3)[i % 3]) for i, vector in enumerate(vectors)]
    expected = [np.sort(_cosine_distances(data, query))[truth.found(query) - 1] for query in queries]
    np.testing.assert_allclose(truth.limits(queries), expected, atol=1e-6)
