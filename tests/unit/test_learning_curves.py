"""Curves and costs: gaps, monotone ladders, uncertainty, and the cheapest arm."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from learning.curves import Caution, cheapest, costs, estimate, evidence, isotonic, ladders
from learning.dialects import AS_IS
from learning.records import Arm, ArmResult, Label

ARMS = (
    AS_IS,
    Arm("ef=10", (("hnsw.ef_search", "10"),), "hnsw", 10),
    Arm("ef=20", (("hnsw.ef_search", "20"),), "hnsw", 20),
    Arm("ef=40", (("hnsw.ef_search", "40"),), "hnsw", 40),
    Arm("exact", (("enable_indexscan", "off"),), "exact"),
)
ALL = np.ones(len(ARMS), dtype=bool)


def label(when: float, **recall: float) -> Label:
    results = {name.replace("_", "="): ArmResult(r, 10, 1.0) for name, r in recall.items()}
    return Label("t", "10", when, None, 10, 10, results, "as is", True)


def test_ladders_are_ordered_by_effort_and_leave_out_arms_without() -> None:
    shuffled = (ARMS[3], ARMS[0], ARMS[1], ARMS[4], ARMS[2])
    assert ladders(shuffled) == [[2, 4, 0]]


def test_different_other_settings_make_different_ladders() -> None:
    strict = Arm("strict", (("hnsw.iterative_scan", "strict_order"), ("hnsw.ef_search", "40")), "hnsw", 40)
    assert ladders((*ARMS, strict)) == [[1, 2, 3], [5]]


def test_recall_never_falls_with_effort() -> None:
    known = evidence([label(0, ef_10=0.9, ef_20=0.7, ef_40=0.8)], ARMS)
    assert known.recall[0, 1:4].tolist() == [0.9, 0.9, 0.9]


def test_an_arm_that_was_not_run_gets_what_less_effort_gave() -> None:
    known = evidence([label(0, ef_10=0.9), label(1, ef_10=0.5, ef_20=0.8, ef_40=1.0)], ARMS)
    assert known.recall[0, 1:4].tolist() == [0.9, 0.9, 0.9]


def test_a_gap_below_gets_the_mean_but_never_more_than_more_effort_gave() -> None:
    known = evidence([label(0, ef_20=0.4, ef_40=0.6), label(1, ef_10=0.8, ef_20=0.8, ef_40=1.0)], ARMS)
    assert known.recall[0, 1] == pytest.approx(0.4)


def test_the_exact_arm_has_recall_one_whatever_was_measured() -> None:
    assert evidence([label(0, exact=0.9)], ARMS).recall[0, 4] == 1.0


def test_missing_rows_are_lost_recall() -> None:
    short = label(0, ef_10=1.0)
    short = msgspec.structs.replace(short, results={"ef=10": ArmResult(1.0, 4, 1.0)})
    assert evidence([short], ARMS).recall[0, 1] == pytest.approx(0.4)
    nothing = msgspec.structs.replace(short, found=0, results={"ef=10": ArmResult(0.0, 0, 1.0)})
    assert evidence([nothing], ARMS).recall[0, 1] == 1.0


def test_labels_age_by_newer_labels_and_are_sorted_by_time() -> None:
    known = evidence([label(2), label(0), label(1)], ARMS, learning_rate=0.1, min_samples=1)
    assert known.weight.tolist() == pytest.approx([0.81, 0.9, 1.0])
    assert evidence([label(0), label(1)], ARMS).weight.tolist() == [1.0, 1.0]


def test_costs_are_medians_that_rise_with_effort_and_infinite_if_never_measured() -> None:
    ms = np.array(
        [[np.nan, 2.0, 1.0, 3.0, np.nan], [np.nan, 2.0, 1.0, 3.0, np.nan], [np.nan, 9.0, 1.0, 3.0, np.nan]]
    )
    cost = costs(ms, ladders(ARMS))
    assert cost.tolist() == [np.inf, 1.5, 1.5, 3.0, np.inf]


def test_isotonic_pools_neighbours_by_weight() -> None:
    fitted = isotonic(np.array([1.0, 4.0, 1.0, 5.0]), np.array([1.0, 1.0, 2.0, 1.0]))
    assert fitted.tolist() == pytest.approx([1.0, 2.0, 2.0, 5.0])


def test_few_perfect_labels_do_not_prove_perfection() -> None:
    caution = Caution(deviations=1.0, misses=1.0)
    bounds = [float(estimate(np.ones(n), np.ones(n)).lower(caution)) for n in (3, 30, 300, 3000)]
    assert bounds == sorted(bounds)
    assert bounds[0] < 0.8
    assert 0.98 < bounds[2] < 1.0
    assert float(estimate(np.ones(3), np.ones(3)).lower(Caution(0.0, 0.0))) == 1.0


def test_no_labels_support_no_claim() -> None:
    nothing = estimate(np.zeros((0, 3)), np.zeros(0))
    assert (nothing.lower(Caution(1.0, 1.0)) < 0.0).all()


def test_unequal_weights_count_as_fewer_labels() -> None:
    recall = np.array([0.8, 1.0] * 50)
    equal = estimate(recall, np.ones(100))
    skewed = estimate(recall, np.repeat([0.02, 1.0], 50))
    assert skewed.count < equal.count == 100.0
    assert skewed.error > equal.error


def test_the_cheapest_arm_that_reaches_the_target_is_taken() -> None:
    recall = np.array([0.9, 0.97, 0.985, 0.99, 1.0])
    cost = np.array([1.0, 1.0, 2.0, 3.0, 30.0])
    assert cheapest(recall, cost, 0.98, ALL) == 2
    assert cheapest(recall, cost, 0.5, ALL) == 1
    assert cheapest(recall, cost, 0.995, ALL & (recall < 1.0)) is None


def test_between_equal_costs_the_higher_recall_wins_and_then_the_earlier_arm() -> None:
    cost = np.array([1.0, 1.02, 1.0, 1.04, np.inf])
    assert cheapest(np.array([0.98, 0.99, 0.98, 0.999, 1.0]), cost, 0.98, ALL) == 3
    assert cheapest(np.array([0.99, 0.99, 0.99, 0.99, 1.0]), cost, 0.98, ALL) == 0


def test_the_arm_in_use_is_left_only_for_one_that_is_clearly_better() -> None:
    cost, allowed = np.array([1.0, 1.04, 2.0]), np.ones(3, dtype=bool)
    assert cheapest(np.array([0.99, 0.985, 1.0]), cost, 0.98, allowed) == 0
    assert cheapest(np.array([0.99, 0.985, 1.0]), cost, 0.98, allowed, current=1) == 1
    assert cheapest(np.array([0.99, 0.9795, 1.0]), cost, 0.98, allowed, current=1) == 1  # within the grace
    assert cheapest(np.array([0.99, 0.97, 1.0]), cost, 0.98, allowed, current=1) == 0
    assert cheapest(np.array([0.99, 0.985, 1.0]), cost, 0.98, allowed, current=2) == 0


def test_a_tolerance_forgives_standard_errors_but_no_imagined_miss() -> None:
    found = estimate(np.tile([1.0, 1.0, 1.0, 0.8], 25), np.ones(100))
    without = Caution(deviations=0.0, misses=1.0)
    tolerant = Caution(deviations=1.645, misses=1.0, tolerance=0.25)
    forgiven = 0.25 * (1.0 - 0.98)
    doubt = 1.645 * float(found.error)
    assert 0.0 < doubt - forgiven < doubt  # the case tests something
    assert float(found.lower(tolerant, 0.98)) == pytest.approx(
        float(found.lower(without)) - (doubt - forgiven)
    )
    assert float(found.lower(tolerant, 0.5)) == float(found.lower(without))
