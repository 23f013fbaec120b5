"""Verdicts: which signals count, and what is recommended."""

from __future__ import annotations

import msgspec
import pytest

from learning.records import ArmResult, Label, Trajectory, Trust
from learning.verdict import Expectation, Feedback, Recommendation, VerdictEngine

SERVED = Trajectory(
    b"0" * 16,
    "t",
    0.0,
    None,
    10,
    0,
    (),
    "ef=40",
    (),
    Trust.STATIC,
    1,
    rows=10,
    first_byte_ms=1.0,
    latency_ms=2.0,
)


def label(**results: tuple[float, float]) -> Label:
    measured = {name: ArmResult(recall, 10, ms) for name, (recall, ms) in results.items()}
    return Label("t", "10", 0.0, None, 10, 10, measured, "ef=40", True)


def probed(served: tuple[float, float], **others: tuple[float, float]) -> Label:
    return label(**{"ef=40": served, "exact": (1.0, 30.0), **others})


def test_a_complete_search_of_full_recall_is_a_success() -> None:
    verdict = VerdictEngine().judge(SERVED, probed((1.0, 2.0)))
    assert verdict.success
    assert verdict.scores == {"recall": 1.0, "completeness": 1.0}
    assert verdict.recommendations == ()


def test_without_any_signal_nothing_is_claimed() -> None:
    unknown = msgspec.structs.replace(SERVED, rows=-1)
    verdict = VerdictEngine().judge(unknown)
    assert not verdict.success
    assert verdict.confidence == 0.0
    assert verdict.scores == {}


def test_a_failed_query_is_a_certain_failure() -> None:
    verdict = VerdictEngine().judge(msgspec.structs.replace(SERVED, error="57014"), probed((1.0, 2.0)))
    assert not verdict.success
    assert verdict.confidence == 1.0


def test_more_signals_give_more_confidence() -> None:
    engine = VerdictEngine()
    alone = engine.judge(SERVED)
    measured = engine.judge(SERVED, probed((1.0, 2.0)))
    everything = engine.judge(SERVED, probed((1.0, 2.0)), Expectation(latency_ms=2.0), Feedback(5, 0))
    assert alone.confidence < measured.confidence < everything.confidence == 1.0


def test_too_few_rows_ask_for_a_scan_that_goes_further() -> None:
    short = msgspec.structs.replace(SERVED, rows=2)
    verdict = VerdictEngine().judge(short, probed((0.2, 2.0)))
    assert not verdict.success
    assert verdict.scores["completeness"] == pytest.approx(0.2)
    assert Recommendation.SCAN_FURTHER in verdict.recommendations


def test_fewer_rows_than_asked_are_complete_where_no_more_exist() -> None:
    few = msgspec.structs.replace(SERVED, rows=3)
    found = msgspec.structs.replace(probed((1.0, 2.0)), found=3)
    assert VerdictEngine().judge(few, found).scores["completeness"] == 1.0
    assert VerdictEngine().judge(few, None, Expectation(matching_rows=3.0)).scores["completeness"] == 1.0
    assert "completeness" not in VerdictEngine().judge(few).scores


def test_slower_than_expected_lowers_the_latency_score() -> None:
    scores = [
        VerdictEngine().judge(SERVED, None, Expectation(latency_ms=usual)).scores["latency"]
        for usual in (4.0, 2.0, 1.0, 0.5)
    ]
    assert scores == pytest.approx([1.0, 1.0, 0.5, 0.25])


def test_irrelevant_results_make_a_failure() -> None:
    assert VerdictEngine().judge(SERVED, None, None, Feedback(relevant=9, irrelevant=1)).success
    assert not VerdictEngine().judge(SERVED, None, None, Feedback(relevant=1, irrelevant=9)).success


def test_low_recall_asks_for_effort_or_for_the_index_to_be_checked() -> None:
    engine = VerdictEngine()
    better = engine.judge(SERVED, probed((0.7, 2.0), **{"ef=200": (1.0, 5.0)}))
    assert better.recommendations == (Recommendation.RAISE_EFFORT,)
    hopeless = engine.judge(SERVED, probed((0.7, 2.0), **{"ef=200": (0.7, 5.0)}))
    assert hopeless.recommendations == (Recommendation.CHECK_INDEX,)


def test_a_much_faster_arm_of_the_same_recall_is_recommended() -> None:
    verdict = VerdictEngine().judge(SERVED, probed((1.0, 2.0), **{"ef=20": (1.0, 1.0)}))
    assert verdict.recommendations == (Recommendation.FASTER_ARM,)


def test_the_threshold_is_a_share() -> None:
    with pytest.raises(ValueError, match="success_threshold"):
        VerdictEngine(1.5)


def test_copies_of_one_document_lower_the_diversity_and_are_named() -> None:
    def found(distinct: int) -> Label:
        results = {"ef=40": ArmResult(1.0, 10, 2.0, distinct), "exact": ArmResult(1.0, 10, 30.0, 10)}
        return Label("t", "10", 0.0, None, 10, 10, results, "ef=40", True)

    varied, copies = (VerdictEngine().judge(SERVED, found(n)) for n in (10, 1))
    assert varied.scores["diversity"] == 1.0
    assert varied.recommendations == ()
    assert copies.scores["diversity"] == 0.0
    assert copies.recommendations == (Recommendation.DUPLICATES,)
    assert copies.score < varied.score
    assert "diversity" not in VerdictEngine().judge(SERVED, probed((1.0, 2.0))).scores  # not measured


def test_a_relevant_row_that_was_missed_counts_against_the_search() -> None:
    verdict = VerdictEngine().judge(SERVED, None, None, Feedback(relevant=4, irrelevant=0, missed=2))
    assert verdict.scores["feedback"] == 0.5
    assert verdict.recommendations == (Recommendation.MISSED,)
