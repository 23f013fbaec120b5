"""A forwarder that misbehaves on demand: late, silent, broken off, in a thread of its own.

It carries bytes between clients and one server and knows nothing of what they mean.  Each fault is an attribute,
and holds for all connections, old and new, until it is taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading

_CHUNK = 1 << 16


class Forwarder:
    """Listens on `port` of the loopback address and carries everything to `server`; seeded."""

    def __init__(self, server: tuple[str, int], seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        self.delay = 0.0  # seconds before a chunk goes on, in each direction
        self.jitter = 0.0  # seconds more, at most
        self.is_silent = False  # nothing goes on, and nobody is told
        self.refuses = False  # new connections are reset
        self.reset_chance = 0.0  # that a chunk is cut anywhere, and its connection reset
        self.cut_after: bytes | None = None  # reset when the server has sent this, behind it
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> Forwarder:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def calm(self) -> None:
        """Take every fault back."""
        self.delay = self.jitter = self.reset_chance = 0.0
        self.is_silent = self.refuses = False
        self.cut_after = None

    def reset_all(self) -> None:
        """Reset every connection."""
        for writer in list(self._open):
            self._loop.call_soon_threadsafe(_reset, writer)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for writer in list(self._open):
            _reset(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            _reset(writer)
            return
        try:
            there_reader, there = await asyncio.open_connection(*self._server)
        except OSError:
            _reset(writer)
            return
        self._open |= {writer, there}
        try:
            await asyncio.gather(
                self._carry(reader, there, writer, from_server=False),
                self._carry(there_reader, writer, there, from_server=True),
            )
        finally:
            self._open -= {writer, there}
            for each in (writer, there):
                each.close()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        other: asyncio.StreamWriter,
        *,
        from_server: bool,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                while self.is_silent:  # noqa: ASYNC110 - set by another thread
                    await asyncio.sleep(0.02)
                if self.delay or self.jitter:
                    await asyncio.sleep(self.delay + self.jitter * self._random.random())
                cut = self._cut(data, from_server=from_server)
                writer.write(data[:cut])
                await writer.drain()
                if cut is not None:
                    await asyncio.sleep(0.02)
                    _reset(writer)
                    _reset(other)
                    return
            if writer.can_write_eof():
                writer.write_eof()
            return
        _reset(writer)
        _reset(other)

    def _cut(self, data: bytes, *, from_server: bool) -> int | None:
        if self.cut_after is not None and from_server:
            found = data.find(self.cut_after)
            if found >= 0:
                return found + len(self.cut_after)
        if self.reset_chance and self._random.random() < self.reset_chance:
            return self._random.randrange(len(data))
        return None


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
