"""The server's side of a session: its bytes in, bytes for the client out.

The stream is cut into messages by their headers.  While nothing is marked (proxy.session.replies) a chunk
is counted through and forwarded as it came, without a copy; where marks are due, replies to the proxy's own
messages are cut out and vector queries are timed.

Buffers: a chunk passed in belongs to the caller and is never kept, except for an incomplete message at its
end that must be seen whole (at most `_HOLD` bytes) or an incomplete header (4 bytes).  DataRow and CopyData
are never held: a value of any size streams through.
"""

from __future__ import annotations

import uuid
from collections import deque
from struct import Struct
from time import perf_counter
from typing import Final

from learning.records import Settings
from proxy.session.adaptation import Adapter, BoundQuery, Outcome
from proxy.session.diagnosis import (
    FAILED_EARLIER,
    INTERVENTION,
    INVALID_NAME,
    LOGIN_REFUSED,
    PREPARED_GONE,
    RELAYED_CLASSES,
    InsertedText,
    diagnosed,
)
from proxy.session.injection import REFUSED
from proxy.session.journal import Journal
from proxy.session.replies import ABORTED, COMPLETIONS, Mark, Purpose, Segment
from proxy.wire import framing
from proxy.wire.backend import CommandComplete, ParameterStatus
from proxy.wire.diagnostics import ErrorResponse, NoticeResponse
from proxy.wire.errors import ProtocolViolation, Sender

_LENGTH: Final = Struct("!I").unpack_from
_HOLD: Final = 1 << 20
_LONGEST: Final = framing.MAX_LENGTH + 1

IDLE: Final = framing.IDLE
OPEN: Final = framing.IN_TRANSACTION
FAILED: Final = framing.FAILED_TRANSACTION


class BackendStream:
    """Cuts, counts and filters what the server sends.  See the module's docstring."""

    __slots__ = (
        "_backend_pid",
        "_blind",
        "_copy_ended_early",
        "_copying",
        "_cover",
        "_in_force",
        "_in_force_segment",
        "_injected_last",
        "_inserted",
        "_journal",
        "_latest",
        "_marks",
        "_owed_error",
        "_pending",
        "_pooled",
        "_prepared",
        "_raw",
        "_recover",
        "_refusal",
        "_replied",
        "_segment_in",
        "_segment_out",
        "_sent",
        "_server_skip",
        "_server_tail",
        "_status",
        "_unreported",
        "adapter",
        "copy_in",
        "fatal",
        "greeted",
        "resend",
        "search_path",
        "standard_strings",
        "started",
        "utf8",
    )

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.started = False  # the first ReadyForQuery has come
        self.greeted = False  # the server has said something about the login
        self.fatal = False  # the server has said why it closes
        self.copy_in = False
        self.search_path: str | None = None  # as the server reports it (PostgreSQL 18 and later)
        self.standard_strings = True  # backslashes in literals are plain, as the recogniser takes them
        self.utf8 = True  # texts are in UTF-8, as the recogniser takes them
        self.resend = b""  # bytes for the server that a reply has called for
        self._status = IDLE
        self._pending: deque[Segment] = deque((Segment.STARTUP,))
        self._segment_in = 0
        self._segment_out = 1
        self._sent = 0  # completions that the client's current segment will have
        self._replied = 0
        self._marks: deque[Mark] = deque()
        self._cover: Mark | None = None  # the first mark, if it is due now
        self._inserted: deque[InsertedText] = deque()
        self._prepared: set[str] = set()
        self._backend_pid: int | None = None  # as the server has introduced itself
        self._pooled: bool | None = None  # a pooler may change the server behind it; None: not known yet
        self._in_force: Settings = ()
        self._in_force_segment = -1
        self._injected_last: Settings = ()
        self._journal = Journal()
        self._recover: Mark | None = None  # the injection that failed in the current segment
        self._latest: BoundQuery | None = None  # the vector query that was answered last
        self._unreported = False  # its id is to be told to the client
        self._refusal = b""  # the server's answer to it
        self._owed_error = b""  # hit a segment of the proxy's own, but was meant for the client
        self._blind = False  # completions of the current client segment cannot be counted
        self._server_skip = 0
        self._server_tail = b""
        self._raw = False
        self._copying = False  # COPY data has been sent, and what the server made of it is not known yet
        self._copy_ended_early = False  # and its end, before the server had asked for any

    # -- the stream --------------------------------------------------------------------------------

    def from_server(self, data: bytes) -> bytes:
        """Return what the client is to get of `data`.

        Raises
        ------
        ProtocolViolation
            The stream is no PostgreSQL protocol; both sides must be closed.
        """
        if self._raw:
            return data
        position = start = 0
        if self._server_skip:
            if len(data) <= self._server_skip:
                self._server_skip -= len(data)
                return data
            position = self._server_skip
            self._server_skip = 0
        elif self._server_tail:
            data = self._server_tail + data
            self._server_tail = b""
        size = len(data)
        out: list[bytes] | None = None
        while size - position >= 5:
            tag = data[position]
            end = position + 1 + _LENGTH(data, position + 1)[0]
            if not 5 <= end - position <= _LONGEST:
                framing.cut(data, position, Sender.BACKEND)  # raises, with the words for it
            cover = self._cover
            if (tag == framing.DATA_ROW or tag == framing.COPY_DATA) and (cover is None or not cover.own):
                if cover is not None and not cover.first_byte:
                    cover.first_byte = perf_counter()
                if end > size:
                    break
                position = end
                while size - position >= 5 and data[position] == tag:  # where there is a row there are many
                    end = position + 1 + _LENGTH(data, position + 1)[0]
                    if end > size or end - position < 5:
                        break  # as any other message
                    position = end
                continue
            if end > size:
                break
            if COMPLETIONS[tag]:
                if cover is not None:
                    self._covered(cover, tag, data, position, end)
                elif tag == framing.COMMAND_COMPLETE and end - position in (17, 20):
                    self._watch_for_discard(data, position, end)
                self._replied += 1
                current = self._cover
                if self._marks and (current is None or self._replied >= current.last):
                    self._advance()
                forward: bytes | bool = cover is None or not cover.own
                if cover is not None and cover.purpose is Purpose.SHOW:
                    forward = self._shown(cover, tag)
            elif tag == framing.READY_FOR_QUERY:
                forward = self._ready(data[position:end])
            elif tag == framing.DATA_ROW or tag == framing.COPY_DATA:
                forward = False  # a row of the proxy's own SELECT
                if cover is not None and cover.purpose is Purpose.ASK:
                    cover.rows.append(data[position:end])
                if self._pooled is None and cover is not None and cover.purpose is Purpose.INJECT:
                    self._pooled = _backend_pid(data, position, end) != self._backend_pid
            else:
                forward = self._other(tag, data, position, end)
            if forward is not True:
                if out is None:
                    out = []
                if start < position:
                    out.append(data[start:position])
                if forward:
                    out.append(forward)
                start = end
            position = end
            if tag == framing.COPY_BOTH_RESPONSE:
                position = size  # from here on everything is relayed without a look
                break
        if position < size:
            position = self._keep_rest(data, position, size)
        if out is None:
            return data if position == len(data) and start == 0 else data[start:position]
        if start < position:
            out.append(data[start:position])
        return b"".join(out)

    def _keep_rest(self, data: bytes, position: int, size: int) -> int:
        """Deal with an incomplete message at the end; return where forwarding stops."""
        if size - position >= 5:
            tag = data[position]
            end = position + 1 + _LENGTH(data, position + 1)[0]
            rows = tag == framing.DATA_ROW or tag == framing.COPY_DATA
            own = self._cover is not None and self._cover.own
            asked = self._cover is not None and self._cover.purpose is Purpose.ASK
            if (rows and not own) or (end - position > _HOLD and not asked):
                self._server_skip = end - size
                return size
        self._server_tail = data[position:]
        return position

    # -- messages ----------------------------------------------------------------------------------

    def _covered(self, mark: Mark, tag: int, data: bytes, position: int, end: int) -> None:
        """A completion within a mark."""
        if mark.purpose is Purpose.WATCH:
            now = perf_counter()
            if not mark.first_byte:
                mark.first_byte = now
            if tag == framing.COMMAND_COMPLETE or tag == framing.PORTAL_SUSPENDED:
                rows = -1 if tag == framing.PORTAL_SUSPENDED else _rows(data, position + 5, end - 1)
                self._finish(mark, rows, now, None)
        elif mark.prepares is not None and tag == framing.PARSE_COMPLETE:
            self._prepared.add(mark.prepares)
        elif mark.is_trial and mark.bound is not None and tag == framing.COMMAND_COMPLETE:
            self.adapter.accept(mark.bound)

    @staticmethod
    def _shown(mark: Mark, tag: int) -> bytes | bool:
        """A completion of a text of the proxy's that stands for the client's; return as `_other` does."""
        if tag == framing.COMMAND_COMPLETE and mark.piece is not None and mark.piece.tag is not None:
            return CommandComplete(mark.piece.tag).encode()
        return tag != framing.NO_DATA  # a simple query has none

    def _asked_failed(
        self, mark: Mark, message: bytes, fields: ErrorResponse | NoticeResponse
    ) -> bytes | bool:
        """Return what the client gets for an error in a text of the proxy's."""
        raise NotImplementedError

    def _finish(self, mark: Mark, rows: int, now: float, error: str | None) -> None:
        if mark.bound is not None:
            first = (mark.first_byte or now) - mark.sent_at
            self.adapter.finished(mark.bound, Outcome(rows, first, now - mark.sent_at, error))
            self._latest = mark.bound
            self._unreported = self.adapter.interface.report_query_id
            mark.bound = None

    def _watch_for_discard(self, data: bytes, position: int, end: int) -> None:
        """DISCARD ALL and DEALLOCATE ALL drop the proxy's own prepared statements, too."""
        if data[position + 5 : end - 1] in (b"DISCARD ALL", b"DEALLOCATE ALL"):
            self._forget_prepared()

    def _forget_prepared(self) -> None:
        """Prepare again at the next use: those on their way do not survive either."""
        self._prepared.clear()
        for mark in self._marks:
            mark.prepares = None

    def _advance(self) -> None:
        """Find out whether the first mark is due."""
        marks = self._marks
        while marks:
            mark = marks[0]
            if mark.segment > self._segment_in or (
                mark.segment == self._segment_in and mark.first > self._replied
            ):
                break
            if mark.segment == self._segment_in and self._replied < mark.last:
                self._cover = mark
                return
            marks.popleft()
        self._cover = None

    def _add_mark(self, mark: Mark) -> None:
        if self._marks:
            last = self._marks[-1]
            mark.follows_own = last.own and (last.segment == mark.segment and last.last == mark.first)
        self._marks.append(mark)
        if len(self._marks) == 1:
            self._advance()

    def _ready(self, message: bytes) -> bytes | bool:
        """ReadyForQuery: the segment is over.  Return as `_other` does."""
        if len(message) != 6:
            raise ProtocolViolation("a ReadyForQuery without a status", sender=Sender.BACKEND)
        status = message[5]
        segment = self._segment_in
        own = bool(self._pending) and self._pending[0] is Segment.OWN
        if self._pending:
            self._pending.popleft()
        if self._copying and self._nothing_sent_behind(segment):
            self._copying = self._copy_ended_early = False
        if self._journal:
            self._journal.over(segment)
        self._segment_in = segment + 1
        self._replied = 0
        self._status = status
        self.started = True
        self.copy_in = False
        if self._inserted and self._inserted[0].segment <= segment:
            self._inserted.popleft()
        if self._marks or self._cover is not None:
            self._advance()
        if not own:
            self._owed_error = b""
        if status != OPEN and self._in_force and self._in_force_segment <= segment:
            self._in_force = ()
        if status == IDLE:
            self.transaction_ended()
        if self._recover is not None:
            mark, self._recover = self._recover, None
            if self._nothing_sent_behind(segment):
                self._send_again(mark)
                return False
            return self._refusal + message
        if self._unreported and not own:
            self._unreported = False
            name = b"ruvector.last_query_id"
            return ParameterStatus(name, (self.last_query_id or "").encode()).encode() + message
        return not own

    @property
    def last_query_id(self) -> str | None:
        """The id of the vector query that was answered last: the application's own, or a UUID."""
        latest = self._latest
        if latest is None or latest.query_id is None:
            return None
        return latest.query.query_id or str(uuid.UUID(bytes=latest.query_id))

    def transaction_ended(self) -> None:
        """Called when the server is known to be outside a transaction."""

    def _retry(self, mark: Mark) -> bool:
        """The settings of `mark` were refused: tell whether the client's own bytes are sent without them."""
        raise NotImplementedError

    def _send_again(self, mark: Mark) -> None:
        """Send the client's own bytes of a segment again, now that it is over."""
        raise NotImplementedError

    def _other(self, tag: int, data: bytes, position: int, end: int) -> bytes | bool:
        """Messages that are no completion; return True to forward, False to swallow, or other bytes."""
        if tag == framing.ERROR_RESPONSE:
            return self._error(data[position:end])
        if tag == framing.NOTICE_RESPONSE:
            return self._notice(data[position:end])
        if tag == framing.PARAMETER_DESCRIPTION and self._cover is not None:
            if self._cover.purpose is Purpose.ASK:
                self._cover.rows.append(data[position:end])
            return not self._cover.own
        if tag == framing.PARAMETER_STATUS:
            name, _, value = data[position + 5 : end - 1].partition(b"\0")
            if name == b"search_path":
                self.search_path = value.decode(errors="replace")
            elif name == b"standard_conforming_strings":
                self.standard_strings = value == b"on"
            elif name == b"client_encoding":
                self.utf8 = value in (b"UTF8", b"SQL_ASCII")
        elif tag == framing.BACKEND_KEY_DATA and end - position >= 9:
            self._backend_pid = _LENGTH(data, position + 5)[0]
        elif tag == framing.COPY_IN_RESPONSE:
            self._copy_in_begins()
        elif tag == framing.COPY_BOTH_RESPONSE:
            self._raw = True
        elif tag == framing.AUTHENTICATION:
            self.greeted = True
        return True

    def _copy_in_begins(self) -> None:
        """In COPY IN mode the server ignores Sync: those already under way will have no answer.

        Where the client has sent data before this answer came, a Sync among or behind the data is answered
        if the data is found wrong before it is read, and else it is not: nobody can tell.
        """
        pending = self._pending
        if self._copying:
            self.copy_in = not self._copy_ended_early
            if Segment.EXTENDED in pending:
                self._lose_count()
            return
        self.copy_in = True
        while pending and pending[-1] is Segment.EXTENDED:
            pending.pop()
            self._segment_out -= 1
            self._sent += 1  # the segment goes on: not empty, and its completions are not counted
            self._blind = True

    def _lose_count(self) -> None:
        """Which reply answers what can no longer be told: nothing is adapted on this connection any more."""
        raise NotImplementedError

    def _notice(self, message: bytes) -> bytes | bool:
        """NoticeResponse: what a message of the proxy's own gives rise to is not for the client.

        A message logs its duration after its completion: what comes before the first completion of the
        proxy's is about the client's message before it, and in a text it may be the parser's.
        """
        cover = self._cover
        if cover is not None and cover.is_trial and cover.bound is not None:
            fields = diagnosed(message)
            if fields.code == REFUSED:
                sqlstate, _, text = (fields.message or b"").decode(errors="replace").partition(" ")
                self.adapter.switch_off(cover.bound, sqlstate, text)
                return False
        if (
            cover is not None
            and cover.own
            and (cover.follows_own or self._replied > cover.first)
            and not self._text_is_inserted()
        ):
            return (diagnosed(message).code or b"")[:2] == INTERVENTION
        if self._injected_last and self._drops_a_setting(diagnosed(message)):
            return False
        return self._with_original_position(message)

    def _drops_a_setting(self, fields: ErrorResponse | NoticeResponse) -> bool:
        """Tell whether a notice says that a setting of ours is unknown, and switch its template off."""
        text = (fields.message or b"").decode(errors="replace")
        if fields.code != INVALID_NAME or not any(name in text for name, _ in self._injected_last):
            return False
        for mark in self._marks:
            if mark.bound is not None:
                self.adapter.switch_off(mark.bound, INVALID_NAME.decode(), text)
                break
        return True

    def _text_is_inserted(self) -> bool:
        return bool(self._inserted) and self._inserted[0].segment == self._segment_in

    def _error(self, message: bytes) -> bytes | bool:
        """ErrorResponse: nothing more is completed in this segment."""
        fields = diagnosed(message)
        code = fields.code or b""
        self.copy_in = False
        if fields.is_fatal:
            self.fatal = True
            if not self.started and code[:2] == LOGIN_REFUSED:
                self.adapter.counters.logins_failed["server"] += 1
        cover = self._cover
        self._drop_marks(code.decode(errors="replace"))
        if self._journal:
            self._journal.failed(self._segment_in, self._replied)
        self._replied = ABORTED
        if fields.is_fatal:
            return True
        if self._pending and self._pending[0] is Segment.OWN:
            # The client's next statement finds the failed transaction by itself; but a cancellation was
            # meant for that statement, and is then its answer.
            if code[:2] == INTERVENTION:
                self._owed_error = message
            return False
        if self._owed_error and code == FAILED_EARLIER:
            owed, self._owed_error = self._owed_error, b""
            return owed
        if cover is not None and cover.purpose in (Purpose.ASK, Purpose.SHOW):
            return self._asked_failed(cover, message, fields)
        own = cover is not None and cover.own
        if cover is not None and own and code[:2] not in RELAYED_CLASSES:
            self._injection_failed(cover, code.decode(), (fields.message or b"").decode(errors="replace"))
            if self._retry(cover):
                if cover.replay is not None:
                    self._recover, self._refusal = cover, message
                return False
        return self._with_original_position(message)

    def _injection_failed(self, mark: Mark, sqlstate: str, text: str) -> None:
        if sqlstate in PREPARED_GONE:
            self._prepared.clear()  # somebody dropped them behind our back; the next use prepares again
        elif mark.bound is not None:
            self.adapter.switch_off(mark.bound, sqlstate, text)

    def _nothing_sent_behind(self, segment: int) -> bool:
        """Tell whether a segment could be sent again without losing the order of the client's statements."""
        raise NotImplementedError

    def _drop_marks(self, sqlstate: str) -> None:
        """The rest of the segment is skipped; a query that was watched has failed."""
        marks = self._marks
        now = perf_counter()
        while marks and marks[0].segment <= self._segment_in:
            mark = marks.popleft()
            if mark.purpose is Purpose.WATCH and (mark is self._cover):
                self._finish(mark, 0, now, sqlstate)
        self._cover = None

    def _with_original_position(self, message: bytes) -> bytes | bool:
        """Undo the shift of an error position by text that the proxy inserted; counted in characters."""
        if not self._text_is_inserted():
            return True
        fields = diagnosed(message)
        if fields.position is None:
            return True
        return fields.with_position(self._inserted[0].original(fields.position)).encode()

    @property
    def at_boundary(self) -> bool:
        """True where the proxy may speak to the client: the server is known not to be within a message."""
        return not self._server_skip and not self._raw


def _backend_pid(data: bytes, position: int, end: int) -> int | None:
    """Process id in the first column of a row of the proxy's own; None where it is not there."""
    if end - position < 11:
        return None
    text = data[position + 11 : position + 11 + min(_LENGTH(data, position + 7)[0], 10)]
    return int(text) if text.isdigit() else None


def _rows(data: bytes, start: int, end: int) -> int:
    """Row count of a CommandComplete tag such as ``SELECT 10``; -1 where there is none."""
    number = data[start:end].rpartition(b" ")[2]
    return int(number) if number.isdigit() else -1
