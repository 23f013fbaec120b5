"""The least that a Python process can do between a client and a server: what comes in goes out.

Nothing is looked at.  It measures the floor under the proxy: what two sockets, an event loop and the wake-up
of one more process cost, before anything is understood.

    python -m bench.relay.forwarder SERVER_PORT OWN_PORT
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import uvloop

from bench.embedded import free_port
from bench.pooler import wait_for_port
from bench.relay.results import FORWARDER
from bench.relay.ways import Way

HOST = "127.0.0.1"


class _End(asyncio.Protocol):
    """One side; what it receives goes to the other, and waits while there is none yet."""

    def __init__(self, other: _End | None, port: int) -> None:
        self.other = other
        self._port = port
        self._waiting = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self.other is None:
            self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: _End(self, self._port), HOST, self._port)
        self.other.transport.write(self._waiting)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._waiting += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


@contextmanager
def forwarder(port: int) -> Iterator[Way]:
    """Run a forwarder before the server at `port`."""
    own = free_port()
    with subprocess.Popen([sys.executable, "-m", "bench.relay.forwarder", str(port), str(own)]) as process:
        try:
            wait_for_port(own)
            yield Way(FORWARDER, own, (process.pid,))
        finally:
            process.kill()


async def _serve(port: int, own: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: _End(None, port), HOST, own)
    gc.collect()
    gc.freeze()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(*map(int, sys.argv[1:])))
