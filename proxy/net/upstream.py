"""Where the server is, and how to reach it: TCP, or the directory of a unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_P = TypeVar("_P", bound=asyncio.BaseProtocol)


class Upstream:
    """Address of the PostgreSQL server; `timeout` in seconds limits the making of a connection."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self.host = host
        self.port = port
        self.timeout = timeout
        self.socket_path = f"{host.rstrip('/')}/.s.PGSQL.{port}" if host.startswith("/") else None
        self.name = self.socket_path or f"{host}:{port}"

    async def connect(self, factory: Callable[[], _P]) -> _P:
        """Open a connection.

        Raises
        ------
        OSError
            It cannot be made (TimeoutError where it takes too long).
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self.timeout):
            if self.socket_path is not None:
                _, protocol = await loop.create_unix_connection(factory, self.socket_path)
            else:
                _, protocol = await loop.create_connection(factory, self.host, self.port)
        return protocol

    async def send_cancel(self, packet: bytes) -> None:
        """Send a CancelRequest on a connection of its own; return when the server has closed it.

        Raises
        ------
        OSError
            It cannot be delivered.
        """
        async with asyncio.timeout(self.timeout):
            if self.socket_path is not None:
                reader, writer = await asyncio.open_unix_connection(self.socket_path)
            else:
                reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(packet)
                await writer.drain()
                await reader.read()
            finally:
                writer.close()
