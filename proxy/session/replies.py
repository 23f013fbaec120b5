"""Which of the server's replies belong to the client, which to the proxy, and which are to be timed.

Theory
------
The client's stream falls into *segments*, each answered by exactly one ReadyForQuery: a Query message, a
FunctionCall, or all extended messages up to a Sync.  Segments are numbered in order, on the way out by the
client's messages, on the way back by ReadyForQuery.

Within a segment replies are counted in *completions*: ParseComplete, BindComplete, CloseComplete,
RowDescription or NoData (answer to Describe), and CommandComplete, EmptyQueryResponse or PortalSuspended
(answer to Execute).  Each extended message has exactly one, so the message that a reply belongs to is known
by counting; in a Query message a statement that returns rows has two (RowDescription, CommandComplete),
another one.  A DataRow belongs to the completion that is still to come.  After an error nothing more is
completed in the segment.

A `Mark` names a range of completions in a segment: to be swallowed (replies to what the proxy added), or
watched (a vector query to be timed).  Marks are made in the order of sending, so only the first can be due.

Exceptions, verified on PostgreSQL 15 and 18: a Sync sent while the server is in COPY IN mode gets no
answer, and a Query sent after an error without a Sync in between is skipped; the session handles both.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.interface.records import Piece, RefusalError
    from proxy.session.adaptation import BoundQuery

COMPLETIONS = bytes(1 if chr(tag) in "123TnCIs" else 0 for tag in range(256))
"""By message tag: 1 where the message is a completion."""

ABORTED = 1 << 40
"""Completion count of a segment after an error: past every mark."""


class Segment(enum.IntEnum):
    """What closes a segment."""

    EXTENDED = 0  # Sync
    QUERY = 1
    FUNCTION_CALL = 2
    OWN = 3  # a Sync of the proxy's own: its ReadyForQuery is swallowed
    STARTUP = 4


class Purpose(enum.IntEnum):
    """Why a mark was made."""

    WATCH = 0
    PREPARE = 1  # swallowed: Close and Parse of a statement of the proxy's
    INJECT = 2  # swallowed: settings put in force
    RESTORE = 3  # swallowed: settings taken back
    ASK = 4  # swallowed: a step of a procedure (proxy.session.calling), which gets the rows
    SHOW = 5  # for the client: replies to a text that the proxy has written in place of the client's


class Mark:
    """Completions [first, last) of one segment."""

    __slots__ = (
        "bound",
        "first",
        "first_byte",
        "follows_own",
        "is_trial",
        "last",
        "own",
        "piece",
        "position",
        "prepares",
        "purpose",
        "refusal",
        "replay",
        "rows",
        "segment",
        "sent_at",
    )

    def __init__(self, purpose: Purpose, segment: int, first: int, last: int) -> None:
        self.purpose = purpose
        self.segment = segment
        self.first = first
        self.last = last
        self.own = purpose is not Purpose.WATCH and purpose is not Purpose.SHOW  # not for the client
        self.bound: BoundQuery | None = None
        self.is_trial = False  # INJECT: a first try, which reports a refusal instead of failing
        self.follows_own = False  # what comes directly before it is the proxy's own, too
        self.sent_at = 0.0  # WATCH: perf_counter when the statement left
        self.first_byte = 0.0  # WATCH: perf_counter at the first reply, 0 before
        self.prepares: str | None = None  # PREPARE: name of what will be prepared
        self.replay: bytes | None = (
            None  # INJECT: the client's own bytes, for sending again without the settings
        )
        self.rows: list[bytes] = []  # ASK: DataRow and ParameterDescription messages
        self.piece: Piece | None = None  # whose text an error may point into
        self.position = 0  # ASK: where in the client's text an error of it belongs
        self.refusal: RefusalError | None = None  # what the client gets for the error that is provoked
