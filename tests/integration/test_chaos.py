"""A short form of `make chaos` and of `make soak`: a few faults, and half a minute of mixed load."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import page, run
from tests.chaos.faults import CASES
from tests.soak.__main__ import page as soak_page
from tests.soak.__main__ import soak

pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUICK = {
    "one backend killed: the server recovers",
    "connections reset in mid-message, at random",
    "learner killed",
    "a worker killed",
}


@pytest.mark.timeout(600)
def test_a_few_faults_do_no_lasting_harm() -> None:
    outcomes = run([case for case in CASES if case.name in QUICK], seed=3, clients=2)
    assert len(outcomes) == len(QUICK)
    assert [failure for outcome in outcomes for failure in outcome.failures] == []
    assert all(outcome.proxied.answered for outcome in outcomes)
    assert f"{len(QUICK)} of {len(QUICK)} faults as they should be" in page(outcomes, 3, 2)


def test_names_of_faults_are_different() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.timeout(600)
def test_a_short_soak_differs_nowhere() -> None:
    tally, readings, wrong = soak(15.0, 1 << 60, 3, seed=2)
    assert wrong == []
    assert tally.queries > 100
    assert len(tally.steps) > 8
    assert "0\nanswers that differ" in soak_page(tally, readings, wrong, 2, 3, 15.0)
