"""The ring buffer of recent queries: what it keeps, what it says, and how it samples."""

from __future__ import annotations

import struct
from collections import Counter

import msgspec
import numpy as np
import pytest

from learning.records import Trajectory, Trust, Value
from learning.trajectory import TrajectoryTracker, filter_values, identity

INT4 = 23


def trajectory(
    number: int, *, k: int = 10, category: bytes | None = b"7", error: str | None = None
) -> Trajectory:
    vector = np.full(4, number, dtype=np.float32).tobytes()
    return Trajectory(
        query_id=number.to_bytes(16, "big"),
        template="t",
        timestamp=float(number),
        vector=vector,
        k=k,
        offset=5,
        values=(Value(0, category), None),
        arm="ef=40",
        settings=(),
        trust=Trust.OBSERVE,
        policy_version=1,
        rows=k,
        first_byte_ms=0.5,
        latency_ms=float(number),
        error=error,
    )


def tracker(window: int = 1000) -> TrajectoryTracker:
    return TrajectoryTracker(window, filter_slots=(0,), value_types=(INT4, 0))


def test_the_oldest_query_falls_out_of_a_full_window() -> None:
    ring = tracker(3)
    for number in range(5):
        ring.record(trajectory(number))
    assert len(ring) == 3
    assert [t.timestamp for t in ring.get_recent(10)] == [2.0, 3.0, 4.0]
    assert [t.timestamp for t in ring.get_recent(1)] == [4.0]
    assert ring.get_recent(0) == []


def test_a_window_needs_room() -> None:
    with pytest.raises(ValueError, match="window"):
        TrajectoryTracker(0)


def test_text_and_binary_values_make_the_same_context() -> None:
    ring = tracker()
    text = trajectory(1, category=b"7")
    binary = msgspec.structs.replace(text, values=(Value(1, struct.pack("!i", 7)), None))
    assert ring.context(text) == ring.context(binary) == "15\x1f7"


def test_null_and_undecodable_values_are_none() -> None:
    assert filter_values(trajectory(1, category=None), (0,), (INT4, 0)) == (None,)
    assert filter_values(trajectory(1, category=b"seven"), (0,), (INT4, 0)) == (None,)
    assert filter_values(trajectory(1), (9,), (INT4, 0)) == (None,)


def test_identity_knows_the_query_and_not_its_circumstances() -> None:
    first = trajectory(1)
    again = msgspec.structs.replace(first, arm="exact", timestamp=99.0, latency_ms=1.0, query_id=b"x" * 16)
    assert identity(first) == identity(again)
    for other in (trajectory(2), trajectory(1, k=11), trajectory(1, category=b"8")):
        assert identity(other) != identity(first)


def test_analysis_counts_everything_once() -> None:
    ring = tracker()
    for number in range(10):
        ring.record(
            trajectory(number % 5, k=10 if number < 8 else 20, error="57014" if number == 9 else None)
        )
    analysis = ring.analyze_patterns()
    assert analysis.queries == 10
    assert analysis.errors == 1
    assert analysis.contexts == {"15\x1f7": 8, "25\x1f7": 2}
    assert analysis.ks == {15: 8, 25: 2}
    assert sum(analysis.arms.values()) == 10
    assert analysis.distinct + analysis.repeated == 10
    assert analysis.repeated == 3
    assert analysis.latency_ms["ef=40"][0] == pytest.approx(2.0)
    assert analysis.span == 4.0


def test_an_empty_window_has_an_analysis() -> None:
    analysis = tracker().analyze_patterns()
    assert analysis.queries == 0
    assert analysis.latency_ms == {}


def test_samples_are_without_replacement_and_never_failed_queries() -> None:
    ring = tracker()
    for number in range(20):
        ring.record(trajectory(number, error="57014" if number % 2 else None))
    for uniform in (True, False):
        drawn = ring.sample(np.random.default_rng(0), 15, uniform=uniform)
        assert len(drawn) == 10
        assert len({t.timestamp for t in drawn}) == 10
        assert all(t.error is None for t in drawn)


def test_samples_repeat_with_the_seed() -> None:
    def draw(seed: int) -> list[float]:
        ring = TrajectoryTracker(seed=seed)
        for number in range(50):
            ring.record(trajectory(number))
        return [t.timestamp for t in ring.sample(None, 5, uniform=True)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_frequent_queries_are_drawn_more_often_and_once_each() -> None:
    ring = tracker()
    for number in range(40):
        ring.record(trajectory(0 if number < 30 else number))
    hits: Counter[float] = Counter()
    rng = np.random.default_rng(0)
    for _ in range(200):
        drawn = ring.sample(rng, 2, uniform=False)
        assert len({identity(t) for t in drawn}) == 2
        hits.update(t.timestamp for t in drawn)
    assert hits[0.0] > 150


def test_excluded_queries_are_not_drawn_by_frequency() -> None:
    ring = tracker()
    for number in range(3):
        ring.record(trajectory(number))
    known = {identity(trajectory(0)), identity(trajectory(1))}
    assert [t.timestamp for t in ring.sample(None, 5, uniform=False, exclude=known)] == [2.0]
    assert ring.sample(None, 5, uniform=False, exclude=known | {identity(trajectory(2))}) == []
    assert ring.sample(None, 0, uniform=True) == []


def test_what_was_asked_most_is_drawn_first_even_where_the_window_forgot_how_often() -> None:
    tracker = TrajectoryTracker(window=20)
    often, seldom = trajectory(1).vector, trajectory(2).vector
    for number in [1] * 50 + [2] * 19:
        tracker.record(trajectory(number))
    (drawn,) = tracker.sample(np.random.default_rng(0), 1, uniform=False)
    assert drawn.vector == often
    (other,) = tracker.sample(np.random.default_rng(0), 1, uniform=False, exclude={identity(drawn)})
    assert other.vector == seldom


def test_an_occurrence_is_audited_again_only_after_all_others() -> None:
    tracker = TrajectoryTracker(window=10)
    for number in range(10):
        tracker.record(trajectory(number))
    rng = np.random.default_rng(0)
    drawn = [tracker.sample(rng, 1, uniform=True)[0].vector for _ in range(10)]
    assert len(set(drawn)) == 10
    assert tracker.sample(rng, 1, uniform=True)[0].vector in drawn
