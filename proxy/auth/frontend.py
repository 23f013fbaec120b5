"""Authentication of the client by the proxy, message by message.

::

    request()               AuthenticationSASL
    receive(...)   FIRST    SASLInitialResponse -> AuthenticationSASLContinue      -> FINAL
                            one without data    -> an empty challenge              -> DELAYED
                   DELAYED  SASLResponse        -> AuthenticationSASLContinue      -> FINAL
                   FINAL    SASLResponse        -> AuthenticationSASLFinal         -> DONE

AuthenticationOk is not sent from here: it belongs to the end of the login at the server, so that what the
server sends before it (NegotiateProtocolVersion) reaches the client before it, too.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from proxy.auth import refusal
from proxy.auth.scram import Server
from proxy.auth.users import User
from proxy.auth.verifier import Verifier
from proxy.wire.authentication import (
    AuthenticationSASL,
    AuthenticationSASLContinue,
    AuthenticationSASLFinal,
    SASLInitialResponse,
)
from proxy.wire.errors import ProtocolViolation
from proxy.wire.framing import PASSWORD

MAX_MESSAGE: Final = 1024
"""Bytes of a response's body: PostgreSQL's PG_MAX_SASL_MESSAGE_LENGTH."""

MAX_NAME: Final = 63
"""Bytes of a role's name; PostgreSQL cuts off what is longer (NAMEDATALEN)."""


class State(enum.Enum):
    """See the module's docstring."""

    FIRST = enum.auto()
    DELAYED = enum.auto()
    FINAL = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client that has proved itself leaves behind for the login at the server."""

    user: bytes
    verifier: Verifier = field(repr=False)
    client_key: bytes = field(repr=False)
    password: bytes | None = field(default=None, repr=False)


class ClientAuthentication:
    """One client's authentication.

    Parameters
    ----------
    name
        The user of the start-up packet.
    user
        What is known of that user; None if there is none.
    verifier
        The user's verifier, derived from the password if need be; for no user a stand-in.
    end_point
        Channel binding of the certificate that the client was shown; None without TLS.
    """

    def __init__(self, name: bytes, user: User | None, verifier: Verifier, end_point: bytes | None) -> None:
        self._name = name
        self._user = user
        self._verifier = verifier
        self._exchange = Server(verifier, genuine=user is not None, end_point=end_point)
        self._mechanism = b""
        self.state = State.FIRST

    def request(self) -> bytes:
        """Return the first message to the client."""
        return AuthenticationSASL(self._exchange.mechanisms).encode()

    def receive(self, tag: int, body: bytes) -> bytes:
        """Return the answer to a message of the client's.

        Raises
        ------
        Refusal
            The client is not let in.
        """
        if tag != PASSWORD:
            raise refusal.violation(f"expected SASL response, got message type {tag}")
        if self.state is State.FIRST:
            try:
                initial = SASLInitialResponse.decode(body)
            except ProtocolViolation:
                raise refusal.violation("invalid message format") from None
            self._mechanism = initial.mechanism
            if initial.data is not None:
                return self._first(initial.data)
            if initial.mechanism not in self._exchange.mechanisms:
                raise refusal.violation("client selected an invalid SASL authentication mechanism")
            self.state = State.DELAYED
            return AuthenticationSASLContinue(b"").encode()
        if self.state is State.DELAYED:
            return self._first(body)
        assert self.state is State.FINAL
        answer = self._exchange.final(self._name, body)
        self.state = State.DONE
        return AuthenticationSASLFinal(answer).encode()

    def _first(self, data: bytes) -> bytes:
        answer = self._exchange.first(self._mechanism, data)
        self.state = State.FINAL
        return AuthenticationSASLContinue(answer).encode()

    @property
    def credentials(self) -> Credentials:
        """What the client has proved; to be asked for in state DONE."""
        assert self._exchange.client_key is not None
        assert self._user is not None
        return Credentials(self._name, self._verifier, self._exchange.client_key, self._user.password)
