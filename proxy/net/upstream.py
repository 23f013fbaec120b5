"""Where the server is, and how to reach it: TCP or a unix socket, with TLS by the rules of libpq's sslmode.

=============  ============  =================================================================
sslmode        attempts
=============  ============  =================================================================
disable        plain
allow          plain, TLS    TLS where the server's first answer to plain is an error
prefer         TLS, plain    plain where it has no TLS, the handshake fails, or its first answer is an error
require, ...   TLS
=============  ============  =================================================================

The answer to the start-up packet is waited for only where another attempt is left.  A connection that cannot
be made at all is not tried again.  A CancelRequest takes the way on which a connection was made last.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar, cast

from config.schema import SSLMode
from config.schema import Upstream as Options
from proxy.net.certificates import ALPN, ClientSide, Keeper, for_server
from proxy.net.tls import TLSTransport
from proxy.wire.startup import SSLRequest

log = logging.getLogger(__name__)

_REPLY_SECONDS: Final = 60.0  # for the first answer; the server itself gives up after a minute
_ATTEMPTS: Final[dict[SSLMode, tuple[bool, ...]]] = {
    "disable": (False,),
    "allow": (False, True),
    "prefer": (True, False),
}


class UpstreamTLSError(OSError):
    """The server was reached, but TLS could not be had as it was asked for."""


class Opened(Protocol):
    """What `Upstream.connect` needs of a protocol."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As in asyncio."""

    def data_received(self, data: bytes) -> None:
        """As in asyncio."""

    async def wait_refused(self) -> bool:
        """Wait for the first byte from the server; tell whether it begins an error, and leave it there."""


_P = TypeVar("_P", bound=Opened)


class Upstream:
    """Address of the PostgreSQL server; `timeout` in seconds limits the making of a connection."""

    def __init__(
        self,
        host: str,
        port: int,
        timeout: float,
        *,
        sslmode: SSLMode = "disable",
        keeper: Keeper[ClientSide] | None = None,
        direct: bool = False,
    ) -> None:
        self.host = host
        self.port = port
        self.timeout = timeout
        self.keeper = keeper
        self.socket_path = f"{host.rstrip('/')}/.s.PGSQL.{port}" if host.startswith("/") else None
        self.name = self.socket_path or f"{host}:{port}"
        self._direct = direct
        self._attempts = _ATTEMPTS.get(sslmode, (True,)) if keeper is not None else (False,)
        self._last = self._attempts[0]  # whether the last connection was encrypted

    @classmethod
    def create(cls, options: Options, timeout: float) -> Upstream:
        """Return the server that is configured; reads certificates.

        Raises
        ------
        CertificateError
            A file cannot be used.
        """
        return cls(
            options.host,
            options.port,
            timeout,
            sslmode=options.effective_sslmode,
            keeper=for_server(options),
            direct=options.sslnegotiation == "direct",
        )

    async def connect(self, factory: Callable[[], _P], packet: bytes) -> _P:
        """Open a connection and send the start-up packet.

        Raises
        ------
        OSError
            It cannot be made: TimeoutError where it takes too long, UpstreamTLSError for want of TLS.
        """
        left = list(self._attempts)
        while True:
            encrypt = left.pop(0)
            try:
                protocol, encrypted = await self._open(factory, encrypt=encrypt)
            except UpstreamTLSError as failure:
                if not left:
                    raise
                log.debug("%s: %s; going on without TLS", self.name, failure)
                continue
            if encrypt and not encrypted:
                left.clear()
            try:
                protocol.transport.write(packet)
                if left and await self._is_refused(protocol):
                    protocol.transport.abort()
                    continue
            except BaseException:
                protocol.transport.abort()
                raise
            self._last = encrypted
            return protocol

    async def _is_refused(self, protocol: Opened) -> bool:
        async with asyncio.timeout(_REPLY_SECONDS):
            return await protocol.wait_refused()

    async def send_cancel(self, packet: bytes) -> None:
        """Send a CancelRequest on a connection of its own; return when the server has closed it.

        Raises
        ------
        OSError
            It cannot be delivered.
        """
        left = sorted(self._attempts, key=lambda encrypt: encrypt is not self._last)
        while True:
            try:
                cancel, _ = await self._open(_UntilClosed, encrypt=left.pop(0))
                break
            except UpstreamTLSError:
                if not left:
                    raise
        try:
            cancel.transport.write(packet)
            async with asyncio.timeout(self.timeout):
                await cancel.closed
        finally:
            cancel.transport.abort()

    async def probe(self) -> None:
        """Connect as far as TLS and hang up; raises as `connect` does."""
        left = list(self._attempts)
        while True:
            try:
                probe, _ = await self._open(_UntilClosed, encrypt=left.pop(0))
            except UpstreamTLSError:
                if not left:
                    raise
            else:
                probe.transport.abort()
                return

    async def _open(self, factory: Callable[[], _P], *, encrypt: bool) -> tuple[_P, bool]:
        """Make one attempt; return the protocol, and whether it is encrypted."""
        async with asyncio.timeout(self.timeout):
            if not encrypt:
                return await self._dial(factory), False
            assert self.keeper is not None
            negotiation = await self._dial(
                lambda: _Negotiation(
                    cast("Keeper[ClientSide]", self.keeper).current.context,
                    self.host,
                    factory,
                    direct=self._direct,
                    plain=False in self._attempts,
                )
            )
            try:
                return await negotiation.done
            except BaseException:
                negotiation.transport.abort()
                raise

    async def _dial(self, factory: Callable[[], _D]) -> _D:
        loop = asyncio.get_running_loop()
        made = cast("Callable[[], asyncio.Protocol]", factory)
        if self.socket_path is not None:
            _, protocol = await loop.create_unix_connection(made, self.socket_path)
        else:
            _, protocol = await loop.create_connection(made, self.host, self.port)
        return cast("_D", protocol)


_D = TypeVar("_D")


class _Negotiation(asyncio.Protocol, Generic[_P]):
    """From a fresh connection to one that is encrypted, or to one that the server declines to encrypt."""

    transport: asyncio.Transport

    def __init__(
        self,
        context: ssl.SSLContext,
        hostname: str,
        factory: Callable[[], _P],
        *,
        direct: bool,
        plain: bool,
    ) -> None:
        self.done: asyncio.Future[tuple[_P, bool]] = asyncio.get_running_loop().create_future()
        self._context, self._hostname, self._factory = context, hostname, factory
        self._direct, self._plain = direct, plain
        self._tls: TLSTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._direct:
            self._begin()
        else:
            self.transport.write(SSLRequest().encode())

    def data_received(self, data: bytes) -> None:
        if data == b"S":
            self._begin()
        elif data == b"N" and self._plain:
            self._succeed(self.transport, encrypted=False)
        elif data == b"N":
            self._fail("the server does not support it, and upstream.sslmode requires it")
        elif data[:1] in (b"S", b"N"):
            self._fail("received unencrypted data after the answer to SSLRequest")
        else:
            self._fail("the answer to SSLRequest is an error")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the server closed the connection")

    def _begin(self) -> None:
        # Addresses are not sent as a server name (SNI) and compared with those in the certificate: `ssl`
        # does both by itself.
        self._tls = TLSTransport(
            self.transport,
            self._context,
            server_side=False,
            server_hostname=self._hostname,
            on_done=self._encrypted,
        )
        self._tls.start()

    def _encrypted(self, reason: Exception | None) -> None:
        assert self._tls is not None
        if reason is not None:
            self._fail(_why(reason))
        elif self._direct and self._tls.ssl_object.selected_alpn_protocol() != ALPN:
            self._fail("direct TLS without the application protocol (ALPN) that it demands")
        else:
            self._succeed(self._tls, encrypted=True)

    def _succeed(self, transport: asyncio.Transport, *, encrypted: bool) -> None:
        if self.done.done():  # it took too long
            transport.abort()
            return
        protocol = self._factory()
        transport.set_protocol(cast("asyncio.Protocol", protocol))
        protocol.connection_made(transport)
        self.done.set_result((protocol, encrypted))

    def _fail(self, problem: str) -> None:
        if not self.done.done():
            self.done.set_exception(UpstreamTLSError(problem))


class _UntilClosed(asyncio.Protocol):
    """Waits for the server to close."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    async def wait_refused(self) -> bool:
        return False


def _why(reason: Exception) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {reason.verify_message}"
    if isinstance(reason, ssl.SSLError):
        return (reason.reason or str(reason)).lower().replace("_", " ")
    return str(reason)
