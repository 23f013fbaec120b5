"""How often queries return, and what the past says of the future."""

from __future__ import annotations

import numpy as np
import pytest

from learning.repetition import Asked, Repetition, vector_name


def test_counts_are_kept_by_context_and_fall_out_of_the_window() -> None:
    repetition = Repetition(window=4)
    for context, name in (("10", b"a"), ("10", b"a"), ("50", b"a"), ("10", b"b")):
        repetition.record(context, name)
    assert repetition.count("10", b"a") == 2
    assert repetition.count("50", b"a") == 1
    assert repetition.count("99", b"a") == 0
    repetition.record("50", b"c")
    repetition.record("50", b"c")  # both of the first are gone
    assert repetition.count("10", b"a") == 0
    assert repetition.asked("10") == Asked({b"b": 1}, 1)
    assert repetition.asked("50").total == 3


def test_where_nothing_returns_nothing_is_expected_to() -> None:
    asked = Asked({bytes([i]): 1 for i in range(100)}, 100)
    assert asked.discounts()[0] == 1.0
    assert asked.shares([bytes([i]) for i in range(100)]).sum() == 0.0


def test_where_everything_returns_shares_are_frequencies() -> None:
    asked = Asked({b"a": 30, b"b": 10}, 40)
    assert asked.discounts() == (0.0, 0.0)
    assert asked.shares([b"a", b"b", b"unknown"]).tolist() == [0.75, 0.25, 0.0]


def test_nothing_asked_has_no_shares() -> None:
    assert Asked().shares([b"a"]).tolist() == [0.0]


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
def test_the_share_of_traffic_to_come_is_foretold(exponent: float) -> None:
    """The most frequent 200 of a window, chosen by that very window, get about the share that is foretold."""
    rng = np.random.default_rng(3)
    share = 1.0 / np.arange(1, 5001) ** exponent
    share /= share.sum()
    errors = []
    for _ in range(10):
        repetition = Repetition()
        for number in rng.choice(len(share), size=3000, p=share).tolist():
            repetition.record("10", vector_name(str(number).encode()))
        counts = {n: repetition.count("10", vector_name(str(n).encode())) for n in range(5000)}
        chosen = sorted(counts, key=lambda n: -counts[n])[:200]
        foretold = repetition.asked("10").shares([vector_name(str(n).encode()) for n in chosen]).sum()
        errors.append(foretold - share[chosen].sum())
    assert abs(np.mean(errors)) < 0.02
    assert max(errors) < 0.05
