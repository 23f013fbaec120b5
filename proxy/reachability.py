"""Whether the servers answer: asked at the start and by /readyz, never in the way of traffic.

An open port is not enough: a server that is starting or hanging accepts connections too.  So the check asks
whether TLS is on offer (SSLRequest, protocol documentation, "SSL Session Encryption"), which every server
answers with one byte before any authentication, and then hangs up.  Where TLS is required the check goes on
to the end of the handshake: a certificate that clients would be refused for is a reason not to send them.
PostgreSQL writes nothing into its log for either.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import struct
import time

import asyncpg

from config.schema import Learner, Upstream
from proxy.net.certificates import CertificateError
from proxy.net.upstream import Upstream as Connector

SSL_REQUEST = struct.pack("!II", 8, 80877103)

logger = logging.getLogger(__name__)


def reason(error: BaseException) -> str:
    """Say in words why a connection failed."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return error.strerror or "the name cannot be looked up"
    # A name with several addresses gives one error whose text holds the numbers of all.
    numbers = re.findall(r"\[Errno (\d+)\]", str(error)) if isinstance(error, OSError) else []
    return (
        ", ".join(dict.fromkeys(os.strerror(int(each)) for each in numbers))
        or str(error)
        or type(error).__name__
    )


class UpstreamCheck:
    """Knows whether the server answers; a change is logged, and an answer holds for `max_age` seconds."""

    def __init__(self, upstream: Upstream, timeout: float, max_age: float = 1.0) -> None:
        self._upstream = upstream
        self._timeout = timeout
        self._max_age = max_age
        self._asked_at = float("-inf")
        self._problem: str | None = None
        self._lock = asyncio.Lock()
        self._secure: Connector | None = None  # where TLS is required

    @property
    def answered(self) -> bool:
        """Whether the server answered when it was asked last; False before that."""
        return self._asked_at > float("-inf") and self._problem is None

    async def problem(self) -> str | None:
        """Return why the server does not answer, or None if it does."""
        async with self._lock:
            if time.monotonic() - self._asked_at > self._max_age:
                await self._ask()
            return self._problem

    async def watch_start(self, interval: float = 2.0) -> None:
        """Ask every `interval` seconds until the server has answered once."""
        while True:
            if await self.problem() is None:
                return
            await asyncio.sleep(interval)

    async def _ask(self) -> None:
        before = self._problem
        try:
            async with asyncio.timeout(self._timeout):
                await self._exchange()
            self._problem = None
        except (OSError, EOFError, CertificateError) as error:
            self._problem = f"upstream {self._upstream.address} is unreachable: {reason(error)}"
        self._asked_at = time.monotonic()
        if self._problem and self._problem != before:
            logger.error(
                "%s; clients get an error until it answers (upstream.host, upstream.port)", self._problem
            )
        elif before and not self._problem:
            logger.info("upstream %s is reachable again", self._upstream.address)

    async def _exchange(self) -> None:
        if self._upstream.effective_sslmode in ("require", "verify-ca", "verify-full"):
            if self._secure is None:
                self._secure = await asyncio.to_thread(Connector.create, self._upstream, self._timeout)
            if self._secure.keeper is not None:
                await asyncio.to_thread(self._secure.keeper.refresh)
            await self._secure.probe()
            return
        path = self._upstream.socket_path
        if path:
            reader, writer = await asyncio.open_unix_connection(path)
        else:
            reader, writer = await asyncio.open_connection(self._upstream.host, self._upstream.port)
        try:
            writer.write(SSL_REQUEST)
            if not await reader.read(1):
                raise EOFError("it closed the connection without an answer")
        finally:
            writer.close()


async def check_learner_dsn(learner: Learner, timeout: float) -> None:
    """Log an error where the learner's URI does not lead into a database; traffic does not depend on it."""
    assert learner.dsn is not None
    try:
        connection = await asyncpg.connect(learner.dsn.get_secret_value(), timeout=timeout)
        await connection.close(timeout=timeout)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        logger.error(
            "the learner cannot connect to %s: %s; queries run as they came until it can (learner.dsn)",
            learner.redacted_dsn,
            reason(error),
        )
