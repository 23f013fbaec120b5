"""Random scripts from a seed: valid and semi-valid pipelines, as a list of *bursts* between which one may wait.

A burst is what a client might send in one go: a few extended messages up to a Sync (or without one), a Query,
a COPY with its data, a FunctionCall.  Names are few, so that they collide; statements are picked by weight
from tables, so that most scripts hold transactions, vector queries and settings at once.  Nothing here knows
what the server will answer.

Every script ends the same way: a Sync, a look at what must not have leaked, and the end of the client's stream.
"""

from __future__ import annotations

import random
from typing import Final

NAMES: Final = ("-", "-", "-", "s1", "s2")
PORTALS: Final = ("-", "-", "-", "p1", "p2")
V: Final = "'[0.1,0.2,0.3]'"
NEAREST: Final = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 3"

# (weight, text): what both protocols may carry.
STATEMENTS: Final = (
    (8, "SELECT 1"),
    (3, "SELECT generate_series(1, 7)"),
    (4, "SELECT * FROM t"),
    (5, "INSERT INTO t VALUES (1, 'one')"),
    (2, "INSERT INTO t VALUES (2, 'é') RETURNING *"),
    (2, "UPDATE t SET i = i + 1"),
    (2, "DELETE FROM t"),
    (4, "SELECT 1/0"),
    (2, "SELECT 'é', nonsense FROM t"),
    (1, "SELEC 1"),
    (1, ""),
    (1, ";"),
    (1, "/* c */ -- d\\n"),
    (9, f"SELECT id FROM items ORDER BY embedding <-> {V} LIMIT 3"),
    (3, f"SELECT id, category FROM items WHERE category = 1 ORDER BY embedding <-> {V} LIMIT 2 OFFSET 1"),
    (2, f"WITH w AS (SELECT id FROM items ORDER BY embedding <-> {V} LIMIT 4) SELECT * FROM w ORDER BY id"),
    (1, f"SELECT id FROM items ORDER BY embedding <-> {V} LIMIT 1 FOR UPDATE"),
    (1, f"SELECT id/0 FROM items ORDER BY embedding <-> {V} LIMIT 3"),
    (1, "SELECT id FROM items ORDER BY embedding <-> '[1,2]' LIMIT 3"),
    (1, f"SELECT nonsense FROM items ORDER BY embedding <-> {V} LIMIT 3"),
    (7, "BEGIN"),
    (6, "COMMIT"),
    (4, "ROLLBACK"),
    (3, "SAVEPOINT a"),
    (3, "ROLLBACK TO a"),
    (2, "RELEASE a"),
    (1, "BEGIN ISOLATION LEVEL SERIALIZABLE"),
    (1, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"),
    (1, "COMMIT AND CHAIN"),
    (1, "ROLLBACK AND CHAIN"),
    (5, "SHOW hnsw.ef_search"),
    (1, "SELECT current_setting('hnsw.ef_search')"),
    (2, "SET hnsw.ef_search = 55"),
    (2, "SET LOCAL hnsw.ef_search = 56"),
    (2, "RESET hnsw.ef_search"),
    (1, "SET hnsw.ef_search TO DEFAULT"),
    (1, "RESET ALL"),
    (1, "SELECT set_config('hnsw.ef_search', '57', true)"),
    (1, "SELECT set_config('hnsw.ef_search', '58', false)"),
    (1, "SET hnsw.ef_search = 0"),
    (2, "DISCARD ALL"),
    (1, "DISCARD PLANS"),
    (2, "DEALLOCATE ALL"),
    (1, "SET search_path = other, public"),
    (1, "SET application_name = 'x'"),
    (1, "SET standard_conforming_strings = off"),
    (1, "SET client_encoding = 'LATIN1'"),
    (1, "LISTEN c"),
    (1, "NOTIFY c, 'x'"),
    (1, "UNLISTEN *"),
    (2, "DECLARE k CURSOR FOR SELECT generate_series(1, 5)"),
    (1, f"DECLARE k CURSOR WITH HOLD FOR SELECT id FROM items ORDER BY embedding <-> {V} LIMIT 4"),
    (2, "FETCH 2 FROM k"),
    (1, "MOVE 1 FROM k"),
    (1, "CLOSE k"),
    (1, "PREPARE q AS SELECT 5"),
    (1, "EXECUTE q"),
    (1, "DEALLOCATE q"),
    (1, "DO $$ BEGIN INSERT INTO t VALUES (60, 'd'); END $$"),
    (1, "CALL commits()"),
    (1, "SELECT warns(1)"),
    (1, "SELECT rises(3)"),
    (1, "EXPLAIN (COSTS OFF) SELECT * FROM t"),
    (1, f"EXPLAIN (COSTS OFF) SELECT id FROM items ORDER BY embedding <-> {V} LIMIT 3"),
    (1, "COPY t TO STDOUT"),
    (1, "COPY (SELECT generate_series(1, 9)) TO STDOUT"),
    (1, "VACUUM t"),
    (1, "CREATE TEMP TABLE temporary (i int)"),
    (1, "SELECT * FROM temporary"),
    (1, "SELECT 1 AS i INTO TEMP temporary"),
    (1, "TRUNCATE t"),
    (1, "SELECT repeat('x', 300000)"),
    (1, "SELECT pg_sleep(0.001)"),
    (1, "TABLE t"),
    (1, "VALUES (1, 'a'), (2, 'b')"),
)

# (weight, Parse with types, Bind without names, Describe may be asked): parametrised statements.
BOUND: Final = (
    (10, NEAREST, f"({V},)"),
    (4, NEAREST, "in=1 (vector(0.1, 0.2, 0.3),)"),
    (2, NEAREST, "in=1 out=1 (vector(0.1, 0.2, 0.3),)"),
    (1, NEAREST, "('[1,2]',)"),
    (1, NEAREST, "('no vector',)"),
    (1, NEAREST, "(None,)"),
    (1, NEAREST, "()"),
    (3, "SELECT id FROM items WHERE category = $2 ORDER BY embedding <-> $1 LIMIT $3", f"({V}, '1', '2')"),
    (1, "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT $2", f"({V}, '-1')"),
    (1, "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT $2", f"({V}, None)"),
    (3, "SELECT $1::int + 1", "('41',)"),
    (1, "SELECT $1::int + 1", "('many',)"),
    (2, "SELECT $1::text, $2::bytea", "('é', None)"),
    (2, "INSERT INTO t VALUES ($1, $2)", "('3', 'three')"),
    (1, "INSERT INTO t VALUES ($1, 'four') RETURNING i", "in=1 out=1 (int4(4),)"),
    (1, "SELECT length($1)", "('{x*200000}',)"),
    (1, "SELECT 1/$1::int", "('0',)"),
)
COPY_DATA: Final = (
    "CopyData '1\\tone\\n'",
    "CopyData '2\\ttwo\\n3\\tthree\\n'",
    "CopyData '4\\t'",
    "CopyData 'four\\n'",
    "CopyData 'no number\\tx\\n'",
    "CopyData ''",
    "CopyData '5\\t{y*70000}\\n'",
)
COPY_ENDS: Final = ("CopyDone", "CopyDone", "CopyDone", "CopyFail enough", "")
STRAY: Final = (
    "Flush",
    "Sync",
    "Sync",
    "CopyDone",
    "CopyData '9\\tstray\\n'",
    "CopyFail stray",
    "Bind - nowhere ()",
    "Execute nowhere 0",
    "Describe S nowhere",
    "Describe P nowhere",
    "Close S nowhere",
    "Close P nowhere",
    "FunctionCall 177 ('1', '2')",
    "FunctionCall 177 ('1', 'two')",
    "FunctionCall 177 ('1',)",
    "FunctionCall 4000000000 ()",
)
RARE: Final = (
    "Raw b'y\\0\\0\\0\\4'",
    "Terminate",
    "Raw b'Q\\0\\0\\0\\4'",
    "Raw b'B\\0\\0\\0\\5x'",
    "half-close",
)
EPILOGUE: Final = (
    "settle",
    "Sync",
    "settle",
    "Query SHOW hnsw.ef_search",
    "Query SELECT name, from_sql FROM pg_prepared_statements WHERE name NOT LIKE '\\_ruvector%' ORDER BY 1",
    "Query SELECT name FROM pg_cursors WHERE name NOT LIKE '\\_ruvector%' ORDER BY 1",
    "Query ROLLBACK",
    "Query SHOW hnsw.ef_search",
)


class Generator:
    """Makes one script; the same seed makes the same script."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = random.Random(seed)

    def script(self) -> str:
        """Return the script, with its seed in a comment."""
        lines = [f"# seed {self.seed}"]
        if self._chance(0.05):
            lines.append("connect options=-c~hnsw.ef_search=54")
        if self._chance(0.15):
            lines.append("settle")
        # Patience: how likely the client waits for answers before it goes on.
        patience = self._random.choice((0.0, 0.2, 0.5, 1.0))
        for _ in range(self._random.randint(1, 12)):
            if self._chance(0.08):
                lines.append(f"portions {self._random.choice((0, 1, 2, 5, 7, 64, 1000))}")
            lines += self._burst()
            if self._chance(patience):
                lines.append("settle")
            elif self._chance(0.1):
                lines.append(f"pause {self._random.choice((0, 1, 3))}")
        return "\n".join((*lines, *EPILOGUE)) + "\n"

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _pick(self, table: tuple[tuple[object, ...], ...]) -> tuple[object, ...]:
        return self._random.choices(table, [float(str(row[0])) for row in table])[0]

    def _burst(self) -> list[str]:
        way = self._random.random()
        if way < 0.50:
            return self._extended()
        if way < 0.80:
            return [self._query()]
        if way < 0.90:
            return self._copy_in()
        if way < 0.985:
            return [self._random.choice(STRAY)]
        return [self._random.choice(RARE)]

    def _query(self) -> str:
        count = self._random.choice((1, 1, 1, 1, 2, 2, 3, 5))
        text = "; ".join(str(self._pick(STATEMENTS)[1]) for _ in range(count))
        return f"Query {text}{self._random.choice(('', '', ';', ' ; '))}"

    def _extended(self) -> list[str]:
        lines: list[str] = []
        for _ in range(self._random.choice((1, 1, 1, 2, 3, 5))):
            lines += self._cycle()
            if self._chance(0.1):
                lines.append("Flush")
                if self._chance(0.5):
                    lines.append("settle")
            if self._chance(0.06):
                lines.append(self._random.choice(STRAY))
        if self._chance(0.93):
            lines.append("Sync")
        return lines

    def _cycle(self) -> list[str]:
        """Parse, Bind, Describe, Execute, Close: each may be missing."""
        name, portal = self._random.choice(NAMES), self._random.choice(PORTALS)
        if self._chance(0.5):
            _, sql, values = self._pick(BOUND)
        else:
            sql, values = self._pick(STATEMENTS)[1], "()"
        lines = []
        if self._chance(0.88):
            if name != "-" and self._chance(0.6):
                lines.append(f"Close S {name}")
            lines.append(f"Parse {name} {sql}".rstrip())
        if self._chance(0.2):
            lines.append(f"Describe S {name}")
        if self._chance(0.05):
            lines += ["Flush", "settle"]
        if self._chance(0.93):
            if portal != "-" and self._chance(0.6):
                lines.append(f"Close P {portal}")
            lines.append(f"Bind {portal} {name} {values}")
        if self._chance(0.3):
            lines.append(f"Describe P {portal}")
        if self._chance(0.93):
            lines.append(f"Execute {portal} {self._random.choice((0, 0, 0, 0, 1, 2, 100))}")
        if self._chance(0.15):
            lines.append(f"Execute {portal} {self._random.choice((0, 1))}")
        if self._chance(0.1):
            lines.append(f"Close P {portal}")
        return lines

    def _copy_in(self) -> list[str]:
        data = [self._random.choice(COPY_DATA[:3] * 3 + COPY_DATA) for _ in range(self._random.randint(0, 3))]
        end = [line for line in [self._random.choice(COPY_ENDS)] if line]
        if self._chance(0.5):
            more = self._random.choice(("", "; SELECT 1", f"; {STATEMENTS[13][1]}"))
            wait = ["settle"] if self._chance(0.4) else []
            return [f"Query COPY t FROM STDIN{more}", *wait, *data, *end]
        lines = ["Parse - COPY t FROM STDIN", "Bind - - ()", "Execute - 0"]
        lines += self._random.choice(([], ["Flush"], ["Sync"], ["Sync", "settle"], ["Flush", "settle"]))
        return [*lines, *data, *end, *(["Sync"] if self._chance(0.9) else [])]
