"""The ReasoningBank: lookup, merging, forgetting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from learning.reasoning_bank import LearnedPattern, ReasoningBank
from learning.records import Arm

ARMS = (
    Arm("as is", (), "as-is"),
    Arm("ef=10", (("hnsw.ef_search", "10"),), "hnsw", 10),
    Arm("ef=40", (("hnsw.ef_search", "40"),), "hnsw", 40),
    Arm("probes=4", (("ivfflat.probes", "4"),), "ivfflat", 4),
)


def pattern(
    vector: list[float],
    curve: tuple[float, ...] = (0.9, 0.9, 1.0, 0.95),
    *,
    weight: float = 1.0,
    usage: float = 1.0,
) -> LearnedPattern:
    ms = np.array([1.0, 0.5, np.nan, 2.0])
    return LearnedPattern.of(
        np.array(vector, dtype=np.float32), np.array(curve), ms, weight=weight, usage=usage
    )


def bank(*patterns: LearnedPattern) -> ReasoningBank:
    made = ReasoningBank(2)
    for one in patterns:
        made.store(one)
    return made


def test_lookup_gives_the_nearest_directions_nearest_first() -> None:
    made = bank(pattern([1, 0]), pattern([0, 1]), pattern([-1, 0]))
    found = made.lookup(np.array([2.0, 0.4], dtype=np.float32), 2)
    assert [p.query_cluster_centroid.round().tolist() for p, _ in found] == [[1.0, 0.0], [0.0, 1.0]]
    assert found[0][1] == pytest.approx(2.0 / np.hypot(2.0, 0.4), abs=1e-6)


def test_an_empty_bank_and_a_zero_vector_are_no_error() -> None:
    assert ReasoningBank(2).lookup(np.ones(2, dtype=np.float32), 3) == []
    found = bank(pattern([1, 0])).lookup(np.zeros(2, dtype=np.float32), 3)
    assert [cosine for _, cosine in found] == [0.0]


def test_a_pattern_stored_after_a_lookup_is_found() -> None:
    made = bank(pattern([1, 0]))
    made.lookup(np.ones(2, dtype=np.float32), 1)
    made.store(pattern([0, 1]))
    (found, _), *_ = made.lookup(np.array([0.0, 1.0], dtype=np.float32), 1)
    assert found.query_cluster_centroid.tolist() == [0.0, 1.0]


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        bank(pattern([1, 0, 0]))


def test_equal_queries_merge_and_others_stay() -> None:
    made = bank(pattern([1, 0], (0.8, 0.8, 0.8, 0.8)), pattern([0, 1]), pattern([5, 0], (1.0, 1.0, 1.0, 1.0)))
    assert made.consolidate() == 1
    merged = made.patterns()[0]
    assert merged.count == 2.0
    assert merged.curve.tolist() == pytest.approx([0.9] * 4)
    assert len(made) == 2
    assert made.consolidate() == 0


def test_merging_gives_the_same_in_any_order() -> None:
    parts = [pattern([1, 0.01 * i], (0.1 * i,) * 4, weight=1.0 + i) for i in range(4)]
    totals = []
    for order in itertools.permutations(parts):
        made = bank(*order)
        made.consolidate(0.99)
        (total,) = made.patterns()
        totals.append(np.concatenate((total.vector_sum, total.recall_sum, total.cost_sum, [total.count])))
    for other in totals[1:]:
        np.testing.assert_allclose(other, totals[0], rtol=1e-12)


def test_pruning_removes_the_unused_the_unsure_and_then_the_least_used_and_oldest() -> None:
    made = bank(
        pattern([1, 0], usage=5.0),
        pattern([0, 1], usage=0.0),
        pattern([1, 1], usage=5.0, weight=0.01),
        pattern([1, 2], usage=2.0),
        pattern([2, 1], usage=2.0),
    )
    assert made.prune(1.0, 0.1) == 2
    assert [p.usage for p in made.patterns()] == [5.0, 2.0, 2.0]
    assert made.prune(0.0, 0.0, limit=2) == 1
    np.testing.assert_allclose(made.centroids(), [[1.0, 0.0], [0.894, 0.447]], atol=1e-3)


def test_a_pattern_says_what_is_best_for_it() -> None:
    one = pattern([1, 0], (0.9, 0.9, 1.0, 0.95))
    assert one.optimal(ARMS, 0.98, "hnsw.ef_search") == 40
    assert one.optimal(ARMS, 0.9, "hnsw.ef_search") == 10
    assert one.optimal(ARMS, 0.98, "ivfflat.probes") == 4
    assert one.optimal(ARMS, 0.98, "ruvector.probes") is None
    assert one.best_arm(ARMS, 0.98) == 2


def test_confidence_grows_with_labels_and_stays_below_one() -> None:
    levels = [pattern([1, 0], weight=n).confidence for n in (1.0, 4.0, 100.0)]
    assert levels == sorted(levels)
    assert levels[1] == 0.5
    assert levels[2] < 1.0
