"""The same conversation twice: direct, and through a proxy that dictates ``hnsw.ef_search``.

An HNSW scan without iteration returns at most ef_search rows.  The table has more, the LIMIT is higher: the number
of rows returned *is* the ef_search that was in force.  The default is 40; the proxy dictates 77.
"""

from __future__ import annotations

from bench.embedded import EmbeddedPostgres
from tests.integration.proxied import Proxy
from tests.integration.raw import Message, RawClient, bind, execute, first_values, parse, query, rows

DEFAULT, DICTATED = 40, 77
SETTINGS = (("hnsw.ef_search", str(DICTATED)),)
VECTOR = "[0.1,0.2,0.3]"
SQL = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 500"
LITERAL = f"SELECT id FROM items ORDER BY embedding <-> '{VECTOR}' LIMIT 500"

P = parse(SQL)
B = bind(VECTOR.encode())
E = execute()


class Pair:
    """The same conversation direct and through the proxy."""

    def __init__(self, postgres: EmbeddedPostgres, proxy: Proxy, database: str) -> None:
        self.proxied = RawClient((proxy.host, proxy.port), database, postgres.user)
        self.direct = RawClient(f"{postgres.host}/.s.PGSQL.{postgres.port}", database, postgres.user)

    def both(self, *messages: bytes, ready: int = 1) -> tuple[list[Message], list[Message]]:
        return self.direct.run(*messages, ready=ready), self.proxied.run(*messages, ready=ready)

    def same(self, *messages: bytes, ready: int = 1) -> list[Message]:
        """Run on both; the replies must be equal to the byte."""
        direct, proxied = self.both(*messages, ready=ready)
        assert proxied == direct
        return proxied

    def adapted(self, *messages: bytes, ready: int = 1, times: int = 1) -> list[Message]:
        """Run on both: the same kinds of message but for the rows, of which there are 40 and 77."""
        direct, proxied = self.both(*messages, ready=ready)
        assert rows(direct) == times * DEFAULT
        assert rows(proxied) == times * DICTATED
        assert unrowed(proxied) == unrowed(direct)
        return proxied

    def setting(self) -> bytes:
        """Return ef_search as the client behind the proxy sees it, as the server says it."""
        return first_values(self.proxied.run(query("SHOW hnsw.ef_search")))[0]


def unrowed(messages: list[Message]) -> list[Message]:
    """Return the messages without rows and row counts."""
    return [
        (tag, b"SELECT" if tag == "C" and body.startswith(b"SELECT") else body)
        for tag, body in messages
        if tag != "D"
    ]
