"""A statement with calls of the proxy's functions: what happens before the server executes it.

Theory
------
Such a statement is rare and may take its time, so everything is done one step after the other.  Where it is
about to be executed the session *holds* the client's bytes from there on, until the server has answered all
that was sent before: then nothing is in doubt.  A *procedure* takes over, a generator that yields one step
and is resumed with its outcome:

    Ask       messages for the server, of the proxy's own: their replies come back to the procedure
    Show      messages for the server whose replies are for the client
    Question  for the learner; meanwhile the server is kept busy with short sleeps, so that a cancellation
              finds something to cancel, and hits the procedure

An error of the server in any step ends the procedure and is the client's own.  A refusal of ours is made
the server's: it gets a text that fails, and its error is replaced by ours on the way back; so transaction,
segment and savepoints are in the state that an error leaves them in.

In the extended protocol the procedure runs before the first Execute of a portal, in the client's own
segment.  A simple query with calls is turned into extended messages, one statement after the other, and the
replies that a simple query has not are taken out: positions, implicit transaction and command tags stay the
same.

Every answer lies in a setting that is local to the transaction (`proxy.interface.rewriting`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from proxy.interface import prepared
from proxy.interface.questions import Question, question_of
from proxy.interface.records import Call, Deferred, Piece, RefusalError, Rewritten
from proxy.interface.rewriting import ANSWER
from proxy.interface.settings import NOTHING, PREFIX, READ, Steering, read_values
from proxy.session.adaptation import Adapter
from proxy.session.backend import FAILED
from proxy.session.enforcement import Enforcer
from proxy.session.injection import message
from proxy.session.replies import ABORTED, Mark, Purpose, Segment
from proxy.sql import ANY_SETTING, Statement, TransactionVerb, VectorQuery
from proxy.wire import framing
from proxy.wire.diagnostics import ErrorResponse, NoticeResponse
from proxy.wire.errors import ProtocolViolation
from proxy.wire.framing import DATA_ROW, PARAMETER_DESCRIPTION

MAX_ARGUMENTS: Final = 256 << 20
"""Bytes of a Bind for a statement with calls: a document of patterns may have some ten megabytes."""

_MAX_CALLS: Final = 1_000  # portals with calls, per session
FLUSH: Final = b"H\0\0\0\4"
_STATEMENT: Final = b"_ruvector_ask\0"
_SLEEP: Final = "SELECT pg_catalog.pg_sleep(0.1)"
_SET: Final = f"SELECT pg_catalog.set_config('{ANSWER}' || $1, $2, true) IS NULL"
_FAILS: Final = "SELECT pg_catalog.ruvector_refused() -- "
UNDEFINED: Final = b"42883"


@dataclass(frozen=True, slots=True)
class Ask:
    """Messages of the proxy's own; the outcome is the bytes of their rows and of a ParameterDescription."""

    data: bytes
    completions: int
    position: int = 0  # where in the client's text an error belongs
    refusal: RefusalError | None = None  # it is to fail, and this is what the client gets


@dataclass(frozen=True, slots=True)
class Show:
    """Messages whose replies are for the client, the first `hidden` completions and NoData excepted."""

    data: bytes
    hidden: int
    completions: int
    piece: Piece


Procedure = Generator[Ask | Show | Question, Any, None]


class BoundCalls:
    """A portal of a statement with calls in it: its arguments, and whether they have been answered."""

    __slots__ = ("answered", "name", "parameters", "piece")

    def __init__(self, name: bytes, piece: Piece, parameters: Sequence[tuple[int, bytes | None]]) -> None:
        self.name = name
        self.piece = piece
        self.parameters = parameters
        self.answered = False


class Caller(Enforcer):
    """Runs procedures; see the module's docstring."""

    __slots__ = (
        "_asked",
        "_calls",
        "_closing",
        "_consulting",
        "_deferred",
        "_outcome",
        "_patient",
        "_procedure",
        "_resume",
        "_stale",
        "_steered_segment",
        "_steering",
        "_steers",
        "abandoned",
        "calling",
        "question",
        "to_client",
    )

    def __init__(self, adapter: Adapter, parameters: dict[str, str]) -> None:
        super().__init__(adapter, parameters)
        self.question: Question | None = None  # for the learner: whoever moves the bytes asks it
        self.calling = False  # a procedure is under way; the client's bytes are held
        self.abandoned = False  # the answer to the last question is of no more use
        self.to_client = b""  # bytes for the client that no reply has called for
        self._calls: dict[bytes, BoundCalls] = {}  # portals with calls in them
        self._deferred: dict[str, Deferred] = {}  # prepared at the level of SQL, with calls in them
        self._procedure: Procedure | None = None
        self._asked: Mark | None = None  # of the step under way
        self._consulting = False  # the learner is at work
        self._patient = True  # and has been for a moment only
        self._outcome: Any = None  # its answer, until the server is quiet
        self._resume = b""  # what ends the client's message once the procedure is over
        self._closing = Segment.EXTENDED  # the kind of segment that it ends
        self._steering = NOTHING  # what the client's settings say
        self._stale = adapter.interface.reads_settings  # they may have changed on the server
        # The client has something to do with them: then they are asked for before anything was learned, too.
        self._steers = self._stale and PREFIX in parameters.get("options", "")
        self._steered_segment = -1  # last one that changed them in a transaction, until that is over

    # -- life of a procedure ---------------------------------------------------------------------------

    def _begin(self, procedure: Procedure, resume: bytes = b"", closing: Segment = Segment.EXTENDED) -> None:
        """Hold the client's bytes until a procedure is over; `resume` then ends its message."""
        self._procedure = procedure
        self.calling = True
        self._asked = None
        self._outcome = None
        self._resume = resume
        self._closing = closing
        if self._replied < self._sent:
            self.resend += FLUSH

    def proceed(self) -> None:
        """Take the next step if the server has answered all that was sent."""
        while self._procedure is not None and self._segment_in == self._segment_out:
            if self._replied >= ABORTED:
                self._end()
                return
            if self._replied < self._sent:
                return
            if self._consulting and self._outcome is None:
                if not self._patient:
                    self._beat()
                return
            self._consulting = False
            outcome, self._outcome = self._outcome, None
            asked, self._asked = self._asked, None
            if asked is not None:
                outcome = asked.rows
            try:
                if isinstance(outcome, RefusalError):
                    step = self._procedure.throw(outcome)
                else:
                    step = self._procedure.send(outcome)
            except StopIteration:
                self._end()
                return
            self._take(step)

    def _take(self, step: Ask | Show | Question) -> None:
        """Send what a step is made of."""
        if isinstance(step, Question):
            self.question = step
            self._consulting = self._patient = True
            return
        first = self._sent
        self._sent = first + step.completions
        hidden = step.completions if isinstance(step, Ask) else step.hidden
        mark = Mark(Purpose.ASK, self._segment_out, first, first + hidden)
        self._add_mark(mark)
        if isinstance(step, Ask):
            mark.position, mark.refusal = step.position, step.refusal
            self._asked = mark
        else:
            mark.piece = step.piece
            if step.completions > hidden:
                shown = Mark(Purpose.SHOW, self._segment_out, first + hidden, self._sent)
                shown.piece = step.piece
                self._add_mark(shown)
        self.resend += step.data + FLUSH

    def _end(self) -> None:
        """The procedure is over, well or not: let the client's bytes go on."""
        procedure, self._procedure = self._procedure, None
        self.calling = False
        if procedure is not None:
            procedure.close()
        if self._consulting:
            self._consulting = False
            self.abandoned = True
        self.question = None
        if self._resume:
            self.resend += self._resume
            self._resume = b""
            self._end_segment(self._closing)
        self.resend += self.from_client(b"")

    def from_client(self, data: bytes) -> bytes:
        """Return what the server is to get for the client's bytes."""
        raise NotImplementedError

    def _asked_failed(
        self, mark: Mark, response: bytes, fields: ErrorResponse | NoticeResponse
    ) -> bytes | bool:
        """Return what the client gets for an error in a step: its own, whoever's text it was."""
        if mark.refusal is not None:
            return error_message(mark.refusal) if fields.code == UNDEFINED else True
        if fields.position is None:
            return True
        place = mark.piece.original(fields.position) if mark.piece is not None else mark.position
        return fields.with_position(place).encode()

    # -- what a session asks of it -----------------------------------------------------------------

    def _rewritten_parse(self, statement: Statement, body: bytes, name: bytes, sql_end: int) -> bytes | None:
        """Return the Parse that is sent instead of the client's; None where that goes as it is."""
        rewritten = statement.rewritten
        assert rewritten is not None
        if self._disabled or self._blind:
            return None
        mark = Mark(Purpose.SHOW, self._segment_out, self._sent, self._sent + 1)
        if rewritten.refusal is not None:
            text, mark.refusal = error_text(rewritten.refusal), rewritten.refusal
        elif len(rewritten.pieces) == 1:
            mark.piece = rewritten.pieces[0]
            text = mark.piece.text
        else:
            return None  # the server says that it takes one statement only
        self._add_mark(mark)
        return message(b"P", name + b"\0" + text + body[sql_end:])

    def _with_executions(self, sql: bytes, statement: Statement) -> Statement:
        """Return what a text is that may execute a statement which was prepared with calls in it."""
        rewritten, gone = prepared.look(sql, self._deferred)
        if rewritten is not None:
            return replace(statement, rewritten=rewritten, controls_transaction=True)
        for name in tuple(self._deferred):
            if (name in gone or prepared.EVERYTHING in gone) and statement.rewritten is None:
                # Where it fails nothing is lost but that its EXECUTE finds no answer, and says so.
                del self._deferred[name]
        return statement

    def _keep(self, deferred: Deferred, completion: int) -> None:
        """Remember the calls of a PREPARE that is sent, unless the message with this completion fails."""
        before = self._deferred.get(deferred.name)

        def undo() -> None:
            if before is not None:
                self._deferred[deferred.name] = before
            else:
                self._deferred.pop(deferred.name, None)

        self._journal.note(self._segment_out, completion, undo)
        if len(self._deferred) < _MAX_CALLS:
            self._deferred[deferred.name] = deferred

    def _bind_calls(
        self, portal: bytes, name: bytes, statement: Statement, data: bytes, position: int, end: int
    ) -> None:
        """Remember the arguments of a portal whose statement holds calls."""
        assert statement.rewritten is not None
        if len(statement.rewritten.pieces) != 1 or len(self._calls) >= _MAX_CALLS:
            return
        try:
            parameters = framing.bind_parameters(data, position + 5, end)
        except ProtocolViolation:
            return  # the server says what is wrong with it
        kept = [(code, None if value is None else bytes(value)) for code, value in parameters]
        self._calls[portal] = BoundCalls(name, statement.rewritten.pieces[0], kept)

    def _must_read_settings(self, query: VectorQuery) -> bool:
        """Tell whether the server has to be asked what the proxy's own settings are, before this query.

        To be asked where they may have changed.  Not behind other segments, whose outcome is open, and not
        where the server skips everything: the query then goes by what was known before, the next one asks.
        """
        return (
            self._segment_in == self._segment_out
            and self._replied < ABORTED
            and not (self._disabled or self._blind or self.copy_in or self._copying)
            and self._status != FAILED
            and (self._steers or self.adapter.adapts(query))
        )

    def _steering_of(self, statement: Statement) -> Steering:
        """Return what the client asks for: in the statement, else in the session."""
        return self._steering if statement.steering is None else statement.steering.over(self._steering)

    def _own_answer(self, question: Question) -> tuple[object] | None:
        """Return what the session itself knows."""
        if question.function == "ruvector_last_query_id":
            return (self.last_query_id,)
        if question.function == "ruvector_relay_only":
            return (self.adapter.switch_by_client(question.arguments["relay_only"], question.username),)
        return None

    # -- the learner's answer --------------------------------------------------------------------------

    def answered(self, outcome: object) -> None:
        """The learner has answered, or will not: a RefusalError."""
        if self._procedure is not None and self._consulting:
            self._outcome = outcome
            self.proceed()

    def lose_patience(self) -> None:
        """The learner takes its time: from now on the server is kept busy."""
        if self._consulting:
            self._patient = False
            self.proceed()

    def _beat(self) -> None:
        """Keep the server busy, with the next sleep right behind the one under way."""
        data, completions = once(_SLEEP)
        for _ in range(2):
            self._add_mark(Mark(Purpose.ASK, self._segment_out, self._sent, self._sent + completions))
            self._sent += completions
        self.resend += data + data + FLUSH

    # -- settings of the proxy's own -------------------------------------------------------------------

    def _note_steering(self, statement: Statement) -> None:
        """Note that a statement may change them."""
        names = statement.touches | statement.resets
        if any(name == ANY_SETTING or name.startswith(PREFIX) for name in names):
            self._stale = self._steers = self.adapter.interface.enabled
            self._steered_segment = self._segment_out
        elif statement.transaction is TransactionVerb.ROLLBACK_TO and self._steered_segment >= 0:
            self._stale = True

    def _transaction_over(self) -> None:
        """What was set for a transaction, or in one that was rolled back, is gone."""
        if 0 <= self._steered_segment < self._segment_in:
            self._steered_segment = -1
            self._stale = True

    def _read_settings(self) -> Procedure:
        """Ask the server what they are now; a transaction that failed while the session waited gets none."""
        if self._status == FAILED:
            return
        self._stale = False
        data, completions = once(READ)
        rows = yield Ask(data, completions)
        self._steering = read_values(_first_value(rows))

    # -- procedures ------------------------------------------------------------------------------------

    def _nothing(self) -> Procedure:
        """Wait until nothing is in doubt."""
        yield from ()

    def _before_execute(self, bound: BoundCalls) -> Procedure:
        """Answer the calls of a portal."""
        bound.answered = True
        types: tuple[int, ...] = ()
        if any(call.parameters for call in bound.piece.calls):
            described = yield Ask(message(b"D", b"S" + bound.name + b"\0"), 1)
            types = _parameter_types(described)
        for call in bound.piece.calls:
            yield from self._answer(call, bound.parameters, types)

    def _in_place_of_query(self, rewritten: Rewritten) -> Procedure:
        """Run the statements of a simple query."""
        if rewritten.refusal is not None:
            yield from self._refuse(rewritten.refusal)
        for piece in rewritten.pieces:
            parse = message(b"P", b"\0" + piece.text + b"\0\0\0")
            if piece.calls:
                yield Show(parse, 1, 1, piece)
                for call in piece.calls:
                    yield from self._answer(call, (), ())
                parse = b""
            portal = message(b"B", b"\0\0\0\0\0\0\0\0") + message(b"D", b"P\0") + message(b"E", b"\0\0\0\0\0")
            hidden = 2 if parse else 1
            if piece.deferred is not None:
                self._keep(piece.deferred, self._sent + hidden + 1)
            yield Show(parse + portal, hidden, hidden + 2, piece)

    def _answer(
        self, call: Call, parameters: Sequence[tuple[int, bytes | None]], types: Sequence[int]
    ) -> Procedure:
        values = [parameters[number] for number in call.parameters if number < len(parameters)]
        oids = [types[number] for number in call.parameters if number < len(types)]
        data, completions = once(call.question, values, oids)
        rows = yield Ask(data, completions, position=call.position)
        try:
            question = question_of(call, _first_value(rows), self.adapter.interface.manager)
            own = self._own_answer(question)
            answer = own[0] if own is not None else (yield question)
        except RefusalError as refusal:
            yield from self._refuse(refusal)
            return
        if not call.function.returns_rows:
            answer = {call.key: answer}
        text = json.dumps(answer).encode()
        values = [(0, call.slot.encode()), (0, text)]
        yield Ask(*once(_SET, values, [25, 25]))

    def _refuse(self, refusal: RefusalError) -> Procedure:
        """Let the server fail, and the client see why."""
        data, completions = once(error_text(refusal).decode())
        yield Ask(data, completions, refusal=refusal)


def once(
    sql: str, values: Sequence[tuple[int, bytes | None]] = (), types: Sequence[int] = ()
) -> tuple[bytes, int]:
    """Return the messages that run a statement once, and how many completions they have.

    The name is closed before as well: an earlier run may have ended by an error.
    """
    count = struct.pack("!H", len(values))
    formats = struct.pack(f"!H{len(values)}H", len(values), *(code for code, _ in values))
    bound = b"".join(
        b"\xff\xff\xff\xff" if value is None else struct.pack("!I", len(value)) + value for _, value in values
    )
    oids = struct.pack(f"!H{len(types)}I", len(types), *types)
    data = (
        message(b"C", b"S" + _STATEMENT)
        + message(b"P", _STATEMENT + sql.encode() + b"\0" + oids)
        + message(b"B", _STATEMENT + _STATEMENT + formats + count + bound + b"\0\0")
        + message(b"E", _STATEMENT + b"\0\0\0\0")
        + message(b"C", b"P" + _STATEMENT)
        + message(b"C", b"S" + _STATEMENT)
    )
    return data, 6


def _parameter_types(rows: Sequence[bytes]) -> tuple[int, ...]:
    message = next(row for row in rows if row[0] == PARAMETER_DESCRIPTION)
    (count,) = struct.unpack_from("!H", message, 5)
    return struct.unpack_from(f"!{count}I", message, 7)


def _first_value(rows: Sequence[bytes]) -> bytes:
    row = next(row for row in rows if row[0] == DATA_ROW)
    (length,) = struct.unpack_from("!i", row, 7)
    return row[11 : 11 + max(0, length)]


def error_text(refusal: RefusalError) -> bytes:
    """Return a text that the server refuses with error `UNDEFINED`, and that says in its log why."""
    return (_FAILS + refusal.message.replace("\n", " ").replace("\0", " ")).encode(errors="replace")


def error_message(refusal: RefusalError) -> bytes:
    """Return the ErrorResponse for a refusal."""
    fields = [
        (b"S", "ERROR"), (b"V", "ERROR"), (b"C", refusal.sqlstate), (b"M", refusal.message),
        (b"D", refusal.detail), (b"H", refusal.hint), (b"P", str(refusal.position or "")),
        (b"R", "ruvector-proxy"),
    ]  # fmt: skip
    body = b"".join(code + text.encode() + b"\0" for code, text in fields if text)
    return message(b"E", body + b"\0")


def notice_message(text: str) -> bytes:
    """Return a NoticeResponse."""
    fields = ((b"S", "NOTICE"), (b"V", "NOTICE"), (b"C", "00000"), (b"M", text))
    return message(b"N", b"".join(code + value.encode() + b"\0" for code, value in fields) + b"\0")
