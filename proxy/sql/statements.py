"""What the recogniser says about one SQL text: plain immutable records.

A *text* is what one Parse or Query message carries; it holds any number of *statements*.  `Statement`
describes the text as a whole, because that is what a session acts on.  Most texts are of no interest, and
for those the recogniser hands out the constants below, so that a session can compare by identity and
nothing is allocated.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from learning.records import Template, Value

if TYPE_CHECKING:
    from proxy.interface.records import Rewritten
    from proxy.interface.settings import Steering

ANY_SETTING: Final = "*"
"""In `Statement.touches` and `Statement.resets`: every setting, or one whose name cannot be told."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What names in a text mean: they depend on database, role and search_path (None: the role's default)."""

    database: str
    user: str
    search_path: str | None


@dataclass(frozen=True, slots=True)
class Argument:
    """Where the value of a slot comes from: a bound parameter (0-based, ``$1`` is 0) or else a literal."""

    parameter: int | None
    literal: Value | None


@dataclass(frozen=True, slots=True)
class VectorQuery:
    """The one vector query of a text.  Offsets are bytes.

    `start` is where its statement begins, behind the previous ``;``, blanks and comments; `end` is where the
    statement's own ``;`` stands, or the end of the text.  A comment may stand at either end.
    `completions_before` counts the RowDescription and CommandComplete messages that the statements before
    it send in the simple query protocol; None where that cannot be known.
    """

    template: Template
    arguments: tuple[Argument, ...]  # by slot
    index: int  # which statement of the text, 0-based
    start: int
    end: int
    completions_before: int | None
    query_id: str | None = None  # that the application has chosen


class TransactionVerb(enum.Enum):
    """What a transaction-control statement does."""

    BEGIN = "begin"
    COMMIT = "commit"
    ROLLBACK = "rollback"
    SAVEPOINT = "savepoint"
    RELEASE = "release"
    ROLLBACK_TO = "rollback to"
    OTHER = "other"  # AND CHAIN, two-phase commit


@dataclass(frozen=True, slots=True)
class Statement:
    """What a session must know about one SQL text.

    Names of settings are lower-case.  `reason` says in short, stable words why something that looks like a
    vector query is left alone; it is a label of metrics.
    """

    count: int  # statements in the text, 0 = empty; 1 where the text was not analysed
    controls_transaction: bool = False  # may begin or end a transaction or savepoint, CALL and DO included
    transaction: TransactionVerb | None = None  # the text is exactly one transaction-control statement
    touches: frozenset[str] = frozenset()  # settings that it sets itself
    local: frozenset[str] = frozenset()  # those of them that last until the transaction ends
    resets: frozenset[str] = frozenset()  # settings that it gives back their defaults
    drops_prepared: bool = False  # DISCARD ALL, DEALLOCATE ALL
    vector: VectorQuery | None = None
    reason: str | None = None
    rewritten: Rewritten | None = None  # it calls functions that the proxy answers
    text: bytes | None = None  # what the server gets instead: without the clause that is `steering`
    steering: Steering | None = None


EMPTY: Final = Statement(count=0)
"""Nothing but blanks and semicolons."""

PLAIN: Final = Statement(count=1)
"""A text without anything that a session must know of."""

CONTROL: Final = Statement(count=1, controls_transaction=True)
"""A text that cannot be read and may control transactions, but sets nothing."""

UNKNOWN: Final = Statement(count=1, controls_transaction=True, touches=frozenset({ANY_SETTING}))
"""A text that cannot be read (too large, not UTF-8) and may control transactions and change settings."""
