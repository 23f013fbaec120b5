"""From a parsed text to the template of its vector query.

The template is what is learned about: the query without its arguments.  Its `sql` is the whole statement in
libpg_query's canonical spelling, so that case, blanks, comments and parentheses do not matter, and a
literal and a bound parameter lead to the same key.  Its `probe_sql` asks for the distances alone, and is
what the learner runs.

Roles of slots are read off the tree after the arguments have been replaced: the parameter under LIMIT *is*
the LIMIT slot.  A slot in two roles that must be known apart makes the query one to leave alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from postgast import pg_query_pb2 as pb

from learning.records import Slot, SlotRole, Template, template_key
from proxy.sql.arguments import Source, replace_arguments
from proxy.sql.levels import (
    VECTOR_TYPES,
    Level,
    cte_names,
    is_vector_sort,
    levels,
    resolved_key,
    survey,
    why_no_search,
    why_not_adapted,
)
from proxy.sql.statements import Scope
from proxy.sql.tree import (
    Message,
    column_path,
    inner,
    names,
    operator_name,
    relation_text,
    sql_text,
    walk,
    without_casts,
)

MAX_SLOTS: Final = 128
"""More arguments than this (long IN lists) make a template of their own each time: not worth learning."""

_MIRRORED: Final = {"=": "=", "<>": "<>", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


@dataclass(frozen=True, slots=True)
class Found:
    """A vector query that may be adapted: which statement it is, its template, and its slots' sources."""

    index: int
    template: Template
    sources: tuple[Source, ...]


class LeftAloneError(Exception):
    """Something that looks like a vector query is not to be touched; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _Distance:
    """The sort expression taken apart."""

    path: list[str]  # [qualifiers..., column]
    slot: int
    operator: str


def find(statements: list[pb.RawStmt], scope: Scope) -> Found | None:
    """Return the one vector query in the statements of a text; None if it has nothing to do with vectors.

    The statement that holds the query is changed in place: its arguments are replaced.

    Raises
    ------
    LeftAloneError
        There is something like a vector query, and a reason not to touch it.
    """
    searches = [
        (index, level)
        for index, statement in enumerate(statements)
        for level in levels(statement)
        if is_vector_sort(level.select)
    ]
    if not searches:
        reason = why_no_search(statements)
        if reason is None:
            return None
        raise LeftAloneError(reason)
    if len(searches) > 1:
        raise LeftAloneError("several vector queries")
    index, level = searches[0]
    seen = survey(statements[index])
    obstacle = level.obstacle or seen.obstacle or why_not_adapted(level.select)
    if obstacle is not None:
        raise LeftAloneError(obstacle)
    statement = statements[index].stmt.select_stmt
    sources = replace_arguments(statement)
    if len(sources) > MAX_SLOTS:
        raise LeftAloneError("too many arguments")
    template = _template(statement, level, len(sources), seen.functions, scope)
    return Found(index, template, tuple(sources))


def _template(
    statement: pb.SelectStmt, level: Level, slots: int, functions: tuple[str, ...], scope: Scope
) -> Template:
    select = level.select
    whole = select == statement
    distance = _take_apart(resolved_key(select, select.sort_clause[0].sort_by))
    relation = _relation(level, distance.path)
    roles = _roles(select, distance.slot)
    for sort in select.sort_clause:
        if sort.sort_by.sortby_dir == pb.SORTBY_ASC:
            sort.sort_by.sortby_dir = pb.SORTBY_DEFAULT
    sql = sql_text(statement)
    probe, probe_slots = _probe(level)
    return Template(
        key=template_key(scope.database, scope.user, scope.search_path, sql),
        database=scope.database,
        user=scope.user,
        search_path=scope.search_path,
        sql=sql,
        probe_sql=sql_text(probe),
        probe_slots=probe_slots,
        slots=tuple(roles.get(slot, Slot(SlotRole.OTHER)) for slot in range(slots)),
        relation=relation_text(relation),
        column=distance.path[-1],
        operator=distance.operator,
        whole=whole,
        functions=functions,
        scan_sql=_scan(probe, probe_slots.index(distance.slot)),
        sample_sql=_sampled(probe, len(probe_slots)),
    )


# -- the sort expression and its table -----------------------------------------------------------------------


def _take_apart(key: pb.Node) -> _Distance:
    """Take ``column operator argument`` apart, in either order."""
    expression = key.a_expr
    for column, argument in ((expression.lexpr, expression.rexpr), (expression.rexpr, expression.lexpr)):
        path = column_path(without_casts(column))
        slot = _slot(argument)
        if path is not None and slot is not None:
            if not (_has_vector_type(column) and _has_vector_type(argument)):
                raise LeftAloneError("argument type")
            return _Distance(path, slot, operator_name(expression))
    sides = (without_casts(expression.lexpr), without_casts(expression.rexpr))
    function = any(side.WhichOneof("node") == "func_call" for side in sides)
    raise LeftAloneError("function" if function else "argument")


def _slot(node: pb.Node) -> int | None:
    """Return the slot that an expression is, casts aside; None for any other expression."""
    bare = without_casts(node)
    return bare.param_ref.number - 1 if bare.WhichOneof("node") == "param_ref" else None


def _has_vector_type(node: pb.Node) -> bool:
    """Tell whether an operand without a cast, or whose outermost cast is to a vector type."""
    if node.WhichOneof("node") != "type_cast":
        return True
    type_name = node.type_cast.type_name
    return not type_name.array_bounds and names(type_name.names)[-1] in VECTOR_TYPES


def _relation(level: Level, path: list[str]) -> pb.RangeVar:
    """Return the table in FROM that the ordered column belongs to."""
    items = [item for node in level.select.from_clause for item in _from_items(node)]
    tables = [item for item in items if isinstance(item, pb.RangeVar)]
    if len(path) > 1:
        tables = [table for table in tables if _is_named(table, path[:-1])]
    elif any(not isinstance(item, pb.RangeVar | pb.RangeFunction) for item in items):
        tables = []
    if len(tables) != 1:
        raise LeftAloneError("ambiguous column" if tables else "column not of a table")
    table = tables[0]
    if not table.schemaname and table.relname in level.outer | cte_names(level.select):
        raise LeftAloneError("column not of a table")
    return table


def _from_items(node: pb.Node) -> Iterator[Message]:
    item = inner(node)
    if isinstance(item, pb.JoinExpr):
        yield from _from_items(item.larg)
        yield from _from_items(item.rarg)
    elif item is not None:
        yield item


def _is_named(table: pb.RangeVar, qualifiers: list[str]) -> bool:
    """Tell whether the qualifiers of a column mean this table (``t.c``, ``schema.t.c``)."""
    if table.HasField("alias"):
        return qualifiers == [table.alias.aliasname]
    if table.relname != qualifiers[-1]:
        return False
    return len(qualifiers) == 1 or not table.schemaname or table.schemaname == qualifiers[-2]


# -- roles of slots ------------------------------------------------------------------------------------------


def _roles(select: pb.SelectStmt, vector: int) -> dict[int, Slot]:
    """Return the slots whose role is known."""
    limit = _slot(select.limit_count)
    if limit is None:
        raise LeftAloneError("limit expression")
    known = [vector, limit]
    roles = {slot: Slot(SlotRole.FILTER, column, operator) for slot, column, operator in _filters(select)}
    if select.HasField("limit_offset") and not select.limit_offset.a_const.isnull:
        offset = _slot(select.limit_offset)
        if offset is None:
            raise LeftAloneError("offset expression")
        known.append(offset)
        roles[offset] = Slot(SlotRole.OFFSET)
    if len(set(known)) != len(known):
        raise LeftAloneError("shared argument")
    roles[limit] = Slot(SlotRole.LIMIT)
    roles[vector] = Slot(SlotRole.VECTOR)
    return roles


def _filters(select: pb.SelectStmt) -> Iterator[tuple[int, str | None, str]]:
    """Yield (slot, column, operator) for each condition of WHERE that every row must meet."""
    if not select.HasField("where_clause"):
        return
    pending = [select.where_clause]
    while pending:
        node = inner(pending.pop())
        if isinstance(node, pb.BoolExpr) and node.boolop == pb.AND_EXPR:
            pending.extend(node.args)
        elif isinstance(node, pb.A_Expr):
            yield from _condition(node)


def _condition(node: pb.A_Expr) -> Iterator[tuple[int, str | None, str]]:
    operator = operator_name(node)
    if node.kind != pb.AEXPR_OP:
        path = column_path(node.lexpr)
        elements, word = _elements(node, operator)
        if path is not None:
            yield from ((slot, path[-1], word) for slot in map(_slot, elements) if slot is not None)
    elif operator in _MIRRORED:
        yield from _comparison(node.lexpr, _slot(node.rexpr), operator)
        yield from _comparison(node.rexpr, _slot(node.lexpr), _MIRRORED[operator])
    elif operator == "@>":
        yield from _comparison(node.lexpr, _slot(node.rexpr), operator)


def _comparison(left: pb.Node, slot: int | None, operator: str) -> Iterator[tuple[int, str | None, str]]:
    """Yield the slots of ``left operator slot``.

    Where the left side is an expression over columns, such as ``meta ->> 'source'``, there is no column to
    name, and the arguments inside it decide with the others which rows pass.
    """
    if slot is None:
        return
    path = column_path(left)
    if path is not None:
        yield slot, path[-1], operator
        return
    parts = list(walk(left))
    if any(isinstance(part, pb.ColumnRef) for part in parts):
        yield slot, None, operator
        yield from ((part.number - 1, None, operator) for part in parts if isinstance(part, pb.ParamRef))


def _elements(node: pb.A_Expr, operator: str) -> tuple[list[pb.Node], str]:
    """Return what a column is compared with in IN, ANY or BETWEEN, and the word for it."""
    if node.kind == pb.AEXPR_BETWEEN:
        return list(node.rexpr.list.items), "BETWEEN"
    if operator == "=" and node.kind == pb.AEXPR_IN:
        return list(node.rexpr.list.items), "IN"
    if operator == "=" and node.kind == pb.AEXPR_OP_ANY:
        bare = without_casts(node.rexpr)
        if bare.WhichOneof("node") == "a_array_expr":
            return list(bare.a_array_expr.elements), "IN"
        return [node.rexpr], "ANY"
    return [], ""


# -- the probe -----------------------------------------------------------------------------------------------


def _probe(level: Level) -> tuple[pb.SelectStmt, tuple[int, ...]]:
    """Return the query that yields the distances alone, and which slots its parameters are."""
    probe = pb.SelectStmt()
    probe.CopyFrom(level.select)
    for sort, original in zip(probe.sort_clause, level.select.sort_clause, strict=True):
        sort.sort_by.node.CopyFrom(resolved_key(level.select, original.sort_by))
    del probe.target_list[:]
    target = probe.target_list.add().res_target
    target.name = "distance"
    target.val.CopyFrom(probe.sort_clause[0].sort_by.node)
    parameters = []
    for node in walk(probe):
        if isinstance(node, pb.ParamRef):
            parameters.append(node)
        elif isinstance(node, pb.RangeVar) and not node.schemaname and node.relname in level.outer:
            raise LeftAloneError("outer reference")
    slots = sorted({parameter.number for parameter in parameters})
    for parameter in parameters:
        parameter.number = slots.index(parameter.number) + 1
    return probe, tuple(slot - 1 for slot in slots)


def _scan(probe: pb.SelectStmt, vector: int) -> str:
    """Return the probe without order and limit, the vector as ``$1``; "" where there are other parameters."""
    scan = pb.SelectStmt()
    scan.CopyFrom(probe)
    del scan.sort_clause[:]
    for name in ("limit_count", "limit_offset"):
        scan.ClearField(name)
    scan.limit_option = pb.LIMIT_OPTION_DEFAULT
    parameters = [node for node in walk(scan) if isinstance(node, pb.ParamRef)]
    if any(parameter.number != vector + 1 for parameter in parameters):
        return ""
    for parameter in parameters:
        parameter.number = 1
    return sql_text(scan)


def _sampled(probe: pb.SelectStmt, parameters: int) -> str:
    """Return the probe of some pages of its one table; "" where it reads more than that.

    Percentage and seed are two more parameters, the last ones.
    """
    if len(probe.from_clause) != 1 or not isinstance(inner(probe.from_clause[0]), pb.RangeVar):
        return ""
    sampled = pb.SelectStmt()
    sampled.CopyFrom(probe)
    sample = pb.RangeTableSample()
    sample.relation.CopyFrom(sampled.from_clause[0])
    sample.method.add().string.sval = "system"
    sample.args.add().param_ref.number = parameters + 1
    sample.repeatable.param_ref.number = parameters + 2
    sampled.from_clause[0].Clear()
    sampled.from_clause[0].range_table_sample.CopyFrom(sample)
    return sql_text(sampled)
