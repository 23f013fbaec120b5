"""A client that costs next to nothing: prebuilt messages out, bytes in, on a blocking socket.

A driver takes more time for a query than a hop does, and its own scheduling would be measured with it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import Self

from proxy.wire import framing
from proxy.wire.frontend import Bind, Describe, Execute, Parse, Query, Sync, Terminate
from proxy.wire.startup import StartupMessage

_READY = b"Z\0\0\0\5"
_CHUNK = 1 << 18


class RawClient:
    """One connection to a server that trusts; a context manager."""

    def __init__(self, port: int, user: str, database: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        startup = StartupMessage(0x30000, ((b"user", user.encode()), (b"database", database.encode())))
        self.ask(startup.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, message: bytes) -> bytes:
        """Send; return everything up to ReadyForQuery.

        Raises
        ------
        RuntimeError
            The answer is an error.
        """
        self._socket.sendall(message)
        data = self._socket.recv(_CHUNK)
        while data[-6:-1] != _READY:
            part = self._socket.recv(_CHUNK)
            if not part:
                raise RuntimeError(f"the connection was closed after {data[:200]!r}")
            data += part
        if data[0] == framing.ERROR_RESPONSE or b"\0C57014\0" in data[-200:]:
            raise RuntimeError(f"the answer is an error: {data[:300]!r}")
        return data

    def drain(self, message: bytes) -> int:
        """Send; read a large answer up to ReadyForQuery and return its size in bytes."""
        self._socket.sendall(message)
        size, tail = 0, b""
        while tail[-6:-1] != _READY:
            part = self._socket.recv(_CHUNK)
            if not part:
                raise RuntimeError("the connection was closed in the middle of an answer")
            size += len(part)
            tail = tail[-6:] + part if len(part) < 6 else part
        return size

    def copy_in(self, sql: str, chunks: Iterable[bytes]) -> int:
        """Send rows with COPY ... FROM STDIN and return their size; `chunks` are CopyData messages.

        Raises
        ------
        RuntimeError
            The server does not take them.
        """
        self._socket.sendall(Query(sql.encode()).encode())
        begun = self._socket.recv(_CHUNK)
        if begun[0] != framing.COPY_IN_RESPONSE:
            raise RuntimeError(f"no COPY: {begun[:300]!r}")
        size = 0
        for chunk in chunks:
            self._socket.sendall(chunk)
            size += len(chunk)
        self.ask(b"c\0\0\0\4")
        return size

    def query(self, sql: str) -> bytes:
        """Run texts by the simple protocol."""
        return self.ask(Query(sql.encode()).encode())

    def prepare(self, name: str, sql: str) -> None:
        """Prepare a statement."""
        self.ask(Parse(name.encode(), sql.encode()).encode() + Sync().encode())

    def close(self) -> None:
        """Say goodbye."""
        try:
            self._socket.sendall(Terminate().encode())
        except OSError:
            pass
        self._socket.close()


def bound(name: str, value: bytes, *, binary: bool) -> bytes:
    """Return the messages that run a prepared statement of one parameter, as drivers send them."""
    bind = Bind(b"", name.encode(), (int(binary),), (value,), ())
    return bind.encode() + Describe(framing.PORTAL, b"").encode() + Execute(b"").encode() + Sync().encode()


def first_row(reply: bytes) -> list[bytes | None]:
    """Return the columns of the first DataRow of a reply; none where it has no row."""
    for tag, start, _ in framing.frames(reply):
        if tag == framing.DATA_ROW:
            (columns,) = struct.unpack_from("!H", reply, start + 5)
            position, values = start + 7, list[bytes | None]()
            for _ in range(columns):
                (size,) = struct.unpack_from("!i", reply, position)
                values.append(None if size < 0 else reply[position + 4 : position + 4 + size])
                position += 4 + max(size, 0)
            return values
    return []
