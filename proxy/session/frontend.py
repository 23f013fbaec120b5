"""The client's side of a session: its bytes in, bytes for the server out.

Theory
------
Transaction state as the *sender* must know it: the last ReadyForQuery speaks of a segment that may lie behind what
has been sent since.  It is certain while no transaction-control statement is under way; else it is UNKNOWN and
treated like an open transaction block: settings are saved, and restored before another statement could see them.

    state      extended query                       simple query
    ---------  -----------------------------------  ----------------------------------------------
    IDLE       settings before Bind; end with Sync  SET LOCAL in front of the text; end with it
    OPEN       the same, restored when needed       saving SELECT in front; restored when needed
    UNKNOWN    the same as OPEN                     left alone
    FAILED     left alone                           left alone

Rules
-----
* The client's own will comes first: a setting that it has set itself is not touched until it resets it.
* A restoration is sent only when another statement needs it; the end of the transaction restores for free.
* Nothing is restored while a portal is suspended: its scan may still read the setting.
* An injection that fails in autocommit is answered by sending the client's own bytes again: it gets its result.
* In doubt (both protocols mixed in one segment, endless names) the session stops adapting, for good.
"""

from __future__ import annotations

from struct import Struct
from time import perf_counter
from typing import Final

from learning.records import Settings
from proxy.session import injection
from proxy.session.adaptation import Adapter, BoundQuery
from proxy.session.backend import FAILED, IDLE, OPEN, BackendStream, InsertedText
from proxy.session.replies import Mark, Purpose, Segment
from proxy.sql import Scope, Statement, TransactionVerb, VectorQuery
from proxy.wire import framing
from proxy.wire.errors import ProtocolViolation, Sender

_LENGTH: Final = Struct("!I").unpack_from
_HOLD: Final = 1 << 20  # bytes; a longer message is streamed through and not looked at
_LONGEST: Final = framing.MAX_LENGTH + 1
_MAX_NAMES: Final = 10_000  # statements, portals and settings remembered per session
_UNKNOWN: Final = 0
_ENDS_SCOPE: Final = frozenset({TransactionVerb.COMMIT, TransactionVerb.ROLLBACK, TransactionVerb.ROLLBACK_TO})
_OTHER_SCOPE: Final = frozenset({"search_path", "role", "session_authorization", "*"})


class Session(BackendStream):
    """One client's connection.  `from_client` and `from_server` turn one side's bytes into the other side's."""

    __slots__ = (
        "_client_skip",
        "_client_tail",
        "_control_segment",
        "_disabled",
        "_executed",
        "_injected",
        "_own",
        "_portals",
        "_scope",
        "_scope_segment",
        "_sent",
        "_statements",
        "terminated",
    )

    def __init__(self, adapter: Adapter, parameters: dict[str, str], *, raw: bool = False) -> None:
        """`parameters` are those of the startup message; `raw` relays without looking (replication)."""
        super().__init__(adapter)
        user = parameters.get("user", "")
        self.terminated = False  # the client has said goodbye
        self._raw = raw
        self._scope = Scope(database=parameters.get("database", user), user=user, search_path=None)
        self._scope_segment = -1  # last segment in which the client changed what names mean
        self._control_segment = -1  # last segment with transaction control in it
        self._sent = 0  # completions that the current segment will have
        self._executed = False  # the current segment has executed something
        self._own: set[str] = own_settings(parameters)
        self._statements: dict[bytes, Statement] = {}  # prepared, and of interest
        self._portals: dict[bytes, BoundQuery] = {}
        self._injected: Mark | None = None  # injection of the current segment, while it may be sent again
        self._disabled = False
        self._client_skip = 0
        self._client_tail = b""

    # -- the stream ---------------------------------------------------------------------------------------------

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
        replay_from = -1
        while size - position >= 5:
            tag = data[position]
            end = position + 1 + _LENGTH(data, position + 1)[0]
            if not 5 <= end - position <= _LONGEST:
                framing.cut(data, position, Sender.FRONTEND)  # raises, with the words for it
            inserted: bytes | None = None
            if tag == framing.BIND:
                if self._statements or self._portals or self._in_force:
                    if end > size and end - position <= _HOLD:
                        break
                    first = self._injected
                    inserted = self._bind(data, position, end, size)
                    if self._injected is not first:
                        replay_from = position
                self._sent += 1
            elif tag == framing.EXECUTE:
                self.adapter.counters.statements += 1
                if self._portals or self._in_force:
                    if end > size:
                        break
                    inserted = self._execute(data, position, end)
                self._sent += 1
                self._executed = True
            elif tag == framing.SYNC:
                if self._injected is not None and replay_from >= 0:
                    self._injected.replay = data[replay_from:end]
                self._sync()
            elif tag == framing.DESCRIBE:
                self._sent += 1
            elif tag == framing.PARSE:
                if end > size and end - position <= _HOLD:
                    break
                self._parse(data, position, end, size)
                self._sent += 1
            elif tag == framing.QUERY:
                if end > size and end - position <= _HOLD:
                    break
                replacement = self._query(data, position, end, size)
                if replacement is not None:
                    out = out if out is not None else []
                    out.append(data[start:position])
                    out.append(replacement)
                    start = end
            elif tag == framing.CLOSE:
                if end > size:
                    break
                self._close(data, position, end)
                self._sent += 1
            elif tag == framing.COPY_DONE or tag == framing.COPY_FAIL:
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
                position = size
                break
            position = end
        if position < size:
            self._client_tail = data[position:]
        if out is None:
            return data if position == size else data[:position]
        out.append(data[start:position])
        return b"".join(out)

    # -- transaction state ----------------------------------------------------------------------------------------

    def _state(self) -> int:
        """IDLE, OPEN or FAILED where it is certain for what is sent next; else UNKNOWN."""
        if self._control_segment >= self._segment_in:
            return _UNKNOWN
        return self._status

    def transaction_ended(self) -> None:
        """The server is idle: portals are gone, unless the client has already sent more."""
        if self._portals and not self._pending and not self._sent:
            self._portals.clear()

    def _nothing_sent_behind(self, segment: int) -> bool:
        return self._segment_out == segment + 1 and self._sent == 0 and not self._client_tail

    @property
    def is_idle(self) -> bool:
        """True where the session can be ended without losing anything: outside a transaction, nothing owed."""
        return self._status == IDLE and not self._pending and not self._sent and not self._client_tail

    # -- extended query -------------------------------------------------------------------------------------------

    def _parse(self, data: bytes, position: int, end: int, size: int) -> None:
        """Remember a prepared statement if anything depends on it."""
        name_end = data.find(b"\0", position + 5, min(end, size))
        if name_end < 0:
            self._give_up("statement name")
            return
        name = data[position + 5 : name_end]
        if end > size:
            statement = self.adapter.unknown_statement
        else:
            sql_end = data.find(b"\0", name_end + 1, end)
            if sql_end < 0:
                return  # the server will say what is wrong
            statement = self.adapter.recognise(data[name_end + 1 : sql_end], self._current_scope())
        if is_plain(statement):
            self._statements.pop(name, None)
            return
        if statement.reason is not None:
            self.adapter.counters.left_alone[statement.reason] += 1
        if len(self._statements) >= _MAX_NAMES:
            self._give_up("too many prepared statements")
        else:
            self._statements[name] = statement

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
        if portal == self._suspended_portal:
            self._suspended_portal = None
        statement = self._statements.get(data[portal_end + 1 : name_end])
        if statement is None or end > size:
            return self._restore()
        inserted = self._take_note(statement)
        query = statement.vector
        if query is None or self._disabled:
            return inserted
        started = perf_counter()
        try:
            parameters = framing.bind_parameters(data, position + 5, end)
        except ProtocolViolation:
            return self._restore()  # the server says what is wrong with it
        bound = self.adapter.bind(query, parameters)
        if len(self._portals) < _MAX_NAMES:
            self._portals[portal] = bound
        settings = self._settings_for(bound)
        if settings and self._state() != IDLE and not _executes_whole(data, end, size, portal):
            self.adapter.counters.left_alone["cursor"] += 1
            settings = ()
        inserted = self._enforce(settings, bound)
        bound.overhead = perf_counter() - started
        return inserted

    def _execute(self, data: bytes, position: int, end: int) -> bytes | None:
        """Time a vector query; restore settings before another portal runs."""
        portal_end = data.find(b"\0", position + 5, end)
        portal = data[position + 5 : portal_end]
        bound = self._portals.get(portal)
        inserted = None
        if bound is None or bound.settings != self._in_force:
            inserted = self._restore()
        if bound is not None:
            self._watch(bound, self._segment_out, self._sent, self._sent + 1)
            if data[portal_end + 1 : end] != b"\0\0\0\0" and self._in_force:
                self._suspended_portal = portal
        return inserted

    def _close(self, data: bytes, position: int, end: int) -> None:
        name = data[position + 6 : end - 1]
        if data[position + 5] == 0x53:  # 'S'
            self._statements.pop(name, None)
        else:
            self._portals.pop(name, None)
            if name == self._suspended_portal:
                self._suspended_portal = None

    def _sync(self) -> None:
        if self.copy_in:
            return  # the server ignores it
        if self._in_force and self._state() == IDLE:
            self._in_force = ()  # it ends with this segment's implicit transaction
            self._suspended_portal = None
        self._end_segment(Segment.EXTENDED)

    def _end_segment(self, kind: Segment) -> None:
        self._pending.append(kind)
        self._segment_out += 1
        self._sent = 0
        self._executed = False
        self._injected = None
        self._blind = False

    # -- simple query and function call ---------------------------------------------------------------------------

    def _query(self, data: bytes, position: int, end: int, size: int) -> bytes | None:
        """Return what is to be sent instead of this Query, or None where it goes as it is."""
        counters = self.adapter.counters
        counters.statements += 1
        if end > size:
            statement = self.adapter.unknown_statement
        else:
            statement = self.adapter.recognise(data[position + 5 : end - 1], self._current_scope())
        if self._sent:
            # Replies of a Query behind unsynced messages cannot be told apart when one of those fails.
            self._give_up("both protocols in one segment")
        if statement.reason is not None:
            counters.left_alone[statement.reason] += 1
        query = statement.vector
        if query is None or self._disabled:
            restored = None if is_plain(statement) and not self._in_force else self._before_query(statement)
            self._end_segment(Segment.QUERY)
            return None if not restored else restored + data[position:end]
        self._note_settings(statement)
        started = perf_counter()
        bound = self.adapter.bind(query, ())
        settings = self._settings_for(bound)
        if settings and (query.completions_before is None or self._state() not in (IDLE, OPEN)):
            counters.left_alone["position" if query.completions_before is None else "pipeline"] += 1
            settings = ()
        restored = b""
        if self._in_force and self._in_force != settings:
            restored = self._restore_in_own_segment()
        text = data[position + 5 : end - 1]
        replacement = self._with_settings(text, statement, query, settings, bound)
        bound.overhead = perf_counter() - started
        self._end_segment(Segment.QUERY)
        if replacement is None:
            return restored + data[position:end] if restored else None
        return restored + injection.query_message(replacement)

    def _with_settings(
        self, text: bytes, statement: Statement, query: VectorQuery, settings: Settings, bound: BoundQuery
    ) -> bytes | None:
        """Return the text with `settings` in force for its vector query; None where it stays as it is."""
        before = query.completions_before or 0
        segment = self._segment_out
        if not settings or settings == self._in_force:
            if query.completions_before is not None:
                bound.settings = settings
                self._watch(bound, segment, before, before + 2)
            return None
        last = query.index + 1 == statement.count
        state = self._state()
        plain = last and state == IDLE
        prefix = injection.text_set_local(settings) if plain else injection.text_save_and_set(settings)
        mark = Mark(Purpose.INJECT, segment, before, before + prefix.completions)
        mark.bound = bound
        if state == IDLE and query.index == 0:
            mark.replay = injection.query_message(text)
        self._add_mark(mark)
        bound.settings = settings
        self._count_adapted(bound)
        self._watch(bound, segment, mark.last, mark.last + 2)
        head, body, tail = text[: query.start], text[query.start : query.end], text[query.end :]
        insertions = [(len(head.decode()), len(prefix.data))]
        if last:
            suffix = b""
            if state == OPEN:
                self._in_force, self._in_force_segment = settings, segment
        else:
            restoration = injection.text_restore(settings)
            suffix = restoration.data
            first = mark.last + 2
            self._add_mark(Mark(Purpose.RESTORE, segment, first, first + restoration.completions))
            insertions.append((sum(insertions[0]) + len(body.decode()), len(suffix)))
        self._inserted.append(InsertedText(segment, tuple(insertions)))
        return head + prefix.data + body + suffix + tail

    def _before_query(self, statement: Statement) -> bytes:
        """Note what a Query without adaptation does; return what must go before it."""
        self._note_settings(statement)
        if statement.controls_transaction:
            self._control_segment = self._segment_out
        if statement.transaction in _ENDS_SCOPE:
            self._in_force = ()
            self._suspended_portal = None
        return self._restore_in_own_segment()

    def _function_call(self) -> bytes | None:
        if self._sent:
            self._give_up("both protocols in one segment")
        inserted = self._restore_in_own_segment()
        self._end_segment(Segment.FUNCTION_CALL)
        return inserted or None

    # -- settings -------------------------------------------------------------------------------------------------

    def _settings_for(self, bound: BoundQuery) -> Settings:
        """Return the settings chosen for a query, or none where it must be left alone."""
        settings = bound.choice.arm.settings
        if not settings:
            return ()
        own = self._own
        if own and ("*" in own or any(name in own for name, _ in settings)):
            self.adapter.counters.left_alone["client setting"] += 1
            return ()
        if self._blind or self.copy_in or self._scope_segment >= 0 or self._state() == FAILED:
            self.adapter.counters.left_alone["state"] += 1
            return ()
        if self._suspended_portal is not None and settings != self._in_force:
            self.adapter.counters.left_alone["suspended portal"] += 1
            return ()
        return settings

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
        batch = injection.injection(settings)
        out = restored or b""
        out += self._prepare("inject", len(settings))
        mark = Mark(Purpose.INJECT, self._segment_out, self._sent, self._sent + batch.completions)
        mark.bound = bound
        self._add_mark(mark)
        self._sent += batch.completions
        if self._state() == IDLE and not self._executed:
            self._injected = mark
        self._in_force, self._in_force_segment = settings, self._segment_out
        bound.settings = settings
        self._count_adapted(bound)
        return out + batch.data

    def _restore(self) -> bytes | None:
        """Return the messages that take the settings back, within the current segment."""
        settings = self._in_force
        if not settings or self._suspended_portal is not None:
            return None
        self._in_force = ()
        prepare = self._prepare("restore", len(settings))
        batch = injection.restoration(settings)
        self._add_mark(Mark(Purpose.RESTORE, self._segment_out, self._sent, self._sent + batch.completions))
        self._sent += batch.completions
        return prepare + batch.data

    def _restore_in_own_segment(self) -> bytes:
        """The same in front of a Query: unsynced messages must not stand before it."""
        if self._sent or self._disabled:
            return b""
        restored = self._restore()
        if restored is None:
            return b""
        self._end_segment(Segment.OWN)
        return restored + injection.SYNC

    def _prepare(self, kind: str, count: int) -> bytes:
        """Return the messages that prepare a statement of the proxy's, unless the server is known to have it."""
        name = f"{kind} {count}"
        if name in self._prepared:
            return b""
        batch = injection.preparation(kind, count)
        mark = Mark(Purpose.PREPARE, self._segment_out, self._sent, self._sent + batch.completions)
        mark.prepares = name
        self._add_mark(mark)
        self._sent += batch.completions
        return batch.data

    def _send_again(self, mark: Mark) -> None:
        """Send the client's own bytes of a segment whose injection failed; they are one whole segment."""
        assert mark.replay is not None
        query = mark.replay[:1] == b"Q"
        self.resend += mark.replay
        self._end_segment(Segment.QUERY if query else Segment.EXTENDED)

    def _watch(self, bound: BoundQuery, segment: int, first: int, last: int) -> None:
        mark = Mark(Purpose.WATCH, segment, first, last)
        mark.bound = bound
        mark.sent_at = perf_counter()
        self._add_mark(mark)

    def _count_adapted(self, bound: BoundQuery) -> None:
        self.adapter.counters.adapted[bound.query.template.relation, bound.choice.arm.name] += 1

    # -- what statements do to the session --------------------------------------------------------------------------

    def _take_note(self, statement: Statement) -> bytes | None:
        """Note what a bound statement does; return what must be inserted before it."""
        self._note_settings(statement)
        if statement.controls_transaction:
            self._control_segment = self._segment_out
            if statement.transaction in _ENDS_SCOPE:
                self._in_force = ()
                self._suspended_portal = None
                return None
        return self._restore() if statement.vector is None else None

    def _note_settings(self, statement: Statement) -> None:
        if statement.resets and self._state() == IDLE:
            self._own = set() if "*" in statement.resets else self._own - statement.resets
        if statement.touches:
            self._own |= statement.touches
            if len(self._own) > _MAX_NAMES:
                self._own = {"*"}
            if not _OTHER_SCOPE.isdisjoint(statement.touches) and self.search_path is None:
                self._scope_segment = self._segment_out
        if statement.drops_prepared:
            self._prepared.clear()
            self._statements.clear()

    def _current_scope(self) -> Scope:
        if self.search_path is not None and self.search_path != self._scope.search_path:
            self._scope = Scope(self._scope.database, self._scope.user, self.search_path)
        return self._scope

    def _give_up(self, reason: str) -> None:
        """Stop adapting on this connection; what is under way is finished."""
        self._disabled = True
        self.adapter.counters.left_alone[reason] += 1


def is_plain(statement: Statement) -> bool:
    """Tell whether a statement needs no attention."""
    return (
        statement.vector is None
        and statement.reason is None
        and not statement.controls_transaction
        and not statement.touches
        and not statement.resets
        and not statement.drops_prepared
    )


def own_settings(parameters: dict[str, str]) -> set[str]:
    """Names of the settings that a startup message sets: as parameters, or as ``-c name=value`` in options."""
    own = {name.lower() for name in parameters if "." in name or name.startswith(("enable_", "plan_"))}
    words = parameters.get("options", "").replace("\\ ", "_").split()
    for i, word in enumerate(words):
        text = ""
        if word == "-c" and i + 1 < len(words):
            text = words[i + 1]
        elif word.startswith("-c") or word.startswith("--"):
            text = word[2:]
        name = text.partition("=")[0].strip().lower().replace("-", "_")
        if name:
            own.add(name)
    return own


def _executes_whole(data: bytes, position: int, size: int, portal: bytes) -> bool:
    """Tell whether the messages from `position` on execute `portal` without a row limit, as far as they are here."""
    while size - position >= 5:
        tag = data[position]
        end = position + 1 + _LENGTH(data, position + 1)[0]
        if end > size or end - position < 5:
            return False
        if tag == framing.EXECUTE:
            return data[position + 5 : end] == portal + b"\0\0\0\0\0"
        if tag != framing.DESCRIBE:
            return False
        position = end
    return False
