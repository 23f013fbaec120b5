"""The COPY sub-protocol.

CopyInResponse, CopyOutResponse or CopyBothResponse begin it, CopyData flows, CopyDone or CopyFail end it.
CopyData and CopyDone go both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from proxy.wire.body import BackendMessage, BodyReader, FrontendMessage, Message, byte, int16s, string
from proxy.wire.framing import (
    COPY_BOTH_RESPONSE,
    COPY_DATA,
    COPY_DONE,
    COPY_FAIL,
    COPY_IN_RESPONSE,
    COPY_OUT_RESPONSE,
)


@dataclass(frozen=True, slots=True)
class CopyData(Message):
    """A piece of the stream: a whole row from the server, any piece from the client."""

    TAG = COPY_DATA
    data: bytes

    def _body(self) -> bytes:
        return self.data

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.rest())


@dataclass(frozen=True, slots=True)
class CopyDone(Message):
    """The stream is complete."""

    TAG = COPY_DONE


@dataclass(frozen=True, slots=True)
class CopyFail(FrontendMessage):
    """The client gives up; the server is to fail the COPY with `reason`."""

    TAG = COPY_FAIL
    reason: bytes

    def _body(self) -> bytes:
        return string(self.reason)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.string("reason"))


@dataclass(frozen=True, slots=True)
class _CopyResponse(BackendMessage):
    """`format` is 0 for text, 1 for binary; `column_formats` has the same for each column."""

    format: int
    column_formats: tuple[int, ...]

    def _body(self) -> bytes:
        return byte(self.format) + int16s(self.column_formats)

    @classmethod
    def _read(cls, reader: BodyReader) -> Self:
        return cls(reader.byte("format"), reader.int16s("column formats"))


@dataclass(frozen=True, slots=True)
class CopyInResponse(_CopyResponse):
    """The client is to send the stream.  From here on the server ignores Sync and Flush."""

    TAG = COPY_IN_RESPONSE


@dataclass(frozen=True, slots=True)
class CopyOutResponse(_CopyResponse):
    """The server will send the stream."""

    TAG = COPY_OUT_RESPONSE


@dataclass(frozen=True, slots=True)
class CopyBothResponse(_CopyResponse):
    """Both sides send: streaming replication."""

    TAG = COPY_BOTH_RESPONSE
