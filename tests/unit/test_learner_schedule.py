"""Labels go where they are needed, and arms that nobody will choose cost nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learning.records import Arm, ArmResult, Label, Trajectory, Trust
from learning.schedule import (
    FIRST_LABELS,
    FULL_EVERY,
    JUDGED_AFTER,
    PLENTY,
    ArmLedger,
    Candidate,
    Traffic,
    draw,
    neediest,
)

EF = [Arm(f"ef={ef}", (("hnsw.ef_search", str(ef)),), "hnsw", ef) for ef in (20, 40, 80)]
ITERATIVE = Arm(
    "strict ef=40", (("hnsw.iterative_scan", "strict_order"), ("hnsw.ef_search", "40")), "hnsw", 40
)
AS_IS, EXACT = Arm("as is", (), "as-is"), Arm("exact", (("enable_indexscan", "off"),), "exact")
ARMS = [AS_IS, *EF, ITERATIVE, EXACT]


def label(results: dict[str, tuple[float, float]], context: str = "10") -> Label:
    """Return a label; `results` is recall and milliseconds by arm."""
    measured = {name: ArmResult(recall, 10, ms) for name, (recall, ms) in results.items()}
    return Label("t", context, 0.0, None, 10, 10, measured, "as is", False)


def trajectory() -> Trajectory:
    return Trajectory(b"q", "t", 0.0, b"", 10, 0, (), "as is", (), Trust.OBSERVE, 0, 10, 1.0, 1.0)


def candidate(
    context: str, traffic: float, labels: int, *, seconds: float = 0.1, enough: int = 300
) -> Candidate:
    return Candidate("t", context, traffic, labels, enough, seconds)


@given(
    traffic=st.dictionaries(
        st.text("abcdefgh", min_size=1, max_size=2), st.integers(1, 1000), min_size=1, max_size=20
    )
)
def test_every_context_with_traffic_gets_its_first_labels_before_any_has_plenty(
    traffic: dict[str, int],
) -> None:
    labels = dict.fromkeys(traffic, 0)
    while any(count < FIRST_LABELS for count in labels.values()):
        chosen = neediest([candidate(c, n, labels[c]) for c, n in traffic.items()])
        assert chosen is not None
        labels[chosen.context] += 1
        assert max(labels.values()) < PLENTY
    assert neediest([candidate(c, n, 300) for c, n in traffic.items()]) is None


def test_traffic_and_cheapness_attract_labels() -> None:
    assert neediest([candidate("often", 90, 10), candidate("seldom", 10, 10)]) == candidate("often", 90, 10)
    quick = candidate("quick", 10, 10, seconds=0.01)
    assert neediest([candidate("slow", 10, 10), quick]) == quick


def test_old_traffic_counts_less_and_memory_is_bounded() -> None:
    traffic = Traffic()
    for _ in range(100):
        traffic.record("old", trajectory(), 0.0)
    for _ in range(60):
        traffic.record("new", trajectory(), 3600.0)
    assert traffic.counts["old"] < 5 < traffic.counts["new"]
    for i in range(5000):
        traffic.record(str(i), trajectory(), 3600.0)
    assert len(traffic.counts) <= 1024
    assert len(traffic.recent("4999")) == 1
    assert min(traffic.rounded().values()) >= 1


def test_draw_follows_the_weights() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw({"a": 9.0, "b": 1.0, "never": 0.0}, rng) for _ in range(1000)]
    assert 850 < drawn.count("a") < 950
    assert "never" not in drawn
    assert draw({}, rng) is None


def test_first_labels_of_a_template_run_every_arm() -> None:
    plan = ArmLedger(ARMS).plan("10")
    assert plan.warm
    assert not any(plan.leave_out(arm, 1.0) for arm in ARMS)


def test_arm_that_is_dearer_than_exact_search_is_left_out_until_a_thorough_label() -> None:
    ledger = ArmLedger(ARMS)
    results = {"as is": (0.2, 1.0), "ef=20": (0.2, 0.5), "strict ef=40": (0.9, 60.0), "exact": (1.0, 2.0)}
    for _ in range(JUDGED_AFTER):
        ledger.record(label(results))
    plan = ledger.plan("10")
    assert plan.leave_out(ITERATIVE, 2.0)
    assert not any(plan.leave_out(arm, 2.0) for arm in (AS_IS, *EF, EXACT))
    for _ in range(FULL_EVERY - 1 - JUDGED_AFTER):
        ledger.record(label(results))
    thorough = ledger.plan("10")
    assert thorough.thorough
    assert not thorough.leave_out(ITERATIVE, 2.0)


def test_new_context_does_not_try_what_usually_costs_more_than_its_exact_search() -> None:
    ledger = ArmLedger(ARMS)
    for _ in range(JUDGED_AFTER):
        ledger.record(label({"strict ef=40": (0.9, 60.0), "exact": (1.0, 100.0)}))
    plan = ledger.plan("other")
    assert plan.leave_out(ITERATIVE, 1.0)
    assert not plan.leave_out(ITERATIVE, 100.0)


def test_higher_rungs_that_were_not_run_because_a_lower_one_found_everything_do_not_look_worse() -> None:
    ledger = ArmLedger(ARMS)
    others = {"strict ef=40": (0.72, 1.5), "exact": (1.0, 50.0)}
    for _ in range(JUDGED_AFTER):  # hard queries: all rungs run
        ledger.record(label({"ef=20": (0.5, 1.0), "ef=40": (0.6, 2.0), "ef=80": (0.7, 4.0), **others}))
    for _ in range(10):  # easy ones: the ladder stops at its first rung
        ledger.record(label({"ef=20": (1.0, 1.0), **others}))
    plan = ledger.plan("10")
    assert not any(plan.leave_out(arm, 50.0) for arm in EF)
    assert not plan.warm
