"""The end of a connection: what waits is still sent, and the peer gets the time to read it.

Closing a socket with input unread, or that input arrives at, resets the connection, and a reset takes from
the peer what it has not read yet: the error for which the connection ends, or the rest of a result.  So a
client that may be sending still gets the end of the stream first, and what it sends is discarded for a moment
(a "lingering close").

Rules
-----
- What waits to be sent gets `LINGER_SECONDS`; then the peer does not want it.
- What the peer still sends is read for about `DISCARD_SECONDS` after the last byte was sent, and never kept.
- A worker that stops waits for these moments to pass (`Farewells.over`).
"""

from __future__ import annotations

import asyncio
from typing import Final

LINGER_SECONDS: Final = 30.0
DISCARD_SECONDS: Final = 1.0


def close_soon(transport: asyncio.Transport | None) -> None:
    """Close when what waits has been sent, at last after `LINGER_SECONDS`."""
    if transport is None or transport.is_closing():
        return
    transport.close()
    if transport.get_write_buffer_size():
        asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)


class Farewells:
    """The connections of a worker that are over but for the peer's reading of their last bytes."""

    def __init__(self) -> None:
        self._open: set[_Farewell] = set()

    def __len__(self) -> int:
        return len(self._open)

    def close_gently(self, transport: asyncio.Transport | None) -> None:
        """Send what waits and the end of the stream; take the transport over until the peer closes too."""
        if transport is None or transport.is_closing():
            return
        farewell = _Farewell(transport, self._open)
        self._open.add(farewell)
        transport.set_protocol(farewell)
        transport.resume_reading()
        transport.write_eof()

    async def over(self) -> None:
        """Give those under way `DISCARD_SECONDS` to end; then cut off what is left."""
        if self._open:
            await asyncio.wait([farewell.ended for farewell in self._open], timeout=DISCARD_SECONDS)
        for farewell in list(self._open):
            farewell.transport.abort()


class _Farewell(asyncio.Protocol):
    """Reads to the end of the stream, keeps nothing, and closes in the end."""

    def __init__(self, transport: asyncio.Transport, among: set[_Farewell]) -> None:
        self.transport = transport
        self._among = among
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._deadline = loop.time() + LINGER_SECONDS
        self._timer = loop.call_later(DISCARD_SECONDS, self._look)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        if self.transport.get_write_buffer_size() and loop.time() < self._deadline:
            self._timer = loop.call_later(DISCARD_SECONDS, self._look)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer has closed too, or went away."""
        self._timer.cancel()
        self._among.discard(self)
        self.ended.set_result(None)
