"""The relay's two exceptions: what has to be done about channel binding when authentication is passed on.

A server that is reached with TLS offers SCRAM-SHA-256-PLUS, which binds the exchange to the certificate that
it showed, to the proxy.

============  ====================================================================================
client leg    with TLS to the server
============  ====================================================================================
plain         The client cannot use the offer, and libpq takes it for an attack: it is taken out.
TLS           The client would bind to the proxy's certificate (``p``), or say that it could have (``y``);
              the server refuses both, the latter as a downgrade.  So the proxy refuses, with what to do.
              A client that does not support channel binding (``n``) is let through.
============  ====================================================================================

Without TLS to the server nothing is to be done, and nothing of this is in the way.

It looks at the messages up to the end of authentication and keeps an incomplete one until it is whole; then
it is `over`, and the rest of the stream is none of its business.
"""

from __future__ import annotations

from typing import Final

from proxy.auth import refusal
from proxy.auth.scram import PLUS
from proxy.wire import framing
from proxy.wire.authentication import AuthenticationOk, AuthenticationSASL, SASLInitialResponse
from proxy.wire.errors import ProtocolViolation, Sender

_LONGEST: Final = 64 * 1024  # bytes; a longer message is none of authentication


class RelayedAuthentication:
    """Watches one authentication that goes over a TLS connection to the server."""

    def __init__(self, *, client_tls: bool) -> None:
        self.over = False
        self._client_tls = client_tls
        self._offered = False  # the server has offered SASL, and the client has not chosen yet
        self._from_server = b""
        self._from_client = b""

    def from_server(self, data: bytes) -> bytes:
        """Return what the client's side is to get for `data`."""
        data = self._from_server + data
        self._from_server = b""
        out: list[bytes] = []
        position = 0
        while not self.over:
            cut = _cut(data, position, Sender.BACKEND)
            if cut is None:
                self.over = True  # not ours to judge: the session says what is wrong
                break
            tag, end = cut
            if end > len(data):
                self._from_server = data[position:]
                return b"".join(out)
            out.append(self._server_message(tag, data[position:end]))
            position = end
        self.over = True
        out.append(data[position:])
        return b"".join(out)

    def _server_message(self, tag: int, message: bytes) -> bytes:
        if tag in (framing.NOTICE_RESPONSE, framing.NEGOTIATE_PROTOCOL_VERSION):
            return message
        code = message[5:9]
        if tag != framing.AUTHENTICATION or code == AuthenticationOk.CODE.to_bytes(4, "big"):
            self.over = True
        elif code == AuthenticationSASL.CODE.to_bytes(4, "big"):
            return self._offer(message)
        return message

    def _offer(self, message: bytes) -> bytes:
        if self._client_tls:
            self._offered = True
            return message
        try:
            mechanisms = AuthenticationSASL.decode(message[5:]).mechanisms
        except ProtocolViolation:
            return message
        kept = tuple(each for each in mechanisms if not each.endswith(b"-PLUS"))
        return AuthenticationSASL(kept).encode() if kept != mechanisms else message

    def from_client(self, data: bytes) -> bytes:
        """Return what the server's side is to get for `data`.

        Raises
        ------
        Refusal
            The client supports channel binding, with TLS on both sides.
        """
        if not self._client_tls or self.over or not self._offered:
            return data
        data = self._from_client + data
        self._from_client = b""
        cut = _cut(data, 0, Sender.FRONTEND)
        if cut is None:
            return data
        tag, end = cut
        if end > len(data):
            self._from_client = data
            return b""
        self._offered = False
        if tag == framing.PASSWORD:
            _check_choice(data[5:end])
        return data


def _cut(data: bytes, position: int, sender: Sender) -> tuple[int, int] | None:
    """Return tag and end of a message, which may lie beyond `data`; None for what is no authentication."""
    if len(data) - position < 5:
        return 0, len(data) + 1
    try:
        found = framing.cut(data, position, sender)
    except ProtocolViolation:
        return None
    assert found is not None
    return found if found[1] - position <= _LONGEST else None


def _check_choice(body: bytes) -> None:
    try:
        initial = SASLInitialResponse.decode(body)
    except ProtocolViolation:
        return
    scram = initial.mechanism.startswith(b"SCRAM-")
    if initial.mechanism == PLUS or (scram and initial.data is not None and initial.data[:1] in (b"y", b"p")):
        raise refusal.relayed_binding()
