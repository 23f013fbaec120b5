"""Cheap checks on bytes: does a text need the parser at all?

Nearly all traffic is of no interest to the proxy, and must not pay for a parse.  A text needs one if it
contains a vector operator, if one of its statements begins with a word that controls transactions or
settings, or if it mentions ``set_config``.  Statements begin at the start of the text and behind every
``;``: a semicolon inside a literal or a comment at worst costs a parse, never a wrong answer.
"""

from __future__ import annotations

import re
from typing import Final

OPERATORS: Final = ("<->", "<#>", "<=>", "<+>", "<~>", "<%>")
"""pgvector's distance operators: L2, negative inner product, cosine, L1, Hamming, Jaccard."""

_OPERATOR: Final = re.compile(b"|".join(re.escape(operator.encode()) for operator in OPERATORS))
_EMPTY: Final = b"; \t\n\r\f\v"
_BLANKS: Final = rb"(?:\s++|--[^\n\r]*+|/\*(?:[^*/]++|\*(?!/)|/(?!\*))*+\*/)*+"
_WORDS: Final = (
    rb"(?:BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|PREPARE|CALL|DO"
    rb"|SET|RESET|DISCARD|DEALLOCATE)(?![A-Za-z0-9_$\x80-\xff])"
)
_LEAD: Final = re.compile(_BLANKS)
_FIRST: Final = re.compile(_BLANKS + rb"(?:" + _WORDS + rb"|/\*)", re.IGNORECASE)  # "/*": nested comments
_LATER: Final = re.compile(rb";" + _BLANKS + rb"(?:" + _WORDS + rb"|/\*)", re.IGNORECASE)


def is_empty(sql: bytes) -> bool:
    """Tell whether there is nothing but blanks and semicolons."""
    return not sql.strip(_EMPTY)


def mentions_operator(sql: bytes) -> bool:
    """Tell whether the text contains the characters of a vector operator, anywhere."""
    return _OPERATOR.search(sql) is not None


def mentions_set_config(sql: bytes) -> bool:
    """Tell whether the text contains the name of the function, in any case."""
    return b"set_config" in sql.lower()


def mentions_control(sql: bytes) -> bool:
    """Tell whether a statement of the text may control a transaction or a setting."""
    if _FIRST.match(sql) is not None or mentions_set_config(sql):
        return True
    return b";" in sql and _LATER.search(sql) is not None


def skip_blanks(sql: bytes, position: int) -> int:
    """Return where the blanks and comments at `position` end; a nested comment ends them too."""
    match = _LEAD.match(sql, position)
    return position if match is None else match.end()
