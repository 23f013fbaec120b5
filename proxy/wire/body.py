"""Reading and writing message bodies: the one place where lengths, counts and NULs are checked.

`Message` is what every message class builds on: it frames what `_body` writes, and it makes sure that what
`_read` leaves over is an error.  Integers are big-endian; counts are unsigned, as in libpq and the server
(65,535 parameters are allowed).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from proxy.wire.errors import ProtocolViolation, Sender
from proxy.wire.framing import MAX_LENGTH

Buffer = bytes | bytearray | memoryview
Value = bytes | None
"""A parameter, argument, column or result; None is NULL."""

_BYTE = struct.Struct("!B")
_INT16 = struct.Struct("!h")
_UINT16 = struct.Struct("!H")
_INT32 = struct.Struct("!i")
_UINT32 = struct.Struct("!I")


class BodyReader:
    """Takes one body apart from front to back; raises ProtocolViolation where bytes are missing."""

    __slots__ = ("_body", "_message", "_position", "_sender")

    def __init__(self, body: Buffer, message: str, sender: Sender | None) -> None:
        self._body = bytes(body)
        self._position = 0
        self._message = message
        self._sender = sender

    def violation(self, problem: str) -> ProtocolViolation:
        """Return the error for this message, to be raised."""
        return ProtocolViolation(problem, message=self._message, sender=self._sender)

    @property
    def remaining(self) -> int:
        """Bytes not read yet."""
        return len(self._body) - self._position

    def take(self, size: int, what: str) -> bytes:
        """Return the next `size` bytes."""
        if size > self.remaining:
            raise self.violation(f"{what} of {size} bytes, {self.remaining} are left")
        start = self._position
        self._position = start + size
        return self._body[start : self._position]

    def rest(self) -> bytes:
        """Return everything up to the end."""
        return self.take(self.remaining, "rest")

    def _integer(self, format_: struct.Struct, what: str) -> int:
        value: int = format_.unpack(self.take(format_.size, what))[0]
        return value

    def byte(self, what: str) -> int:
        """Return one byte as a number from 0 to 255."""
        return self._integer(_BYTE, what)

    def int16(self, what: str) -> int:
        """Return a signed 16-bit number."""
        return self._integer(_INT16, what)

    def int32(self, what: str) -> int:
        """Return a signed 32-bit number."""
        return self._integer(_INT32, what)

    def uint32(self, what: str) -> int:
        """Return an unsigned 32-bit number, for instance an OID."""
        return self._integer(_UINT32, what)

    def count(self, what: str, each: int) -> int:
        """Return an unsigned 16-bit number of items of at least `each` bytes, which must have room."""
        count = self._integer(_UINT16, f"number of {what}")
        if count * each > self.remaining:
            raise self.violation(f"{count} {what} in {self.remaining} bytes")
        return count

    def string(self, what: str) -> bytes:
        """Return a C string without its NUL."""
        end = self._body.find(b"\0", self._position)
        if end < 0:
            raise self.violation(f"{what} has no terminating NUL")
        start = self._position
        self._position = end + 1
        return self._body[start:end]

    def value(self, what: str) -> Value:
        """Return bytes preceded by their 32-bit length, where -1 is NULL."""
        size = self.int32(f"length of {what}")
        if size >= 0:
            return self.take(size, what)
        if size == -1:
            return None
        raise self.violation(f"{what} of {size} bytes")

    def int16s(self, what: str) -> tuple[int, ...]:
        """Return counted signed 16-bit numbers, for instance format codes."""
        count = self.count(what, _INT16.size)
        return struct.unpack(f"!{count}h", self.take(2 * count, what))

    def uint32s(self, what: str) -> tuple[int, ...]:
        """Return counted unsigned 32-bit numbers, for instance type OIDs."""
        count = self.count(what, _UINT32.size)
        return struct.unpack(f"!{count}I", self.take(4 * count, what))

    def values(self, what: str) -> tuple[Value, ...]:
        """Return counted values."""
        return tuple(self.value(what) for _ in range(self.count(f"{what}s", _INT32.size)))

    def end(self) -> None:
        """Make sure that nothing is left."""
        if self.remaining:
            raise self.violation(f"{self.remaining} bytes too many")


def _pack(format_: struct.Struct | str, what: str, *numbers: int) -> bytes:
    try:
        return struct.pack(format_, *numbers) if isinstance(format_, str) else format_.pack(*numbers)
    except struct.error as error:
        raise ValueError(f"{what} out of range: {error}") from None


def byte(number: int) -> bytes:
    """Write a number from 0 to 255."""
    return _pack(_BYTE, "byte", number)


def int16(number: int) -> bytes:
    """Write a signed 16-bit number."""
    return _pack(_INT16, "Int16", number)


def int32(number: int) -> bytes:
    """Write a signed 32-bit number."""
    return _pack(_INT32, "Int32", number)


def uint32(number: int) -> bytes:
    """Write an unsigned 32-bit number."""
    return _pack(_UINT32, "Int32", number)


def count(items: Sequence[object]) -> bytes:
    """Write the number of items that follow."""
    return _pack(_UINT16, "count", len(items))


def string(text: bytes) -> bytes:
    """Write a C string.  A NUL inside would let the rest of it be read as further fields."""
    if b"\0" in text:
        raise ValueError("a C string cannot hold a NUL")
    return text + b"\0"


def value(data: Value) -> bytes:
    """Write a value preceded by its length, -1 for NULL."""
    return _INT32.pack(-1) if data is None else int32(len(data)) + data


def int16s(numbers: Sequence[int]) -> bytes:
    """Write counted signed 16-bit numbers."""
    return count(numbers) + _pack(f"!{len(numbers)}h", "Int16", *numbers)


def uint32s(numbers: Sequence[int]) -> bytes:
    """Write counted unsigned 32-bit numbers."""
    return count(numbers) + _pack(f"!{len(numbers)}I", "Int32", *numbers)


def values(items: Sequence[Value]) -> bytes:
    """Write counted values."""
    return count(items) + b"".join(map(value, items))


def packet(parts: Iterable[bytes]) -> bytes:
    """Write a length and the body that `parts` make up."""
    body = b"".join(parts)
    if len(body) + 4 > MAX_LENGTH:
        raise ValueError(f"a message of {len(body)} bytes is too long for the protocol")
    return _UINT32.pack(len(body) + 4) + body


class Message:
    """A message with a tag.  Subclasses are frozen dataclasses that write and read their body.

    `decode` raises ProtocolViolation, `encode` ValueError; see the package's rules.
    """

    __slots__ = ()
    TAG: ClassVar[int]
    SENDER: ClassVar[Sender | None] = None

    def encode(self) -> bytes:
        """Return the whole message, header included."""
        return _BYTE.pack(self.TAG) + packet((self._body(),))

    @classmethod
    def decode(cls, body: Buffer, sender: Sender | None = None) -> Self:
        """Return the message that has this body (header excluded); `body` may be reused afterwards.

        `sender` is for errors, where the message alone does not tell: CopyData and CopyDone.
        """
        reader = BodyReader(body, cls.__name__, cls.SENDER or sender)
        message = cls._read(reader)
        reader.end()
        return message

    def _body(self) -> bytes:
        """Write the body; a message without contents has none."""
        return b""

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        """Read the body, from the first byte to the last."""
        return cls()


class FrontendMessage(Message):
    """A message that clients send."""

    __slots__ = ()
    SENDER = Sender.FRONTEND


class BackendMessage(Message):
    """A message that servers send."""

    __slots__ = ()
    SENDER = Sender.BACKEND
