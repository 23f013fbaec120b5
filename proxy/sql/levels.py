"""Finding the vector search in a parse tree, and saying why one is left alone.

A *level* is one SELECT with its own ORDER BY and LIMIT; a statement may nest many.  A level is a vector
search if its first sort key is ``column operator argument``, directly or through an output alias or
ordinal.  It may stand at the top of its statement, or in a subquery in FROM or a CTE of one that does;
anywhere else its LIMIT may be applied once per outer row, or not to what the index returns.

Nothing here is more than a reading of the text.  Whether an index serves the sort is for the server to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from postgast import pg_query_pb2 as pb

from proxy.sql.glance import OPERATORS
from proxy.sql.tree import Message, children, column_path, inner, names, operator_name, walk, without_casts

VECTOR_TYPES: Final = frozenset({"vector", "halfvec", "sparsevec", "bit", "varbit", "ruvector"})

_STATEMENTS: Final = {
    "explain_stmt": "explain",
    "declare_cursor_stmt": "cursor",
    "copy_stmt": "copy",
    "create_table_as_stmt": "create table as",
    "prepare_stmt": "prepare",
    "insert_stmt": "data-modifying",
    "update_stmt": "data-modifying",
    "delete_stmt": "data-modifying",
    "merge_stmt": "data-modifying",
}
_CHANGES: Final = (pb.InsertStmt, pb.UpdateStmt, pb.DeleteStmt, pb.MergeStmt)
_OPEN: Final = frozenset(
    {
        ("SelectStmt", "from_clause"),
        ("SelectStmt", "with_clause"),
        ("WithClause", "ctes"),
        ("CommonTableExpr", "ctequery"),
        ("RangeSubselect", "subquery"),
        ("JoinExpr", "larg"),
        ("JoinExpr", "rarg"),
    }
)
"""Where a level may stand and still be adapted: (parent, field)."""


@dataclass(frozen=True, slots=True)
class Level:
    """One SELECT; `obstacle` says why nothing at its place is adapted, `outer` names the CTEs around it."""

    select: pb.SelectStmt
    obstacle: str | None
    outer: frozenset[str]


@dataclass(frozen=True, slots=True)
class Survey:
    """What stands anywhere in a statement: function names, and what forbids to touch it."""

    functions: tuple[str, ...]
    obstacle: str | None


def levels(statement: pb.RawStmt) -> Iterator[Level]:
    """Yield all levels of a statement, the outermost first."""
    kind = statement.stmt.WhichOneof("node")
    if kind is None:
        return
    node = getattr(statement.stmt, kind)
    if isinstance(node, pb.SelectStmt):
        yield Level(node, None, frozenset())
        yield from _beneath(node, None, frozenset())
    else:
        yield from _beneath(node, _STATEMENTS.get(kind, "statement"), frozenset())


def _beneath(parent: Message, obstacle: str | None, outer: frozenset[str]) -> Iterator[Level]:
    kind = parent.DESCRIPTOR.name
    if isinstance(parent, pb.SelectStmt):
        outer |= cte_names(parent)
    elif isinstance(parent, pb.RangeSubselect) and parent.lateral:
        obstacle = obstacle or "lateral"
    elif isinstance(parent, pb.WithClause) and parent.recursive:
        obstacle = obstacle or "recursive"
    for field, child in children(parent):
        here = obstacle
        if here is None and (kind, field) not in _OPEN:
            here = "set operation" if field in ("larg", "rarg") else "subquery"
        message = inner(child) if isinstance(child, pb.Node) else child
        if message is None:
            continue
        if isinstance(message, pb.SelectStmt):
            yield Level(message, here, outer)
        yield from _beneath(message, here, outer)


def cte_names(select: pb.SelectStmt) -> frozenset[str]:
    """Return the names of the CTEs that a level defines."""
    return frozenset(cte.common_table_expr.ctename for cte in select.with_clause.ctes)


def resolved_key(select: pb.SelectStmt, sort: pb.SortBy) -> pb.Node:
    """Return what a sort key stands for: an alias or ordinal gives its output expression, others themselves.

    PostgreSQL documentation, SELECT, "ORDER BY Clause": a bare name is looked up among the output names
    first.
    """
    key = sort.node
    targets = [target.res_target for target in select.target_list]
    path = column_path(key)
    if path is not None and len(path) == 1:
        matches = [target.val for target in targets if target.name == path[0]]
        return matches[0] if len(matches) == 1 else key
    if key.a_const.HasField("ival"):
        position = key.a_const.ival.ival
        if 1 <= position <= len(targets) and not any(_is_star(target.val) for target in targets[:position]):
            return targets[position - 1].val
    return key


def _is_star(node: pb.Node) -> bool:
    return node.WhichOneof("node") == "column_ref" and column_path(node) is None


def is_vector_sort(select: pb.SelectStmt) -> bool:
    """Tell whether the first sort key is a distance."""
    if not select.sort_clause:
        return False
    return _is_distance(inner(resolved_key(select, select.sort_clause[0].sort_by)))


def _is_distance(node: Message | None) -> bool:
    return isinstance(node, pb.A_Expr) and node.kind == pb.AEXPR_OP and operator_name(node) in OPERATORS


def _holds_distance(tree: Message) -> bool:
    return any(_is_distance(node) for node in walk(tree))


def why_no_search(statements: Sequence[pb.RawStmt]) -> str | None:
    """Say why a text with no vector search in it still looks like one; None if it does not."""
    if not any(_holds_distance(statement) for statement in statements):
        return None
    for statement in statements:
        for level in levels(statement):
            select = level.select
            if select.op != pb.SETOP_NONE and select.sort_clause:
                return "set operation"
            for position, sort in enumerate(select.sort_clause):
                if _holds_distance(resolved_key(select, sort.sort_by)):
                    return "expression" if position == 0 else "not the first sort key"
    return "no order by"


def survey(statement: pb.RawStmt) -> Survey:
    """Look through a whole statement once."""
    functions: set[str] = set()
    obstacle: str | None = None
    for node in walk(statement):
        if isinstance(node, pb.FuncCall):
            path = names(node.funcname)
            functions.add(".".join(path))
            if path[-1:] == ["set_config"]:
                obstacle = obstacle or "set_config"
        elif isinstance(node, pb.LockingClause):
            obstacle = obstacle or "for update"
        elif isinstance(node, pb.IntoClause):
            obstacle = obstacle or "select into"
        elif isinstance(node, _CHANGES):
            obstacle = obstacle or "data-modifying"
    return Survey(tuple(sorted(functions)), obstacle)


def why_not_adapted(select: pb.SelectStmt) -> str | None:
    """Say why a level with a vector sort is left alone, by its other clauses; None if they are in order."""
    if select.distinct_clause:
        return "distinct"
    if select.group_clause or select.HasField("having_clause"):
        return "group by"
    if select.window_clause or any(
        isinstance(node, pb.FuncCall) and node.HasField("over")
        for target in select.target_list
        for node in walk(target)
    ):
        return "window function"
    sort = select.sort_clause[0].sort_by
    if sort.sortby_dir == pb.SORTBY_DESC:
        return "descending"
    if sort.sortby_dir == pb.SORTBY_USING and names(sort.use_op)[-1:] != ["<"]:
        return "descending"
    if not select.HasField("limit_count") or without_casts(select.limit_count).a_const.isnull:
        return "no limit"
    if select.limit_option == pb.LIMIT_OPTION_WITH_TIES:
        return "with ties"
    return None
