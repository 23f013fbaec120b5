"""Questions from outside, carried to the learner over its unix socket, and the answers back.

Questions and answers are bytes here: what they say is for `learning.answering` and whoever asks.  One
connection for each question: they are few, and a learner that was restarted is found again by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from learning.channel import Answered, ChannelError, FrameReader, Question, encode

Ask = Callable[[bytes], Awaitable[bytes]]
"""Carries a question to the learner; raises `NoAnswerError`."""

TIMEOUT = 15.0
"""Seconds; the first question about a policy waits for the index of a sample of the table."""


class NoAnswerError(Exception):
    """The learner cannot be asked; the message says why."""


async def ask_learner(path: Path, body: bytes, *, timeout: float = TIMEOUT) -> bytes:
    """Return the learner's answer to one question.

    Raises
    ------
    NoAnswerError
        It cannot be reached, or says nothing in time.
    """
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(encode(Question(1, body)))
                return await _answer(reader)
            finally:
                writer.close()
    except TimeoutError:
        raise NoAnswerError(f"the learner did not answer within {timeout:g} s") from None
    except (OSError, ChannelError) as error:
        raise NoAnswerError(f"the learner cannot be reached: {error}") from error


async def _answer(reader: asyncio.StreamReader) -> bytes:
    frames = FrameReader()
    while data := await reader.read(1 << 18):
        for frame in frames.feed(data):
            if isinstance(frame, Answered):
                return frame.body
    raise ConnectionResetError("it closed the connection")
