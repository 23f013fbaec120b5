"""The shape of a text: what remains when literals and comments are cut out.

Drivers that bind on the client's side send texts that differ only in their literals, each of them unique.
Two texts of one shape have the same parse tree but for the values of these literals, so that what was
derived from the first serves the second.  That holds because of three rules:

- The pattern below is a lexer for what may hide a quote: plain strings, quoted names, comments.  Where it
  meets anything else that could (``E'..'``, ``U&'..'``, ``$$``, a nested comment, an open quote) it gives
  up: no shape.
- A literal counts as understood only if the parser reported a constant of the same value at the same place
  (`proxy.sql.recogniser`); all others belong to the shape with their text.
- Comments are cut out, but their kind stays, since ``'a' --x`` and a string on the next line are one literal.

Strings are read as ``standard_conforming_strings = on`` has them, PostgreSQL's default since 9.1;
libpg_query does the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_PIECE: Final = re.compile(
    rb"""
      (?P<string>(?<![A-Za-z0-9_&$\x80-\xff])'[^']*+(?:''[^']*+)*+')
    | (?P<number>(?<![A-Za-z0-9_$.\x80-\xff])[0-9]++(?:\.[0-9]++)?(?![A-Za-z0-9_.$\x80-\xff]))
    | (?P<name>"[^"]*+")
    | (?P<line>--[^\n\r]*+)
    | (?P<block>/\*(?:[^*/]++|\*(?!/)|/(?!\*))*+\*/)
    | (?P<odd>['"]|\$(?![0-9])|/\*)
    """,
    re.VERBOSE,
)
_MARKS: Final = {"number": b"\0n", "line": b"\0-", "block": b"\0*"}


@dataclass(frozen=True, slots=True)
class Piece:
    """A literal as written, and where: `start` in bytes."""

    start: int
    text: bytes

    @property
    def value(self) -> bytes:
        """The literal's value: a string without its quotes, a number as it stands."""
        if self.text[0] != 0x27:
            return self.text
        inner = self.text[1:-1]
        return inner.replace(b"''", b"'") if b"'" in inner else inner

    @property
    def is_string(self) -> bool:
        """Tell a string from a number."""
        return self.text[0] == 0x27


@dataclass(frozen=True, slots=True)
class Shape:
    """`key` is the text with marks where literals and comments stood.

    Equal vector literals get equal marks, since equal vectors share a slot.  `code_size` is the number of
    bytes that are neither string nor comment, `last_comment` the start of the last comment (-1: none).
    """

    key: bytes
    pieces: tuple[Piece, ...]
    code_size: int
    last_comment: int


def shape_of(sql: bytes) -> Shape | None:
    """Return the shape of a text without NUL bytes, or None where it cannot be told by looking at it."""
    parts: list[bytes] = []
    pieces: list[Piece] = []
    vectors: list[bytes] = []
    position = 0
    last_comment = -1
    code_size = len(sql)
    for match in _PIECE.finditer(sql):
        kind = match.lastgroup
        if kind == "name":
            continue
        if kind == "odd" or kind is None:
            return None
        start, end = match.span()
        parts.append(sql[position:start])
        position = end
        text = sql[start:end]
        if kind == "string":
            mark = b"\0s"
            if text[1:2] == b"[":
                if text not in vectors:
                    vectors.append(text)
                mark += b"%d" % vectors.index(text)
            parts.append(mark)
            code_size -= end - start
        else:
            parts.append(_MARKS[kind])
        if kind == "string" or kind == "number":
            pieces.append(Piece(start, text))
        else:
            last_comment = start
            code_size -= end - start
    parts.append(sql[position:])
    return Shape(b"".join(parts), tuple(pieces), code_size, last_comment)
