"""A TCP forwarder that knows nothing: the control of the differential runs.

Where a server ends a connection with input unread, TCP resets it, and what the peer has not read is lost on
any path with one hop more.  What differs through this forwarder, too, is that, and not the proxy's doing.
"""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import cast

from proxy.net.farewell import Farewells


class _Side(asyncio.Protocol):
    """One end of a connection; what comes in here goes out at the other."""

    def __init__(self, farewells: Farewells, other: _Side | None = None) -> None:
        self.other = other
        self.transport: asyncio.Transport | None = None
        self._farewells = farewells
        self._waiting = b""
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def paired(self, other: _Side) -> None:
        """Deliver what came before there was another side."""
        self.other = other
        if self._waiting:
            self.data_received(self._waiting)
        if self._ended:
            self.eof_received()

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self._waiting += data
        else:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        self._ended = True
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self._farewells.close_gently(self.other.transport)


class Forwarder:
    """A context manager: listens on a port of its own, in a thread, for one server."""

    def __init__(self, host: str, port: int) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self._to = (host, port)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> Forwarder:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        farewells = Farewells()
        tasks: set[asyncio.Task[None]] = set()

        async def connect(client: _Side) -> None:
            _, server = await self._loop.create_connection(lambda: _Side(farewells, client), *self._to)
            client.paired(server)

        def accept() -> _Side:
            client = _Side(farewells)
            task = self._loop.create_task(connect(client))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            return client

        listening = await self._loop.create_server(accept, self.host, 0)
        self.port = listening.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        listening.close()
        await farewells.over()
