"""Start-up packets: what a client may send first.  They have a length and a code, but no tag.

SSLRequest and GSSENCRequest are answered with one byte, and another packet follows on the same connection.
A CancelRequest is answered with nothing: the server closes the connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

from proxy.wire.body import BodyReader, Buffer, packet, string, uint32
from proxy.wire.errors import ProtocolViolation, Sender
from proxy.wire.framing import MAX_STARTUP_LENGTH

SSL_REQUEST_CODE: Final = 1234 << 16 | 5679
GSSENC_REQUEST_CODE: Final = 1234 << 16 | 5680
CANCEL_REQUEST_CODE: Final = 1234 << 16 | 5678

PROTOCOL_3_0: Final = 3 << 16
PROTOCOL_3_2: Final = 3 << 16 | 2

ENCRYPTION_ACCEPTED_SSL: Final = b"S"
ENCRYPTION_ACCEPTED_GSS: Final = b"G"
ENCRYPTION_REFUSED: Final = b"N"

MIN_SECRET_KEY: Final = 4
MAX_SECRET_KEY: Final = 256
"""Bytes of a cancel key: always 4 before protocol 3.2, then 4 to 256."""


class StartupPacket:
    """A packet without a tag.  See the package's rules for errors and buffers."""

    __slots__ = ()
    CODE: ClassVar[int]

    def encode(self) -> bytes:
        """Return the whole packet, length included."""
        encoded = packet((self._body(),))
        if len(encoded) > MAX_STARTUP_LENGTH:
            raise ValueError(
                f"a start-up packet of {len(encoded)} bytes, the server accepts {MAX_STARTUP_LENGTH}"
            )
        return encoded

    @classmethod
    def decode(cls, body: Buffer) -> Self:
        """Return the packet with this body, which begins with the code; `body` may be reused afterwards."""
        reader = BodyReader(body, cls.__name__, Sender.FRONTEND)
        if reader.remaining + 4 > MAX_STARTUP_LENGTH:
            raise reader.violation(f"{reader.remaining} bytes, the limit is {MAX_STARTUP_LENGTH - 4}")
        packet_ = cls._read(reader)
        reader.end()
        return packet_

    def _body(self) -> bytes:
        return uint32(self.CODE)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        _expect_code(reader, cls.CODE)
        return cls()


def _expect_code(reader: BodyReader, code: int) -> None:
    found = reader.uint32("code")
    if found != code:
        raise reader.violation(f"code {found} instead of {code}")


@dataclass(frozen=True, slots=True)
class SSLRequest(StartupPacket):
    """The client wants to go on with TLS."""

    CODE = SSL_REQUEST_CODE


@dataclass(frozen=True, slots=True)
class GSSENCRequest(StartupPacket):
    """The client wants to go on with GSSAPI encryption."""

    CODE = GSSENC_REQUEST_CODE


@dataclass(frozen=True, slots=True)
class CancelRequest(StartupPacket):
    """The client asks to cancel what another connection of its own is doing.

    `process_id` and `secret_key` (4 to 256 bytes) are those of that connection's BackendKeyData.
    """

    CODE = CANCEL_REQUEST_CODE
    process_id: int
    secret_key: bytes = field(repr=False)

    def _body(self) -> bytes:
        return uint32(self.CODE) + uint32(self.process_id) + secret_key_bytes(self.secret_key)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        _expect_code(reader, cls.CODE)
        return cls(reader.uint32("process ID"), read_secret_key(reader))


@dataclass(frozen=True, slots=True)
class StartupMessage(StartupPacket):
    """Protocol version and parameters (names and values, in order) of a session to be started.

    Any minor version of protocol 3 is one for the server to negotiate; another major version has another
    layout and is a violation.
    """

    version: int
    parameters: tuple[tuple[bytes, bytes], ...]

    def get(self, name: bytes) -> bytes | None:
        """Return the value of a parameter; the last one counts.  None if it is not there."""
        return next((value for key, value in reversed(self.parameters) if key == name), None)

    def _body(self) -> bytes:
        if self.version >> 16 != 3:
            raise ValueError(f"protocol version {_version(self.version)}, not 3")
        if any(not name for name, _ in self.parameters):
            raise ValueError("a parameter without a name would end the list")
        pairs = b"".join(string(name) + string(value) for name, value in self.parameters)
        return uint32(self.version) + pairs + b"\0"

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        version = reader.uint32("protocol version")
        if version >> 16 != 3:
            raise reader.violation(f"unsupported protocol version {_version(version)}")
        parameters: list[tuple[bytes, bytes]] = []
        while name := reader.string("parameter name"):
            parameters.append((name, reader.string("parameter value")))
        return cls(version, tuple(parameters))


def _version(code: int) -> str:
    return f"{code >> 16}.{code & 0xFFFF}"


def secret_key_bytes(key: bytes) -> bytes:
    """Return `key` if its length is allowed; raises ValueError."""
    if not MIN_SECRET_KEY <= len(key) <= MAX_SECRET_KEY:
        raise ValueError(
            f"a secret key of {len(key)} bytes, allowed are {MIN_SECRET_KEY} to {MAX_SECRET_KEY}"
        )
    return key


def read_secret_key(reader: BodyReader) -> bytes:
    """Read a cancel key, which ends where the message ends."""
    size = reader.remaining
    if not MIN_SECRET_KEY <= size <= MAX_SECRET_KEY:
        raise reader.violation(
            f"secret key of {size} bytes, allowed are {MIN_SECRET_KEY} to {MAX_SECRET_KEY}"
        )
    return reader.rest()


AnyStartupPacket = StartupMessage | CancelRequest | SSLRequest | GSSENCRequest

_BY_CODE: Final[dict[int, type[SSLRequest | GSSENCRequest | CancelRequest]]] = {
    SSL_REQUEST_CODE: SSLRequest,
    GSSENC_REQUEST_CODE: GSSENCRequest,
    CANCEL_REQUEST_CODE: CancelRequest,
}


def decode_startup(body: Buffer) -> AnyStartupPacket:
    """Return the packet with this body (see `framing.cut_startup`), told apart by its code.

    Raises
    ------
    ProtocolViolation
        The body is malformed, or asks for a protocol other than 3.
    """
    if len(body) < 4:
        raise ProtocolViolation("a start-up packet without a code", sender=Sender.FRONTEND)
    code = int.from_bytes(body[:4], "big")
    return _BY_CODE.get(code, StartupMessage).decode(body)
