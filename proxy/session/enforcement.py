"""Putting settings in force for one query, and taking them back.

Theory
------
Transaction state as the *sender* must know it: the last ReadyForQuery speaks of a segment that may lie
behind what has been sent since.  It is certain while no transaction-control statement is under way; else it
is UNKNOWN and treated like an open transaction block: settings are saved, and restored before another
statement could see them.

    state      extended query                       simple query
    ---------  -----------------------------------  ----------------------------------------------
    IDLE       settings before Bind; end with Sync  SET LOCAL in front of the text; end with it
    OPEN       the same, restored when needed       saving SELECT in front; restored when needed
    UNKNOWN    the same as OPEN                     left alone
    FAILED     left alone                           left alone

Rules
-----
* The client's own will comes first (proxy.session.will).
* A restoration is sent only when another statement needs it; the end of the transaction restores for free.
* A query gets settings only if its portal is executed at once and whole: a suspended scan may still read them
  when somebody else must not.
* An injection that fails in autocommit is answered by sending the client's own bytes again: it gets its
  result.  Once something of the segment was bound or executed before, that is no longer possible.
"""

from __future__ import annotations

from time import perf_counter
from typing import Final

from learning.records import Settings
from proxy.session import injection
from proxy.session.adaptation import Adapter, BoundQuery
from proxy.session.backend import FAILED, IDLE, OPEN, BackendStream
from proxy.session.diagnosis import InsertedText
from proxy.session.replies import Mark, Purpose, Segment
from proxy.session.will import ClientWill
from proxy.sql import Statement, VectorQuery
from proxy.wire import framing

_MOST_HELD: Final = 1 << 20  # bytes
UNKNOWN: Final = 0
"""Transaction state that only the server knows for now; beside `IDLE`, `OPEN` and `FAILED`."""


class Enforcer(BackendStream):
    """What the proxy itself sends to the server, and what is in force there."""

    __slots__ = (
        "_client_tail",
        "_control_segment",
        "_disabled",
        "_engaged",
        "_held",
        "_injected",
        "_will",
    )

    def __init__(self, adapter: Adapter, parameters: dict[str, str]) -> None:
        super().__init__(adapter)
        self._control_segment = -1  # last segment with transaction control in it
        self._engaged = False  # the current segment has bound or executed something
        self._injected: Mark | None = None  # injection of the current segment, while it may be sent again
        self._held = b""  # the client's own bytes of that segment, from the injection on, of earlier chunks
        self._client_tail = b""  # an incomplete message of the client's, not sent yet
        self._disabled = False
        self._will = ClientWill(parameters)

    def _state(self) -> int:
        """IDLE, OPEN or FAILED where it is certain for what is sent next; else UNKNOWN."""
        if self._control_segment >= self._segment_in:
            return UNKNOWN
        return self._status

    def _end_segment(self, kind: Segment) -> None:
        self._pending.append(kind)
        self._segment_out += 1
        self._sent = 0
        self._engaged = False
        self._injected = None
        self._held = b""
        self._blind = False

    # -- choosing ----------------------------------------------------------------------------------

    def _settings_for(self, bound: BoundQuery) -> Settings:
        """Return the settings chosen for a query, or none where it must be left alone."""
        settings = bound.choice.arm.settings
        if not settings:
            return ()
        if self._will.claims(settings):
            self.adapter.counters.left_alone["client setting"] += 1
            return ()
        if self._will.changes_names and self.search_path is None:
            # Only servers that report it (PostgreSQL 18) tell what names mean from now on.
            self.adapter.counters.left_alone["search path"] += 1
            return ()
        if (
            self._blind
            or self.copy_in
            or self._copying
            or not self.standard_strings
            or self._state() == FAILED
        ):
            self.adapter.counters.left_alone["state"] += 1
            return ()
        return settings

    # -- extended query ----------------------------------------------------------------------------

    def _enforce(self, settings: Settings, bound: BoundQuery) -> bytes | None:
        """Return the messages after which exactly `settings` are in force."""
        if settings == self._in_force:
            bound.settings = settings
            if settings:
                self._count_adapted(bound)
            return None
        restored = self._restore()
        if not settings or self._in_force:
            return restored
        out = restored or b""
        accepted = settings in self.adapter.accepted
        if accepted:
            out += self._prepare("inject", len(settings))
        batch = injection.injection(settings) if accepted else injection.trial(settings)
        mark = Mark(Purpose.INJECT, self._segment_out, self._sent, self._sent + batch.completions)
        mark.bound = bound
        mark.is_trial = not accepted
        self._add_mark(mark)
        self._sent += batch.completions
        if self._state() == IDLE and not self._engaged:
            self._injected = mark
        self._in_force, self._in_force_segment = settings, self._segment_out
        bound.settings = self._injected_last = settings
        self._count_adapted(bound)
        return out + batch.data

    def _restore(self) -> bytes | None:
        """Return the messages that take the settings back, within the current segment."""
        settings = self._in_force
        if not settings:
            return None
        self._in_force = ()
        prepare = b""
        if settings in self.adapter.accepted:
            prepare = self._prepare("restore", len(settings))
            batch = injection.restoration(settings)
        else:
            batch = injection.trial_restoration(settings)
        self._add_mark(Mark(Purpose.RESTORE, self._segment_out, self._sent, self._sent + batch.completions))
        self._sent += batch.completions
        return prepare + batch.data

    def _restore_in_own_segment(self) -> bytes:
        """The same in front of a Query: unsynced messages must not stand before it.

        And in front of a segment that comes before the last one is answered: if that one fails the
        transaction, restoring fails as well, and must not take the client's messages with it.
        """
        restored = self._restore()
        if restored is None:
            return b""
        self._end_segment(Segment.OWN)
        return restored + injection.SYNC

    def _prepare(self, kind: str, count: int) -> bytes:
        """Return the messages that prepare a statement of ours, unless the server is known to have it."""
        name = f"{kind} {count}"
        if name in self._prepared and self._pooled is False:
            return b""
        batch = injection.preparation(kind, count)
        mark = Mark(Purpose.PREPARE, self._segment_out, self._sent, self._sent + batch.completions)
        mark.prepares = name
        self._add_mark(mark)
        self._sent += batch.completions
        return batch.data

    # -- simple query ------------------------------------------------------------------------------

    def _with_settings(
        self, text: bytes, statement: Statement, query: VectorQuery, settings: Settings, bound: BoundQuery
    ) -> bytes | None:
        """Return the text with `settings` in force for its vector query; None where it stays as it is."""
        before = self._sent + (query.completions_before or 0)
        segment = self._segment_out
        if not settings or settings == self._in_force:
            if query.completions_before is not None:
                bound.settings = settings
                self._watch(bound, segment, before, before + 2)
            return None
        last = query.index + 1 == statement.count
        state = self._state()
        accepted = settings in self.adapter.accepted
        if not accepted:
            prefix = injection.text_trial(settings)
        elif last and state == IDLE:
            prefix = injection.text_set_local(settings)
        else:
            prefix = injection.text_save_and_set(settings)
        mark = Mark(Purpose.INJECT, segment, before, before + prefix.completions)
        mark.bound = bound
        mark.is_trial = not accepted
        if state == IDLE and query.index == 0:
            mark.replay = injection.query_message(text)
        self._add_mark(mark)
        bound.settings = self._injected_last = settings
        self._count_adapted(bound)
        self._watch(bound, segment, mark.last, mark.last + 2)
        head, body, tail = text[: query.start], text[query.start : query.end], text[query.end :]
        insertions = [(len(head.decode()), len(prefix.data))]
        if last:
            suffix = b""
            if state == OPEN:
                self._in_force, self._in_force_segment = settings, segment
        else:
            restoration = (
                injection.text_restore(settings) if accepted else injection.text_trial_restore(settings)
            )
            suffix = restoration.data
            first = mark.last + 2
            self._add_mark(Mark(Purpose.RESTORE, segment, first, first + restoration.completions))
            insertions.append((sum(insertions[0]) + len(body.decode()), len(suffix)))
        self._inserted.append(InsertedText(segment, tuple(insertions)))
        return head + prefix.data + body + suffix + tail

    # -- settings that were refused ----------------------------------------------------------------

    def _hold(self, sent: bytes) -> None:
        """Keep what the client has sent since the injection: its Sync is still to come."""
        self._held += sent
        if len(self._held) > _MOST_HELD:
            self._held = b""
            self._injected = None

    def _retry(self, mark: Mark) -> bool:
        """Tell whether the client's own bytes can be sent again without the refused settings of `mark`.

        The server skips everything up to a Sync.  Where the client's has been sent, and nothing behind it,
        its bytes are sent again when the segment is over; where it has not, a Sync of the proxy's own ends
        the segment now.
        """
        if mark.replay is not None:
            return self._nothing_sent_behind(mark.segment)
        if mark is not self._injected:
            return False
        again = self._held
        self._end_segment(Segment.OWN)
        self._in_force = ()
        self._sent = sum(1 for tag, _, _ in framing.frames(again) if tag != framing.FLUSH)
        self._engaged = True
        self.resend += injection.SYNC + again
        return True

    def _nothing_sent_behind(self, segment: int) -> bool:
        """Tell whether a segment could be sent again without losing the order of the client's statements."""
        return self._segment_out == segment + 1 and self._sent == 0 and not self._client_tail

    def _send_again(self, mark: Mark) -> None:
        """Send the client's own bytes of a segment whose injection failed; they are one whole segment."""
        assert mark.replay is not None
        query = mark.replay[:1] == b"Q"
        self.resend += mark.replay
        self._end_segment(Segment.QUERY if query else Segment.EXTENDED)

    # -- what is reported --------------------------------------------------------------------------

    def _watch(self, bound: BoundQuery, segment: int, first: int, last: int) -> None:
        mark = Mark(Purpose.WATCH, segment, first, last)
        mark.bound = bound
        mark.sent_at = perf_counter()
        self._add_mark(mark)

    def _count_adapted(self, bound: BoundQuery) -> None:
        self.adapter.counters.adapted[bound.table, bound.choice.arm.name] += 1
