"""What is wrong with bytes that are no valid message, and who sent them."""

from __future__ import annotations

import enum


class Sender(enum.StrEnum):
    """The side of the connection that a message comes from."""

    FRONTEND = "frontend"
    BACKEND = "backend"


class ProtocolViolation(Exception):  # noqa: N818 - the protocol's own term
    """A body is malformed: `sender` broke the protocol in `message`; `problem` says how.

    The stream can still be cut, because the header of the message was sound: a relay may pass the message on
    and leave the verdict to the receiver.  Sending the same bytes again gives the same error.

    Attributes
    ----------
    problem
        What is wrong, in words.  Never quotes the contents, which may be secret.
    message
        Name of the message as in the protocol documentation; None where it cannot be told.
    sender
        Whose fault it is; None where neither message nor caller tells.
    """

    sqlstate = b"08P01"
    """The server's own code for such a case, "protocol_violation"."""

    def __init__(self, problem: str, *, message: str | None = None, sender: Sender | None = None) -> None:
        self.problem = problem
        self.message = message
        self.sender = sender
        culprit = f"{sender} sent" if sender else "peer sent"
        super().__init__(f"{culprit} a malformed {message}: {problem}" if message else f"{culprit} {problem}")


class FramingViolation(ProtocolViolation):
    """A header is impossible, so nobody knows where the next message begins: close both sides."""


class MessageTooLong(ProtocolViolation):
    """A message is longer than the receiver takes: sound, but too much."""

    sqlstate = b"54000"
