"""The login at the server in the name of a client that has proved itself, message by message.

Which way the server asks for, it decides; what it gets::

    AuthenticationOk (trust, peer, a client certificate)   nothing
    SASL                    SCRAM with the client's own key, or with the password of the users file
    MD5, clear text         the password of the users file; without it the login is refused
    anything else           refused

The client's key opens the server only where it keeps the same verifier, salt and iteration count included:
both come from one ALTER ROLE.  Where they differ the proxy's copy is out of date.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from proxy.auth import refusal
from proxy.auth.frontend import Credentials
from proxy.auth.scram import Client, ServerMisbehaved
from proxy.auth.verifier import Keys
from proxy.wire import framing
from proxy.wire.authentication import (
    AuthenticationCleartextPassword,
    AuthenticationMD5Password,
    AuthenticationOk,
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    PasswordMessage,
    SASLInitialResponse,
    SASLResponse,
    decode_authentication,
)
from proxy.wire.diagnostics import HINT, ErrorResponse
from proxy.wire.errors import ProtocolViolation

MAX_MESSAGE: Final = 64 * 1024
"""Bytes of a message before AuthenticationOk: an error with all its fields has room in it."""

_STALE: Final = (
    "The proxy's copy of the user's password is out of date: connect again, or bring auth.users_file up to "
    "date."
)
_ONLY_A_VERIFIER: Final = (
    "Put the password in plain text into auth.users_file, or have the server use scram-sha-256 (pg_hba.conf)."
)


@dataclass(frozen=True, slots=True)
class Derive:
    """Asks the caller for the keys of the password, which take milliseconds: `with_keys` goes on with "
    "them."""

    salt: bytes
    iterations: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one message of the server's leads to."""

    to_server: bytes = b""
    to_client: bytes = b""
    derive: Derive | None = None
    done: bool = False  # logged in: `to_client` is AuthenticationOk


class UpstreamLogin:
    """One login.  `end_point` is the channel binding of the server's certificate; None without TLS."""

    def __init__(self, credentials: Credentials, end_point: bytes | None) -> None:
        self._credentials = credentials
        self._end_point = end_point
        self._scram: Client | None = None
        self._verified = False

    def receive(self, tag: int, message: bytes) -> Step:
        """Return what is to be done about a message (whole, with its header).

        Raises
        ------
        Refusal
            The login is not possible.
        """
        if tag in (framing.NOTICE_RESPONSE, framing.NEGOTIATE_PROTOCOL_VERSION):
            return Step(to_client=message)
        if tag == framing.ERROR_RESPONSE:
            raise self._refusal(message)
        if tag != framing.AUTHENTICATION:
            raise _misbehaved(f"it sends a message with tag {chr(tag)!r} in place of authentication")
        try:
            return self._requested(message)
        except ServerMisbehaved as problem:
            raise _misbehaved(str(problem)) from None
        except ProtocolViolation:
            code = int.from_bytes(message[5:9], "big")
            raise _misbehaved(f"it sends an authentication request (code {code}) that is unknown") from None

    def _requested(self, message: bytes) -> Step:
        request = decode_authentication(message[5:])
        match request:
            case AuthenticationOk():
                if self._scram is not None and not self._verified:
                    raise ServerMisbehaved("it ends SCRAM without having proved itself")
                return Step(to_client=message, done=True)
            case AuthenticationSASL(mechanisms) if self._scram is None:
                self._scram = Client(mechanisms, end_point=self._end_point)
                answer = SASLInitialResponse(self._scram.mechanism, self._scram.first())
                return Step(to_server=answer.encode())
            case AuthenticationSASLContinue(data) if self._scram is not None and not self._scram.iterations:
                self._scram.challenge(data)
                return self._prove(self._scram)
            case AuthenticationSASLFinal(data) if self._scram is not None and not self._verified:
                self._scram.verify(data)
                self._verified = True
                return Step()
            case AuthenticationCleartextPassword() if self._scram is None:
                return Step(to_server=PasswordMessage(self._password("the password itself")).encode())
            case AuthenticationMD5Password(salt) if self._scram is None:
                password = self._password("an md5 hash")
                inner = _md5_hex(password + self._credentials.user)
                return Step(to_server=PasswordMessage(b"md5" + _md5_hex(inner + salt)).encode())
            case _:
                kind = type(request).__name__.removeprefix("Authentication")
                raise refusal.upstream(
                    f"it asks for {kind}, which the proxy cannot answer",
                    "Have the server use scram-sha-256 for the proxy (pg_hba.conf), or set auth.mode = "
                    '"relay".',
                )

    def _prove(self, scram: Client) -> Step:
        """Answer the challenge: at once with the client's key, or as soon as the caller has the keys."""
        credentials = self._credentials
        verifier = credentials.verifier
        if (scram.salt, scram.iterations) == (verifier.salt, verifier.iterations):
            return self.with_keys(Keys(credentials.client_key, verifier.server_key))
        if credentials.password is not None:
            return Step(derive=Derive(scram.salt, scram.iterations))
        raise refusal.upstream("it has another SCRAM verifier for this user than the proxy", _STALE)

    def with_keys(self, keys: Keys) -> Step:
        """Go on with the keys that were asked for."""
        assert self._scram is not None
        return Step(to_server=SASLResponse(self._scram.response(keys)).encode())

    def _password(self, what: str) -> bytes:
        if self._credentials.password is None:
            raise refusal.upstream(
                f"it asks for {what}, and the proxy knows only a verifier", _ONLY_A_VERIFIER
            )
        return self._credentials.password

    def _refusal(self, message: bytes) -> refusal.Refusal:
        """Return the server's own error, with what it means where the server cannot know it."""
        try:
            error = ErrorResponse.decode(message[5:])
        except ProtocolViolation:
            return _misbehaved("it sends a malformed error")
        if error.code == b"28P01" and error.hint is None:
            hint = f"ruvector-proxy accepted the password, the server did not. {_STALE}"
            error = ErrorResponse((*error.fields, (HINT, hint.encode())))
        return refusal.Refusal(refusal.Cause.UPSTREAM, error)


def _misbehaved(problem: str) -> refusal.Refusal:
    return refusal.upstream(
        problem, "Is upstream.host and upstream.port a PostgreSQL server that can be trusted?"
    )


def _md5_hex(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).hexdigest().encode()
