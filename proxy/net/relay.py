"""The only place with client sockets: two transports, one session between them, back-pressure each way.

Each side is an asyncio Protocol.  What a `data_received` brings is handed to the session and what comes out
is written to the other side at once, in one write.  When a transport's buffer is full the *other* side
stops reading; the two directions are independent, so that a client that writes a large pipeline before it
reads cannot lock up.

Life of a connection, each step entered once:

    STARTUP         the client's first packets; nothing upstream yet
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
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast

from proxy.auth.binding import end_point
from proxy.auth.frontend import MAX_MESSAGE as MAX_FROM_CLIENT
from proxy.auth.frontend import Credentials
from proxy.auth.login import MAX_MESSAGE as MAX_FROM_SERVER
from proxy.auth.refusal import Cause, Refusal, timeout
from proxy.auth.relayed import RelayedAuthentication
from proxy.net import messages
from proxy.net.authentication import Authenticator, Inbox
from proxy.session.adaptation import Adapter
from proxy.session.frontend import Session
from proxy.wire import framing
from proxy.wire.errors import ProtocolViolation
from proxy.wire.startup import (
    ENCRYPTION_REFUSED,
    CancelRequest,
    GSSENCRequest,
    SSLRequest,
    StartupMessage,
    decode_startup,
)

if TYPE_CHECKING:
    from proxy.net.upstream import Upstream

log = logging.getLogger(__name__)

_HIGH_WATER: Final = 256 * 1024  # bytes in a transport's write buffer at which the other side stops reading


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
        "_authenticator",
        "_buffer",
        "_eof",
        "_inbox",
        "_limit",
        "_on_close",
        "_task",
        "_timeout",
        "_upstream_at",
        "authentication",
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
        *,
        authenticator: Authenticator | None = None,
        authentication_timeout: float = 60.0,
    ) -> None:
        """Serve one client; without an `authenticator` its authentication is relayed (times in seconds)."""
        self._adapter = adapter
        self._authenticator = authenticator
        self._timeout = authentication_timeout
        self._upstream_at = upstream_at
        self._on_close = on_close
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._eof = False
        self._inbox: Inbox | None = None  # while the proxy authenticates the client
        self.authentication: RelayedAuthentication | None = None  # while a relayed one is watched
        self._limit: asyncio.TimerHandle | None = None
        self.state = State.STARTUP
        self.session: Session | None = None
        self.transport: asyncio.Transport | None = None
        self.upstream: UpstreamConnection | None = None

    # -- asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept a client."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH_WATER)
        _keep_alive(self.transport)
        self._adapter.counters.connections_opened += 1
        self._limit = asyncio.get_running_loop().call_later(self._timeout, self._timed_out)

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
            except ProtocolViolation as violation:
                self._refuse_client(str(violation))
                return
            except Refusal as refused:
                self._refuse_login(refused)
                return
            if out:
                upstream.transport.write(out)
        elif self._inbox is not None:
            self._inbox.feed(data)
            if self._inbox.full and self.transport is not None:
                self.transport.pause_reading()
        elif self.state is not State.CLOSED:
            self._buffer += data
            if self.state is State.STARTUP:
                self._start()

    def eof_received(self) -> bool:
        """Pass the client's end of stream on; keep reading what the server still has to say."""
        self._eof = True
        if self.state is State.RELAYING:
            assert self.upstream is not None
            assert self.session is not None
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
        """The client is gone: so is its upstream connection."""
        self.close()

    @property
    def upstream_name(self) -> str:
        """Address of the server, for messages."""
        return self._upstream_at.name

    # -- life --------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Read the packets that come before a session."""
        assert self.transport is not None
        while self.state is State.STARTUP:
            try:
                end = framing.cut_startup(self._buffer)
                if end is None or end > len(self._buffer):
                    return
                packet = self._buffer[:end]
                request = decode_startup(packet[4:])
            except ProtocolViolation as violation:
                self._refuse_client(str(violation))
                return
            self._buffer = self._buffer[end:]
            if isinstance(request, SSLRequest | GSSENCRequest):
                if self._buffer:
                    # Somebody may have slipped in plain text before the encryption (CVE-2021-23214's class).
                    self._refuse_client("received unencrypted data after SSL or GSSAPI encryption request")
                    return
                self.transport.write(ENCRYPTION_REFUSED)
                continue
            self.state = State.CONNECTING
            self.transport.pause_reading()
            if self._authenticator is None or isinstance(request, CancelRequest):
                self._stop_clock()  # from here on the server's own limits hold
            work = (
                self._cancel(packet) if isinstance(request, CancelRequest) else self._connect(packet, request)
            )
            self._task = asyncio.get_running_loop().create_task(work)

    async def _connect(self, packet: bytes, startup: StartupMessage) -> None:
        """Make the session: authenticate if that is the proxy's task, connect upstream; then relay."""
        try:
            credentials = await self._admit(startup) if self._authenticator is not None else None
            upstream = await self._upstream_at.connect(
                lambda: UpstreamConnection(self, Inbox(MAX_FROM_SERVER) if credentials is not None else None)
            )
            if self.state is not State.CONNECTING or self.transport is None:
                upstream.transport.abort()
                return
            self.upstream = upstream
            upstream.transport.write(packet)
            if credentials is not None:
                await self._log_in(credentials, upstream)
        except OSError as error:
            self._adapter.counters.connections_refused += 1
            self._end(messages.upstream_unreachable(self._upstream_at.name, error))
        except Refusal as refused:
            self._refuse_login(refused)
        except EOFError:
            self._end(messages.upstream_lost(self._upstream_at.name))
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
            startup, self._inbox, self.transport.write, self.end_point
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

    def _relay(self, startup: StartupMessage, upstream: UpstreamConnection) -> None:
        """Both sides are up: let the session have what they have said meanwhile."""
        assert self.transport is not None
        parameters = {
            name.decode(errors="replace"): value.decode(errors="replace")
            for name, value in startup.parameters
        }
        self.session = Session(self._adapter, parameters, raw=_is_replication(parameters))
        self.state = State.RELAYING
        self._task = None
        self._stop_clock()
        if self._authenticator is None and upstream.is_encrypted:
            self.authentication = RelayedAuthentication(client_tls=self.is_encrypted)
        held, self._buffer = self._buffer, b""
        upstream.hand_over()
        if held:
            self.data_received(held)
        if self._eof:
            self.eof_received()
        elif self.state is State.RELAYING:
            self.transport.resume_reading()

    @property
    def is_encrypted(self) -> bool:
        """Whether the client has come with TLS."""
        return False

    @property
    def end_point(self) -> bytes | None:
        """Channel binding of the certificate that the client was shown."""
        return None

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
        if self.state is State.STARTUP:
            self._adapter.counters.connections_refused += 1
            self.close()
        elif self.state is not State.CLOSED:
            self._refuse_login(timeout())

    def _stop_clock(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _refuse_login(self, refused: Refusal) -> None:
        """The client is not let in, or could not be logged in at the server."""
        self._adapter.counters.logins_failed[refused.cause.value] += 1
        peer = self.transport.get_extra_info("peername") if self.transport is not None else None
        log.log(
            logging.ERROR if refused.cause is Cause.LOOKUP else logging.WARNING,
            "login from %s refused: %s",
            peer or "a unix socket",
            refused,
        )
        self._end(refused.response.encode())

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
            self._end(messages.upstream_lost(self._upstream_at.name))
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

    def close(self) -> None:
        """Close both sides; idempotent."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self._stop_clock()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = None
        self._buffer = b""
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.close()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
        self._adapter.counters.connections_closed += 1
        self._on_close(self)


class UpstreamConnection(asyncio.Protocol):
    """The server's side."""

    __slots__ = ("client", "inbox", "lost", "transport")

    transport: asyncio.Transport

    def __init__(self, client: ClientConnection, inbox: Inbox | None = None) -> None:
        self.client = client
        self.inbox = inbox  # while the proxy logs in
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The server has accepted."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=_HIGH_WATER)
        _keep_alive(self.transport)

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the server's on."""
        client = self.client
        session = client.session
        if session is None or client.transport is None:
            if self.inbox is not None:
                self.inbox.feed(data)
            return
        authentication = client.authentication
        if authentication is not None:
            data = authentication.from_server(data)
            if authentication.over:
                client.authentication = None
        try:
            out = session.from_server(data)
        except ProtocolViolation as violation:
            log.error("upstream %s does not speak PostgreSQL: %s", client.upstream_name, violation)
            if not session.started:
                # A server that cannot fork a backend answers in protocol 2: the client's driver knows it.
                client.transport.write(data)
            client.close()
            return
        if out:
            client.transport.write(out)
        if session.resend:
            again, session.resend = session.resend, b""
            self.transport.write(again)

    def eof_received(self) -> bool:
        """The server has said its last."""
        return False

    def pause_writing(self) -> None:
        """The server reads slowly: stop reading from the client."""
        if self.client.transport is not None:
            self.client.transport.pause_reading()

    def resume_writing(self) -> None:
        """The server has caught up."""
        if self.client.transport is not None and not self.client.transport.is_closing():
            self.client.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The server is gone."""
        self.lost = True
        if self.inbox is not None:
            self.inbox.end()
        else:
            self.client.upstream_gone()

    def hand_over(self) -> None:
        """The login is over: let the session have what has come behind it."""
        inbox, self.inbox = self.inbox, None
        if inbox is None:
            return
        rest = inbox.rest()
        if rest:
            self.data_received(rest)
        if self.lost:
            self.client.upstream_gone()

    @property
    def is_encrypted(self) -> bool:
        """Whether the server was reached with TLS."""
        return self.transport.get_extra_info("ssl_object") is not None

    @property
    def end_point(self) -> bytes | None:
        """Channel binding of the certificate that the server has shown; None without TLS."""
        tls = self.transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        return end_point(certificate) if certificate is not None else None


def _is_replication(parameters: dict[str, str]) -> bool:
    """Tell whether this is a connection for the replication protocol, which is relayed without looking."""
    return parameters.get("replication", "").lower() not in ("", "false", "off", "no", "0", "f", "n")


def _keep_alive(transport: asyncio.Transport) -> None:
    """Find out about peers that vanish without a word."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
