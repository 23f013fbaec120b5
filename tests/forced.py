"""Forced injection: every SELECT that can carry settings gets them, vector query or not.

Third-party suites hold few vector queries, so an ordinary proxy relays them without touching anything.  Here
the recogniser says of every plain SELECT that it is a vector query, and a dictated arm is put in force for
it: proxy.session injects, swallows, restores and counts replies all through the suite, as it would for an
application that does nothing but vector search.

What can carry settings: SELECT, VALUES, WITH ... SELECT and TABLE, on their own or among the statements of
one Query message.  What cannot: utility statements, INTO, FOR UPDATE and its kind, data-modifying CTEs, and
statements that would *show* the setting (``current_setting``, ``pg_settings``, ``pg_prepared_statements``).
Of several candidates in one text the checksum of the text picks one: first, middle and last ones occur.

The process for suites that need one::

    python -m tests.forced --upstream-host HOST --upstream-port PORT [--set hnsw.ef_search=77] [--port 0]

It prints ``host port`` once it accepts connections, and what it counted (JSON) when stdin is closed or on
SIGINT or SIGTERM.  ``--as-is`` relays without forcing.  In-process: `tests.integration.proxied.Proxy(...,
adapter=ForcedAdapter)`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import signal
import sys
import threading
import zlib
from typing import Final

from postgast import PgQueryError
from postgast import pg_query_pb2 as pb

from learning.records import Settings, Slot, SlotRole, Template, Value
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.sql import Recogniser, Scope, Statement, VectorQuery
from proxy.sql.cache import GenerationCache
from proxy.sql.effects import completions
from proxy.sql.glance import is_empty, skip_blanks
from proxy.sql.recogniser import MAX_TEXT, read
from proxy.sql.shape import shape_of
from proxy.sql.statements import Argument
from proxy.sql.tree import inner, walk

SHOWS_SETTINGS: Final = (b"current_setting", b"pg_settings", b"pg_prepared_statements", b"set_config")
DEFAULT_SETTINGS: Final[Settings] = (("hnsw.ef_search", "77"),)

_ONE_ROW: Final = (Argument(None, Value(0, b"1")),)
_SLOTS: Final = (Slot(SlotRole.LIMIT),)
_WRITES: Final = (pb.InsertStmt, pb.UpdateStmt, pb.DeleteStmt, pb.MergeStmt)


class ForcedRecogniser(Recogniser):
    """Takes every SELECT that can carry settings for a vector query; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._forced: GenerationCache[tuple[bytes, Scope], Statement] = GenerationCache(4096, 32 << 20)

    def recognise(self, sql: bytes, scope: Scope) -> Statement:
        statement = super().recognise(sql, scope)
        if statement.vector is not None or len(sql) > MAX_TEXT or is_empty(sql):
            return statement
        key = (sql, scope)
        known = self._forced.get(key)
        if known is None:
            known = self._force(sql, scope, statement)
            self._forced.put(key, known, 2 * len(sql) + 1024)
        return known

    def _force(self, sql: bytes, scope: Scope, statement: Statement) -> Statement:
        statements = _read(sql)
        if not statements or any(word in sql.lower() for word in SHOWS_SETTINGS):
            return statement
        candidates = [i for i, raw in enumerate(statements) if can_carry(raw)]
        if not candidates:
            return statement
        index = candidates[zlib.crc32(sql) % len(candidates)]
        before = [completions(raw) for raw in statements[:index]]
        start = statements[index].stmt_location
        end = start + statements[index].stmt_len if statements[index].stmt_len else len(sql)
        query = VectorQuery(
            template=_template(sql, scope),
            arguments=_ONE_ROW,
            index=index,
            start=min(skip_blanks(sql, start), end),
            end=end,
            completions_before=None if None in before else sum(count or 0 for count in before),
        )
        return dataclasses.replace(statement, count=len(statements), vector=query, reason=None)


class ForcedAdapter(Adapter):
    """An adapter that recognises by force; dictate the arm with `Adapter.swap(Dictated(settings), 1)`."""

    def __init__(self, counters: Counters, *, enabled: bool = True) -> None:
        super().__init__(counters, enabled=enabled)
        self._recogniser = ForcedRecogniser()


def can_carry(raw: pb.RawStmt) -> bool:
    """Tell whether a statement is a SELECT that reads, locks nothing and makes no table."""
    node = inner(raw.stmt)
    if not isinstance(node, pb.SelectStmt):
        return False
    return not any(
        isinstance(part, _WRITES)
        or (isinstance(part, pb.SelectStmt) and (part.locking_clause or part.HasField("into_clause")))
        for part in walk(node)
    )


def _read(sql: bytes) -> list[pb.RawStmt] | None:
    """Parse within the recogniser's own limits: libpg_query overflows the stack beyond them."""
    shape = None if b"\0" in sql else shape_of(sql)
    try:
        return read(sql.decode(), len(sql) if shape is None else shape.code_size)
    except (PgQueryError, UnicodeDecodeError):
        return None


def _template(sql: bytes, scope: Scope) -> Template:
    return Template(
        key=hashlib.blake2b(sql, digest_size=16).hexdigest(),
        database=scope.database,
        user=scope.user,
        search_path=scope.search_path,
        sql="",
        probe_sql="",
        probe_slots=(),
        slots=_SLOTS,
        relation="forced",
        column="",
        operator="",
    )


def main() -> None:
    """Run a relay that forces injection (or does not) until told to stop."""
    from tests.integration.proxied import Proxy

    parser = argparse.ArgumentParser(description="relay with forced injection, for third-party suites")
    parser.add_argument("--upstream-host", required=True, help="host, or the directory of the unix socket")
    parser.add_argument("--upstream-port", type=int, required=True)
    parser.add_argument("--port", type=int, default=0, help="port of 127.0.0.1 to listen on; 0: a free one")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="the dictated arm")
    parser.add_argument("--as-is", action="store_true", help="do not force: an ordinary relay")
    options = parser.parse_args()
    settings = tuple((name, value) for name, _, value in (text.partition("=") for text in options.set))
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())

    def wait_for_end_of_input() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_end_of_input, daemon=True).start()
    adapter = Adapter if options.as_is else ForcedAdapter
    with Proxy(
        options.upstream_host,
        options.upstream_port,
        settings or DEFAULT_SETTINGS,
        adapter=adapter,
        listen_port=options.port,
    ) as proxy:
        print(proxy.host, proxy.port, flush=True)
        stop.wait()
        counted = {
            "connections": proxy.counters.connections_opened,
            "statements": proxy.counters.statements,
            "adapted": sum(proxy.counters.adapted.values()),
            "left_alone": dict(proxy.counters.left_alone),
            "injection_errors": proxy.counters.injection_errors,
        }
    print(json.dumps(counted), flush=True)


if __name__ == "__main__":
    main()
