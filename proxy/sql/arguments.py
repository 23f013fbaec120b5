"""Replacing the arguments of a query by numbered slots.

Every bound parameter and every constant becomes ``$1..$n``, in the order in which they stand in the text.
What the query means must not change, and it must still be possible to PREPARE it:

- A parameter used twice is one slot.  Equal vector literals (they begin with ``[``) are one slot too: a
  driver that binds on the client's side writes the vector of ``SELECT e <=> $1 ... ORDER BY e <=> $1``
  twice.
- A quoted literal has no type of its own and neither has a parameter, so that PostgreSQL resolves both alike
  (documentation, "Type Conversion", 10.2): quoted literals are replaced, and casts around them stay.
- A bare number or boolean does have a type, and in a place where the type selects an operator or function a
  parameter would select another one (``meta -> 0`` looks up an element, ``meta -> $1`` a key).  They are
  replaced where the other side settles the type: compared with an expression, in IN and BETWEEN, in LIMIT
  and OFFSET, under a cast.  Elsewhere they stay. - NULL stays, since it may decide the result's shape.  So
  do constants that cannot be parameters: type modifiers, ordinals in ORDER BY, GROUP BY and DISTINCT ON,
  and the words of SQL's own function syntax (``extract(year FROM t)``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from postgast import pg_query_pb2 as pb

from learning.records import Value
from proxy.sql.glance import OPERATORS
from proxy.sql.tree import Message, children, operator_name

_COMPARISONS: Final = frozenset({"=", "<>", "<", ">", "<=", ">="})
_LISTS: Final = frozenset(
    {pb.AEXPR_IN, pb.AEXPR_BETWEEN, pb.AEXPR_NOT_BETWEEN, pb.AEXPR_BETWEEN_SYM, pb.AEXPR_NOT_BETWEEN_SYM}
)
_ORDINALS: Final = frozenset({"group_clause", "distinct_clause"})
_COUNTS: Final = frozenset({"limit_count", "limit_offset"})


@dataclass(frozen=True, slots=True)
class Source:
    """Where a slot's value came from: a bound parameter (0-based), or a literal, at a byte offset or -1."""

    parameter: int | None
    literal: Value | None
    location: int


def replace_arguments(select: pb.SelectStmt) -> list[Source]:
    """Replace the arguments beneath a SELECT in place by ``$1..$n``; return the slots' sources."""
    found = sorted(_arguments(select, settled=False), key=_location)
    sources: list[Source] = []
    parameters: dict[int, int] = {}
    vectors: dict[bytes, int] = {}
    for node in found:
        source = _source(node)
        if source.parameter is not None:
            slot = parameters.setdefault(source.parameter, len(sources))
        elif source.literal is not None and (source.literal.data or b"").startswith(b"["):
            slot = vectors.setdefault(source.literal.data or b"", len(sources))
        else:
            slot = len(sources)
        if slot == len(sources):
            sources.append(source)
        node.param_ref.number = slot + 1
    return sources


def _location(node: pb.Node) -> tuple[bool, int]:
    """Sort key: the place in the text; constants that the parser made up come last."""
    location: int = (
        node.param_ref.location if node.WhichOneof("node") == "param_ref" else node.a_const.location
    )
    return location < 0, location


def _source(node: pb.Node) -> Source:
    if node.WhichOneof("node") == "param_ref":
        return Source(node.param_ref.number - 1, None, node.param_ref.location)
    constant = node.a_const
    kind = constant.WhichOneof("val")
    if kind == "sval":
        text = constant.sval.sval
    elif kind == "bsval":
        text = constant.bsval.bsval.removeprefix("b")
    elif kind == "fval":
        text = constant.fval.fval
    elif kind == "boolval":
        text = "true" if constant.boolval.boolval else "false"
    else:
        text = str(constant.ival.ival)
    return Source(None, Value(0, text.encode()), constant.location)


def _arguments(parent: Message, *, settled: bool) -> Iterator[pb.Node]:
    """Yield the nodes to replace; `settled`: these are elements of a list that a value is compared with."""
    for field, child in children(parent):
        if isinstance(child, pb.TypeName):
            continue
        if not isinstance(child, pb.Node):
            yield from _arguments(child, settled=False)
            continue
        kind = child.WhichOneof("node")
        if kind == "param_ref":
            yield child
        elif kind == "a_const":
            if _is_replaceable(child.a_const, parent, field, settled=settled):
                yield child
        elif kind is not None:
            is_list = kind == "list" and isinstance(parent, pb.A_Expr) and parent.kind in _LISTS
            yield from _arguments(getattr(child, kind), settled=is_list)


def _is_replaceable(constant: pb.A_Const, parent: Message, field: str, *, settled: bool) -> bool:
    if constant.isnull or isinstance(parent, pb.SortBy):
        return False
    if isinstance(parent, pb.SelectStmt):
        if field in _ORDINALS:
            return False
        if field in _COUNTS:
            return True
    quoted: bool = constant.HasField("sval")
    if isinstance(parent, pb.FuncCall):
        return quoted and bool(parent.funcformat != pb.COERCE_SQL_SYNTAX)
    if quoted or settled or isinstance(parent, pb.TypeCast):
        return True
    return isinstance(parent, pb.A_Expr) and _settles_type(parent, field)


def _settles_type(expression: pb.A_Expr, field: str) -> bool:
    """Tell whether the other operand settles the type of the constant in `field`."""
    if expression.kind != pb.AEXPR_OP:
        return False
    other = expression.lexpr if field == "rexpr" else expression.rexpr
    if other.WhichOneof("node") in (None, "a_const", "param_ref"):
        return False
    operator = operator_name(expression)
    if operator in OPERATORS:
        constant = expression.rexpr if field == "rexpr" else expression.lexpr
        return bool(constant.a_const.HasField("bsval"))
    return operator in _COMPARISONS
