"""Drift: what raises an alarm, what does not, and what is served meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from learning.dialects import IndexInfo, ladder
from learning.drift import RECENT, Cusum, Kind, MixWatch, World, compare, safe_arm
from learning.records import ArmResult, Label

ARMS = ladder([IndexInfo("i", "hnsw")], filtered=False, max_k=10)
INDEXES = (("i", 7),)


def alarms(recalls: np.ndarray, target: float = 0.98) -> int | None:
    """Return the number of audits after which the alarm is raised, or None."""
    cusum = Cusum()
    for number, recall in enumerate(recalls.tolist(), start=1):
        if cusum.add(recall, target, float(number)):
            return number
    return None


def hits(share: float, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).binomial(10, share, count) / 10


def test_recall_that_keeps_the_target_raises_no_alarm() -> None:
    raised = [alarms(hits(0.985, 2000, seed)) for seed in range(20)]
    assert sum(alarm is not None for alarm in raised) <= 1


@pytest.mark.parametrize(("share", "within"), [(0.80, 12), (0.90, 25), (0.95, 100)])
def test_fallen_recall_raises_an_alarm_soon(share: float, within: int) -> None:
    found = [alarms(hits(share, 500, seed)) for seed in range(20)]
    assert all(alarm is not None for alarm in found)
    assert sorted(alarm or 0 for alarm in found)[18] <= within


def test_one_query_that_found_nothing_raises_no_alarm() -> None:
    assert alarms(np.array([0.0] + [1.0] * 50 + [0.0, 0.0])) is None


def test_change_is_dated_back_to_where_it_began() -> None:
    cusum = Cusum()
    for at in range(50):
        assert not cusum.add(1.0, 0.98, float(at))
    at = 50
    while not cusum.add(0.7, 0.98, float(at)):
        at += 1
    assert cusum.since == 50.0
    cusum.reset()
    assert not cusum.add(0.7, 0.98, 99.0)


def vectors(count: int, centre: float, seed: int, dimensions: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(count, dimensions))
    found[:, 0] += centre
    return found.astype(np.float32)


def test_queries_from_one_population_raise_no_suspicion_and_others_do() -> None:
    for seed in range(10):
        watch = MixWatch()
        assert not any(watch.add(vector) for vector in vectors(20 * RECENT, 2.0, seed))
        suspected = [number for number, v in enumerate(vectors(3 * RECENT, -2.0, seed + 99)) if watch.add(v)]
        assert suspected
        assert suspected[0] < 2 * RECENT


def test_vectors_of_another_length_are_not_compared() -> None:
    watch = MixWatch()
    assert not any(watch.add(v) for v in vectors(2 * RECENT, 0.0, 1))
    assert not any(watch.add(v) for v in vectors(2 * RECENT, 0.0, 1, dimensions=3))


def test_changes_of_the_catalogs_are_named() -> None:
    before = World(INDEXES, 1000.0)
    assert compare(before, World(INDEXES, 1400.0), 1.0) is None
    rebuilt = compare(before, World((("i", 8),), 1000.0), 1.0)
    assert rebuilt is not None
    assert (rebuilt.kind, rebuilt.words) == (Kind.INDEX, "index i rebuilt")
    other = compare(before, World((("j", 9),), 1000.0), 1.0)
    assert other is not None
    assert other.words == "index i gone; j new"
    for rows in (1600.0, 600.0):
        changed = compare(before, World(INDEXES, rows), 1.0)
        assert changed is not None
        assert changed.kind is Kind.ROWS
    assert compare(World(INDEXES, 5.0), World(INDEXES, 90.0), 1.0) is None


def label(exact_ms: float = 50.0, **recalls: float) -> Label:
    results = {
        name.replace("ef", "ef="): ArmResult(recall, 10, int(name[2:]) / 40)
        for name, recall in recalls.items()
    }
    results["exact"] = ArmResult(1.0, 10, exact_ms)
    return Label("t", "10", 0.0, None, 10, 10, results, "as is", True)


def test_safe_arm_has_recall_to_spare_and_twice_the_effort() -> None:
    labels = [label(ef40=0.97, ef80=0.98, ef160=0.996, ef320=1.0)] * 30

    def chosen(**options: bool) -> str:
        found = safe_arm(ARMS, labels, target=0.98, max_exact_ms=100.0, **{"filtered": False, **options})
        return ARMS[found].name

    assert chosen() == "ef=320"
    assert chosen(strongest=True) == "exact"
    assert chosen(filtered=True) == "exact"


def test_safe_arm_is_exact_where_that_is_hardly_dearer_and_never_where_it_stalls_the_server() -> None:
    cheap = [label(exact_ms=5.0, ef160=0.999)] * 30
    assert ARMS[safe_arm(ARMS, cheap, target=0.98, max_exact_ms=100.0, filtered=False)].name == "exact"
    dear = [label(exact_ms=500.0, ef160=0.95)] * 30
    for strongest in (False, True):
        found = safe_arm(ARMS, dear, target=0.98, max_exact_ms=100.0, filtered=False, strongest=strongest)
        assert ARMS[found].name == "ef=1000"


def test_without_any_label_the_strongest_arm_serves() -> None:
    assert ARMS[safe_arm(ARMS, [], target=0.98, max_exact_ms=100.0, filtered=False)].name == "ef=1000"
