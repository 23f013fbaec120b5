"""Frames between workers, or whoever has a question, and the learner: msgpack over a unix socket.

A frame is a 4-byte big-endian length followed by that many bytes of msgpack, one tagged record.  Either
side drops the connection on a frame that is too long or does not decode: the worker then goes on with the
policy it has and reconnects with back-off.  Nothing here blocks or owns a socket.
"""

from __future__ import annotations

import struct

import msgspec

from learning.records import Snapshot, Template, Trajectory

MAX_FRAME = 256 * 1024 * 1024
"""Bytes; a snapshot with 1,000 patterns of 1536 dimensions takes 6 MB."""

ASK_VERSION = 1
"""Of questions and answers: a learner that finds another one says so instead of guessing."""

_LENGTH = struct.Struct("!I")


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First frame from a worker."""

    pid: int
    policy_version: int  # 0: none yet


class TemplateSeen(msgspec.Struct, frozen=True, tag="template"):
    """A worker met a template; sent before its first trajectory on this connection."""

    template: Template


class TrajectoryBatch(msgspec.Struct, frozen=True, tag="trajectories"):
    """Trajectories in the order of completion; `dropped` counts those lost since the last batch."""

    trajectories: tuple[Trajectory, ...]
    dropped: int = 0


class InjectionFailed(msgspec.Struct, frozen=True, tag="injection-failed"):
    """The server refused a setting: the template is to be switched off."""

    template: str
    sqlstate: str
    message: str


class Rated(msgspec.Struct, frozen=True, tag="rated"):
    """A user rated the results of a query; rows are named by their primary key, as text."""

    query_id: bytes  # UUID, 16 bytes: Trajectory.query_id
    relevant: tuple[str, ...] = ()
    irrelevant: tuple[str, ...] = ()


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """A client called a function; the answers to come bear its number.

    `arguments` is a JSON object by argument name; `table` and `index` are resolved names, unquoted.
    """

    number: int
    function: str
    arguments: bytes
    database: str
    username: str
    table: str = ""
    relation: int = 0  # the table's OID
    index: str = ""
    version: int = ASK_VERSION


class Abandon(msgspec.Struct, frozen=True, tag="abandon"):
    """Nobody waits for the answer to a question any more."""

    number: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far the work on a question has got, in words."""

    number: int
    text: str


class Problem(msgspec.Struct, frozen=True):
    """Why a question cannot be answered, as PostgreSQL says such things."""

    sqlstate: str
    message: str
    hint: str = ""
    detail: str = ""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """The answer to a question: JSON, a value or a list of objects; or the problem with it."""

    number: int
    answer: bytes = b"null"
    problem: Problem | None = None


class Question(msgspec.Struct, frozen=True, tag="question"):
    """Somebody asks; the answer carries the same number.  The body is for `learning.answering` to read."""

    number: int
    body: bytes


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    """The answer to the `Question` of this number on this connection."""

    number: int
    body: bytes


class Publish(msgspec.Struct, frozen=True, tag="publish"):
    """The learner's current policy."""

    snapshot: Snapshot


Frame = (
    Hello
    | TemplateSeen
    | TrajectoryBatch
    | InjectionFailed
    | Rated
    | Ask
    | Abandon
    | Progress
    | Answer
    | Question
    | Answered
    | Publish
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class ChannelError(Exception):
    """The peer sent something that is not a frame; close the connection."""


def encode(frame: Frame) -> bytes:
    """Return the frame with its length prefix."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cut a byte stream into frames.  Feed it bytes as they come; it keeps an incomplete tail.

    Raises
    ------
    ChannelError
        The stream does not hold frames; the reader must not be used again.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that `data` completes."""
        buffer = self._buffer
        buffer += data
        frames: list[Frame] = []
        start = 0
        while len(buffer) - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME:
                raise ChannelError(f"frame of {length} bytes, the limit is {MAX_FRAME}")
            end = start + 4 + length
            if end > len(buffer):
                break
            try:
                frames.append(_decoder.decode(memoryview(buffer)[start + 4 : end].tobytes()))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ChannelError(f"frame does not decode: {error}") from error
            start = end
        if start:
            del buffer[:start]
        return frames
