"""The client's side of a connection: two transports, one session between them, back-pressure each way.

Each side is an asyncio Protocol.  What a `data_received` brings is handed to the session and what comes out
is written to the other side at once, in one write.  When a transport's buffer is full the *other* side
stops reading; the two directions are independent, so that a client that writes a large pipeline before it
reads cannot lock up.

Life of a connection, each step entered once:

    STARTUP         the client's first packets, and its TLS handshake; nothing upstream yet
    AUTHENTICATING  the proxy authenticates the client (only where auth.mode is "scram")
    CONNECTING      the upstream connection is being made, and logged in where the proxy does that; what the
                    client sends is kept (it is not read further)
    RELAYING        both sides up
    CLOSED          both sides closed; `close` may be called any number of times from anywhere

Half-close: an EOF from the client is passed on, and replies still flow back; a client that is gone closes
upstream at once, which ends its query.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable
from typing import Final, cast

from config.schema import Limits
from proxy.auth.frontend import MAX_MESSAGE as MAX_FROM_CLIENT
from proxy.auth.frontend import Credentials
from proxy.auth.refusal import Cause, Refusal, timeout
from proxy.auth.relayed import RelayedAuthentication
from proxy.interface.questions import Question
from proxy.net import messages
from proxy.net.admission import Gate, Place
from proxy.net.arrival import Arrival
from proxy.net.authentication import Authenticator, Inbox
from proxy.net.client_tls import PLAIN, ClientTLS
from proxy.net.consultation import Consultation
from proxy.net.farewell import Farewells, close_soon
from proxy.net.preamble import Request
from proxy.net.server_side import HIGH_WATER, UpstreamConnection
from proxy.net.upstream import Upstream, UpstreamTLSError
from proxy.session.adaptation import Adapter
from proxy.session.frontend import Session
from proxy.wire.errors import MessageTooLong, ProtocolViolation
from proxy.wire.startup import CancelRequest, StartupMessage

log = logging.getLogger(__name__)

_BIND_PATIENCE: Final = 0.01  # seconds that a vector query's Bind is kept for what follows it


_CANCELS: Final[set[asyncio.Task[None]]] = set()
"""Cancel requests on their way to the server."""


class State(enum.Enum):
    """See the module's docstring."""

    STARTUP = enum.auto()
    AUTHENTICATING = enum.auto()
    CONNECTING = enum.auto()
    RELAYING = enum.auto()
    CLOSED = enum.auto()


class ClientConnection(asyncio.Protocol):
    """The client's side; owns the session and the upstream side."""

    __slots__ = (
        "_adapter",
        "_arrival",
        "_authenticator",
        "_buffer",
        "_client_tls",
        "_consultation",
        "_eof",
        "_farewells",
        "_inbox",
        "_limit",
        "_on_close",
        "_place",
        "_task",
        "_upstream_at",
        "authentication",
        "gate",
        "session",
        "state",
        "transport",
        "upstream",
    )

    def __init__(
        self,
        adapter: Adapter,
        upstream_at: Upstream,
        on_close: Callable[[ClientConnection], None],
        farewells: Farewells,
        *,
        client_tls: ClientTLS = PLAIN,
        authenticator: Authenticator | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Serve one client; without an `authenticator` its authentication is relayed.

        `gate` holds the limits of the worker; None: the defaults.
        """
        self.gate = gate if gate is not None else Gate(Limits(), adapter.counters)
        self._place: Place | None = None  # among the clients that are served
        self._adapter = adapter
        self._authenticator = authenticator
        self._upstream_at = upstream_at
        self._on_close = on_close
        self._farewells = farewells
        self._client_tls = client_tls
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._eof = False
        self._inbox: Inbox | None = None  # while the proxy authenticates the client
        self.authentication: RelayedAuthentication | None = None  # while a relayed one is watched
        self._limit: asyncio.TimerHandle | None = None
        self._consultation: Consultation | None = None  # what the learner is asked
        self.state = State.STARTUP
        self.session: Session | None = None
        self._arrival: Arrival  # from connection_made on
        self.transport: asyncio.Transport | None = None
        self.upstream: UpstreamConnection | None = None

    # -- asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a client."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.gate.tune(self.transport.get_extra_info("socket"))
        self._adapter.counters.connections_opened += 1
        self._limit = asyncio.get_running_loop().call_later(
            self.gate.limits.authentication_timeout, self._timed_out
        )
        self._arrival = Arrival(self._client_tls, self, self.transport, self._encryption_failed)
        self.gate.arrived(self)

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the client's on."""
        if self.state is State.RELAYING:
            upstream = self.upstream
            assert self.session is not None
            assert upstream is not None
            try:
                if self.authentication is not None:
                    data = self.authentication.from_client(data)
                out = self.session.from_client(data)
            except MessageTooLong as violation:
                self._refuse_message(str(violation))
                return
            except ProtocolViolation as violation:
                self._refuse_client(str(violation))
                return
            except Refusal as refused:
                self._refuse_login(refused)
                return
            if out:
                upstream.transport.write(out)
            if self.session.calling:
                self.serve_call()
            if self.session.keeps_bind:
                asyncio.get_running_loop().call_later(_BIND_PATIENCE, self._release)
        elif self._inbox is not None:
            self._inbox.feed(data)
            if self._inbox.full and self.transport is not None:
                self.transport.pause_reading()
        elif self.state is State.STARTUP:
            self._arrive(data)
        elif self.state is not State.CLOSED:
            self._buffer += data

    def serve_call(self) -> None:
        """Move on with a statement that calls the proxy's functions.

        What the client sends meanwhile is kept, in bounds: were it not read, its end would go unnoticed.
        """
        session, upstream = self.session, self.upstream
        if session is None or upstream is None or self.transport is None:
            return
        session.proceed()
        self._deliver()
        if session.calling:
            if session.kept > HIGH_WATER:
                self.transport.pause_reading()
        elif not self.transport.is_closing():
            if session.keeps_bind:
                asyncio.get_running_loop().call_later(_BIND_PATIENCE, self._release)
            self.transport.resume_reading()
            if self._eof:
                self.eof_received()

    def _deliver(self) -> None:
        """Write what a procedure has to say, and ask what it has to ask."""
        session, upstream = self.session, self.upstream
        if session is None or upstream is None or self.transport is None:
            return
        if session.resend:
            again, session.resend = session.resend, b""
            upstream.transport.write(again)
        if session.abandoned:
            session.abandoned = False
            self._give_up()
        question = session.question
        if question is not None:
            session.question = None
            self._consult(question)

    def _consult(self, question: Question) -> None:
        assert self.transport is not None
        consultation = Consultation(question, self.transport.write, self._lose_patience, self._answered)
        self._consultation = consultation
        consultation.begin(self._adapter.consult)
        if self._eof:
            consultation.knock()

    def _answered(self, outcome: object) -> None:
        self._consultation = None
        if self.session is not None and self.state is State.RELAYING:
            self.session.answered(outcome)
            self.serve_call()

    def _lose_patience(self) -> None:
        if self.session is not None and self.state is State.RELAYING:
            self.session.lose_patience()
            self._deliver()

    def _give_up(self) -> None:
        if self._consultation is not None:
            consultation, self._consultation = self._consultation, None
            consultation.give_up()

    def _release(self) -> None:
        """Send a Bind that is kept though nothing follows it: the client may wait for an error in it."""
        session, upstream = self.session, self.upstream
        if (
            self.state is State.RELAYING
            and session is not None
            and upstream is not None
            and session.keeps_bind
        ):
            upstream.transport.write(session.release())
            if session.calling:
                self.serve_call()

    def eof_received(self) -> bool:
        """Pass the client's end of stream on; keep reading what the server still has to say."""
        self._eof = True
        if self.state is State.RELAYING:
            assert self.upstream is not None
            assert self.session is not None
            if self.session.calling:
                if self.session.says_goodbye:
                    self.connection_lost(None)
                elif self._consultation is not None:
                    self._consultation.knock()
                return True  # passed on when the call is over
            rest = self.session.client_ended()
            if rest:
                self.upstream.transport.write(rest)
            if self.upstream.transport.can_write_eof():
                self.upstream.transport.write_eof()
            return True
        return self.state is State.CONNECTING

    def pause_writing(self) -> None:
        """The client reads slowly: stop reading from the server."""
        if self.upstream is not None:
            self.upstream.transport.pause_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: so is its upstream connection, and what waits there is nobody's any more."""
        if self.upstream is not None and self.state is not State.CLOSED:
            self.upstream.transport.abort()
        self.close()

    @property
    def upstream_name(self) -> str:
        """Address of the server, for messages."""
        return self._upstream_at.name

    # -- life --------------------------------------------------------------------------------------

    def _arrive(self, data: bytes) -> None:
        """Take what comes before a session."""
        try:
            request = self._arrival.receive(data)
        except ProtocolViolation as violation:
            self._refuse_client(str(violation))
        else:
            if request is not None:
                self._begin(request)

    def _encryption_failed(self, reason: Exception) -> None:
        if self.state is not State.CLOSED:
            log.warning("TLS with %s failed: %s", self._arrival.peer, reason)
            self._adapter.counters.connections_refused += 1
            self.close()

    def _begin(self, request: Request) -> None:
        """The client has said what it wants: a session, or something cancelled."""
        assert self.transport is not None
        self.gate.spoke(self)
        message = request.message
        if not isinstance(message, CancelRequest):
            user = message.get(b"user") if message is not None else None
            objection = self._arrival.objection(user or b"")
            if objection is not None:
                self._adapter.counters.connections_refused += 1
                self._end(objection)
                return
        if message is None and self._authenticator is not None:
            self._refuse_client("the start-up packet is malformed or of an unsupported protocol version")
            return
        if isinstance(message, CancelRequest):
            self._stop_clock()  # limits.connect_timeout holds
        else:
            place = self._admitted(message)
            if not isinstance(place, Place):
                self._end(place)
                return
            self._place = place
        self._buffer = self._arrival.rest()
        self.state = State.CONNECTING
        self.transport.pause_reading()
        loop = asyncio.get_running_loop()
        if isinstance(message, CancelRequest):
            task = loop.create_task(self._cancel(request.packet))
            _CANCELS.add(task)  # it is delivered even if the client does not wait for that
            task.add_done_callback(_CANCELS.discard)
        else:
            self._task = loop.create_task(self._connect(request.packet, message))

    def _admitted(self, startup: StartupMessage | None) -> Place | bytes:
        """Return the client's place, or the error where there is none."""
        if startup is None:
            return self.gate.admit(b"", b"")
        return self.gate.admit(startup.get(b"user") or b"", startup.get(b"database") or b"")

    async def _connect(self, packet: bytes, startup: StartupMessage | None) -> None:
        """Make the session: authenticate if that is the proxy's task, connect upstream; then relay.

        A start-up packet that cannot be read (None) is for the server to refuse, in its own words.
        """
        try:
            credentials = None
            if self._authenticator is not None and startup is not None:
                credentials = await self._admit(startup)
            upstream = await self._upstream_at.connect(lambda: UpstreamConnection(self), packet)
            if self.state is not State.CONNECTING or self.transport is None:
                upstream.transport.abort()
                return
            self.upstream = upstream
            if credentials is not None:
                await self._log_in(credentials, upstream)
        except UpstreamTLSError as failure:
            self._adapter.counters.connections_refused += 1
            log.error("no TLS with upstream %s: %s", self._upstream_at.name, failure)
            self._end(messages.upstream_without_tls(self._upstream_at.name, str(failure)))
        except OSError as error:
            self._adapter.counters.connections_refused += 1
            self._end(messages.upstream_unreachable(self._upstream_at.name, error))
        except Refusal as refused:
            self._refuse_login(refused)
        except EOFError:
            self._end(messages.login_lost(self._upstream_at.name))
        except Exception:
            log.exception("a login from %s failed by a fault of the proxy's own", self._arrival.peer)
            self._end(messages.internal_error())
        else:
            self._relay(startup, upstream)

    async def _admit(self, startup: StartupMessage) -> Credentials:
        """Authenticate the client."""
        assert self._authenticator is not None
        assert self.transport is not None
        self._inbox = Inbox(MAX_FROM_CLIENT)
        self._inbox.feed(self._buffer)
        self.state = State.AUTHENTICATING
        self.transport.resume_reading()
        credentials = await self._authenticator.admit(
            startup, self._inbox, self.transport.write, self._arrival.end_point
        )
        self.transport.pause_reading()
        self._buffer, self._inbox = self._inbox.rest(), None
        self.state = State.CONNECTING
        return credentials

    async def _log_in(self, credentials: Credentials, upstream: UpstreamConnection) -> None:
        """Log in upstream as the client."""
        assert self._authenticator is not None
        assert self.transport is not None
        assert upstream.inbox is not None
        await self._authenticator.log_in(
            credentials, upstream.inbox, upstream.transport.write, self.transport.write, upstream.end_point
        )

    def _relay(self, startup: StartupMessage | None, upstream: UpstreamConnection) -> None:
        """Both sides are up: let the session have what they have said meanwhile."""
        assert self.transport is not None
        parameters = {
            name.decode(errors="replace"): value.decode(errors="replace")
            for name, value in (startup.parameters if startup is not None else ())
        }
        raw = startup is None or _is_replication(parameters)
        self.session = Session(self._adapter, parameters, raw=raw)
        self.state = State.RELAYING
        self._task = None
        if raw:
            self._stop_clock()  # whether its login is over cannot be seen
        if self._authenticator is None and upstream.is_encrypted:
            self.authentication = RelayedAuthentication(client_tls=self._arrival.is_encrypted)
        held, self._buffer = self._buffer, b""
        upstream.hand_over()
        if held:
            self.data_received(held)
        if self._eof:
            self.eof_received()
        elif self.state is State.RELAYING:
            self.transport.resume_reading()

    async def _cancel(self, packet: bytes) -> None:
        """Send a CancelRequest upstream; close the client only after upstream has closed.

        The server closes once the signal is sent: a client that waits for its own close therefore knows
        that a later statement will not be hit.
        """
        try:
            await self._upstream_at.send_cancel(packet)
        except OSError as error:
            log.warning("cancel request not delivered to %s: %s", self._upstream_at.name, error)
        self.close()

    def _timed_out(self) -> None:
        """The client has not logged in in time; one that has not said anything gets no answer either."""
        session = self.session
        if session is not None and session.started:
            return
        if self.state is State.STARTUP:
            self._adapter.counters.connections_refused += 1
            self.close()
        elif self.state is State.CONNECTING or (session is not None and not session.greeted):
            self._adapter.counters.connections_refused += 1
            self._end(messages.silent_server(self.upstream_name, self.gate.limits.authentication_timeout))
        elif self.state is not State.CLOSED:
            self._refuse_login(timeout())

    def crowded_out(self) -> None:
        """Too many connections have not said yet what they want, and this one has been silent for longest."""
        self.close()

    def _stop_clock(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _refuse_login(self, refused: Refusal) -> None:
        """The client is not let in, or could not be logged in at the server."""
        self._adapter.counters.logins_failed[refused.cause.value] += 1
        log.log(
            logging.ERROR if refused.cause is Cause.LOOKUP else logging.WARNING,
            "login from %s refused: %s",
            self._arrival.peer,
            refused,
        )
        self._end(refused.response.encode())

    def _refuse_message(self, reason: str) -> None:
        self.gate.hit_message()
        self._end(messages.message_too_long(reason))

    def _refuse_client(self, reason: str) -> None:
        self._adapter.counters.connections_refused += 1
        self._end(messages.protocol_violation(reason))

    def _end(self, message: bytes) -> None:
        """Say why, if the client can still understand it, and close."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(message)
        self.close()

    def upstream_gone(self) -> None:
        """The server has closed: say so, unless it has done so itself or the client has said goodbye."""
        session = self.session
        if (
            self.state is State.RELAYING
            and session is not None
            and not session.fatal
            and not session.terminated
            and session.at_boundary
            and not self._eof
        ):
            lost = messages.upstream_lost if session.started else messages.login_lost
            self._end(lost(self._upstream_at.name))
        else:
            self.close()

    def drain(self) -> bool:
        """End the connection if nothing would be lost; tell whether it is over."""
        if self.state is State.CLOSED:
            return True
        if self.session is None or self.session.is_idle:
            self._end(messages.shutting_down())
            return True
        return False

    def abort_for_shutdown(self) -> None:
        """End the connection at the end of the drain period."""
        self._end(messages.shutting_down())

    def _log_end(self) -> None:
        """Write the one line of this connection."""
        who = "before its start-up packet"
        if self.session is not None:
            scope = self.session.scope
            who = f'of user "{scope.user}" to database "{scope.database}"'
        log.debug("connection from %s %s ended (%s)", self._arrival.peer, who, self.state.name.lower())

    def close(self) -> None:
        """Close both sides; idempotent."""
        if self.state is State.CLOSED:
            return
        if log.isEnabledFor(logging.DEBUG):
            self._log_end()
        self.state = State.CLOSED
        self._stop_clock()
        self.gate.spoke(self)
        if self._place is not None:
            self._place.leave()
        self._give_up()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = None
        self._buffer = b""
        if self.upstream is not None:
            close_soon(self.upstream.transport)
        if self.session is None or self.session.terminated or self._eof:
            close_soon(self.transport)  # the client sends no more, or nothing that was worth an answer
        elif len(self._farewells) < self.gate.farewells:
            self._farewells.close_gently(self.transport)
        else:
            close_soon(self.transport)
        self._adapter.counters.connections_closed += 1
        self._on_close(self)


def _is_replication(parameters: dict[str, str]) -> bool:
    """Tell whether this is a connection for the replication protocol, which is relayed without looking."""
    return parameters.get("replication", "").lower() not in ("", "false", "off", "no", "0", "f", "n")
