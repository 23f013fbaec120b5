"""The SCRAM-SHA-256 exchange, both roles (RFC 5802, RFC 7677; PostgreSQL documentation, "SASL "
"Authentication").

::

    client                                          server
    client-first   n,,n=,r=<nonce>             -->
                                               <--  r=<nonce+more>,s=<salt>,i=<count>       server-first
    client-final   c=<binding>,r=<..>,p=<proof> -->
                                               <--  v=<signature>                           server-final

The proof is ClientKey XOR HMAC(StoredKey, AuthMessage): `Server` checks it against a verifier and so learns
the ClientKey; `Client` makes one from keys, wherever these come from.  The name in the exchange is ignored,
as PostgreSQL does: who logs in is in the start-up packet.

The library scramp does not fit here: it refuses the empty name that libpq sends, does not give the ClientKey
away, can use nothing but a password, and derives keys in the middle of the exchange, which would block an
event loop.  Tests let it play the other side.

Rules: bytes in, bytes out; each method once, in order.  What is wrong in a client's message is refused with
PostgreSQL's own words (auth-scram.c), in its order of checks.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import b64encode
from typing import Final

from proxy.auth import binding, refusal
from proxy.auth.verifier import MAX_ITERATIONS, Keys, Verifier, hmac_sha256, unbase64, xor

PLAIN: Final = b"SCRAM-SHA-256"
PLUS: Final = b"SCRAM-SHA-256-PLUS"

_NONCE_BYTES: Final = 18  # random, as in PostgreSQL; 24 characters


def _nonce() -> bytes:
    return b64encode(secrets.token_bytes(_NONCE_BYTES))


def _shown(byte: bytes) -> str:
    """Write one byte of a message for an error."""
    if not byte:
        return "0x00"
    return f"'{byte.decode()}'" if 0x21 <= byte[0] <= 0x7E else f"0x{byte[0]:02x}"


class _Attributes:
    """Takes ``a=value,b=value`` apart, with PostgreSQL's words for what is wrong."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.position = 0

    @property
    def next(self) -> bytes:
        return self.text[self.position : self.position + 1]

    def value(self, name: bytes) -> bytes:
        """Return the value of the next attribute, which must have this name."""
        if self.next != name:
            raise refusal.malformed(f'Expected attribute "{name.decode()}" but found "{_shown(self.next)}".')
        return self._value(name)

    def any(self) -> tuple[bytes, bytes]:
        """Return name and value of the next attribute."""
        name = self.next
        if not name:
            raise refusal.malformed("Attribute expected, but found end of string.")
        if not name.isalpha():
            raise refusal.malformed(f'Attribute expected, but found invalid character "{_shown(name)}".')
        return name, self._value(name)

    def _value(self, name: bytes) -> bytes:
        self.position += 1
        if self.next != b"=":
            raise refusal.malformed(f'Expected character "=" for attribute "{name.decode()}".')
        start = self.position + 1
        end = self.text.find(b",", start)
        if end < 0:
            self.position = end = len(self.text)
        else:
            self.position = end + 1
        return self.text[start:end]


class Server:
    """The server's role, towards the client.

    Parameters
    ----------
    verifier
        The user's, or a stand-in.
    genuine
        False for a stand-in: the exchange takes its course and fails at the end.
    end_point
        Channel binding of the certificate that the client was shown; None: none is offered.
    nonce
        For tests.
    """

    def __init__(
        self, verifier: Verifier, *, genuine: bool, end_point: bytes | None, nonce: bytes | None = None
    ) -> None:
        self.client_key: bytes | None = None
        """Known once the client has proved itself."""
        self._verifier = verifier
        self._genuine = genuine
        self._end_point = end_point
        self._own_nonce = nonce or _nonce()
        self._binding = b""  # the client's c=, before base64
        self._bound = False
        self._nonce = b""
        self._exchanged = b""  # client-first-bare "," server-first

    @property
    def mechanisms(self) -> tuple[bytes, ...]:
        """What is offered, the best first."""
        return (PLAIN,) if self._end_point is None else (PLUS, PLAIN)

    def first(self, mechanism: bytes, message: bytes) -> bytes:
        """Return server-first for the client's choice and client-first.

        Raises
        ------
        Refusal
            The choice was not on offer, or the message is wrong.
        """
        if mechanism not in self.mechanisms:
            raise refusal.violation("client selected an invalid SASL authentication mechanism")
        self._bound = mechanism == PLUS
        _check_whole(message)
        start = self._header(message)
        self._binding = message[:start] + (self._end_point or b"" if self._bound else b"")
        bare = message[start:]
        if bare[:1] == b"m":
            raise refusal.unsupported("client requires an unsupported SCRAM extension")
        attributes = _Attributes(bare)
        attributes.value(b"n")
        nonce = attributes.value(b"r")
        if not all(0x21 <= byte <= 0x7E for byte in nonce):  # a comma has ended it
            raise refusal.violation("non-printable characters in SCRAM nonce")
        while attributes.next:
            attributes.any()
        self._nonce = nonce + self._own_nonce
        salt = b64encode(self._verifier.salt)
        answer = b"r=%b,s=%b,i=%d" % (self._nonce, salt, self._verifier.iterations)
        self._exchanged = bare + b"," + answer
        return answer

    def _header(self, message: bytes) -> int:
        """Check the GS2 header and return its length."""
        position = self._flag(message)
        following = message[position : position + 1]
        if following == b"a":
            raise refusal.unsupported("client uses authorization identity, but it is not supported")
        if following != b",":
            raise refusal.malformed(f'Unexpected attribute "{_shown(following)}" in client-first-message.')
        return position + 1

    def _flag(self, message: bytes) -> int:
        """Check the flag for channel binding and return where the header goes on."""
        flag = message[:1]
        if flag == b"p":
            return self._bind(message)
        if flag not in (b"n", b"y"):
            raise refusal.malformed(f'Unexpected channel-binding flag "{_shown(flag)}".')
        if self._bound:
            raise refusal.malformed(
                "The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel "
                "binding data."
            )
        if flag == b"y" and self._end_point is not None:
            # Somebody took -PLUS out of the offer (RFC 5802, section 6).
            raise refusal.binding(
                "SCRAM channel binding negotiation error",
                "The client supports SCRAM channel binding but thinks the server does not.  However, this "
                "server does support channel binding.",
            )
        if message[1:2] != b",":
            raise refusal.malformed(f'Comma expected, but found character "{_shown(message[1:2])}".')
        return 2

    def _bind(self, message: bytes) -> int:
        if not self._bound:
            raise refusal.malformed(
                "The client selected SCRAM-SHA-256 without channel binding, but the SCRAM message includes"
                " channel binding data."
            )
        attributes = _Attributes(message)
        name = attributes.value(b"p")
        if name != binding.NAME:
            shown = "".join(chr(x) if 0x21 <= x <= 0x7E else "?" for x in name)
            raise refusal.violation(f'unsupported SCRAM channel-binding type "{shown}"')
        return attributes.position

    def final(self, user: bytes, message: bytes) -> bytes:
        """Return server-final for client-final; `user` is for the error.

        Raises
        ------
        Refusal
            The message or the channel binding is wrong, the user a stand-in, or the password another.
        """
        _check_whole(message)
        attributes = _Attributes(message)
        if attributes.value(b"c") != b64encode(self._binding):
            if self._bound:
                raise refusal.binding("SCRAM channel binding check failed")
            raise refusal.violation("unexpected SCRAM channel-binding attribute in client-final-message")
        nonce = attributes.value(b"r")
        while True:
            before_proof = attributes.position - 1
            name, value = attributes.any()
            if name == b"p":
                break
        try:
            proof = unbase64(value)
        except ValueError:
            proof = b""
        if len(proof) != len(self._verifier.stored_key):
            raise refusal.malformed("Malformed proof in client-final-message.")
        if attributes.next:
            raise refusal.malformed("Garbage found at the end of client-final-message.")
        if not hmac.compare_digest(nonce, self._nonce):
            raise refusal.violation("invalid SCRAM response", "Nonce does not match.")
        auth_message = self._exchanged + b"," + message[:before_proof]
        client_key = xor(proof, hmac_sha256(self._verifier.stored_key, auth_message))
        proved = hmac.compare_digest(hashlib.sha256(client_key).digest(), self._verifier.stored_key)
        if not (proved and self._genuine):
            raise refusal.wrong_password(user)
        self.client_key = client_key
        return b"v=" + b64encode(hmac_sha256(self._verifier.server_key, auth_message))


def _check_whole(message: bytes) -> None:
    if not message:
        raise refusal.malformed("The message is empty.")
    if 0 in message:
        raise refusal.malformed("Message length does not match input length.")


class ServerMisbehaved(Exception):  # noqa: N818 - the server did
    """What the server sent is no SCRAM, or it does not know the user's keys; the message says which."""


class Client:
    """The client's role, towards the server.

    Parameters
    ----------
    mechanisms
        What the server offers.
    end_point
        Channel binding of the certificate that the server has shown; None: without TLS, or undefined.
    nonce
        For tests.
    """

    def __init__(
        self, mechanisms: tuple[bytes, ...], *, end_point: bytes | None, nonce: bytes | None = None
    ) -> None:
        if end_point is not None and PLUS in mechanisms:
            self.mechanism = PLUS
            self._header = b"p=" + binding.NAME + b",,"
        elif PLAIN in mechanisms:
            self.mechanism = PLAIN
            # "y": we could have, but it was not on offer; a server that did offer it knows then that somebody
            # took it away.
            self._header = b"n,," if end_point is None else b"y,,"
        else:
            offered = b", ".join(mechanisms).decode(errors="replace") or "nothing"
            raise ServerMisbehaved(f"it offers {offered}, and not SCRAM-SHA-256")
        self._binding = self._header + (end_point or b"" if self.mechanism == PLUS else b"")
        self._own_nonce = nonce or _nonce()
        self._bare = b"n=,r=" + self._own_nonce
        self._server_first = b""
        self._nonce = b""
        self._signature = b""
        self.salt = b""
        self.iterations = 0

    def first(self) -> bytes:
        """Return client-first."""
        return self._header + self._bare

    def challenge(self, message: bytes) -> None:
        """Take server-first: afterwards `salt` and `iterations` are known."""
        attributes = _Attributes(message)
        try:
            self._nonce = attributes.value(b"r")
            self.salt = unbase64(attributes.value(b"s"))
            count = attributes.value(b"i")
        except (refusal.Refusal, ValueError):
            raise ServerMisbehaved("its first SCRAM message is malformed") from None
        if not self._nonce.startswith(self._own_nonce) or self._nonce == self._own_nonce:
            raise ServerMisbehaved("its SCRAM nonce does not continue the one sent")
        if not count.isdigit() or len(count) > 8 or not 1 <= int(count) <= MAX_ITERATIONS:
            raise ServerMisbehaved("its SCRAM iteration count is out of range")
        self.iterations = int(count)
        self._server_first = message

    def response(self, keys: Keys) -> bytes:
        """Return client-final, made with the keys that belong to `salt` and `iterations`."""
        without_proof = b"c=%b,r=%b" % (b64encode(self._binding), self._nonce)
        auth_message = b",".join((self._bare, self._server_first, without_proof))
        stored_key = hashlib.sha256(keys.client_key).digest()
        proof = xor(keys.client_key, hmac_sha256(stored_key, auth_message))
        self._signature = hmac_sha256(keys.server_key, auth_message)
        return without_proof + b",p=" + b64encode(proof)

    def verify(self, message: bytes) -> None:
        """Check server-final: only a server that has the verifier can have made it."""
        try:
            signature = unbase64(_Attributes(message).value(b"v"))
        except (refusal.Refusal, ValueError):
            raise ServerMisbehaved("its last SCRAM message is malformed") from None
        if not self._signature or not hmac.compare_digest(signature, self._signature):
            raise ServerMisbehaved("it does not know the user's password (its SCRAM signature is wrong)")
