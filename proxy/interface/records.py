"""What a text with something of the proxy's in it is turned into: plain immutable records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.interface.signatures import Function


class RefusalError(Exception):
    """A call that cannot be answered: the client gets an ErrorResponse.

    `position` counts characters of the client's text from 1; 0: none.
    """

    def __init__(
        self, sqlstate: str, message: str, *, hint: str = "", detail: str = "", position: int = 0
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message
        self.hint = hint
        self.detail = detail
        self.position = position


@dataclass(frozen=True, slots=True)
class Call:
    """One call in a statement.

    `question` is the SQL text that evaluates its arguments; its parameters are the client's, renumbered:
    ``$(i+1)`` is the client's parameter `parameters[i]` (counted from 0).
    """

    function: Function
    slot: str  # end of the name of the setting that carries the answer
    question: str
    parameters: tuple[int, ...]
    position: int  # of the function's name, in characters from 1
    key: str = "v"  # a value's name in the answer


@dataclass(frozen=True, slots=True)
class Deferred:
    """The calls of a statement that is prepared at the level of SQL, for its executions."""

    name: str
    calls: tuple[Call, ...]
    types: tuple[bytes, ...]  # of the parameters, as they are written; may be fewer than there are


@dataclass(frozen=True, slots=True)
class Piece:
    """One statement of a text as the server gets it, with blanks in place of what stands before it.

    `splices` tell what was replaced, in characters of the client's text: (start, end, length of the new one).
    """

    text: bytes
    calls: tuple[Call, ...] = ()
    splices: tuple[tuple[int, int, int], ...] = ()
    deferred: Deferred | None = None
    tag: bytes | None = None  # the client is told this instead of the server's command tag

    def original(self, position: int) -> int:
        """Turn a 1-based character position in `text` into one in the client's own text."""
        shift = 0
        for start, end, length in self.splices:
            if position - 1 < start + shift:
                break
            if position - 1 < start + shift + length:
                return start + 1
            shift += length - (end - start)
        return position - shift


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A text of the client's that the proxy has a part in: its statements, or why it cannot be."""

    pieces: tuple[Piece, ...] = ()
    refusal: RefusalError | None = field(default=None, compare=False)
