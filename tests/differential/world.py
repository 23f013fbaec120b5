"""The server, one database and two proxies: normal, and with injection forced on every SELECT.

`items` holds 30 vectors, fewer than the default ef_search and fewer than the dictated one: the settings that
the proxy puts in force change no row, but would be seen by ``SHOW`` if they leaked.  `t` is for writing; a
script starts with it empty, and what it left there is part of the result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg

from learning.records import Settings
from tests.differential.conversation import Conversation, Transcript, direct_executor
from tests.differential.forwarder import Forwarder
from tests.differential.notation import Step
from tests.forced import ForcedAdapter
from tests.integration.proxied import Proxy

SETTINGS: Final[Settings] = (("hnsw.ef_search", "77"),)

_SCHEMA: Final = """
CREATE TABLE items (id int PRIMARY KEY, category int, embedding vector(3));
INSERT INTO items SELECT i, i % 3, ARRAY[sin(i), cos(i * 1.7), sin(i * 0.3)]::vector FROM generate_series(1, 30) i;
CREATE INDEX ON items USING hnsw (embedding vector_l2_ops);
CREATE TABLE t (i int, s text);
CREATE SCHEMA other;
CREATE TABLE other.items (id int PRIMARY KEY, category int, embedding vector(3));
INSERT INTO other.items SELECT 100 + id, category, embedding FROM items;
CREATE PROCEDURE commits() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO t VALUES (70, 'p'); COMMIT; END $$;
CREATE FUNCTION warns(int) RETURNS int LANGUAGE plpgsql AS
    $$ BEGIN RAISE NOTICE 'warned %', $1; RETURN $1; END $$;
CREATE FUNCTION rises(int) RETURNS SETOF int LANGUAGE plpgsql AS
    $$ BEGIN FOR i IN 1..$1 LOOP RETURN NEXT i; END LOOP; RAISE EXCEPTION 'risen' USING ERRCODE = 'RS001'; END $$;
"""

_OTHERS: Final = (
    "SELECT pid, state, query FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)
_GONE_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Server:
    """Where a running server is: the directory of its socket, its port (TCP on the loopback address, too)."""

    host: str
    port: int
    user: str

    def dsn(self, database: str = "postgres") -> str:
        return f"host={self.host} port={self.port} user={self.user} dbname={database}"


class World:
    """One database of a running server, with proxies in front."""

    def __init__(
        self,
        server: Server,
        database: str,
        normal: Proxy,
        forced: Proxy,
        forwarder: Forwarder | None = None,
    ) -> None:
        self.server = server
        self.database = database
        self.normal = normal
        self.forced = forced
        self._forwarder = forwarder  # in place of both
        self.control, self.run = direct_executor(server.dsn(database))

    def address(self, way: str) -> tuple[str, int]:
        """Return where a way leads: ``direct``, ``normal`` or ``forced``."""
        if way == "direct":
            return "127.0.0.1", self.server.port
        if self._forwarder is not None:
            return self._forwarder.host, self._forwarder.port
        proxy = self.normal if way == "normal" else self.forced
        return proxy.host, proxy.port

    def play(self, steps: list[Step], way: str, settled: list[int] | None = None) -> Result:
        """Play a script one way; return what the client saw and what is in the table afterwards."""
        self.control.execute("TRUNCATE t")  # a new file: rows are found in the order of their insertion
        conversation = Conversation(self.address(way), self.database, self.server.user)
        seen = conversation.play(steps, settled=settled, elsewhere=self.run)
        self._wait_until_alone(seen)
        rows = self.control.execute("SELECT i, s FROM t").fetchall()
        return Result(seen, rows)

    def _wait_until_alone(self, seen: Transcript) -> None:
        """Wait until the script's backend is gone: none may be left behind."""
        deadline = time.monotonic() + _GONE_SECONDS
        while True:
            others = self.control.execute(_OTHERS).fetchall()
            if not others:
                return
            if time.monotonic() > deadline:
                seen.problem = f"backends are left behind: {others}"
                return
            time.sleep(0.001)


class Result:
    """What a script led to."""

    def __init__(self, seen: Transcript, rows: list[tuple[object, ...]]) -> None:
        self.seen = seen
        self.rows = rows


@contextmanager
def world(server: Server, database: str, *, control: bool = False) -> Iterator[World]:
    """Create the database and the proxies; the server must be listening and have the vector extension.

    `control` puts a forwarder that knows nothing in their place.
    """
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database} STRATEGY file_copy")
        connection.execute(f"ALTER DATABASE {database} SET enable_seqscan = off")
        # Else the first settings forced on a query without vectors would make hnsw.ef_search known to SHOW.
        connection.execute(f"ALTER DATABASE {database} SET session_preload_libraries = 'vector'")
    try:
        with psycopg.connect(server.dsn(database), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.execute(_SCHEMA.encode())
            connection.execute("VACUUM ANALYZE")
        with ExitStack() as stack:
            normal = stack.enter_context(Proxy("127.0.0.1", server.port, SETTINGS))
            forced = stack.enter_context(Proxy("127.0.0.1", server.port, SETTINGS, adapter=ForcedAdapter))
            forwarder = stack.enter_context(Forwarder("127.0.0.1", server.port)) if control else None
            there = World(server, database, normal, forced, forwarder)
            stack.callback(there.control.close)
            yield there
    finally:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {database} WITH (FORCE)")
