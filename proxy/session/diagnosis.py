"""Errors and notices of the server: whom they are about, and where in the client's own text they point."""

from __future__ import annotations

from typing import Final

from proxy.wire import framing
from proxy.wire.diagnostics import ErrorResponse, NoticeResponse
from proxy.wire.errors import ProtocolViolation

PREPARED_GONE: Final = frozenset({"26000", "42P05"})
LOGIN_REFUSED: Final = b"28"  # class "invalid authorization specification"
RELAYED_CLASSES: Final = (b"57", b"53", b"25", b"08", b"58", b"XX")
"""Errors in which a server speaks of itself or of the session, not of the settings: for the client to see."""
INTERVENTION: Final = b"57"
"""Class of cancellation, timeout and shutdown: meant for whatever the client is doing."""
FAILED_EARLIER: Final = b"25P02"
INVALID_NAME: Final = b"42602"
"""Of the warning with which a library that is being loaded drops a setting that it does not know."""


class InsertedText:
    """Where text was inserted into a Query: start and length in characters of the text sent, in order.

    The server gives some positions in another text (a type's name that a function reads), without saying so.
    One that would lie in inserted text is certainly of that kind and stays; others cannot be told apart.
    """

    __slots__ = ("insertions", "segment")

    def __init__(self, segment: int, insertions: tuple[tuple[int, int], ...]) -> None:
        self.segment = segment
        self.insertions = insertions

    def original(self, position: int) -> int:
        """Turn a 1-based character position in the text sent into one in the client's own text."""
        inserted = 0
        for start, length in self.insertions:
            if position <= start:
                break
            if position <= start + length:
                return position
            inserted += length
        return position - inserted


def diagnosed(message: bytes) -> ErrorResponse | NoticeResponse:
    """Return what an ErrorResponse or NoticeResponse says; nothing where it cannot be read."""
    kind = ErrorResponse if message[0] == framing.ERROR_RESPONSE else NoticeResponse
    try:
        return kind.decode(message[5:])
    except ProtocolViolation:
        return kind(())
