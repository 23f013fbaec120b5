"""Messages that servers send, and `decode_backend`.

COPY, authentication, errors and notices have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Self

from proxy.wire import framing
from proxy.wire.authentication import AnyAuthenticationRequest, decode_authentication
from proxy.wire.body import (
    BackendMessage,
    BodyReader,
    Buffer,
    Value,
    byte,
    count,
    int16,
    int32,
    string,
    uint32,
    uint32s,
    value,
    values,
)
from proxy.wire.copying import CopyBothResponse, CopyData, CopyDone, CopyInResponse, CopyOutResponse
from proxy.wire.diagnostics import ErrorResponse, NoticeResponse
from proxy.wire.errors import ProtocolViolation, Sender
from proxy.wire.startup import read_secret_key, secret_key_bytes


# -- the session -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class BackendKeyData(BackendMessage):
    """What a CancelRequest for this session must carry; the key has 4 to 256 bytes."""

    TAG = framing.BACKEND_KEY_DATA
    process_id: int
    secret_key: bytes = field(repr=False)

    def _body(self) -> bytes:
        return uint32(self.process_id) + secret_key_bytes(self.secret_key)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.uint32("process ID"), read_secret_key(reader))


@dataclass(frozen=True, slots=True)
class NegotiateProtocolVersion(BackendMessage):
    """The server does not know the minor version or some of the ``_pq_.`` options asked for.

    `newest` is the newest version that it offers, as sent: PostgreSQL 18 gives the whole version (3 << 16 |
    minor).
    """

    TAG = framing.NEGOTIATE_PROTOCOL_VERSION
    newest: int
    unknown_options: tuple[bytes, ...] = ()

    def _body(self) -> bytes:
        options = b"".join(map(string, self.unknown_options))
        return uint32(self.newest) + uint32(len(self.unknown_options)) + options

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        newest, number = reader.uint32("version"), reader.uint32("number of options")
        if number > reader.remaining:
            raise reader.violation(f"{number} options in {reader.remaining} bytes")
        return cls(newest, tuple(reader.string("option") for _ in range(number)))


@dataclass(frozen=True, slots=True)
class ParameterStatus(BackendMessage):
    """A setting that the server reports has this value now; it can come at any time."""

    TAG = framing.PARAMETER_STATUS
    name: bytes
    value: bytes

    def _body(self) -> bytes:
        return string(self.name) + string(self.value)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("name"), reader.string("value"))


@dataclass(frozen=True, slots=True)
class NotificationResponse(BackendMessage):
    """NOTIFY of a channel that the session listens to; it can come at any time."""

    TAG = framing.NOTIFICATION_RESPONSE
    process_id: int
    channel: bytes
    payload: bytes

    def _body(self) -> bytes:
        return uint32(self.process_id) + string(self.channel) + string(self.payload)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.uint32("process ID"), reader.string("channel"), reader.string("payload"))


@dataclass(frozen=True, slots=True)
class ReadyForQuery(BackendMessage):
    """A segment is over; `status` is `framing.IDLE`, `IN_TRANSACTION` or `FAILED_TRANSACTION`."""

    TAG = framing.READY_FOR_QUERY
    status: int

    def _body(self) -> bytes:
        if self.status not in _STATUSES:
            raise ValueError(f"unknown transaction status {self.status}")
        return byte(self.status)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        status = reader.byte("transaction status")
        if status not in _STATUSES:
            raise reader.violation(f"unknown transaction status {status:#04x}")
        return cls(status)


_STATUSES: Final = frozenset({framing.IDLE, framing.IN_TRANSACTION, framing.FAILED_TRANSACTION})


# -- answers to Parse, Bind, Close, Describe ---------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ParseComplete(BackendMessage):
    """Answer to Parse."""

    TAG = framing.PARSE_COMPLETE


@dataclass(frozen=True, slots=True)
class BindComplete(BackendMessage):
    """Answer to Bind."""

    TAG = framing.BIND_COMPLETE


@dataclass(frozen=True, slots=True)
class CloseComplete(BackendMessage):
    """Answer to Close."""

    TAG = framing.CLOSE_COMPLETE


@dataclass(frozen=True, slots=True)
class NoData(BackendMessage):
    """Answer to Describe of what returns no rows."""

    TAG = framing.NO_DATA


@dataclass(frozen=True, slots=True)
class ParameterDescription(BackendMessage):
    """First answer to Describe of a statement: type OIDs of its parameters."""

    TAG = framing.PARAMETER_DESCRIPTION
    type_oids: tuple[int, ...]

    def _body(self) -> bytes:
        return uint32s(self.type_oids)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.uint32s("type OIDs"))


@dataclass(frozen=True, slots=True)
class FieldDescription:
    """One column of a result.

    `table_oid` and `column_number` are 0 unless it is a column of a table.  `type_size` is negative for
    types of variable width; `type_modifier` depends on the type, -1 is none.  `format` is 0 where it is not
    known yet.
    """

    name: bytes
    table_oid: int = 0
    column_number: int = 0
    type_oid: int = 0
    type_size: int = 0
    type_modifier: int = -1
    format: int = 0

    def encode(self) -> bytes:
        """Return the description as part of a RowDescription."""
        source = uint32(self.table_oid) + int16(self.column_number)
        type_ = uint32(self.type_oid) + int16(self.type_size) + int32(self.type_modifier)
        return string(self.name) + source + type_ + int16(self.format)

    @classmethod
    def read(cls, reader: BodyReader) -> Self:
        """Read the description of one column."""
        return cls(
            name=reader.string("column name"),
            table_oid=reader.uint32("table OID"),
            column_number=reader.int16("column number"),
            type_oid=reader.uint32("type OID"),
            type_size=reader.int16("type size"),
            type_modifier=reader.int32("type modifier"),
            format=reader.int16("format code"),
        )


_SMALLEST_FIELD: Final = 19  # bytes: an empty name and 18 bytes of numbers


@dataclass(frozen=True, slots=True)
class RowDescription(BackendMessage):
    """The columns of a result, before its rows."""

    TAG = framing.ROW_DESCRIPTION
    fields: tuple[FieldDescription, ...]

    def _body(self) -> bytes:
        return count(self.fields) + b"".join(column.encode() for column in self.fields)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        number = reader.count("columns", _SMALLEST_FIELD)
        return cls(tuple(FieldDescription.read(reader) for _ in range(number)))


# -- results -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DataRow(BackendMessage):
    """One row; None is NULL."""

    TAG = framing.DATA_ROW
    values: tuple[Value, ...]

    def _body(self) -> bytes:
        return values(self.values)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.values("column"))


@dataclass(frozen=True, slots=True)
class CommandComplete(BackendMessage):
    """A statement is done; `command_tag` is its name, with the number of rows where that has a meaning."""

    TAG = framing.COMMAND_COMPLETE
    command_tag: bytes

    @property
    def rows(self) -> int | None:
        """Rows returned or changed, the last word of the tag; None if it is not a number."""
        word = self.command_tag.rpartition(b" ")[2]
        return int(word) if word.isdigit() and len(word) <= 20 else None

    def _body(self) -> bytes:
        return string(self.command_tag)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("command tag"))


@dataclass(frozen=True, slots=True)
class EmptyQueryResponse(BackendMessage):
    """In place of CommandComplete where the text held no statement."""

    TAG = framing.EMPTY_QUERY_RESPONSE


@dataclass(frozen=True, slots=True)
class PortalSuspended(BackendMessage):
    """In place of CommandComplete where the row limit of an Execute was reached."""

    TAG = framing.PORTAL_SUSPENDED


@dataclass(frozen=True, slots=True)
class FunctionCallResponse(BackendMessage):
    """Result of a FunctionCall; None is NULL."""

    TAG = framing.FUNCTION_CALL_RESPONSE
    result: Value

    def _body(self) -> bytes:
        return value(self.result)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.value("result"))


_ByTag = (
    BackendKeyData
    | BindComplete
    | CloseComplete
    | CommandComplete
    | CopyBothResponse
    | CopyData
    | CopyDone
    | CopyInResponse
    | CopyOutResponse
    | DataRow
    | EmptyQueryResponse
    | ErrorResponse
    | FunctionCallResponse
    | NegotiateProtocolVersion
    | NoData
    | NoticeResponse
    | NotificationResponse
    | ParameterDescription
    | ParameterStatus
    | ParseComplete
    | PortalSuspended
    | ReadyForQuery
    | RowDescription
)
AnyBackendMessage = AnyAuthenticationRequest | _ByTag

_MESSAGES: Final[dict[int, type[_ByTag]]] = {
    message.TAG: message
    for message in (
        BackendKeyData,
        BindComplete,
        CloseComplete,
        CommandComplete,
        CopyBothResponse,
        CopyData,
        CopyDone,
        CopyInResponse,
        CopyOutResponse,
        DataRow,
        EmptyQueryResponse,
        ErrorResponse,
        FunctionCallResponse,
        NegotiateProtocolVersion,
        NoData,
        NoticeResponse,
        NotificationResponse,
        ParameterDescription,
        ParameterStatus,
        ParseComplete,
        PortalSuspended,
        ReadyForQuery,
        RowDescription,
    )
}


def decode_backend(tag: int, body: Buffer) -> AnyBackendMessage:
    """Return the message of a server with this tag and body; `body` may be reused afterwards.

    Raises
    ------
    ProtocolViolation
        The tag is unknown or the body malformed.
    """
    if tag == framing.AUTHENTICATION:
        return decode_authentication(body)
    message = _MESSAGES.get(tag)
    if message is None:
        raise ProtocolViolation(f"a message with unknown tag {tag:#04x}", sender=Sender.BACKEND)
    return message.decode(body, Sender.BACKEND)
