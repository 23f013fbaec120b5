"""Authentication on two sockets: takes messages to the state machines of `proxy.auth`, and waits for lookups.

The client is authenticated before anything is opened upstream: who cannot log in takes no place there.
AuthenticationOk is the server's own, passed on when the login there is done; so NegotiateProtocolVersion,
which the server sends before it, reaches the client before it, and ParameterStatus and BackendKeyData
after it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from config.schema import Auth
from proxy.auth import refusal
from proxy.auth.frontend import MAX_NAME, ClientAuthentication, Credentials, State
from proxy.auth.login import Derive, UpstreamLogin
from proxy.auth.lookup import AuthQuery, Directory, LookupFailed, UsersFile
from proxy.auth.verifier import Keys, StandIns
from proxy.wire import framing
from proxy.wire.errors import ProtocolViolation
from proxy.wire.startup import StartupMessage

log = logging.getLogger(__name__)

Write = Callable[[bytes], None]

_MAX_KEYS: Final = 10_000  # derived keys that are remembered


class Inbox:
    """The messages of one side while nothing is relayed yet: bytes in, whole messages out, one at a time."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._data = b""
        self._ended = False
        self._waiting: asyncio.Future[None] | None = None

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        self._data += data
        self._wake()

    def end(self) -> None:
        """Nothing more will come."""
        self._ended = True
        self._wake()

    @property
    def full(self) -> bool:
        """True where more has arrived than a message may have: stop reading."""
        return len(self._data) > self._longest + 5

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait_message(self) -> bytes:
        """Return the next message, header included.

        Raises
        ------
        ProtocolViolation
            It is too long, or has no valid header.
        EOFError
            The peer has closed.
        """
        while True:
            cut = framing.cut(self._data)
            if cut is not None:
                _, end = cut
                if end > self._longest + 5:
                    raise ProtocolViolation("invalid message length")
                if end <= len(self._data):
                    message, self._data = self._data[:end], self._data[end:]
                    return message
            if self._ended:
                raise EOFError
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting

    async def wait_first(self) -> int | None:
        """Wait for the first byte and return it without taking it out; None: the peer has closed."""
        while not self._data and not self._ended:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._data[0] if self._data else None

    def rest(self) -> bytes:
        """Return what has arrived and is nobody's yet; the inbox is empty then."""
        rest, self._data = self._data, b""
        return rest


class Authenticator:
    """Authentication that the proxy ends itself (``auth.mode = "scram"``)."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._keys: OrderedDict[tuple[bytes, bytes, int], Keys] = OrderedDict()

    @classmethod
    def create(cls, auth: Auth, secret: bytes) -> Authenticator:
        """Return one that knows the users named in the configuration; reads the users file, which blocks."""
        stand_ins = StandIns(secret)
        file = query = None
        if auth.users_file is not None:
            file = UsersFile(auth.users_file, stand_ins)
            file.refresh()
        if auth.query_dsn is not None:
            query = AuthQuery(
                auth.query_dsn.get_secret_value(),
                auth.query,
                connections=auth.query_connections,
                timeout=auth.query_timeout,
                max_age=auth.query_max_age,
            )
        return cls(Directory(stand_ins, file, query))

    async def watch(self) -> None:
        """Keep up with the users file until cancelled."""
        await self._directory.watch()

    async def admit(
        self, startup: StartupMessage, inbox: Inbox, write: Write, end_point: bytes | None
    ) -> Credentials:
        """Authenticate a client.

        Parameters
        ----------
        inbox, write
            What the client sends, and how to answer.
        end_point
            Channel binding of the certificate that the client was shown; None without TLS.

        Raises
        ------
        Refusal
            It may not come in.
        EOFError
            It has gone.
        """
        name = (startup.get(b"user") or b"")[:MAX_NAME]
        if not name:
            raise refusal.no_user()
        try:
            found = await self._directory.find(name)
        except LookupFailed as problem:
            raise refusal.lookup(str(problem)) from None
        exchange = ClientAuthentication(name, found.user, found.verifier, end_point)
        write(exchange.request())
        try:
            while exchange.state is not State.DONE:
                message = await inbox.wait_message()
                write(exchange.receive(message[0], message[5:]))
        except refusal.Refusal as refused:
            if refused.cause is refusal.Cause.PASSWORD:
                self._directory.forget(name)  # it may have been changed
                raise refusal.wrong_password(name, found.why) from None
            raise
        except ProtocolViolation as violation:
            raise refusal.violation(violation.problem) from None
        return exchange.credentials

    async def log_in(
        self,
        credentials: Credentials,
        inbox: Inbox,
        to_server: Write,
        to_client: Write,
        end_point: bytes | None,
    ) -> None:
        """Log in at the server, which has the start-up packet; passes on what it says to the client.

        Raises
        ------
        Refusal
            It is not possible.
        EOFError
            The server has closed without a word.
        """
        login = UpstreamLogin(credentials, end_point)
        while True:
            try:
                message = await inbox.wait_message()
            except ProtocolViolation as violation:
                raise refusal.upstream(
                    f"it does not speak PostgreSQL: {violation.problem}",
                    "See upstream.host and upstream.port.",
                ) from None
            try:
                step = login.receive(message[0], message)
            except refusal.Refusal:
                self._directory.forget(credentials.user)  # the password may have been changed
                raise
            if step.derive is not None:
                step = login.with_keys(await self._derive(credentials, step.derive))
            if step.to_client:
                to_client(step.to_client)
            if step.to_server:
                to_server(step.to_server)
            if step.done:
                return

    async def _derive(self, credentials: Credentials, asked: Derive) -> Keys:
        """Return the keys of a password for the server's salt: remembered, or derived in a thread."""
        password = credentials.password
        assert password is not None
        key = (password, asked.salt, asked.iterations)
        keys = self._keys.get(key)
        if keys is None:
            keys = await asyncio.to_thread(Keys.derive, password, asked.salt, asked.iterations)
            self._keys[key] = keys
            if len(self._keys) > _MAX_KEYS:
                self._keys.popitem(last=False)
        return keys
