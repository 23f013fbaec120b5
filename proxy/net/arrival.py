"""How a client arrives: over TCP or a unix socket, with TLS or without, up to its start-up packet.

The bytes are understood by `proxy.net.preamble`; here its answers are sent and TLS is put between the
transport and the client's side.  What was agreed is told afterwards: the certificate that the client was
shown, its channel binding, the client's own certificate.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from proxy.net.certificates import ALPN
from proxy.net.client_tls import ClientTLS
from proxy.net.preamble import Answer, Encrypt, Preamble, Request
from proxy.net.tls import TLSTransport


class ClientSide(Protocol):
    """What an arrival needs of the protocol that it serves; `transport` is replaced when TLS begins."""

    transport: asyncio.Transport | None


class Arrival:
    """One client's arrival over `transport`; `failed` is called when its TLS handshake fails."""

    def __init__(
        self,
        policy: ClientTLS,
        side: ClientSide,
        transport: asyncio.Transport,
        failed: Callable[[Exception], None],
    ) -> None:
        sock = transport.get_extra_info("socket")
        self.is_local = sock is not None and sock.family == socket.AF_UNIX
        self.peer: object = transport.get_extra_info("peername") or "a unix socket"
        self._policy = policy
        self._side = side
        self._transport = transport
        self._failed = failed
        self._shown = None if self.is_local else policy.side()
        self._preamble = Preamble(offers_tls=self._shown is not None)
        self._tls: TLSTransport | None = None

    def receive(self, data: bytes) -> Request | None:
        """Take bytes of the client's; return what it wants, once it is known.

        Raises
        ------
        ProtocolViolation
            It does not speak the protocol.
        """
        self._preamble.feed(data)
        while (step := self._preamble.next()) is not None:
            if isinstance(step, Request):
                return step
            if isinstance(step, Encrypt):
                self._encrypt(step)
                return None  # what follows comes through TLS, and may have been here already
            assert isinstance(step, Answer)
            self._transport.write(step.data)
        return None

    def rest(self) -> bytes:
        """Return what stands behind the start-up packet."""
        return self._preamble.rest()

    def objection(self, user: bytes) -> bytes | None:
        """Return the error for a client that may not go on as it has come, or None."""
        if self.is_local:
            return None
        return self._policy.objection(user, self._tls.ssl_object if self._tls is not None else None)

    @property
    def is_encrypted(self) -> bool:
        """Whether the client has come with TLS."""
        return self._tls is not None

    @property
    def end_point(self) -> bytes | None:
        """Channel binding of the certificate that the client was shown; None without TLS."""
        return self._shown.end_point if self._shown is not None and self._tls is not None else None

    def _encrypt(self, step: Encrypt) -> None:
        assert self._shown is not None
        if step.answer:
            self._transport.write(step.answer)

        def done(reason: Exception | None) -> None:
            if reason is None and step.direct and tls.ssl_object.selected_alpn_protocol() != ALPN:
                reason = ssl.SSLError("direct TLS without the application protocol (ALPN) that it demands")
            if reason is None:
                self._preamble.encrypted()
            else:
                self._failed(reason)

        tls = TLSTransport(self._transport, self._shown.context, server_side=True, on_done=done)
        assert isinstance(self._side, asyncio.Protocol)
        tls.set_protocol(self._side)
        self._tls = self._side.transport = tls
        tls.start(step.received)
