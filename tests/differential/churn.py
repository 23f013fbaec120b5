"""Connections opened, used and dropped in random states, by every way a connection can end.

A connection is brought into one of `STATES` and then ended by one of `ENDS`; up to `WIDTH` are kept open at a
time, so that many are in the middle of something when others go.  What is counted afterwards is up to the
caller: nothing may be left of any of them.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter, deque
from typing import Final

from tests.integration.raw import FLUSH, SYNC, bind, execute, message, parse, query

WIDTH: Final = 16
NEAREST: Final = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 3"
VECTOR: Final = b"[0.1,0.2,0.3]"
SEARCH: Final = parse(NEAREST) + bind(VECTOR) + execute()
LARGE: Final = "SELECT repeat('x', 10000) FROM generate_series(1, 2000)"

STATES: Final = (
    "nothing sent",
    "encryption asked for",
    "startup half sent",
    "startup sent",
    "authenticating",
    "wrong password",
    "no such database",
    "idle",
    "idle after queries",
    "in transaction",
    "in failed transaction",
    "in query",
    "in pipeline",
    "in pipeline of many",
    "in copy in",
    "in copy out",
    "mid-row",
    "suspended portal",
    "message half sent",
    "not the protocol",
)
ENDS: Final = ("terminate", "fin", "half-close", "reset")


class Churn:
    """A crowd of clients; `address` is the proxy's."""

    def __init__(self, address: tuple[str, int], database: str, user: str, seed: int) -> None:
        self._address = address
        self._database = database
        self._user = user
        self._random = random.Random(seed)
        self._open: deque[socket.socket] = deque()
        self.done: Counter[str] = Counter()

    def run(self, count: int) -> None:
        """Open `count` connections, each in a random state, and end them all."""
        for _ in range(count):
            state = self._random.choice(STATES)
            self._open.append(self._connect(state))
            self.done[state] += 1
            while len(self._open) > self._random.randrange(1, WIDTH):
                self._end(self._open.popleft())
        while self._open:
            self._end(self._open.popleft())

    # -- states ----------------------------------------------------------------------------------------------------

    def _connect(self, state: str) -> socket.socket:
        sock = socket.create_connection(self._address, timeout=30)
        startup = self._startup(self._user, self._database)
        if state == "nothing sent":
            return sock
        if state == "encryption asked for":
            sock.sendall(struct.pack("!II", 8, 80877103))
        elif state == "not the protocol":
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        elif state == "startup half sent":
            sock.sendall(startup[: self._random.randrange(1, len(startup))])
        elif state == "startup sent":
            sock.sendall(startup)
        elif state == "no such database":
            sock.sendall(self._startup(self._user, "no_such_database"))
        elif state in ("authenticating", "wrong password"):
            sock.sendall(self._startup("auth_password", self._database))
            assert sock.recv(1) == b"R"
            if state == "wrong password":
                sock.sendall(message("p", b"wrong\0"))
        else:
            sock.sendall(startup)
            self._until_ready(sock)
            self._bring(sock, state)
        return sock

    def _bring(self, sock: socket.socket, state: str) -> None:
        """Bring a session that has begun into a state."""
        if state == "idle after queries":
            sock.sendall(SEARCH + SYNC + query("SELECT 1") + SEARCH + SYNC)
            for _ in range(3):
                self._until_ready(sock)
        elif state == "in transaction":
            sock.sendall(query("BEGIN") + SEARCH + SYNC)
            self._until_ready(sock)
            self._until_ready(sock)
        elif state == "in failed transaction":
            sock.sendall(query("BEGIN; SELECT 1/0"))
            self._until_ready(sock)
        elif state == "in query":
            sock.sendall(query("SELECT pg_sleep(30)"))
        elif state == "in pipeline":
            sock.sendall(SEARCH + parse("SELECT pg_sleep(0.01)") + bind() + execute())
        elif state == "in pipeline of many":
            sock.sendall((SEARCH + SYNC) * 50)
        elif state == "in copy in":
            sock.sendall(query("COPY t FROM STDIN") + message("d", b"1\tone\n") * 10 + message("d", b"2\t"))
        elif state == "in copy out":
            sock.sendall(query(f"COPY ({LARGE}) TO STDOUT"))
            sock.recv(1000)
        elif state == "mid-row":
            sock.sendall(query(LARGE))
            sock.recv(self._random.randrange(1, 20_000))
        elif state == "suspended portal":
            sock.sendall(query("BEGIN") + parse(NEAREST) + bind(VECTOR) + execute("", 1) + FLUSH)
            self._until_ready(sock)
        elif state == "message half sent":
            sock.sendall(SEARCH[: self._random.randrange(1, len(SEARCH))])

    def _startup(self, user: str, database: str) -> bytes:
        body = struct.pack("!I", 3 << 16) + f"user\0{user}\0database\0{database}\0\0".encode()
        return struct.pack("!I", len(body) + 4) + body

    def _until_ready(self, sock: socket.socket) -> None:
        """Read one message after the other up to a ReadyForQuery."""
        while True:
            head = self._exactly(sock, 5)
            self._exactly(sock, struct.unpack_from("!I", head, 1)[0] - 4)
            if head[:1] == b"Z":
                return

    def _exactly(self, sock: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = sock.recv(size - len(data))
            if not piece:
                raise EOFError(f"closed within a message; so far {data!r}")
            data += piece
        return data

    # -- ends ------------------------------------------------------------------------------------------------------

    def _end(self, sock: socket.socket) -> None:
        way = self._random.choice(ENDS)
        self.done[way] += 1
        try:
            if way == "terminate":
                sock.sendall(message("X"))
            elif way == "half-close":
                sock.shutdown(socket.SHUT_WR)
            elif way == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # ended by the other side already
        sock.close()
