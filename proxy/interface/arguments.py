"""From the arguments of a call, as written, to one SQL text with which the server evaluates them.

The server evaluates: casts, ARRAY[...], NULL, functions and subqueries mean what they always mean, in the
client's transaction and with its search_path.  Beside the arguments the text asks for the facts on which
authority rests, so that one trip answers all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from postgast import pg_query_pb2 as pb

from proxy.interface.records import RefusalError
from proxy.interface.scanning import Scanned
from proxy.interface.signatures import FUNCTIONS, RATE_BY_VECTOR, Argument, Function
from proxy.sql.tree import Message, children, inner, names

_ENABLE: Final = FUNCTIONS["ruvector_enable_learning"]
_FEEDBACK: Final = FUNCTIONS["ruvector_record_feedback"]


def function_for(name: str, nodes: Sequence[pb.Node]) -> tuple[Function, Sequence[str | None]]:
    """Return the function that a call means, and the name of each argument given (None: by its place).

    Overloads are told apart by what can be seen in the text, as PostgreSQL does by type.
    """
    given = [node.named_arg_expr.name if node.HasField("named_arg_expr") else None for node in nodes]
    function = FUNCTIONS[name]
    if function is _ENABLE and len(nodes) == 2 and given[1] is None and _is_json(nodes[1]):
        return function, [given[0], "config"]
    if function is _FEEDBACK and (
        "query" in given
        or "table_name" in given
        or len(nodes) == 4
        or (given[:2] == [None, None] and _is_vector(nodes))
    ):
        return RATE_BY_VECTOR, given
    return function, given


def _is_json(node: pb.Node) -> bool:
    if node.HasField("type_cast"):
        return bool(names(node.type_cast.type_name.names)[-1] in ("json", "jsonb"))
    return bool(
        node.HasField("a_const")
        and node.a_const.HasField("sval")
        and node.a_const.sval.sval.lstrip()[:1] == "{"
    )


def _is_vector(nodes: Sequence[pb.Node]) -> bool:
    """Tell whether the second of the arguments is a vector, not an array of keys."""
    node = nodes[1]
    if node.HasField("type_cast"):
        return bool(names(node.type_cast.type_name.names)[-1] in ("vector", "halfvec", "sparsevec"))
    return (
        bool(node.HasField("a_const")) and node.a_const.HasField("sval") and node.a_const.sval.sval[:1] == "["
    )


def assigned(
    function: Function, given: Sequence[str | None], texts: Sequence[bytes], position: int
) -> dict[str, bytes]:
    """Return the text of each given argument by its name.

    Raises
    ------
    RefusalError
        The arguments do not fit.
    """
    found: dict[str, bytes] = {}
    known = [argument.name for argument in function.arguments]
    for place, (name, text) in enumerate(zip(given, texts, strict=True)):
        if name is None and place >= len(known):
            raise _no_such(function, f"it takes at most {len(known)} arguments, not {len(given)}", position)
        name = known[place] if name is None else name
        if name not in known:
            raise _no_such(function, f'it has no argument named "{name}"', position)
        if name in found:
            raise _no_such(function, f'argument "{name}" is given twice', position)
        found[name] = text
    missing = [a.name for a in function.arguments if a.default is None and a.name not in found]
    if missing:
        raise _no_such(function, f'argument "{missing[0]}" is missing', position)
    return found


def _no_such(function: Function, detail: str, position: int) -> RefusalError:
    return RefusalError(
        "42883",
        f"function {function.name} does not exist with these arguments",
        detail=detail[0].upper() + detail[1:] + ".",
        hint=f"It is called as {function.usage}.",
        position=position,
    )


def depends_on_rows(node: pb.Node) -> bool:
    """Tell whether an argument refers to columns of the statement around it."""
    pending: list[Message] = [inner(node)]
    while pending:
        current = pending.pop()
        if isinstance(current, pb.ColumnRef):
            return True
        if isinstance(current, pb.SubLink):
            continue  # its columns are most likely its own; the server tells if not
        pending.extend(child for _, child in children(current))
    return False


def question(function: Function, written: dict[str, bytes]) -> tuple[str, tuple[int, ...]]:
    """Return the text that evaluates the arguments and tells the facts, and the client's parameters in it.

    One row of one column comes back: a JSON object.
    """
    numbers: list[int] = []

    columns = []
    for argument in function.arguments:
        text = written.get(argument.name)
        value = argument.default or "NULL" if text is None else _renumbered(text, numbers).decode()
        columns.append(f"{_cast(value, argument)} AS {argument.name}")
    listed = ", ".join(columns) or "NULL::pg_catalog.text AS none"
    facts = _FACTS if function.relation is None else _FACTS + _RELATION
    source = "" if function.relation is None else _FROM_RELATION.format(function.relation)
    if any(argument.name == TRUTH for argument in function.arguments):
        facts, source = facts + _TRUTH, source + _FROM_TRUTH
    return (
        "SELECT pg_catalog.row_to_json(f)::pg_catalog.text FROM "
        f"(SELECT pg_catalog.row_to_json(x) AS arguments, {facts} FROM (SELECT {listed}) AS x{source}) AS f",
        tuple(numbers),
    )


def _renumbered(text: bytes, numbers: list[int]) -> bytes:
    """Return `text` with the client's parameters numbered anew; `numbers` collects those in use, from 0."""
    parts, last = [], 0
    for start, end, number in Scanned(text).parameters(0, len(text)):
        if number - 1 not in numbers:
            numbers.append(number - 1)
        parts += [text[last:start], b"$%d" % (numbers.index(number - 1) + 1)]
        last = end
    return b"".join([*parts, text[last:]])


def _cast(value: str, argument: Argument) -> str:
    return f"({value}\n)::{argument.type}"


_FACTS: Final = (
    "pg_catalog.current_setting('transaction_read_only') AS read_only, "
    "pg_catalog.current_setting('is_superuser') AS superuser, "
    "pg_catalog.current_setting('client_min_messages') AS messages, "
    "(SELECT setting FROM pg_catalog.pg_settings WHERE name = 'statement_timeout') AS timeout, "
    "pg_catalog.current_database() AS database, current_user AS username, "
    "ARRAY(SELECT rolname FROM pg_catalog.pg_roles WHERE rolname <> current_user "
    "AND pg_catalog.pg_has_role(oid, 'USAGE')) AS roles"
)
_RELATION: Final = (
    ", c.oid::pg_catalog.int8 AS relation, c.relkind AS kind, n.nspname AS schema, "
    "c.relname AS relation_name, "
    "t.oid::pg_catalog.int8 AS table_oid, tn.nspname AS table_schema, t.relname AS table, "
    "pg_catalog.has_table_privilege(t.oid, 'SELECT') AS readable, "
    "pg_catalog.pg_has_role(t.relowner, 'USAGE') AS owned"
)
TRUTH: Final = "ground_truth_table"
"""The argument that names a second table, which is read."""

_TRUTH: Final = (
    ", pg_catalog.quote_ident(gn.nspname) || '.' || pg_catalog.quote_ident(g.relname) AS truth, "
    "pg_catalog.has_table_privilege(g.oid, 'SELECT') AS truth_readable"
)
_FROM_TRUTH: Final = (
    f" LEFT JOIN pg_catalog.pg_class AS g ON g.oid = pg_catalog.to_regclass(x.{TRUTH})"
    " LEFT JOIN pg_catalog.pg_namespace AS gn ON gn.oid = g.relnamespace"
)
_FROM_RELATION: Final = (
    " LEFT JOIN pg_catalog.pg_class AS c ON c.oid = pg_catalog.to_regclass(x.{})"
    " LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace"
    " LEFT JOIN pg_catalog.pg_index AS i ON i.indexrelid = c.oid"
    " LEFT JOIN pg_catalog.pg_class AS t ON t.oid = coalesce(i.indrelid, c.oid)"
    " LEFT JOIN pg_catalog.pg_namespace AS tn ON tn.oid = t.relnamespace"
)
