"""ErrorResponse and NoticeResponse: fields told apart by a byte, in any order.

Unknown fields are kept, as the protocol asks for.  Field codes: PostgreSQL documentation, section "Error
and Notice Message Fields".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from proxy.wire.body import BackendMessage, BodyReader, byte, string
from proxy.wire.framing import ERROR_RESPONSE, NOTICE_RESPONSE

SEVERITY: Final = ord("S")
SEVERITY_NONLOCALIZED: Final = ord("V")
CODE: Final = ord("C")
MESSAGE: Final = ord("M")
DETAIL: Final = ord("D")
HINT: Final = ord("H")
POSITION: Final = ord("P")
INTERNAL_POSITION: Final = ord("p")
INTERNAL_QUERY: Final = ord("q")
WHERE: Final = ord("W")
SCHEMA_NAME: Final = ord("s")
TABLE_NAME: Final = ord("t")
COLUMN_NAME: Final = ord("c")
DATA_TYPE_NAME: Final = ord("d")
CONSTRAINT_NAME: Final = ord("n")
FILE: Final = ord("F")
LINE: Final = ord("L")
ROUTINE: Final = ord("R")

_FATAL: Final = frozenset({b"FATAL", b"PANIC"})


@dataclass(frozen=True, slots=True)
class Diagnostics(BackendMessage):
    """Fields as (code, text), in the order in which they came."""

    fields: tuple[tuple[int, bytes], ...]

    @classmethod
    def create(
        cls,
        severity: bytes,
        code: bytes,
        message: bytes,
        *,
        detail: bytes | None = None,
        hint: bytes | None = None,
    ) -> Self:
        """Return a message of one's own: severity such as ``FATAL``, five-character SQLSTATE, text."""
        fields = [(SEVERITY, severity), (SEVERITY_NONLOCALIZED, severity), (CODE, code), (MESSAGE, message)]
        fields += [(key, text) for key, text in ((DETAIL, detail), (HINT, hint)) if text is not None]
        return cls(tuple(fields))

    def get(self, code: int) -> bytes | None:
        """Return the text of a field; None if it is not there."""
        return next((text for key, text in self.fields if key == code), None)

    @property
    def severity(self) -> bytes | None:
        """``ERROR``, ``FATAL``, ``PANIC``, ``WARNING``, ``NOTICE``, ``DEBUG``, ``INFO`` or ``LOG``.

        Servers before 9.6 send it translated only.
        """
        return self.get(SEVERITY_NONLOCALIZED) or self.get(SEVERITY)

    @property
    def is_fatal(self) -> bool:
        """Tell whether the server closes the connection after this message."""
        return self.severity in _FATAL

    @property
    def code(self) -> bytes | None:
        """SQLSTATE, five characters."""
        return self.get(CODE)

    @property
    def message(self) -> bytes | None:
        """The primary message."""
        return self.get(MESSAGE)

    @property
    def detail(self) -> bytes | None:
        """More about the problem."""
        return self.get(DETAIL)

    @property
    def hint(self) -> bytes | None:
        """What to do about it."""
        return self.get(HINT)

    @property
    def position(self) -> int | None:
        """Where in the query text, in characters, from 1; None if it is not there or not a number."""
        return _number(self.get(POSITION))

    @property
    def internal_position(self) -> int | None:
        """Where in `internal_query`, in characters, from 1."""
        return _number(self.get(INTERNAL_POSITION))

    @property
    def internal_query(self) -> bytes | None:
        """Text of a command that the server generated itself."""
        return self.get(INTERNAL_QUERY)

    @property
    def where(self) -> bytes | None:
        """Context, such as a call stack of functions."""
        return self.get(WHERE)

    @property
    def schema_name(self) -> bytes | None:
        """Schema of the object that the error is about."""
        return self.get(SCHEMA_NAME)

    @property
    def table_name(self) -> bytes | None:
        """Table that the error is about."""
        return self.get(TABLE_NAME)

    @property
    def column_name(self) -> bytes | None:
        """Column that the error is about."""
        return self.get(COLUMN_NAME)

    @property
    def data_type_name(self) -> bytes | None:
        """Data type that the error is about."""
        return self.get(DATA_TYPE_NAME)

    @property
    def constraint_name(self) -> bytes | None:
        """Constraint that the error is about."""
        return self.get(CONSTRAINT_NAME)

    @property
    def file(self) -> bytes | None:
        """Source file that reported the error."""
        return self.get(FILE)

    @property
    def line(self) -> int | None:
        """Line in that file."""
        return _number(self.get(LINE))

    @property
    def routine(self) -> bytes | None:
        """Routine that reported the error."""
        return self.get(ROUTINE)

    def with_position(self, position: int) -> Self:
        """Return the same message with another `position`, for a query text that was changed under way.

        A message that has no position stays without one.
        """
        number = str(position).encode()
        return type(self)(tuple((key, number if key == POSITION else text) for key, text in self.fields))

    def _body(self) -> bytes:
        if any(not key for key, _ in self.fields):
            raise ValueError("a field with code 0 would end the message")
        return b"".join(byte(key) + string(text) for key, text in self.fields) + b"\0"

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        fields: list[tuple[int, bytes]] = []
        while key := reader.byte("field code"):
            fields.append((key, reader.string("field")))
        return cls(tuple(fields))


def _number(text: bytes | None) -> int | None:
    """Return a short decimal number; bytes.isdigit() accepts ASCII digits only."""
    return int(text) if text is not None and text.isdigit() and len(text) <= 10 else None


@dataclass(frozen=True, slots=True)
class ErrorResponse(Diagnostics):
    """A statement, or with severity FATAL or PANIC the connection, has failed."""

    TAG = ERROR_RESPONSE


@dataclass(frozen=True, slots=True)
class NoticeResponse(Diagnostics):
    """A warning or a notice; it can come at any time."""

    TAG = NOTICE_RESPONSE
