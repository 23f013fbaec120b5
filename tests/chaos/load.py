"""Clients that go on whatever happens, and check every answer: which is theirs, and is it right?

Every question carries a token of its client and a running number, and the answer has to bring back just these:
a message to the wrong client, an answer to another question or a wrong result are seen at once.  What ends a
connection is noted as the client saw it, and it connects again.
"""

from __future__ import annotations

import itertools
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

from tests.integration.raw import (
    SYNC,
    Message,
    RawClient,
    bind,
    execute,
    first_values,
    message,
    parse,
    query,
)

PATIENCE = 20.0
"""Seconds without a byte after which a client calls it a hang."""

VECTOR = "SELECT id FROM items ORDER BY embedding <-> $1::vector LIMIT 5"

Address = tuple[str, int]


class Seen:
    """What the clients of one road have seen since `begin`."""

    def __init__(self) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()

    @property
    def hangs(self) -> int:
        """How often nothing came at all."""
        return self.errors["hang"]


def sqlstate(body: bytes) -> str:
    """Return the code of an ErrorResponse."""
    fields = {field[:1]: field[1:] for field in body.split(b"\0") if field}
    return fields.get(b"C", b"?????").decode()


def token_of(messages: list[Message]) -> bytes:
    """Return the first value of the first row."""
    return next(iter(first_values(messages)), b"")


class Load:
    """`count` clients on one road, each in a thread; a context manager."""

    def __init__(
        self, name: str, address: Address, count: int, seed: int, truth: dict[str, list[bytes]]
    ) -> None:
        self.name, self.address = name, address
        self._truth = truth
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.seen = Seen()
        self._threads = [
            threading.Thread(target=self._run, args=(f"{name}-{number}", random.Random(f"{seed}-{number}")))
            for number in range(count)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE + 10)

    def begin(self) -> Seen:
        """Return what was seen so far, and begin anew."""
        with self._lock:
            seen, self.seen = self.seen, Seen()
            return seen

    def _run(self, name: str, dice: random.Random) -> None:
        numbers = itertools.count()
        while not self._stop.is_set():
            try:
                with RawClient(self.address, "postgres", "postgres") as client:
                    client.socket.settimeout(PATIENCE)
                    while not self._stop.is_set():
                        self._ask(client, name, next(numbers), dice)
                        if dice.random() < 0.02:  # clients come and go
                            client.send(message("X"))
                            break
            except Exception as error:
                with self._lock:
                    self.seen.errors[kind_of(error)] += 1
                self._stop.wait(0.05)

    def _ask(self, client: RawClient, name: str, number: int, dice: random.Random) -> None:
        token = f"{name}:{number}"
        replies, expected = dice.choice(STATEMENTS)(client, token, dice, self._truth)
        errors = [sqlstate(body) for tag, body in replies if tag == "E"]
        with self._lock:
            for code in errors:
                self.seen.errors[code] += 1
            if errors:
                return
            if first_values(replies) == expected:
                self.seen.answered += 1
            else:
                self.seen.wrong.append(f"{token}: {first_values(replies)[:3]!r} instead of {expected[:3]!r}")


Statement = Callable[
    [RawClient, str, random.Random, dict[str, list[bytes]]], tuple[list[Message], list[bytes]]
]


def _simple(
    client: RawClient, token: str, dice: random.Random, truth: dict[str, list[bytes]]
) -> tuple[list[Message], list[bytes]]:
    return client.run(query(f"SELECT '{token}'")), [token.encode()]


def _extended(
    client: RawClient, token: str, dice: random.Random, truth: dict[str, list[bytes]]
) -> tuple[list[Message], list[bytes]]:
    sent = (parse("SELECT $1::text"), bind(token.encode()), execute(), SYNC)
    return client.run(*sent), [token.encode()]


def _long(
    client: RawClient, token: str, dice: random.Random, truth: dict[str, list[bytes]]
) -> tuple[list[Message], list[bytes]]:
    text = f"SELECT '{token}' || repeat('x', 2000) FROM generate_series(1, 40)"
    return client.run(query(text)), [token.encode() + b"x" * 2000] * 40


def _transaction(
    client: RawClient, token: str, dice: random.Random, truth: dict[str, list[bytes]]
) -> tuple[list[Message], list[bytes]]:
    text = f"BEGIN; INSERT INTO journal VALUES ('{token}'); SELECT '{token}'; COMMIT"
    return client.run(query(text)), [token.encode()]


def _vector(
    client: RawClient, token: str, dice: random.Random, truth: dict[str, list[bytes]]
) -> tuple[list[Message], list[bytes]]:
    vector = dice.choice(sorted(truth))
    return client.run(parse(VECTOR), bind(vector.encode()), execute(), SYNC), truth[vector]


STATEMENTS: tuple[Statement, ...] = (_simple, _extended, _long, _transaction, _vector, _vector)


def kind_of(error: Exception) -> str:
    """Put what ended a connection into a word: the server's last code where it said one."""
    if isinstance(error, TimeoutError):
        return "hang"
    if isinstance(error, EOFError):
        for note in getattr(error, "__notes__", ()):
            found = _last_code(note)
            if found:
                return found
        return "closed"
    if isinstance(error, ConnectionError):
        return {"ConnectionRefusedError": "refused", "ConnectionResetError": "reset"}.get(
            type(error).__name__, "broken pipe"
        )
    return type(error).__name__


def _last_code(note: str) -> str | None:
    """Return the SQLSTATE in what `RawClient.until_ready` has noted."""
    _, found, rest = note.rpartition("\\x00C")
    return rest[:5] if found else None


def wait_calm(load: Load, seconds: float) -> float | None:
    """Wait until every kind of statement is answered and none fails for half a second; return how long it took."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        load.begin()
        time.sleep(0.5)
        seen = load.seen
        if seen.answered >= 10 and not seen.errors and not seen.wrong:
            return time.monotonic() - started - 0.5
    return None


def vector_literal(numbers: tuple[float, ...]) -> str:
    """Write a vector."""
    return "[" + ",".join(f"{number:.3f}" for number in numbers) + "]"


def packed(number: int) -> bytes:
    """Return a 32-bit number as it travels."""
    return struct.pack("!I", number)
