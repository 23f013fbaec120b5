"""Where things stand in a text: PostgreSQL's own scanner, offsets in bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from postgast import pg_query_pb2 as pb
from postgast import scan

_COMMENTS: Final = frozenset({pb.SQL_COMMENT, pb.C_COMMENT})
_OPENING: Final = frozenset({pb.ASCII_40, pb.ASCII_91})
_CLOSING: Final = frozenset({pb.ASCII_41, pb.ASCII_93})
_NAMED: Final = frozenset({pb.COLON_EQUALS, pb.EQUALS_GREATER})


@dataclass(frozen=True, slots=True)
class Token:
    """One token; offsets in bytes."""

    start: int
    end: int
    kind: int


class Scanned:
    """The tokens of a text, comments left out."""

    def __init__(self, sql: bytes) -> None:
        self.sql = sql
        found = [Token(t.start, t.end, t.token) for t in scan(sql.decode()).tokens]
        self.tokens = [token for token in found if token.kind not in _COMMENTS]
        self._starts = [token.start for token in self.tokens]

    def at(self, position: int) -> int:
        """Return the index of the token at a byte offset, or of the next one."""
        return bisect_left(self._starts, position)

    def parameters(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, number) of each parameter between two offsets."""
        for token in self.tokens[self.at(start) :]:
            if token.start >= end:
                return
            if token.kind == pb.PARAM:
                yield token.start, token.end, int(self.sql[token.start + 1 : token.end])

    def call(self, position: int) -> tuple[int, list[tuple[int, int]]] | None:
        """Return where the call of a function named at `position` ends, and the bounds of its arguments.

        A named argument's bounds are those of its value.  None: no parenthesis follows the name.
        """
        index = self.at(position) + 1
        if index >= len(self.tokens) or self.tokens[index].kind != pb.ASCII_40:
            return None
        depth, arguments, start = 0, [], index + 1
        for place in range(index, len(self.tokens)):
            token = self.tokens[place]
            if token.kind in _OPENING:
                depth += 1
            elif token.kind in _CLOSING:
                depth -= 1
            if depth == 1 and token.kind in _NAMED and place == start + 1:
                start = place + 1
            elif (depth == 1 and token.kind == pb.ASCII_44) or depth == 0:
                if place > start:
                    arguments.append((self.tokens[start].start, self.tokens[place - 1].end))
                start = place + 1
                if depth == 0:
                    return token.end, arguments
        return None
