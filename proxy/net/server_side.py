"""The server's side of a connection: what it says goes through the session to the client.

Until the session takes over (`hand_over`) its words are kept in an inbox: for the login, where the proxy
logs in, and for the choice between TLS and none, which depends on the first of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING, Final, cast

from proxy.auth.binding import end_point
from proxy.auth.login import MAX_MESSAGE as MAX_FROM_SERVER
from proxy.net.authentication import Inbox
from proxy.wire import framing
from proxy.wire.errors import ProtocolViolation

if TYPE_CHECKING:
    from proxy.net.relay import ClientConnection

log = logging.getLogger(__name__)

HIGH_WATER: Final = 256 * 1024  # bytes in a transport's write buffer at which the other side stops reading


class UpstreamConnection(asyncio.Protocol):
    """The server's side.  `inbox` holds what it says until the session takes over."""

    __slots__ = ("client", "inbox", "lost", "transport")

    transport: asyncio.Transport

    def __init__(self, client: ClientConnection) -> None:
        self.client = client
        self.inbox: Inbox | None = Inbox(MAX_FROM_SERVER)
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The server has accepted."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.client.gate.tune(self.transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        """Pass bytes of the server's on."""
        client = self.client
        session = client.session
        if self.inbox is not None:
            self.inbox.feed(data)
            return
        if session is None or client.transport is None:
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
        if session.adapter.unsettled:
            session.adapter.settle()
        if session.calling:
            client.serve_call()
        elif session.resend:
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

    async def wait_refused(self) -> bool:
        """Wait for the server's first byte; tell whether it begins an error, which stays in the inbox."""
        assert self.inbox is not None
        return await self.inbox.wait_first() == framing.ERROR_RESPONSE

    def connection_lost(self, exc: Exception | None) -> None:
        """The server is gone; what it said before is still delivered."""
        if exc is not None and not self.is_encrypted:
            rest = _unread(self.transport)
            if rest:
                self.data_received(rest)
        self.lost = True
        if self.inbox is not None:
            self.inbox.end()
        else:
            self.client.upstream_gone()

    def hand_over(self) -> None:
        """The session takes over: let it have what is left in the inbox."""
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


def _unread(transport: asyncio.Transport) -> bytes:
    """Return what the kernel has received on a connection that a failed *write* has ended.

    A server that closes with a FATAL error while a client still sends resets the connection; where the event
    loop finds out by writing, it does not read any more.
    """
    sock = transport.get_extra_info("socket")
    parts: list[bytes] = []
    try:
        with socket.socket(fileno=os.dup(sock.fileno())) as copy:
            copy.setblocking(False)
            while part := copy.recv(1 << 18):
                parts.append(part)
    except (OSError, AttributeError):
        pass  # nothing more, or nothing to be read from
    return b"".join(parts)
