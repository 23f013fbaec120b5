"""Verdicts of the replays on recorded recall curves."""

from __future__ import annotations

import pytest

from bench.replay.main import Result, Scenario, below, is_held
from bench.replay.traffic import Queries
from learning.records import Trust


def result(recall: float) -> Result:
    return Result(recall, 1.0, 2.0, 2.0, 0.1, 0.1, 0.5, Trust.QUERY, "")


def nothing(seed: int) -> tuple[Queries, Queries]:
    raise AssertionError("not drawn here")


@pytest.mark.parametrize(
    ("recalls", "lower", "held"),
    [
        ([0.975] * 20, 0, True),  # exactly 0.005 below is not more than that
        ([0.98] * 19 + [0.9749], 1, True),
        ([0.98] * 18 + [0.9749] * 2, 2, False),
        ([0.98] * 38 + [0.9749] * 2, 2, True),
        ([0.98] * 4 + [0.9], 1, True),
    ],
)
def test_one_replay_in_twenty_may_miss_the_target(recalls: list[float], lower: int, held: bool) -> None:
    scenario = Scenario("mixed", nothing, 300, 0.98)
    results = [result(each) for each in recalls]
    assert below(scenario, results) == lower
    assert is_held(scenario, results) is held
