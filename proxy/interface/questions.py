"""What the server said about a call, and what the learner is asked: authority is decided here.  Pure.

The facts come from the client's own session (`proxy.interface.arguments`), so rights mean what they mean to
the server: role membership, SET ROLE, SECURITY DEFINER are its business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from proxy.interface.arguments import TRUTH
from proxy.interface.records import Call, RefusalError
from proxy.interface.signatures import Access

_TABLES: Final = frozenset({"r", "p", "m"})
_LEVELS: Final = ("debug5", "debug4", "debug3", "debug2", "debug1", "log", "notice", "warning", "error")


@dataclass(frozen=True, slots=True)
class Question:
    """One call with its arguments' values, as the learner gets it."""

    function: str
    arguments: dict[str, Any]
    database: str
    username: str
    table: str  # "public.items", unquoted; "" where the function is not about a table
    relation: int  # OID of the table
    index: str  # likewise of an index, where one was named
    wants_notices: bool
    timeout: float  # seconds; 0: none


def question_of(call: Call, answer: bytes, manager: str) -> Question:
    """Read the server's answer to a call's question; members of `manager` may change any table's learning.

    Raises
    ------
    RefusalError
        The client must not, or not now.
    """
    facts = json.loads(answer)
    function, arguments = call.function, facts["arguments"]
    if function.changes and facts["read_only"] == "on":
        raise RefusalError(
            "25006",
            f"cannot execute {function.name}() in a read-only transaction",
            position=call.position,
        )
    table = index = ""
    if function.relation is not None:
        table, index = _relation(call, facts, arguments[function.relation])
    _authorise(call, facts, table, manager)
    if TRUTH in arguments:
        arguments[TRUTH] = _truth(call, facts, arguments[TRUTH])
    level = facts["messages"]
    return Question(
        function=function.name,
        arguments=arguments,
        database=facts["database"],
        username=facts["username"],
        table=table,
        relation=facts.get("table_oid") or 0,
        index=index,
        wants_notices=level in _LEVELS and _LEVELS.index(level) <= _LEVELS.index("notice"),
        timeout=int(facts["timeout"] or 0) / 1e3,
    )


def _relation(call: Call, facts: dict[str, Any], given: str | None) -> tuple[str, str]:
    """Return the names of the table and, where one was asked for, of the index."""
    wants_index = call.function.relation == "index_name"
    kind = "index" if wants_index else "table"
    if given is None:
        raise RefusalError(
            "22004", f"the {kind} of {call.function.name} must not be NULL", position=call.position
        )
    if facts["relation"] is None:
        raise RefusalError(
            "42P01",
            f'relation "{given}" does not exist',
            hint="Write the schema in front of the name, or set search_path.",
            position=call.position,
        )
    found = facts["kind"]
    if (
        (found == "i" and not wants_index)
        or (found != "i" and wants_index)
        or not (wants_index or found in _TABLES)
    ):
        raise RefusalError("42809", f'"{given}" is not {_article(kind)}', position=call.position)
    table = f"{facts['table_schema']}.{facts['table']}"
    return table, f"{facts['schema']}.{facts['relation_name']}" if wants_index else ""


def _truth(call: Call, facts: dict[str, Any], given: str | None) -> str:
    """Return the quoted name of a table that is only read."""
    if facts["truth"] is None:
        raise RefusalError("42P01", f'relation "{given}" does not exist', position=call.position)
    if not facts["truth_readable"]:
        raise RefusalError("42501", f"permission denied for table {given}", position=call.position)
    return str(facts["truth"])


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] == "i" else f"a {kind}"


def _authorise(call: Call, facts: dict[str, Any], table: str, manager: str) -> None:
    access = call.function.access
    superuser = facts["superuser"] == "on"
    name = call.function.name
    if access is Access.SUPERUSER and not superuser:
        raise RefusalError(
            "42501",
            f"permission denied for function {name}",
            hint="Patterns hold the centres of queries: exporting and importing them needs a superuser.",
            position=call.position,
        )
    if access is Access.READ and not facts["readable"]:
        raise RefusalError("42501", f"permission denied for table {table}", position=call.position)
    manages = bool(manager) and manager in (*facts["roles"], facts["username"])
    if access is Access.MANAGE and not (superuser or manages):
        raise RefusalError(
            "42501",
            f"permission denied for function {name}",
            hint=f'It needs a superuser, or a member of role "{manager}" (sql.manager).'
            if manager
            else "It needs a superuser, or a member of the role that the proxy's option sql.manager names.",
            position=call.position,
        )
    if access is Access.CHANGE and not (facts["owned"] or superuser or manages):
        raise RefusalError(
            "42501",
            f"must be owner of table {table}",
            hint=f'Or be a member of role "{manager}" (sql.manager).'
            if manager
            else "Or be a member of the role that the proxy's option sql.manager names.",
            position=call.position,
        )
