"""The client's side of a session: its bytes in, bytes for the server out.

The stream is cut into messages by their headers; bodies are looked at only where something depends on them:
texts (what is it?), Binds of recognised queries (with which arguments?), Executes of their portals (from
when to when?).  Everything else passes through, and a chunk in which nothing changes is forwarded without a
copy.

Buffers: a chunk passed in belongs to the caller and is never kept, except for an incomplete message at its
end that must be seen whole (at most `_HOLD` bytes); a longer message streams through and is not looked at.
The Bind of a vector query is kept, too, until it is seen what becomes of its portal.

In doubt (both protocols mixed in one segment, endless names) the session stops adapting, for good.
"""

from __future__ import annotations

from struct import Struct
from time import perf_counter
from typing import Final

from proxy.session import injection
from proxy.session.adaptation import Adapter, BoundQuery
from proxy.session.backend import IDLE, OPEN
from proxy.session.calling import MAX_ARGUMENTS, Caller
from proxy.session.enforcement import UNKNOWN
from proxy.session.replies import ABORTED, Mark, Purpose, Segment
from proxy.sql import Scope, Statement, TransactionVerb
from proxy.wire import framing
from proxy.wire.errors import MessageTooLong, ProtocolViolation, Sender

_LENGTH: Final = Struct("!I").unpack_from
_HOLD: Final = 1 << 20  # bytes; a longer message is streamed through and not looked at
_LONGEST_IN_LOGIN: Final = 1 << 16  # bytes; a GSSAPI token may have 65,535, a SCRAM message a few hundred
_MAX_NAMES: Final = 10_000  # statements and portals remembered per session
_OVERSIZE: Final = Statement(count=1, controls_transaction=True)
"""A text too long to be looked at: taken for one that may control transactions, but not for a SET."""
_EXTENDED: Final = frozenset({framing.PARSE, framing.BIND, framing.DESCRIBE, framing.EXECUTE, framing.CLOSE})
_ENDS_SCOPE: Final = frozenset(
    {TransactionVerb.COMMIT, TransactionVerb.ROLLBACK, TransactionVerb.ROLLBACK_TO}
)


_TERMINATE: Final = b"X\0\0\0\4"
_WAIT: Final = b"wait"
"""In place of what is to be inserted before a Bind: keep it until more has come."""
_CALL: Final = b"call"
"""In place of what is to be inserted before a message: keep it until a procedure is over."""


class Session(Caller):
    """One client's connection: `from_client` and `from_server` turn one side's bytes into the other's."""

    __slots__ = (
        "_client_skip",
        "_impatient",
        "_longest",
        "_named_in",
        "_portals",
        "_replaced",
        "_scope",
        "_statements",
        "keeps_bind",
        "terminated",
    )

    def __init__(self, adapter: Adapter, parameters: dict[str, str], *, raw: bool = False) -> None:
        """`parameters` are those of the startup message; `raw` relays without looking (replication)."""
        super().__init__(adapter, parameters)
        user = parameters.get("user", "")
        self.terminated = False  # the client has said goodbye
        self.keeps_bind = False  # until it is seen what follows it, or `release`
        self._impatient = False
        self._raw = raw
        self._scope = Scope(database=parameters.get("database", user), user=user, search_path=None)
        self._statements: dict[bytes, Statement] = {}  # prepared, and of interest
        self._named_in: dict[bytes, int] = {}  # segment in which a name got another meaning, until it is over
        self._portals: dict[bytes, BoundQuery] = {}
        self._replaced: bytes | None = None  # what is sent instead of the Parse that is being looked at
        self._client_skip = 0
        self._client_tail = b""
        self._longest = min(_LONGEST_IN_LOGIN, adapter.longest_message)  # what needs no second look

    # -- the stream --------------------------------------------------------------------------------

    def from_client(self, data: bytes) -> bytes:
        """Return what the server is to get for `data`.

        Raises
        ------
        ProtocolViolation
            The stream is no PostgreSQL protocol; both sides must be closed.
        """
        if self._client_tail:
            data = self._client_tail + data
            self._client_tail = b""
            self.keeps_bind = False
        if self.calling:
            self._client_tail = data
            return b""
        if self._raw:
            return data
        size = len(data)
        position = start = 0
        if self._client_skip:
            if size <= self._client_skip:
                self._client_skip -= size
                return data
            position = self._client_skip
            self._client_skip = 0
        out: list[bytes] | None = None
        replay_from = position if self._injected is not None else -1
        while size - position >= 5:
            tag = data[position]
            end = position + 1 + _LENGTH(data, position + 1)[0]
            if not 5 <= end - position <= self._longest:
                self._check_length(data, position, end)
            inserted: bytes | None = None
            if (
                self._in_force
                and not self._sent
                and self._segment_in != self._segment_out
                and tag in _EXTENDED
            ):
                out = out if out is not None else []
                out += [data[start:position], self._restore_in_own_segment()]
                start = position
            if tag == framing.BIND:
                if self._statements or self._portals or self._in_force:
                    if end > size and (
                        end - position <= _HOLD or self._has_large_arguments(data, position, end)
                    ):
                        break
                    first = self._injected
                    inserted = self._bind(data, position, end, size)
                    if inserted is _WAIT:
                        self.keeps_bind = True
                        break
                    if inserted is _CALL:
                        break
                    if self._injected is not first:
                        replay_from = position
                self._sent += 1
                self._engaged = True
            elif tag == framing.EXECUTE:
                self.adapter.counters.statements += 1
                if self._portals or self._in_force or self._calls:
                    if end > size and end - position <= _HOLD:
                        break
                    inserted = self._execute(data, position, min(end, size))
                    if inserted is _CALL:
                        break
                self._sent += 1
                self._engaged = True
            elif tag == framing.SYNC:
                if self._injected is not None:
                    self._injected.replay = self._held + data[replay_from:end]
                inserted = self._sync()
            elif tag == framing.DESCRIBE:
                if self._in_force:
                    if end > size and end - position <= _HOLD:
                        break
                    inserted = self._describe(data, position, min(end, size))
                self._sent += 1
            elif tag == framing.PARSE:
                if end > size and end - position <= _HOLD:
                    break
                inserted = self._parse(data, position, end, size)
                self._sent += 1
                if self._replaced is not None:
                    out = out if out is not None else []
                    out += [data[start:position], inserted or b"", self._replaced]
                    start, inserted, self._replaced, self._injected = end, None, None, None
            elif tag == framing.QUERY:
                if end > size and end - position <= _HOLD:
                    break
                replacement = self._query(data, position, end, size)
                if replacement is _CALL:
                    break
                if replacement is not None:
                    out = out if out is not None else []
                    out.append(data[start:position])
                    out.append(replacement)
                    start = end
                if self._procedure is not None:
                    position = end
                    break
            elif tag == framing.CLOSE:
                if end > size and end - position <= _HOLD:
                    break
                self._close(data, position, min(end, size))
                self._sent += 1
            elif tag == framing.COPY_DATA:
                self._copying = True
            elif tag == framing.COPY_DONE or tag == framing.COPY_FAIL:
                self._copying = True
                self._copy_ended_early = not self.copy_in
                self.copy_in = False
            elif tag == framing.FUNCTION_CALL:
                inserted = self._function_call()
            elif tag == framing.TERMINATE:
                self.terminated = True
            if inserted:
                out = out if out is not None else []
                out.append(data[start:position])
                out.append(inserted)
                start = position
            if end > size:
                self._client_skip = end - size
                self._injected = None  # too long to be kept for sending again
                position = size
                break
            position = end
        if position < size:
            self._client_tail = data[position:]
        if self._injected is not None:
            self._hold(data[replay_from:position])
        if out is None:
            return data if position == size else data[:position]
        out.append(data[start:position])
        return b"".join(out)

    def _check_length(self, data: bytes, position: int, end: int) -> None:
        """Look at a message that is longer than what needs no look, or shorter than a header."""
        framing.cut(data, position, Sender.FRONTEND)  # raises where the header is impossible
        length, most = end - position, self.adapter.longest_message
        if self.started:
            self._longest = most
        elif data[position] == framing.PASSWORD and length > _LONGEST_IN_LOGIN:
            raise ProtocolViolation("a login message that is too long", sender=Sender.FRONTEND)
        if length > most:
            raise MessageTooLong(f"a message of {length} bytes, {most} are allowed", sender=Sender.FRONTEND)

    def release(self) -> bytes:
        """Return a Bind that has been kept for long enough: its query is left alone."""
        self._impatient = True
        try:
            return self.from_client(b"")
        finally:
            self._impatient = False

    def client_ended(self) -> bytes:
        """Return what has been kept of the client's bytes: no more will come."""
        rest, self._client_tail = self._client_tail, b""
        self.keeps_bind = False
        return rest

    @property
    def kept(self) -> int:
        """The number of the client's bytes that are kept."""
        return len(self._client_tail)

    @property
    def says_goodbye(self) -> bool:
        """Whether the last of what is kept is a Terminate: the client waits for nothing that is before it."""
        return self._client_tail.endswith(_TERMINATE)

    # -- state -------------------------------------------------------------------------------------

    def transaction_ended(self) -> None:
        """The server is idle: what lasted for a transaction is gone, unless the client has sent more."""
        if self._control_segment < self._segment_in:
            self._will.transaction_ended()
        if self._steered_segment >= 0:
            self._transaction_over()
        if (self._portals or self._calls) and not self._pending and not self._sent:
            self._portals.clear()
            self._calls.clear()

    @property
    def is_idle(self) -> bool:
        """True where nothing is lost if the session ends: outside a transaction, nothing owed."""
        nothing_owed = not self._pending and not self._sent and not self._client_tail
        return self._status == IDLE and nothing_owed and not self.calling

    # -- extended query ----------------------------------------------------------------------------

    def _parse(self, data: bytes, position: int, end: int, size: int) -> bytes | None:
        """Remember a prepared statement if anything depends on it; return what is to be inserted before."""
        name_end = data.find(b"\0", position + 5, min(end, size))
        if name_end < 0:
            self._give_up("statement name")
            return None
        name = data[position + 5 : name_end]
        if end > size:
            statement = _OVERSIZE
        else:
            sql_end = data.find(b"\0", name_end + 1, end)
            if sql_end < 0:
                return None  # the server will say what is wrong
            statement = self.adapter.recognise(data[name_end + 1 : sql_end], self._current_scope())
            if self._deferred:
                statement = self._with_executions(data[name_end + 1 : sql_end], statement)
            if statement.text is not None:
                self._replaced = injection.message(b"P", name + b"\0" + statement.text + data[sql_end:end])
            elif statement.rewritten is not None:
                self._replaced = self._rewritten_parse(
                    statement, data[position + 5 : end], name, sql_end - position - 5
                )
        if is_plain(statement):
            restored = self._restore()
            self._know(name, None)
            return restored
        if statement.reason is not None:
            self.adapter.counters.left_alone[statement.reason] += 1
        if len(self._statements) >= _MAX_NAMES:
            self._give_up("too many prepared statements")
        else:
            self._know(name, statement)
        return None

    def _know(self, name: bytes, statement: Statement | None) -> None:
        """Note what a name stands for from this message on; None: nothing of interest."""
        before = self._statements.get(name)
        if self._is_skipped:
            return
        if before is statement:
            if name in self._named_in:
                self._named_in[name] = self._segment_out  # a Bind behind it fails where it does
            return

        def undo() -> None:
            if self._statements.get(name) is statement:
                self._set_known(name, before)

        self._journal.note(self._segment_out, self._sent, undo)
        self._named_in[name] = self._segment_out
        self._set_known(name, statement)

    def _set_known(self, name: bytes, statement: Statement | None) -> None:
        if statement is None:
            self._statements.pop(name, None)
        else:
            self._statements[name] = statement

    def _describe(self, data: bytes, position: int, end: int) -> bytes | None:
        """Restore before something that may fail: in a failed transaction it could no longer be done."""
        if end - position < 7:
            return None  # the server says what is wrong with it
        known = self._statements if data[position + 5] == 0x53 else self._portals
        return None if data[position + 6 : end - 1] in known else self._restore()

    def _bind(self, data: bytes, position: int, end: int, size: int) -> bytes | None:
        """Return what is to be inserted before this Bind."""
        portal_end = data.find(b"\0", position + 5, min(end, size))
        name_end = data.find(b"\0", portal_end + 1, min(end, size))
        if portal_end < 0 or name_end < 0:
            self._give_up("statement name")
            return None
        portal = data[position + 5 : portal_end]
        if self._portals:
            self._portals.pop(portal, None)
        name = data[portal_end + 1 : name_end]
        statement = self._statements.get(name)
        self._calls.pop(portal, None)
        doubtful = bool(self._named_in) and self._is_in_doubt(name)
        if statement is not None and statement.rewritten is not None and end <= size and not self._disabled:
            if doubtful:
                self._begin(self._nothing())
                return _CALL
            self._bind_calls(portal, name, statement, data, position, end)
        if doubtful:
            return self._bind_in_doubt(statement)
        if statement is None or end > size:
            return self._restore()
        query = statement.vector
        if query is None or self._disabled or self.adapter.relay_only:
            self._take_note(statement)
            return self._restore()
        executed = _executed_behind(data, end, size, portal, idle=self._state() == IDLE)
        if executed is None and size - position <= _HOLD and not self._impatient:
            return _WAIT
        if executed and self._stale and self._must_read_settings(query):
            self._begin(self._read_settings())
            return _CALL
        self._take_note(statement)
        started = perf_counter()
        try:
            parameters = framing.bound_values(data, name_end + 1, end)
        except ProtocolViolation:
            return self._restore()  # the server says what is wrong with it
        bound = self.adapter.bind(query, parameters, self._steering_of(statement))
        if len(self._portals) < _MAX_NAMES:
            self._portals[portal] = bound
        settings = self._settings_for(bound)
        if settings and not executed:
            self.adapter.counters.left_alone["cursor"] += 1
            settings = ()
        inserted = self._enforce(settings, bound)
        bound.overhead = perf_counter() - started
        return inserted

    def _has_large_arguments(self, data: bytes, position: int, end: int) -> bool:
        """Tell whether a Bind beyond `_HOLD` must be kept all the same: for a call that takes a document."""
        portal_end = data.find(b"\0", position + 5)
        name_end = data.find(b"\0", portal_end + 1)
        if portal_end < 0 or name_end < 0:
            return False
        statement = self._statements.get(data[portal_end + 1 : name_end])
        return statement is not None and statement.rewritten is not None and end - position <= MAX_ARGUMENTS

    def _is_in_doubt(self, name: bytes) -> bool:
        """Tell whether the Parse that gave a name its meaning is in an earlier segment, and may yet fail."""
        segment = self._named_in.get(name)
        if segment is None or segment == self._segment_out:
            return False
        if segment >= self._segment_in:
            return True
        del self._named_in[name]
        return False

    def _bind_in_doubt(self, statement: Statement | None) -> bytes | None:
        """Leave a Bind alone that may be of another statement, even one that ends the transaction."""
        if statement is not None:
            self._take_note(statement)
            if statement.vector is not None:
                self.adapter.counters.left_alone["pipeline"] += 1
        self._control_segment = self._segment_out
        return self._restore()

    def _execute(self, data: bytes, position: int, end: int) -> bytes | None:
        """Time a vector query; restore settings before another portal runs."""
        portal_end = data.find(b"\0", position + 5, end)
        portal = data[position + 5 : portal_end]
        calls = self._calls.get(portal)
        if calls is not None and not calls.answered and calls.piece.calls and not self._is_skipped:
            self._begin(self._before_execute(calls))
            return _CALL
        bound = self._portals.get(portal)
        inserted = None
        if bound is None or bound.settings != self._in_force:
            inserted = self._restore()
        if bound is not None:
            self._watch(bound, self._segment_out, self._sent, self._sent + 1)
        elif calls is not None and calls.piece.deferred is not None:
            self._keep(calls.piece.deferred, self._sent)
        elif calls is not None and calls.piece.tag is not None:
            mark = Mark(Purpose.SHOW, self._segment_out, self._sent, self._sent + 1)
            mark.piece = calls.piece
            self._add_mark(mark)
        return inserted

    def _close(self, data: bytes, position: int, end: int) -> None:
        if end - position < 7:
            return  # the server says what is wrong with it
        name = data[position + 6 : end - 1]
        if data[position + 5] == 0x53:  # 'S'
            self._know(name, None)
        else:
            self._portals.pop(name, None)
            self._calls.pop(name, None)

    def _sync(self) -> bytes | None:
        """Return what is to be inserted before this Sync."""
        if self.copy_in:
            if self._copying:
                self._lose_count()
            return None  # the server ignores it
        inserted = None
        if self._in_force:
            state = self._state()
            if state == IDLE:
                self._in_force = ()  # it ends with this segment's implicit transaction
            elif state == UNKNOWN:
                # The next segment may be one that must be alone in its transaction: VACUUM.
                inserted = self._restore()
        self._end_segment(Segment.EXTENDED)
        return inserted

    # -- simple query and function call ------------------------------------------------------------

    def _query(
        self, data: bytes, position: int, end: int, size: int, cleaned: Statement | None = None
    ) -> bytes | None:
        """Return what is to be sent instead of this Query, or None where it goes as it is.

        `cleaned` is what the text holds that is looked at in place of the client's.
        """
        counters = self.adapter.counters
        if cleaned is not None:
            statement = cleaned
        else:
            if end > size:
                statement = _OVERSIZE
            else:
                statement = self.adapter.recognise(data[position + 5 : end - 1], self._current_scope())
                if self._deferred:
                    statement = self._with_executions(data[position + 5 : end - 1], statement)
            query = statement.vector
            if self._stale and query is not None and not self._sent and self._must_read_settings(query):
                self._begin(self._read_settings(), injection.SYNC, Segment.OWN)
                return _CALL
            counters.statements += 1
            if statement.text is not None:
                query_message = injection.query_message(statement.text)
                size = len(query_message)
                return self._query(query_message, 0, size, size, statement) or query_message
        mixed = b"" if self._may_query() else self._leave_mixed_segment()
        if statement.reason is not None:
            counters.left_alone[statement.reason] += 1
        if statement.rewritten is not None and not self._disabled and not self._blind:
            restored = mixed or (self._restore_in_own_segment() if self._in_force else b"")
            self._take_note(statement)
            self._begin(self._in_place_of_query(statement.rewritten), injection.SYNC)
            return restored
        query = statement.vector
        if query is not None and statement.controls_transaction:
            counters.left_alone["transaction control"] += 1
            query = None
        if query is None or self._disabled:
            ends = statement.transaction in _ENDS_SCOPE
            restored = mixed
            if self._in_force and not ends:
                restored = self._restore_in_own_segment()
            if not is_plain(statement):
                self._take_note(statement)
            self._end_segment(Segment.QUERY)
            return None if not restored else restored + data[position:end]
        self._take_note(statement)
        started = perf_counter()
        bound = self.adapter.bind(query, (), self._steering_of(statement))
        settings = self._settings_for(bound)
        text = data[position + 5 : end - 1]
        # Positions in errors are counted in characters, by an encoding that the proxy may not know.
        countable = self.utf8 or text[: query.start].isascii()
        if settings and (query.completions_before is None or not countable):
            counters.left_alone["position"] += 1
            settings = ()
        elif settings and self._state() not in (IDLE, OPEN):
            counters.left_alone["pipeline"] += 1
            settings = ()
        restored = b""
        if self._in_force and (self._in_force != settings or statement.count > 1):
            restored = self._restore_in_own_segment()
        replacement = self._with_settings(text, statement, query, settings, bound)
        bound.overhead = perf_counter() - started
        self._end_segment(Segment.QUERY)
        if replacement is None:
            return restored + data[position:end] if restored else None
        return restored + injection.query_message(replacement)

    def _function_call(self) -> bytes | None:
        inserted = self._restore_in_own_segment() if self._may_query() else self._leave_mixed_segment()
        self._end_segment(Segment.FUNCTION_CALL)
        return inserted or None

    def _may_query(self) -> bool:
        """Tell whether a Query or FunctionCall can be counted behind what the segment holds already.

        asyncpg prepares with Parse, Describe and Flush, and then says BEGIN in a Query: once everything is
        answered nothing of it can fail any more, and counting goes on behind it.
        """
        answered = self._segment_in == self._segment_out and self._replied == self._sent
        return not self._sent or (answered and not self._engaged)

    def _leave_mixed_segment(self) -> bytes:
        """A Query or FunctionCall stands behind unsynced messages: take back what is in force, for good.

        When one of those messages fails it is skipped, with no ReadyForQuery of its own; from then on
        segments can no longer be counted.
        """
        restored = self._restore()
        self._in_force = ()
        self._give_up("both protocols in one segment")
        return restored or b""

    # -- what statements do to the session ---------------------------------------------------------

    def _take_note(self, statement: Statement) -> None:
        """Note what a statement does to the transaction, to settings and to prepared statements."""
        if not does_something(statement) or self._is_skipped:
            return
        if statement.touches or statement.resets or statement.transaction is not None:
            self._note_steering(statement)
        dropped = self._will.note(statement, in_transaction=self._state() != IDLE)
        if dropped:
            # Whichever message of the segment fails: it rolls the RESET back.
            self._journal.note(self._segment_out, ABORTED, lambda: self._will.claim_again(dropped))
        if statement.controls_transaction:
            self._control_segment = self._segment_out
        if statement.transaction in _ENDS_SCOPE:
            self._in_force = ()  # it ends what the settings were local to
        if statement.controls_transaction and statement.transaction is None:
            self._prepared.clear()  # DO, CALL, or a text that was not read: they may have dropped them
        if statement.drops_prepared:
            self._forget_prepared()
            kept = {name: known for name, known in self._statements.items() if known.controls_transaction}
            self._statements = kept

    @property
    def _is_skipped(self) -> bool:
        """Whether the server has failed in this segment already, and skips what is sent now."""
        return self._segment_in == self._segment_out and self._replied >= ABORTED

    @property
    def scope(self) -> Scope:
        """Who the client is, and where; the search_path may be older than the last statement."""
        return self._scope

    def _current_scope(self) -> Scope:
        if self.search_path is not None and self.search_path != self._scope.search_path:
            self._scope = Scope(self._scope.database, self._scope.user, self.search_path)
        return self._scope

    def _lose_count(self) -> None:
        self._pending.clear()
        self._segment_out = self._segment_in
        self._marks.clear()
        self._cover = None
        self._give_up("copy data in a pipeline")

    def _give_up(self, reason: str) -> None:
        """Stop adapting on this connection; what is under way is finished."""
        self._disabled = True
        self.adapter.counters.left_alone[reason] += 1


def is_plain(statement: Statement) -> bool:
    """Tell whether a statement needs no attention."""
    return (
        statement.vector is None
        and statement.reason is None
        and statement.rewritten is None
        and not does_something(statement)
    )


def does_something(statement: Statement) -> bool:
    """Tell whether a statement changes transaction, settings or prepared statements."""
    return bool(
        statement.controls_transaction or statement.touches or statement.resets or statement.drops_prepared
    )


def _executed_behind(data: bytes, position: int, size: int, portal: bytes, *, idle: bool) -> bool | None:
    """Tell whether the messages behind a Bind, from `position` on, execute `portal` as an injection needs it.

    It must be executed at once: of a Query behind a portal that was never executed the server would say that
    it left a transaction open, because ours was.  And whole, since nothing can be restored while it is
    suspended; except in autocommit (`idle`), if nothing else is executed until the Sync, which ends it.

    None: more bytes are needed.  They will come, since without a Sync or Flush nothing is answered.
    """
    suspended = False
    while size - position >= 5:
        tag = data[position]
        end = position + 1 + _LENGTH(data, position + 1)[0]
        if tag == framing.SYNC:
            return suspended
        if end > size and tag in (framing.EXECUTE, framing.DESCRIBE):
            return None
        if tag == framing.EXECUTE:
            if data[position + 5 : end] == portal + b"\0\0\0\0\0":
                return True
            suspended = idle and data.startswith(portal + b"\0", position + 5)
            if not suspended:
                return False
        elif tag != framing.DESCRIBE or end - position < 5:
            return False
        position = end
    return None
