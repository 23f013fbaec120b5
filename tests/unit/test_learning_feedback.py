"""Feedback: missed rows ask for more recall, everything else does not, and nobody asks for too much."""

from __future__ import annotations

import pytest

from learning.feedback import LEAST, FeedbackLog, Ratings, attainable
from learning.verdict import Feedback

GOOD, MISSED, IRRELEVANT = Feedback(3, 0), Feedback(3, 0, missed=1), Feedback(0, 5)


def after(*given: Feedback) -> Ratings:
    ratings = Ratings()
    for feedback in given:
        ratings = ratings.rated(feedback)
    return ratings


def test_missed_rows_raise_the_target_and_good_ratings_lower_it_to_what_is_configured() -> None:
    assert after(*[MISSED] * 3).target(0.98) > after(MISSED).target(0.98) > 0.98
    assert after(MISSED, *[GOOD] * 5).target(0.98) < after(MISSED).target(0.98)
    assert after(MISSED, *[GOOD] * 50).target(0.98) == pytest.approx(0.98)


def test_irrelevant_rows_are_no_matter_of_recall() -> None:
    ratings = after(*[IRRELEVANT] * 20)
    assert ratings.target(0.98) == pytest.approx(0.98)
    assert (ratings.queries, ratings.irrelevant) == (20, 100)


def test_nobody_can_ask_for_more_than_a_tenth_of_the_misses() -> None:
    ratings = after(*[Feedback(50, 0, missed=50)] * 50)
    assert ratings.strictness == LEAST
    assert ratings.target(0.98) == pytest.approx(0.998)


def test_target_comes_to_rest_where_misses_are_rare() -> None:
    ratings = Ratings()
    for number in range(1200):
        ratings = ratings.rated(MISSED if number % 12 == 0 else GOOD)
    assert 0.3 < ratings.strictness <= 1.0


def test_target_never_asks_for_labels_that_are_not_there() -> None:
    assert attainable(0.998, 0.98, 100) == pytest.approx(0.98)
    assert attainable(0.998, 0.98, 400) == pytest.approx(0.995)
    assert attainable(0.998, 0.98, 5000) == pytest.approx(0.998)
    assert attainable(0.98, 0.98, 3) == 0.98


def test_ratings_survive_as_a_note_and_can_be_forgotten() -> None:
    log = FeedbackLog()
    log.rated("public.items", MISSED)
    name, note = log.note("public.items")
    restored = FeedbackLog()
    restored.restore(
        {name: note, "feedback:public.other": b"\xc1", "feedback:public.gone": b"", "world:x": b"?"}
    )
    assert restored["public.items"] == log["public.items"]
    assert restored["public.items"].missed == 1
    assert restored["public.other"] == Ratings()
    restored.forget("public.items")
    assert restored["public.items"] == Ratings()
