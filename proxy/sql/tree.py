"""Small helpers on libpg_query's parse tree.

The tree is PostgreSQL's raw parse tree (``src/include/nodes/parsenodes.h``) as protobuf messages; every
place that may hold any kind of node holds a `Node` wrapper.  Helpers here know the shape of the tree, never
its meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from postgast import deparse
from postgast import pg_query_pb2 as pb

Message = Any
"""A protobuf message of any type: protobuf itself ships no types for the common base class."""


def children(message: Message) -> Iterator[tuple[str, Message]]:
    """Yield the messages directly beneath one, with the name of their field."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if hasattr(value, "DESCRIPTOR"):
            yield field.name, value
        else:
            for item in value:
                yield field.name, item


def walk(message: Message) -> Iterator[Message]:
    """Yield a message and everything beneath it, depth first."""
    pending = [message]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(reversed([child for _, child in children(current)]))


def inner(node: pb.Node) -> Message | None:
    """Return what a `Node` wraps; None for an empty one."""
    kind = node.WhichOneof("node")
    return None if kind is None else getattr(node, kind)


def without_casts(node: pb.Node) -> pb.Node:
    """Return what remains of an expression when the casts around it are taken off."""
    while node.WhichOneof("node") == "type_cast":
        node = node.type_cast.arg
    return node


def names(nodes: Iterator[pb.Node] | Message) -> list[str]:
    """Return the strings of a list of String nodes, such as a qualified name; other nodes are left out."""
    return [node.string.sval for node in nodes if node.WhichOneof("node") == "string"]


def operator_name(expression: pb.A_Expr) -> str:
    """Return the operator without its schema."""
    parts = names(expression.name)
    return parts[-1] if parts else ""


def column_path(node: pb.Node) -> list[str] | None:
    """Return a column reference as [qualifiers..., column]; None for anything else, ``*`` included."""
    if node.WhichOneof("node") != "column_ref":
        return None
    fields = node.column_ref.fields
    path = names(fields)
    return path if path and len(path) == len(fields) else None


def sql_text(select: pb.SelectStmt) -> str:
    """Return a SELECT in libpg_query's canonical form."""
    result = pb.ParseResult()
    result.stmts.add().stmt.select_stmt.CopyFrom(select)
    text: str = deparse(result)
    return text


def relation_text(relation: pb.RangeVar) -> str:
    """Return a table's name as one writes it in FROM, quoted where needed, without its alias."""
    select = pb.SelectStmt(op=pb.SETOP_NONE, limit_option=pb.LIMIT_OPTION_DEFAULT)
    target = select.target_list.add().res_target
    target.val.column_ref.fields.add().a_star.SetInParent()
    copy = select.from_clause.add().range_var
    copy.CopyFrom(relation)
    copy.ClearField("alias")
    copy.inh = True
    return sql_text(select).removeprefix("SELECT * FROM ")
