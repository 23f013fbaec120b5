"""Positions in errors, where the proxy has put text before or behind the client's."""

from __future__ import annotations

import pytest

from proxy.session.diagnosis import InsertedText

#                         0         1         2         3
#                         0123456789012345678901234567890123456789
# The client's own text:  SELECT 1; SELECT 2; SELECT 3
# The text sent:          SELECT 1; <before> SELECT 2<behind>; SELECT 3
INSERTED = InsertedText(segment=0, insertions=((10, 9), (27, 8)))


@pytest.mark.parametrize(
    ("sent", "own"),
    [
        (1, 1),  # the first statement
        (10, 10),  # the last character before what was inserted
        (20, 11),  # the second statement
        (27, 18),  # its last character
        (36, 19),  # what follows it
        (45, 28),  # the last character
    ],
)
def test_a_position_moves_back_by_what_was_inserted_before_it(sent: int, own: int) -> None:
    assert INSERTED.original(sent) == own


@pytest.mark.parametrize("position", [11, 19, 28, 35])
def test_a_position_that_would_lie_in_inserted_text_is_one_in_another_text(position: int) -> None:
    assert INSERTED.original(position) == position
