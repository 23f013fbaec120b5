"""A client without a driver: sends bytes, returns the server's messages as they are.

Two conversations can be compared message by message: what differs between any two connections (process ids, cancel
keys, object ids of a fresh table) is masked.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType

Message = tuple[str, bytes]


def message(tag: str, body: bytes = b"") -> bytes:
    return tag.encode() + struct.pack("!I", len(body) + 4) + body


def query(sql: str) -> bytes:
    return message("Q", sql.encode() + b"\0")


def parse(sql: str, name: str = "", types: tuple[int, ...] = ()) -> bytes:
    oids = struct.pack(f"!H{len(types)}I", len(types), *types)
    return message("P", name.encode() + b"\0" + sql.encode() + b"\0" + oids)


def bind(*parameters: bytes | None, name: str = "", portal: str = "", formats: tuple[int, ...] = ()) -> bytes:
    values = b"".join(b"\xff\xff\xff\xff" if p is None else struct.pack("!I", len(p)) + p for p in parameters)
    codes = struct.pack(f"!H{len(formats)}H", len(formats), *formats)
    return message(
        "B",
        portal.encode()
        + b"\0"
        + name.encode()
        + b"\0"
        + codes
        + struct.pack("!H", len(parameters))
        + values
        + b"\0\0",
    )


def describe(kind: str = "P", name: str = "") -> bytes:
    return message("D", kind.encode() + name.encode() + b"\0")


def execute(portal: str = "", limit: int = 0) -> bytes:
    return message("E", portal.encode() + b"\0" + struct.pack("!I", limit))


def close(kind: str, name: str = "") -> bytes:
    return message("C", kind.encode() + name.encode() + b"\0")


SYNC = message("S")
FLUSH = message("H")


class RawClient:
    """One connection; `address` is (host, port) or the path of a unix socket."""

    def __init__(
        self,
        address: tuple[str, int] | str,
        database: str,
        user: str,
        protocol: tuple[int, int] = (3, 0),
        **parameters: str,
    ) -> None:
        if isinstance(address, str):
            self.socket = socket.socket(socket.AF_UNIX)
        else:
            self.socket = socket.socket(socket.AF_INET)
        self.socket.settimeout(10)
        self.socket.connect(address)
        self._buffer = b""
        body = struct.pack("!HH", *protocol)
        for name, value in {"user": user, "database": database, **parameters}.items():
            body += name.encode() + b"\0" + value.encode() + b"\0"
        body += b"\0"
        self.socket.sendall(struct.pack("!I", len(body) + 4) + body)
        try:
            self.greeting = self.until_ready()
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, *messages: bytes) -> None:
        self.socket.sendall(b"".join(messages))

    def receive(self) -> Message:
        """Return the next message; EOFError where the server has closed."""
        while True:
            if len(self._buffer) >= 5:
                end = 1 + struct.unpack_from("!I", self._buffer, 1)[0]
                if len(self._buffer) >= end:
                    found = self._buffer[:end]
                    self._buffer = self._buffer[end:]
                    return chr(found[0]), found[5:]
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError(self._buffer)
            self._buffer += data

    def until_ready(self, count: int = 1) -> list[Message]:
        """Return all messages up to the `count`-th ReadyForQuery."""
        messages: list[Message] = []
        while count:
            try:
                messages.append(self.receive())
            except EOFError as error:
                error.add_note(f"after {messages}")
                raise
            if messages[-1][0] == "Z":
                count -= 1
        return messages

    def run(self, *messages: bytes, ready: int = 1) -> list[Message]:
        self.send(*messages)
        return self.until_ready(ready)

    @property
    def key(self) -> bytes:
        """Return process id and secret, as a CancelRequest carries them."""
        return next(body for tag, body in self.greeting if tag == "K")

    def silent(self) -> bool:
        """Tell whether nothing more comes (for a tenth of a second)."""
        if self._buffer:
            return False
        self.socket.settimeout(0.1)
        try:
            return not self.socket.recv(1)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(10)


def tags(messages: list[Message]) -> str:
    return "".join(tag for tag, _ in messages)


def rows(messages: list[Message]) -> int:
    return sum(tag == "D" for tag, _ in messages)


def first_values(messages: list[Message]) -> list[bytes]:
    """Return the first column of every DataRow."""
    values = []
    for tag, body in messages:
        if tag == "D":
            (length,) = struct.unpack_from("!i", body, 2)
            values.append(body[6 : 6 + length] if length >= 0 else b"")
    return values
