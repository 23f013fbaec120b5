"""What a client may send before a session begins: bytes in, one step at a time out.

    first byte 0x16                 direct TLS (PostgreSQL 17)                  -> Encrypt
    SSLRequest, GSSENCRequest       in either order, each once                  -> Encrypt or Answer
    StartupMessage, CancelRequest                                               -> Request
    anything else of a length that the server would read                        -> Request, for it to refuse

Rules
-----
* Inside TLS no further encryption is asked for: a second request is an unknown protocol version, as to the
  server.
* Whatever stands behind a request for encryption was sent before the answer: somebody may have slipped in
  plain text that would later pass for encrypted (CVE-2021-23214's class), so the connection ends.
* This file knows neither certificates nor sockets; `proxy.net.client_tls` says who has to come with TLS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from proxy.wire import framing
from proxy.wire.errors import ProtocolViolation, Sender
from proxy.wire.startup import (
    ENCRYPTION_ACCEPTED_SSL,
    ENCRYPTION_REFUSED,
    CancelRequest,
    GSSENCRequest,
    SSLRequest,
    StartupMessage,
    decode_startup,
)

_TLS_HANDSHAKE: Final = 0x16  # type of the first TLS record; no length of a start-up packet begins with it


@dataclass(frozen=True, slots=True)
class Answer:
    """Send `data`; the preamble goes on."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Encrypt:
    """Send `answer`, then begin TLS, with `received` as its first bytes; the preamble goes on inside."""

    answer: bytes
    received: bytes
    direct: bool


@dataclass(frozen=True, slots=True)
class Request:
    """The preamble is over; `packet` is `message` as it came, with its length.

    `message` is None where it cannot be read: another major version, or a layout that is wrong.
    """

    packet: bytes
    message: StartupMessage | CancelRequest | None


class Preamble:
    """The preamble of one connection; `offers_tls`: whether there is a certificate to offer."""

    def __init__(self, *, offers_tls: bool) -> None:
        self._offers_tls = offers_tls
        self._buffer = b""
        self._first = True
        self._encrypted = False
        self._asked: set[type] = set()

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._buffer += data

    def encrypted(self) -> None:
        """TLS stands: what is fed from now on came through it."""
        self._encrypted = True
        self._first = False

    def rest(self) -> bytes:
        """Return what stands behind the last packet."""
        rest, self._buffer = self._buffer, b""
        return rest

    def next(self) -> Answer | Encrypt | Request | None:
        """Return what is to be done next; None: more has to arrive.

        Raises
        ------
        ProtocolViolation
            The client does not speak the protocol.
        """
        if self._first and self._buffer[:1] == bytes([_TLS_HANDSHAKE]) and self._offers_tls:
            return Encrypt(b"", self.rest(), direct=True)
        end = framing.cut_startup(self._buffer)
        if end is None or end > len(self._buffer):
            return None
        packet, self._buffer = self._buffer[:end], self._buffer[end:]
        self._first = False
        try:
            message = decode_startup(packet[4:])
        except ProtocolViolation:
            return Request(packet, None)
        if isinstance(message, StartupMessage | CancelRequest):
            return Request(packet, message)
        return self._encryption(message)

    def _encryption(self, request: SSLRequest | GSSENCRequest) -> Answer | Encrypt:
        kind = type(request)
        if self._encrypted or kind in self._asked:
            minor = request.CODE & 0xFFFF
            raise ProtocolViolation(f"unsupported frontend protocol 1234.{minor}", sender=Sender.FRONTEND)
        self._asked.add(kind)
        if self._buffer:
            raise ProtocolViolation(
                "received unencrypted data after SSL or GSSAPI encryption request", sender=Sender.FRONTEND
            )
        if kind is SSLRequest and self._offers_tls:
            return Encrypt(ENCRYPTION_ACCEPTED_SSL, b"", direct=False)
        return Answer(ENCRYPTION_REFUSED)
