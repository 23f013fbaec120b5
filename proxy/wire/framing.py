"""Cutting a stream into messages by their headers, and reading single facts out of a body in place.

This is the hot path: functions on `bytes`, plain ints for tags, nothing copied but the facts asked for.  A
loop that meets every message of a stream looks like this::

    while (header := cut(data, position)) is not None:
        tag, end = header
        if end > len(data):
            break                      # incomplete: keep data[position:], or stream the rest through
        ...                            # the body is data[position + 5 : end]
        position = end

The readers take a buffer and the bounds of the *body* in it.  They check everything that they walk over;
where they raise ProtocolViolation the message is malformed, and the server will say so better than a proxy
can.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

from proxy.wire.errors import FramingViolation, ProtocolViolation, Sender

# -- tags --------------------------------------------------------------------------------------------------
# Frontend.  COPY_DATA and COPY_DONE go both ways.
BIND: Final = ord("B")
CLOSE: Final = ord("C")
COPY_DATA: Final = ord("d")
COPY_DONE: Final = ord("c")
COPY_FAIL: Final = ord("f")
DESCRIBE: Final = ord("D")
EXECUTE: Final = ord("E")
FLUSH: Final = ord("H")
FUNCTION_CALL: Final = ord("F")
PARSE: Final = ord("P")
PASSWORD: Final = ord("p")  # every response to an authentication request: password, SASL, GSSAPI
QUERY: Final = ord("Q")
SYNC: Final = ord("S")
TERMINATE: Final = ord("X")

# Backend.
AUTHENTICATION: Final = ord("R")
BACKEND_KEY_DATA: Final = ord("K")
BIND_COMPLETE: Final = ord("2")
CLOSE_COMPLETE: Final = ord("3")
COMMAND_COMPLETE: Final = ord("C")
COPY_BOTH_RESPONSE: Final = ord("W")
COPY_IN_RESPONSE: Final = ord("G")
COPY_OUT_RESPONSE: Final = ord("H")
DATA_ROW: Final = ord("D")
EMPTY_QUERY_RESPONSE: Final = ord("I")
ERROR_RESPONSE: Final = ord("E")
FUNCTION_CALL_RESPONSE: Final = ord("V")
NEGOTIATE_PROTOCOL_VERSION: Final = ord("v")
NO_DATA: Final = ord("n")
NOTICE_RESPONSE: Final = ord("N")
NOTIFICATION_RESPONSE: Final = ord("A")
PARAMETER_DESCRIPTION: Final = ord("t")
PARAMETER_STATUS: Final = ord("S")
PARSE_COMPLETE: Final = ord("1")
PORTAL_SUSPENDED: Final = ord("s")
READY_FOR_QUERY: Final = ord("Z")
ROW_DESCRIPTION: Final = ord("T")

# Values of ReadyForQuery.
IDLE: Final = ord("I")
IN_TRANSACTION: Final = ord("T")
FAILED_TRANSACTION: Final = ord("E")

# What Describe and Close name.
STATEMENT: Final = ord("S")
PORTAL: Final = ord("P")

# -- limits ------------------------------------------------------------------------------------------------
MAX_LENGTH: Final = 0x3FFFFFFF + 4
"""Largest length field, itself included: the server's buffers end at 1 GiB (MaxAllocSize)."""

MAX_STARTUP_LENGTH: Final = 10_000 + 4
"""Largest length field of a start-up packet; the server's MAX_STARTUP_PACKET_LENGTH leaves the field out."""

_U32 = Struct("!I").unpack_from
_I32 = Struct("!i").unpack_from
_U16 = Struct("!H").unpack_from
_I16 = Struct("!h").unpack_from

Bytes = bytes | bytearray


# -- headers -----------------------------------------------------------------------------------------------
def cut(data: Bytes, position: int = 0, sender: Sender | None = None) -> tuple[int, int] | None:
    """Return tag and end of the message that begins at `position`; None while its header is incomplete.

    The end is an offset into `data` and may lie beyond what has arrived.

    Raises
    ------
    FramingViolation
        The length is below 4 or above `MAX_LENGTH`.  (A server that cannot fork answers in protocol 2:
        ``E``, text, NUL, no length.  That ends up here too.)
    """
    if len(data) - position < 5:
        return None
    length: int = _U32(data, position + 1)[0]
    if 4 <= length <= MAX_LENGTH:
        return data[position], position + 1 + length
    raise FramingViolation(
        f"a header with tag {bytes((data[position],))!r} and a length of {length}", sender=sender
    )


def cut_startup(data: Bytes, position: int = 0) -> int | None:
    """Return the end of the start-up packet that begins at `position`; None while its length is incomplete.

    The body, from the version or request code on, is ``data[position + 4 : end]``.

    Raises
    ------
    FramingViolation
        The length has no room for a code, or is above `MAX_STARTUP_LENGTH`.
    """
    if len(data) - position < 4:
        return None
    length: int = _U32(data, position)[0]
    if 8 <= length <= MAX_STARTUP_LENGTH:
        return position + length
    raise FramingViolation(f"a start-up packet with a length of {length}", sender=Sender.FRONTEND)


def frames(data: Bytes, position: int = 0, sender: Sender | None = None) -> Iterator[tuple[int, int, int]]:
    """Yield (tag, start, end) of each complete message from `position` on; raises FramingViolation."""
    while (header := cut(data, position, sender)) is not None:
        tag, end = header
        if end > len(data):
            return
        yield tag, position, end
        position = end


# -- bodies ------------------------------------------------------------------------------------------------
def c_string(
    data: Bytes, start: int, end: int, message: str, sender: Sender | None = Sender.FRONTEND
) -> tuple[bytes, int]:
    """Return the C string at `start` and the offset behind its NUL, which must lie before `end`.

    Raises
    ------
    ProtocolViolation
        There is no NUL; `message` and `sender` are named in the error.
    """
    nul = data.find(0, start, end)
    if nul < 0:
        raise ProtocolViolation("a string has no terminating NUL", message=message, sender=sender)
    return bytes(data[start:nul]), nul + 1


def query_text(data: Bytes, start: int = 0, end: int | None = None) -> bytes:
    """Return the SQL text of a Query; raises ProtocolViolation."""
    return _only_string(data, start, len(data) if end is None else end, "Query", Sender.FRONTEND)


def command_tag(data: Bytes, start: int = 0, end: int | None = None) -> bytes:
    """Return the tag in a CommandComplete, for instance ``SELECT 10``; raises ProtocolViolation."""
    return _only_string(data, start, len(data) if end is None else end, "CommandComplete", Sender.BACKEND)


def parse_header(data: Bytes, start: int = 0, end: int | None = None) -> tuple[bytes, bytes, tuple[int, ...]]:
    """Return statement name, SQL text and parameter type OIDs (0 = unspecified) of a Parse.

    Raises
    ------
    ProtocolViolation
        The body is malformed.
    """
    end = len(data) if end is None else end
    name, position = c_string(data, start, end, "Parse")
    sql, position = c_string(data, position, end, "Parse")
    count, position = _count(data, position, end, "Parse")
    if position + 4 * count != end:
        raise _malformed("Parse", f"{count} type OIDs in {end - position} bytes")
    return name, sql, tuple(_U32(data, position + 4 * i)[0] for i in range(count))


def bind_header(data: Bytes, start: int = 0, end: int | None = None) -> tuple[bytes, bytes]:
    """Return portal and statement name of a Bind, and look no further; raises ProtocolViolation."""
    end = len(data) if end is None else end
    portal, position = c_string(data, start, end, "Bind")
    return portal, c_string(data, position, end, "Bind")[0]


def bind_parameters(
    data: Bytes, start: int = 0, end: int | None = None
) -> list[tuple[int, memoryview | None]]:
    """Return (format code, value) of each parameter of a Bind; None is NULL.

    The rule for format codes is applied: none = all are text (0), one = it holds for all, else one for each.
    The values refer to `data`; a bytearray cannot be resized while they live.

    Raises
    ------
    ProtocolViolation
        The body is malformed anywhere, or the numbers of format codes and parameters do not agree.
    """
    end = len(data) if end is None else end
    return bound_values(data, c_string(data, c_string(data, start, end, "Bind")[1], end, "Bind")[1], end)


def bound_values(data: Bytes, position: int, end: int) -> list[tuple[int, memoryview | None]]:
    """Return what `bind_parameters` does for a Bind whose names end at `position`; raises the same."""
    coded, codes = _count(data, position, end, "Bind")
    number, position = _count(data, codes + 2 * coded, end, "Bind")
    if coded > 1 and coded != number:
        raise _malformed("Bind", f"{coded} format codes for {number} parameters")
    step = 2 if coded > 1 else 0
    view = memoryview(data)
    parameters: list[tuple[int, memoryview | None]] = []
    for i in range(number):
        if position + 4 > end:
            raise _malformed("Bind", f"{number} parameters announced, {i} found")
        code: int = _I16(data, codes + step * i)[0] if coded else 0
        size: int = _I32(data, position)[0]
        position += 4
        if size == -1:
            parameters.append((code, None))
            continue
        if not 0 <= size <= end - position:
            raise _malformed("Bind", f"parameter of {size} bytes, {end - position} are left")
        parameters.append((code, view[position : position + size]))
        position += size
    results, position = _count(data, position, end, "Bind")
    if position + 2 * results != end:
        raise _malformed("Bind", f"{results} result format codes in {end - position} bytes")
    return parameters


def execute_header(data: Bytes, start: int = 0, end: int | None = None) -> tuple[bytes, int]:
    """Return portal name and row limit (0 or less: all) of an Execute; raises ProtocolViolation."""
    end = len(data) if end is None else end
    portal, position = c_string(data, start, end, "Execute")
    if position + 4 != end:
        raise _malformed("Execute", f"row limit in {end - position} bytes")
    return portal, _I32(data, position)[0]


def target_header(data: Bytes, start: int = 0, end: int | None = None) -> tuple[int, bytes]:
    """Return kind (`STATEMENT` or `PORTAL`) and name in a Describe or Close; raises ProtocolViolation."""
    end = len(data) if end is None else end
    if start >= end or data[start] not in (STATEMENT, PORTAL):
        raise _malformed("Describe or Close", "the kind is neither statement nor portal")
    return data[start], _only_string(data, start + 1, end, "Describe or Close", Sender.FRONTEND)


def _malformed(message: str, problem: str) -> ProtocolViolation:
    return ProtocolViolation(problem, message=message, sender=Sender.FRONTEND)


def _only_string(data: Bytes, start: int, end: int, message: str, sender: Sender) -> bytes:
    """Return the C string that fills the body."""
    text, position = c_string(data, start, end, message, sender)
    if position != end:
        raise ProtocolViolation(f"{end - position} bytes too many", message=message, sender=sender)
    return text


def _count(data: Bytes, position: int, end: int, message: str) -> tuple[int, int]:
    if position + 2 > end:
        raise _malformed(message, "it ends before a count")
    return _U16(data, position)[0], position + 2
