"""Plays a script on one connection and writes down every message that the client was sent.

The socket is read while it is written: no pipeline, however long, can lock up.  A script that does not end
otherwise ends the client's side of the stream and reads until the server closes.  What differs between any two
connections is masked: process ids, cancel keys, object ids of tables.  A connection that is reset counts as closed: which of the
two it is depends on what the kernel had still in its buffers.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import psycopg

from tests.differential.notation import Step, expected_tags

Message = tuple[str, bytes]

QUIET_SECONDS: Final = 0.004
"""How long nothing must come for the server to count as settled.  A wrong guess only moves a pause."""

_FIRST_OF_USERS: Final = 16384  # object ids below belong to the system

PATIENCE_SECONDS: Final = 30.0


class ScriptError(AssertionError):
    """The script's own expectation was not met, or nothing came."""


@dataclass
class Transcript:
    """What the client saw, and how many messages it had seen each time that the server was quiet."""

    messages: list[Message] = field(default_factory=list)
    closed: bool = False
    settled: list[int] = field(default_factory=list)
    problem: str | None = None


class Conversation:
    """One connection; `address` is (host, port)."""

    def __init__(self, address: tuple[str, int], database: str, user: str) -> None:
        self._address = address
        self._database = database
        self._user = user
        self._buffer = bytearray()
        self._out = bytearray()
        self._portion = 0
        self._key = b""
        self.seen = Transcript()

    def play(
        self,
        steps: list[Step],
        *,
        settled: list[int] | None = None,
        elsewhere: Callable[[str], None] | None = None,
    ) -> Transcript:
        """Play a script to its end; `settled` are the counts of the direct run, to be waited for."""
        self._socket = socket.create_connection(self._address, timeout=PATIENCE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._waits = list(settled) if settled is not None else None
        self._elsewhere = elsewhere
        self._over = False
        self._position = 0  # in the transcript: what expectations have looked at
        try:
            if steps and steps[0].word == "connect":
                self._start(steps[0].argument)
                steps = steps[1:]
            else:
                self._start("")
            for step in steps:
                if step.is_message:
                    self._out += step.data
                else:
                    self._send()
                    getattr(self, "_do_" + step.word.replace("-", "_").replace("<<", "expect"))(step.argument)
                if self._over:
                    break
            self._send()
            if not self._over:
                self._do_half_close("")
                self._do_end("")
        except ScriptError as error:
            self.seen.problem = str(error)
        finally:
            self._socket.close()
        return self.seen

    # -- the socket ------------------------------------------------------------------------------------------------

    def _start(self, argument: str) -> None:
        parameters = dict(word.split("=", 1) for word in argument.split())
        major, _, minor = parameters.pop("protocol", "3.0").partition(".")
        body = struct.pack("!HH", int(major), int(minor))
        for name, value in {"user": self._user, "database": self._database, **parameters}.items():
            body += f"{name}\0{value}\0".replace("~", " ").encode()
        body += b"\0"
        self._out += struct.pack("!I", len(body) + 4) + body
        self._send()
        self._read_until(lambda: self._has_ready(1) or self._has_error())
        self._position = len(self.seen.messages)

    def _send(self) -> None:
        """Write what has been collected, in portions, reading all the while."""
        while self._out and not self.seen.closed:
            piece = bytes(self._out[: self._portion or len(self._out)])
            try:
                sent = self._socket.send(piece)
                del self._out[:sent]
                self._turn(0.0, writing=False)
            except BlockingIOError:
                self._turn(1.0, writing=True)
            except (BrokenPipeError, ConnectionResetError):
                break
        self._out.clear()

    def _turn(self, seconds: float, *, writing: bool = False) -> bool:
        """Wait for the socket and read what there is; tell whether anything came."""
        if self.seen.closed:
            return False
        self._poll.register(self._socket, select.POLLIN | (select.POLLOUT if writing else 0))
        events = self._poll.poll(seconds * 1000)
        if not events or not events[0][1] & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return False
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self.seen.closed = True
            if self._buffer:
                self.seen.messages.append(("incomplete", bytes(self._buffer)))
            return False
        self._buffer += data
        self._cut()
        return True

    def _cut(self) -> None:
        position = 0
        buffer = self._buffer
        while len(buffer) - position >= 5:
            end = position + 1 + struct.unpack_from("!I", buffer, position + 1)[0]
            if len(buffer) < end:
                break
            tag, body = chr(buffer[position]), bytes(buffer[position + 5 : end])
            if tag == "K":
                self._key = body
            self.seen.messages.append((tag, masked(tag, body)))
            position = end
        del buffer[:position]

    def _read_until(self, enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not enough():
            if self.seen.closed:
                return
            if time.monotonic() > deadline:
                raise ScriptError(f"nothing more came after {tags(self.seen.messages[self._position :])!r}")
            self._turn(0.5)

    def _has_ready(self, count: int) -> bool:
        return sum(tag == "Z" for tag, _ in self.seen.messages[self._position :]) >= count

    def _has_error(self) -> bool:
        return any(tag == "E" for tag, _ in self.seen.messages[self._position :])

    # -- instructions ----------------------------------------------------------------------------------------------

    def _do_expect(self, argument: str) -> None:
        wanted = expected_tags(argument)
        self._read_until(lambda: len(self.seen.messages) - self._position >= len(wanted))
        came = [tag for tag, _ in self.seen.messages[self._position : self._position + len(wanted)]]
        self._position += len(came)
        if came != wanted:
            raise ScriptError(f"expected {' '.join(wanted)}, got {' '.join(came)}")

    def _do_ready(self, argument: str) -> None:
        count = int(argument or 1)
        self._read_until(lambda: self._has_ready(count))
        self._position = len(self.seen.messages)

    def _do_settle(self, argument: str) -> None:
        if self._waits is not None:
            count = self._waits.pop(0) if self._waits else 0
            self._read_until(lambda: len(self.seen.messages) >= count)
        else:
            while self._turn(QUIET_SECONDS):
                pass
        self.seen.settled.append(len(self.seen.messages))
        self._position = len(self.seen.messages)

    def _do_pause(self, argument: str) -> None:
        deadline = time.monotonic() + float(argument) / 1000
        while (left := deadline - time.monotonic()) > 0 and not self.seen.closed:
            self._turn(left)

    def _do_portions(self, argument: str) -> None:
        self._portion = int(argument)

    def _do_elsewhere(self, argument: str) -> None:
        assert self._elsewhere is not None
        self._elsewhere(argument)

    def _do_cancel(self, argument: str) -> None:
        send_cancel(self._address, self._key)

    def _do_half_close(self, argument: str) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed by the server already

    def _do_reset(self, argument: str) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._over = True

    def _do_end(self, argument: str) -> None:
        self._read_until(lambda: self.seen.closed)
        self._position = len(self.seen.messages)


def send_cancel(address: tuple[str, int], key: bytes) -> None:
    """Send a CancelRequest with the body of a BackendKeyData; return when the other side has closed."""
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as sock:
        sock.sendall(struct.pack("!II", 8 + len(key), 80877102) + key)
        try:
            while sock.recv(64):
                pass
        except ConnectionResetError:
            pass


def masked(tag: str, body: bytes) -> bytes:
    """Blank out what differs between any two connections."""
    if tag == "K":
        return b"\0" * len(body)
    if tag == "A":
        return b"\0\0\0\0" + body[4:]
    if tag == "T":
        return _without_table_oids(body)
    return body


def _without_table_oids(body: bytes) -> bytes:
    """Blank out which table a column is of, if it is one of the user's: a temporary one is always another."""
    out = bytearray(body)
    position = 2
    for _ in range(int.from_bytes(body[:2], "big")):
        position = body.index(b"\0", position) + 1
        if int.from_bytes(body[position : position + 4], "big") >= _FIRST_OF_USERS:
            out[position : position + 4] = b"\xff\xff\xff\xff"
        position += 18
    return bytes(out)


def tags(messages: list[Message]) -> str:
    return "".join(tag for tag, _ in messages)


def direct_executor(dsn: str) -> tuple[psycopg.Connection[tuple[object, ...]], Callable[[str], None]]:
    """Return a connection for ``elsewhere`` lines and for looking at tables, and what runs a statement on it."""
    connection = psycopg.connect(dsn, autocommit=True)

    def run(sql: str) -> None:
        connection.execute(sql.encode())

    return connection, run
