"""The budget is kept in the long run, and measuring gives way to work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learning.budget import Pace, TokenBucket


@given(
    rate=st.floats(0.001, 1.0),
    starting=st.floats(0.0, 100.0),
    costs=st.lists(st.floats(0.001, 5.0), min_size=1, max_size=200),
)
def test_spending_never_exceeds_starting_credit_and_rate_by_more_than_one_measurement(
    rate: float, starting: float, costs: list[float]
) -> None:
    now, spent = 0.0, 0.0
    bucket = TokenBucket(rate, starting, now)
    for cost in costs:
        now += bucket.wait(now)
        assert bucket.credit(now) > 0
        bucket.spend(cost, now)
        spent += cost
        assert spent <= starting + rate * now + max(costs) + 0.01


def test_credit_is_capped_at_the_starting_credit() -> None:
    bucket = TokenBucket(0.5, 10.0, 0.0)
    assert bucket.credit(1e6) == 10.0


def test_without_rate_only_the_starting_credit_is_spent() -> None:
    bucket = TokenBucket(0.0, 1.0, 0.0)
    assert bucket.wait(0.0) == 0.0
    bucket.spend(1.5, 0.0)
    assert bucket.wait(1e9) == float("inf")


def test_waiting_ends_when_the_debt_is_paid_back() -> None:
    bucket = TokenBucket(0.02, 0.0, 0.0)
    bucket.spend(1.0, 0.0)
    assert bucket.wait(0.0) == pytest.approx(50.0, abs=0.1)
    assert bucket.wait(50.1) == 0.0


def test_clock_that_goes_back_gives_no_credit() -> None:
    bucket = TokenBucket(1.0, 5.0, 100.0)
    bucket.spend(5.0, 100.0)
    assert bucket.credit(50.0) == 0.0
    assert bucket.credit(100.0) == 0.0


@pytest.mark.parametrize("values", [(-0.1, 1.0), (0.1, -1.0)])
def test_negative_budget_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="negative"):
        TokenBucket(*values, now=0.0)


def test_quiet_server_is_measured_without_rest() -> None:
    pace = Pace(processors=2)
    assert all(pace.observe("t", 10.0, 1) == 0.0 for _ in range(100))


def test_busy_server_gets_rest_that_grows_to_a_limit_and_goes_when_it_is_quiet() -> None:
    pace = Pace(processors=2)
    seen = [pace.observe("t", 10.0, 9) for _ in range(10)]
    assert seen == sorted(seen)
    assert seen[-1] == 15.0
    assert [pace.observe("t", 10.0, 0) for _ in range(20)][-1] == 0.0


def test_measurements_that_take_much_longer_than_usual_are_a_sign_of_a_busy_server() -> None:
    pace = Pace(processors=2)
    for _ in range(30):
        pace.observe("slow", 100.0, 0)
        pace.observe("quick", 1.0, 0)
    assert pace.pace == 0.0  # templates differ; that is no sign
    for _ in range(3):
        pace.observe("quick", 10.0, 0)
    assert pace.pace > 0.0


def test_grant_for_a_change_never_exceeds_the_most_and_pays_no_debts_twice() -> None:
    bucket = TokenBucket(0.0, 10.0, 0.0)
    bucket.spend(12.0, 0.0)
    bucket.grant(5.0, 1.0)
    assert bucket.credit(1.0) == 5.0
    bucket.grant(20.0, 1.0)
    assert bucket.credit(1.0) == 10.0
