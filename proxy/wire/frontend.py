"""Messages that clients send, and `decode_frontend`.  COPY and authentication have files of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from proxy.wire import framing
from proxy.wire.authentication import AuthenticationResponse
from proxy.wire.body import (
    BodyReader,
    Buffer,
    FrontendMessage,
    Value,
    byte,
    int16,
    int16s,
    int32,
    string,
    uint32,
    uint32s,
    values,
)
from proxy.wire.copying import CopyData, CopyDone, CopyFail
from proxy.wire.errors import ProtocolViolation, Sender


@dataclass(frozen=True, slots=True)
class Query(FrontendMessage):
    """Run one or several statements: the simple protocol."""

    TAG = framing.QUERY
    sql: bytes

    def _body(self) -> bytes:
        return string(self.sql)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("SQL text"))


@dataclass(frozen=True, slots=True)
class Parse(FrontendMessage):
    """Prepare a statement; the empty name is the unnamed one.

    `parameter_types` holds type OIDs, 0 for one left to the server; it may be shorter than the parameters
    are many.
    """

    TAG = framing.PARSE
    statement: bytes
    sql: bytes
    parameter_types: tuple[int, ...] = ()

    def _body(self) -> bytes:
        return string(self.statement) + string(self.sql) + uint32s(self.parameter_types)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("statement"), reader.string("SQL text"), reader.uint32s("type OIDs"))


def _formats_fit(formats: tuple[int, ...], values: tuple[Value, ...]) -> bool:
    """None: all are text; one: it holds for all; else one for each."""
    return len(formats) <= 1 or len(formats) == len(values)


@dataclass(frozen=True, slots=True)
class Bind(FrontendMessage):
    """Make a portal of a prepared statement and its parameters.

    Format codes are 0 for text, 1 for binary.  There are none (all are text), one (it holds for all) or one
    for each parameter; the same goes for result columns, whose number the message does not tell.
    """

    TAG = framing.BIND
    portal: bytes
    statement: bytes
    parameter_formats: tuple[int, ...] = ()
    parameters: tuple[Value, ...] = ()
    result_formats: tuple[int, ...] = ()

    def _body(self) -> bytes:
        if not _formats_fit(self.parameter_formats, self.parameters):
            raise ValueError(
                f"{len(self.parameter_formats)} format codes for {len(self.parameters)} parameters"
            )
        names = string(self.portal) + string(self.statement)
        arguments = int16s(self.parameter_formats) + values(self.parameters)
        return names + arguments + int16s(self.result_formats)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        portal, statement = reader.string("portal"), reader.string("statement")
        formats, parameters = reader.int16s("format codes"), reader.values("parameter")
        if not _formats_fit(formats, parameters):
            raise reader.violation(f"{len(formats)} format codes for {len(parameters)} parameters")
        return cls(portal, statement, formats, parameters, reader.int16s("result format codes"))


@dataclass(frozen=True, slots=True)
class Execute(FrontendMessage):
    """Run a portal for at most `max_rows` rows; 0 or less for all."""

    TAG = framing.EXECUTE
    portal: bytes
    max_rows: int = 0

    def _body(self) -> bytes:
        return string(self.portal) + int32(self.max_rows)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("portal"), reader.int32("row limit"))


@dataclass(frozen=True, slots=True)
class _Target(FrontendMessage):
    """`kind` is `framing.STATEMENT` or `framing.PORTAL`; the empty name is the unnamed one."""

    kind: int
    name: bytes

    def _body(self) -> bytes:
        if self.kind not in (framing.STATEMENT, framing.PORTAL):
            raise ValueError(f"kind {self.kind} is neither statement nor portal")
        return byte(self.kind) + string(self.name)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        kind = reader.byte("kind")
        if kind not in (framing.STATEMENT, framing.PORTAL):
            raise reader.violation("the kind is neither statement nor portal")
        return cls(kind, reader.string("name"))


@dataclass(frozen=True, slots=True)
class Describe(_Target):
    """Ask for parameter types and result columns (statement) or result columns (portal)."""

    TAG = framing.DESCRIBE


@dataclass(frozen=True, slots=True)
class Close(_Target):
    """Drop a prepared statement or a portal; it is no error if there is none."""

    TAG = framing.CLOSE


@dataclass(frozen=True, slots=True)
class Flush(FrontendMessage):
    """Ask for the replies so far, without the end of a segment."""

    TAG = framing.FLUSH


@dataclass(frozen=True, slots=True)
class Sync(FrontendMessage):
    """End a segment of extended messages: commit outside a transaction block, recover after an error."""

    TAG = framing.SYNC


@dataclass(frozen=True, slots=True)
class FunctionCall(FrontendMessage):
    """Call a function by its OID: the fast path, which libpq's large objects use.  Formats are as in Bind."""

    TAG = framing.FUNCTION_CALL
    function: int
    argument_formats: tuple[int, ...] = ()
    arguments: tuple[Value, ...] = ()
    result_format: int = 0

    def _body(self) -> bytes:
        if not _formats_fit(self.argument_formats, self.arguments):
            raise ValueError(f"{len(self.argument_formats)} format codes for {len(self.arguments)} arguments")
        arguments = int16s(self.argument_formats) + values(self.arguments)
        return uint32(self.function) + arguments + int16(self.result_format)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        function = reader.uint32("function OID")
        formats, arguments = reader.int16s("format codes"), reader.values("argument")
        if not _formats_fit(formats, arguments):
            raise reader.violation(f"{len(formats)} format codes for {len(arguments)} arguments")
        return cls(function, formats, arguments, reader.int16("result format code"))


@dataclass(frozen=True, slots=True)
class Terminate(FrontendMessage):
    """The client is about to close the connection."""

    TAG = framing.TERMINATE


AnyFrontendMessage = (
    AuthenticationResponse
    | Bind
    | Close
    | CopyData
    | CopyDone
    | CopyFail
    | Describe
    | Execute
    | Flush
    | FunctionCall
    | Parse
    | Query
    | Sync
    | Terminate
)

_MESSAGES: Final[dict[int, type[AnyFrontendMessage]]] = {
    message.TAG: message
    for message in (
        AuthenticationResponse,
        Bind,
        Close,
        CopyData,
        CopyDone,
        CopyFail,
        Describe,
        Execute,
        Flush,
        FunctionCall,
        Parse,
        Query,
        Sync,
        Terminate,
    )
}


def decode_frontend(tag: int, body: Buffer) -> AnyFrontendMessage:
    """Return the message of a client with this tag and body; `body` may be reused afterwards.

    Every response to an authentication request comes as AuthenticationResponse: see
    proxy.wire.authentication.

    Raises
    ------
    ProtocolViolation
        The tag is unknown or the body malformed.
    """
    message = _MESSAGES.get(tag)
    if message is None:
        raise ProtocolViolation(f"a message with unknown tag {tag:#04x}", sender=Sender.FRONTEND)
    return message.decode(body, Sender.FRONTEND)
