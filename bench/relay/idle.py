"""Memory of idle connections: what each takes in the hop, and whether ten thousand of them can be held.

PostgreSQL itself would not hold so many on a small machine.  So a stub stands behind the hop: it lets
everybody in, answers every statement as an empty one, and keeps nothing; it runs in a process of its own.  A
connection takes two open files in the proxy, which keeps some for those that log in and those that leave:
where a process may have 20,000 (``ulimit -n``), as many are held as it lets in.

    python -m bench.relay.idle --connections 10000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import uvloop

from bench.relay.results import PROXY, Results
from bench.relay.ways import Way, proxy
from config.schema import Limits
from proxy.net.admission import open_files, sessions_for
from proxy.wire.authentication import AuthenticationOk
from proxy.wire.backend import BackendKeyData, EmptyQueryResponse, ParameterStatus, ReadyForQuery
from proxy.wire.frontend import Query
from proxy.wire.startup import StartupMessage

GROUP = "idle connections"
STEPS = (200, 1_000)
WANTED = 10_000

_HELLO = (
    AuthenticationOk().encode()
    + ParameterStatus(b"server_version", b"18.0").encode()
    + ParameterStatus(b"client_encoding", b"UTF8").encode()
    + ParameterStatus(b"standard_conforming_strings", b"on").encode()
    + BackendKeyData(1, b"abcd").encode()
    + ReadyForQuery(ord("I")).encode()
)
_ANSWER = EmptyQueryResponse().encode() + ReadyForQuery(ord("I")).encode()
_STARTUP = StartupMessage(0x30000, ((b"user", b"bench"), (b"database", b"bench"))).encode()
_QUERY = Query(b"SELECT 1").encode()
_FIRST = 20
_AT_ONCE = 200  # connections being made


class _Stub(asyncio.Protocol):
    """A server that lets everybody in and answers every packet as an empty statement."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.answer = _HELLO

    def data_received(self, data: bytes) -> None:
        if data[:1] == b"X":
            self.transport.close()
            return
        self.transport.write(self.answer)
        self.answer = _ANSWER


def allow_files() -> int:
    """Take as many open files as allowed; return how many connections the proxy lets in with them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return sessions_for(open_files(), Limits().max_logins)


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Stub, "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await loop.run_in_executor(None, pipe.recv)

    allow_files()
    with contextlib.suppress(EOFError):
        uvloop.run(serve())


@contextlib.contextmanager
def stub() -> Iterator[int]:
    """Run the stub server in a process of its own; yield its port."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


class Crowd:
    """Idle clients of one hop, each after its first statement; a context manager."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._sockets:
            each.close()

    def __len__(self) -> int:
        return len(self._sockets)

    def grow(self, size: int) -> None:
        """Connect until there are `size` clients.

        Raises
        ------
        OSError
            One was not let in.
        """
        while len(self._sockets) < size:
            some = [self._connect() for _ in range(min(_AT_ONCE, size - len(self._sockets)))]
            self._sockets += some
            for each in some:
                each.sendall(_STARTUP)
            for each in some:
                _read(each, _HELLO)
                each.sendall(_QUERY)
            for each in some:
                _read(each, _ANSWER)

    def ask_all(self) -> None:
        """Have every client run a statement: all are still served."""
        for each in self._sockets:
            each.sendall(_QUERY)
            _read(each, _ANSWER)

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=60)


def _read(from_: socket.socket, wanted: bytes) -> None:
    data = b""
    while len(data) < len(wanted):
        part = from_.recv(len(wanted) - len(data))
        if not part:
            raise OSError(f"the connection was closed after {data!r}")
        data += part
    if data != wanted:
        raise OSError(f"{data!r} instead of {wanted!r}")


def measure(way: Way, size: int, results: Results) -> None:
    """Note kilobytes per idle connection of a hop with `size` of them, and with fewer on the way there."""
    with Crowd(way.port) as crowd:
        crowd.grow(_FIRST)  # with them comes what is made once
        before = _settled_memory(way)
        for step in (*(step for step in STEPS if step < size), size):
            crowd.grow(step)
            each = (_settled_memory(way) - before) / (step - _FIRST)
            crowd.ask_all()
            results.add(GROUP, f"{step:,} connections", way.name, kilobytes=each / 1000)


def _settled_memory(way: Way) -> int:
    time.sleep(1.5)
    return way.memory()


def main() -> int:
    """Hold idle connections before a stub server and say what each takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--connections", type=int, default=WANTED)
    options = parser.parse_args()
    results = Results()
    size = min(options.connections, allow_files())
    with (
        stub() as port,
        tempfile.TemporaryDirectory(prefix="ruvector-bench-") as name,
        proxy(PROXY, "127.0.0.1", port, Path(name)) as way,
    ):
        measure(way, size, results)
    for key, values in results.figures.items():
        print(f"{key.case}: {values[0]:.1f} kB each in one worker")
    if size < options.connections:
        print(f"not {options.connections:,}: a process may have {open_files():,} open files here")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
