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
_STEERING: Final = (b"adaptive_search", b"target_recall", b"optimize_for", b"ef_search", b"probes")
_EMPTY: Final = b"; \t\n\r\f\v"
_NO_CONTROL: Final = frozenset({b"select", b"insert", b"update", b"delete"})
"""How texts begin of which the first statement controls nothing; ``_CONTROL`` has no such word."""
_BLANKS: Final = rb"(?:\s++|--[^\n\r]*+|/\*(?:[^*/]++|\*(?!/)|/(?!\*))*+\*/)*+"
_CONTROL: Final = (
    rb"BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|PREPARE|CALL|DO|SET|RESET|DISCARD|DEALLOCATE"
)
_LEAD: Final = re.compile(_BLANKS)


def _statements_with(words: bytes) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Return patterns for a first and a later statement that begins with one of `words`, or might.

    It might where a nested comment hides the word.
    """
    end = _BLANKS + rb"(?:(?:" + words + rb")(?![A-Za-z0-9_$\x80-\xff])|/\*)"
    return re.compile(end, re.IGNORECASE), re.compile(rb";" + end, re.IGNORECASE)


_FIRST_CONTROL, _LATER_CONTROL = _statements_with(_CONTROL)
_FIRST_SETTING, _LATER_SETTING = _statements_with(rb"SET")


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
    if _FIRST_CONTROL.match(sql) is not None or mentions_set_config(sql):
        return True
    return b";" in sql and _LATER_CONTROL.search(sql) is not None


def is_of_interest(sql: bytes) -> bool:
    """Tell whether the text needs a closer look at all: all the checks here in one, for every message.

    What nearly every text shows at once comes first: it begins with a word that controls nothing, and its
    only semicolon, if any, is its last byte.
    """
    lower = sql.lower()
    if b"ruvector" in lower or b"set_config" in lower:
        return True
    if b"<" in lower and _OPERATOR.search(sql) is not None:
        return True
    if lower[:6] not in _NO_CONTROL and _FIRST_CONTROL.match(sql) is not None:
        return True
    return 0 <= lower.find(b";") < len(lower) - 1 and _LATER_CONTROL.search(sql) is not None


def mentions_setting(sql: bytes) -> bool:
    """Tell whether a statement of the text may set a setting."""
    if _FIRST_SETTING.match(sql) is not None or mentions_set_config(sql):
        return True
    return _LATER_SETTING.search(sql) is not None


def mentions_interface(sql: bytes) -> bool:
    """Tell whether the text contains the beginning of the proxy's own names, in any case, anywhere."""
    return b"ruvector" in sql.lower()


def may_steer(sql: bytes) -> bool:
    """Tell whether the text may hold the WITH clause that is the proxy's own."""
    lower = sql.lower()
    return any(name in lower for name in _STEERING)


def skip_blanks(sql: bytes, position: int) -> int:
    """Return where the blanks and comments at `position` end; a nested comment ends them too."""
    match = _LEAD.match(sql, position)
    return position if match is None else match.end()
