"""SQL-level prepared statements with calls in them: PREPARE keeps the calls, EXECUTE runs them.  Pure.

The server prepares the text in which it reads the answers.  Before each EXECUTE the calls are answered, their
parameters replaced by the arguments of EXECUTE as they are written; its own text stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

from postgast import PgQueryError
from postgast import pg_query_pb2 as pb

from proxy.interface.records import Call, Deferred, Piece, RefusalError, Rewritten
from proxy.interface.scanning import Scanned
from proxy.sql.recogniser import MAX_CODE, read
from proxy.sql.tree import Message, inner

_WORDS: Final = re.compile(rb"\b(?:execute|prepare|deallocate|discard)\b", re.IGNORECASE)
EVERYTHING: Final = "*"
"""In place of a name: every prepared statement."""


def declared_types(scanned: Scanned, statement: pb.RawStmt) -> tuple[bytes, ...]:
    """Return the types of a PREPARE's parameters as they are written, as far as they are."""
    return tuple(_listed(scanned, statement, pb.PREPARE))


def _listed(scanned: Scanned, statement: pb.RawStmt, keyword: int) -> list[bytes]:
    """Return the texts in the parentheses behind the name that follows a keyword."""
    place = scanned.at(statement.stmt_location)
    tokens = scanned.tokens
    while place < len(tokens) and tokens[place].kind != keyword:
        place += 1
    if place + 1 >= len(tokens):
        return []
    found = scanned.call(tokens[place + 1].start)
    return [scanned.sql[start:end] for start, end in found[1]] if found is not None else []


def look(sql: bytes, known: Mapping[str, Deferred]) -> tuple[Rewritten | None, Collection[str]]:
    """Return what a text becomes that executes one of the known statements, and which it does away with."""
    if len(sql) > MAX_CODE or _WORDS.search(sql) is None:
        return None, ()
    try:
        statements = read(sql.decode(), len(sql))
    except (PgQueryError, UnicodeDecodeError):
        return None, ()
    gone: set[str] = set()
    executed: list[tuple[pb.RawStmt, pb.ExecuteStmt]] = []
    for statement in statements or ():
        node = inner(statement.stmt)
        if isinstance(node, pb.DeallocateStmt):
            gone.add(node.name or EVERYTHING)
        elif isinstance(node, pb.DiscardStmt) and node.target == pb.DISCARD_ALL:
            gone.add(EVERYTHING)
        elif isinstance(node, pb.PrepareStmt):
            gone.add(node.name)
        found = _executed(node)
        if found is not None and found.name in known:
            executed.append((statement, found))
    if not executed:
        return None, gone
    if len(statements or ()) > 1:
        refusal = RefusalError(
            "0A000",
            f'"{executed[0][1].name}" holds functions of ruvector-proxy: its EXECUTE cannot share a text',
            hint="Send it by itself.",
        )
        return Rewritten(refusal=refusal), gone
    statement, node = executed[0]
    scanned = Scanned(sql)
    given = _listed(scanned, statement, pb.EXECUTE)
    return Rewritten((Piece(sql, _bound(known[node.name], given)),)), gone


def _executed(node: Message) -> pb.ExecuteStmt | None:
    """Return the EXECUTE in a statement that runs it, if there is one."""
    if isinstance(node, pb.ExplainStmt | pb.CreateTableAsStmt):
        node = inner(node.query)
    return node if isinstance(node, pb.ExecuteStmt) else None


def _bound(deferred: Deferred, given: Sequence[bytes]) -> tuple[Call, ...]:
    """Return the calls with the arguments of EXECUTE in place of their parameters."""
    arguments = [b"(" + text + b"\n)" for text in given]
    for place, kind in enumerate(deferred.types[: len(arguments)]):
        arguments[place] += b"::" + kind
    return tuple(
        replace(call, question=_filled(call, arguments), parameters=(), position=0) for call in deferred.calls
    )


def _filled(call: Call, arguments: Sequence[bytes]) -> str:
    text = call.question.encode()
    parts, last = [], 0
    for start, end, number in Scanned(text).parameters(0, len(text)):
        place = call.parameters[number - 1]
        # Where one is missing the server says so, of the EXECUTE itself.
        parts += [text[last:start], arguments[place] if place < len(arguments) else b"NULL"]
        last = end
    return b"".join([*parts, text[last:]]).decode()
