"""What was noted when it was sent, to be taken back where the server did not do it.

A session notes what a message does (a name stands for another statement, a setting is reset) when it passes,
because the next message may depend on it.  After an error the server skips the rest of the segment, and what
it has done in the segment's implicit transaction is undone; so those notes must go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Journal:
    """Notes of the segments that are not over yet, in the order of sending."""

    __slots__ = ("_notes",)

    def __init__(self) -> None:
        self._notes: deque[tuple[int, int, Callable[[], None]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._notes)

    def note(self, segment: int, completion: int, undo: Callable[[], None]) -> None:
        """Keep how to take back what the message with this completion does, until its segment is over."""
        self._notes.append((segment, completion, undo))

    def failed(self, segment: int, completion: int) -> None:
        """The message with this completion has failed: take back what it and those behind it did."""
        kept: deque[tuple[int, int, Callable[[], None]]] = deque()
        while self._notes:
            note = self._notes.pop()
            if note[0] == segment and note[1] >= completion:
                note[2]()
            else:
                kept.appendleft(note)
        self._notes = kept

    def over(self, segment: int) -> None:
        """A segment is over: what it has done stays."""
        while self._notes and self._notes[0][0] <= segment:
            self._notes.popleft()
