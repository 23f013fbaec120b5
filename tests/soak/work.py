"""What the clients of the soak do: one seeded course of work, the same on both roads.

A course is a sequence of steps; a step sends something, and returns what came back in a form that can be compared.
Each client has tables of its own, so that its course depends on nobody else's moment.  Every step is deterministic:
ORDER BY where there are several rows, and vectors whose neighbours any setting of the index finds.
"""

from __future__ import annotations

import random
import select
import socket
import struct
from collections.abc import Callable, Iterator

from tests.differential.conversation import masked
from tests.integration.raw import (
    SYNC,
    Message,
    RawClient,
    bind,
    close,
    describe,
    execute,
    message,
    parse,
    query,
)

VECTOR = "SELECT id FROM items ORDER BY embedding <-> $1::vector LIMIT 5"

Address = tuple[str, int]
Result = list[Message]


class Course:
    """One client's course on one road; `queries` counts its statements."""

    def __init__(self, address: Address, number: int, road: str, seed: int, vectors: list[str]) -> None:
        self._address = address
        self._dice = random.Random(f"{seed}-{number}")
        self._vectors = vectors
        self._table = f"own_{road}_{number}"
        self._plain = f"own_{number}"
        self._client = self._connect()
        self.queries = 0
        self._run(query(f"DROP TABLE IF EXISTS {self._table}"))
        self._run(query(f"CREATE TABLE {self._table} (id int PRIMARY KEY, word text, embedding vector(3))"))
        self._run(
            query(
                f"INSERT INTO {self._table} SELECT i, md5(i::text), ARRAY[i, i, 1] FROM generate_series(1, 50) i"
            )
        )
        self._run(
            query(f"CREATE INDEX {self._table}_hnsw ON {self._table} USING hnsw (embedding vector_l2_ops)")
        )

    def step(self) -> tuple[str, Result]:
        """Do the next thing; return its name and what came back."""
        name, work, _ = self._dice.choices(_STEPS, _WEIGHTS)[0]
        found = list(work(self))
        return name, [(tag, masked(tag, self._masked(body))) for tag, body in found]

    def end(self) -> None:
        """Say goodbye."""
        self._run(query(f"DROP TABLE IF EXISTS {self._table}"))
        self._client.send(message("X"))
        self._client.socket.close()

    def _connect(self) -> RawClient:
        client = RawClient(self._address, "postgres", "postgres")
        client.socket.settimeout(120)
        return client

    def _run(self, *messages: bytes, ready: int = 1) -> Result:
        return self._client.run(*messages, ready=ready)

    def _masked(self, body: bytes) -> bytes:
        return body.replace(self._table.encode(), self._plain.encode())

    # -- steps -----------------------------------------------------------------------------------------------------

    def _simple(self) -> Iterator[Message]:
        self.queries += 1
        yield from self._run(query(f"SELECT {self._dice.randrange(10**6)}, 'é', NULL"))

    def _extended(self) -> Iterator[Message]:
        self.queries += 1
        value = str(self._dice.randrange(10**6)).encode()
        yield from self._run(parse("SELECT $1::int + 1"), bind(value), describe(), execute(), SYNC)

    def _pipeline(self) -> Iterator[Message]:
        count = self._dice.randint(2, 8)
        self.queries += count
        sent = [
            part
            for n in range(count)
            for part in (parse("SELECT $1::text"), bind(b"%d" % n), execute(), SYNC)
        ]
        yield from self._run(*sent, ready=count)

    def _vector(self) -> Iterator[Message]:
        self.queries += 1
        yield from self._run(parse(VECTOR), bind(self._dice.choice(self._vectors).encode()), execute(), SYNC)

    def _vector_text(self) -> Iterator[Message]:
        self.queries += 1
        yield from self._run(query(VECTOR.replace("$1", f"'{self._dice.choice(self._vectors)}'")))

    def _vectors_in_transaction(self) -> Iterator[Message]:
        self.queries += 6
        yield from self._run(query("BEGIN"))
        yield from self._run(parse(VECTOR, "v"), SYNC)
        for _ in range(2):
            yield from self._run(bind(self._dice.choice(self._vectors).encode(), name="v"), execute(), SYNC)
        yield from self._run(query("SHOW hnsw.ef_search"))
        yield from self._run(close("S", "v"), SYNC)
        yield from self._run(query("COMMIT"))

    def _own_will(self) -> Iterator[Message]:
        self.queries += 3
        yield from self._run(query(f"SET hnsw.ef_search = {self._dice.randint(50, 90)}"))
        yield from self._vector()
        yield from self._run(query("SHOW hnsw.ef_search"))
        yield from self._run(query("RESET hnsw.ef_search"))

    def _errors(self) -> Iterator[Message]:
        self.queries += 3
        for text in ("SELECT 1/0", "SELEC 1", "SELECT * FROM no_such_table"):
            yield from self._run(query(text))
        yield from self._run(parse("SELECT 1/$1::int"), bind(b"0"), execute(), SYNC)

    def _write(self) -> Iterator[Message]:
        self.queries += 3
        row = self._dice.randrange(1, 50)
        yield from self._run(
            query(f"UPDATE {self._table} SET word = '{self._dice.random()}' WHERE id = {row}")
        )
        yield from self._run(query(f"BEGIN; DELETE FROM {self._table} WHERE id = {row}; ROLLBACK"))
        yield from self._run(query(f"SELECT word FROM {self._table} WHERE id = {row}"))

    def _copy_in(self) -> Iterator[Message]:
        self.queries += 2
        self._client.send(query(f"COPY {self._table} (id, word) FROM STDIN"))
        tag, body = self._client.receive()
        yield tag, body
        rows = [b"%d\tword %d\n" % (n, n) for n in range(1000, 1000 + self._dice.randint(1, 300))]
        yield from self._run(*(message("d", row) for row in rows), message("c"))
        yield from self._run(query(f"DELETE FROM {self._table} WHERE id >= 1000"))

    def _copy_out(self) -> Iterator[Message]:
        self.queries += 1
        yield from self._run(query(f"COPY (SELECT id FROM {self._table} ORDER BY id) TO STDOUT"))

    def _large(self) -> Iterator[Message]:
        self.queries += 1
        text = "x" * self._dice.randint(10_000, 400_000)
        yield from self._run(parse("SELECT length($1), md5($1)"), bind(text.encode()), execute(), SYNC)

    def _cancelled(self) -> Iterator[Message]:
        self.queries += 1
        self._client.send(query("SELECT pg_sleep(600)"))
        while not select.select([self._client.socket], [], [], 0.2)[
            0
        ]:  # one that comes too early does nothing
            with socket.create_connection(self._address, timeout=120) as sock:
                body = struct.pack("!I", 80877102) + self._client.key
                sock.sendall(struct.pack("!I", len(body) + 4) + body)
                sock.recv(1)
        # Whether the server had begun to execute, and so had described the row, is chance on a busy machine.
        yield from ((tag, body) for tag, body in self._client.until_ready() if tag != "T")

    def _ddl(self) -> Iterator[Message]:
        self.queries += 3
        yield from self._run(query(f"ALTER TABLE {self._table} ADD COLUMN extra int DEFAULT 7"))
        yield from self._run(query(f"SELECT sum(extra) FROM {self._table} WHERE id < 1000"))
        yield from self._run(query(f"ALTER TABLE {self._table} DROP COLUMN extra"))

    def _reindex(self) -> Iterator[Message]:
        self.queries += 2
        yield from self._run(query(f"REINDEX INDEX {self._table}_hnsw"))
        yield from self._run(
            query(f"SELECT id FROM {self._table} WHERE id <= 50 ORDER BY embedding <-> '[7.1,7.1,1]' LIMIT 3")
        )

    def _reconnect(self) -> Iterator[Message]:
        if self._dice.random() < 0.5:
            self._client.send(message("X"))
        self._client.socket.close()
        self._client = self._connect()
        yield from self._simple()

    def _vanish(self) -> Iterator[Message]:
        """Reset the connection in the midst of a statement."""
        self._client.send(query("SELECT pg_sleep(0.05)"))
        self._client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client.socket.close()
        self._client = self._connect()
        yield from self._simple()


Step = Callable[[Course], Iterator[Message]]

_STEPS: tuple[tuple[str, Step, int], ...] = (
    ("simple", Course._simple, 30),
    ("extended", Course._extended, 30),
    ("pipeline", Course._pipeline, 15),
    ("vector", Course._vector, 25),
    ("vector as text", Course._vector_text, 15),
    ("vectors in a transaction", Course._vectors_in_transaction, 6),
    ("the client's own setting", Course._own_will, 3),
    ("errors", Course._errors, 3),
    ("writes", Course._write, 6),
    ("COPY in", Course._copy_in, 2),
    ("COPY out", Course._copy_out, 2),
    ("large parameter", Course._large, 1),
    ("cancel", Course._cancelled, 1),
    ("DDL", Course._ddl, 1),
    ("REINDEX", Course._reindex, 1),
    ("reconnect", Course._reconnect, 3),
    ("vanish", Course._vanish, 1),
)
_WEIGHTS = [weight for _, _, weight in _STEPS]
