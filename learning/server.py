"""The learner's end of the channel: a unix socket that workers connect to.

Any number of workers may come and go.  Each says hello and then gets the current policy, now and whenever it
changes; one that reads slowly is sent the newest policy when it is ready, never a queue of old ones.  A
frame that does not decode costs the peer its connection and nothing else.  Who only asks questions says no
hello and is sent nothing but answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import stat
from collections.abc import Callable
from pathlib import Path

from learning.channel import ChannelError, Frame, FrameReader, Hello, encode

log = logging.getLogger(__name__)

_READ_SIZE = 256 * 1024


class Peer:
    """One worker, to be answered."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def send(self, frame: Frame) -> None:
        """Send a frame, if the worker is still there."""
        if not self._writer.transport.is_closing():
            self._writer.write(encode(frame))


class ChannelServer:
    """Serves the workers.

    Parameters
    ----------
    path
        Of the socket; only the owner may connect.  A stale socket is replaced.
    receive
        Called with every frame, in order of arrival, and with its sender; must not block.
    gone
        Called with a sender that has gone.
    """

    def __init__(
        self,
        path: Path,
        receive: Callable[[Frame, Peer], None],
        gone: Callable[[Peer], None] = lambda peer: None,
    ) -> None:
        self._gone = gone
        self._path = path
        self._receive = receive
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._workers: set[asyncio.Task[None]] = set()  # tasks that send them what is published
        self._publication: bytes | None = None  # the encoded frame
        self._changed = asyncio.Condition()

    @property
    def workers(self) -> int:
        """The number of connected workers."""
        return len(self._workers)

    async def start(self) -> None:
        """Begin to accept workers.

        Raises
        ------
        OSError
            The socket cannot be created.
        """
        if self._path.exists() and stat.S_ISSOCK(self._path.stat().st_mode):
            self._path.unlink()
        self._server = await asyncio.start_unix_server(self._accepted, str(self._path))
        self._path.chmod(0o600)

    async def publish(self, frame: bytes) -> None:
        """Send an encoded frame to every worker, now and to those that connect later."""
        self._publication = frame
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """Drop all connections and remove the socket."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
        self._path.unlink(missing_ok=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        peer = Peer(writer)
        try:
            await self._converse(reader, writer, peer)
        except (ChannelError, OSError) as error:
            log.error("connection of a worker dropped: %s", error)
        except asyncio.CancelledError:
            pass  # the server is closing; the streams library would log a cancelled handler as an error
        finally:
            writer.transport.abort()
            self._gone(peer)
            self._connections.discard(task)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer) -> None:
        frames = FrameReader()
        sender: asyncio.Task[None] | None = None

        try:
            while data := await reader.read(_READ_SIZE):
                for frame in frames.feed(data):
                    if isinstance(frame, Hello) and sender is None:
                        sender = asyncio.create_task(self._send(writer))
                        self._workers.add(sender)
                    self._receive(frame, peer)
        finally:
            if sender is not None:
                sender.cancel()
                self._workers.discard(sender)

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        sent: bytes | None = None
        with contextlib.suppress(OSError):  # the reading side notices as well, and says so
            while True:
                async with self._changed:
                    while self._publication is sent:
                        await self._changed.wait()
                    sent = self._publication
                assert sent is not None
                writer.write(sent)
                await writer.drain()
