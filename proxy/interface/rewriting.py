"""A text with calls of the proxy's functions -> the same text in which the server reads the answers.

Theory
------
The text is spliced, not printed anew: everything outside the calls stays byte for byte as it came.

    where the call stands         what takes its place
    ----------------------------  -----------------------------------------------------------------
    FROM f(...)                   ROWS FROM (jsonb_to_recordset(ANSWER) AS (columns)) [AS f]
    an expression, one value      (SELECT v AS f FROM jsonb_to_record(ANSWER) AS r(v type))
    an expression, rows           unnest(ARRAY(SELECT s FROM jsonb_to_recordset(ANSWER) AS s(columns)))

ANSWER reads the setting in which the answer lies.  Parameters of the client's in the arguments stay in the
text, in a subquery that the planner drops, with the types that the arguments have: so the server describes
the statement as if the functions were its own.

Rules
-----
* Only an unqualified name is a call of the proxy's; with a schema it is the server's business.
* Arguments must not depend on rows, since there is one answer per execution; a subquery may stand there.
* Statements that are executed where nobody sees it cannot hold a call: no views, no function bodies.
* A cursor is read after its declaration, when other calls may have been answered: its answers lie in settings
  named after it.  A PREPARE keeps its calls (`Piece.deferred`) for EXECUTE (`proxy.interface.prepared`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from postgast import pg_query_pb2 as pb

from proxy.interface import settings
from proxy.interface.arguments import assigned, depends_on_rows, function_for, question
from proxy.interface.prepared import declared_types
from proxy.interface.records import Call, Deferred, Piece, RefusalError, Rewritten
from proxy.interface.scanning import Scanned
from proxy.interface.signatures import FUNCTIONS, Function
from proxy.sql.tree import Message, children, inner, names

ANSWER: Final = "ruvector_proxy.answer_"
MAX_CALLS: Final = 32
_EXECUTED: Final = (pb.SelectStmt, pb.InsertStmt, pb.UpdateStmt, pb.DeleteStmt, pb.MergeStmt)


@dataclass(slots=True)
class _Found:
    """A call in the tree: where, and in what place."""

    node: pb.FuncCall
    function: str
    start: int
    end: int
    arguments: list[tuple[int, int]]
    in_from: pb.RangeFunction | None
    column: bool  # it is a whole column of a select list, without a name of its own
    inside: list[_Found] = field(default_factory=list)  # calls in its arguments


class Rewriter:
    """Rewrites texts.

    Parameters
    ----------
    defaults
        What SHOW says of settings that were never set.
    left_to_server
        Functions that are the server's business all the same.
    """

    def __init__(self, defaults: Mapping[str, str], left_to_server: Collection[str] = ()) -> None:
        self._defaults = defaults
        self._answered = FUNCTIONS.keys() - set(left_to_server)

    def __call__(self, sql: bytes, statements: Sequence[pb.RawStmt]) -> Rewritten | None:
        """Return what a parsed text becomes; None where nothing in it is the proxy's."""
        try:
            for statement in statements:
                node = inner(statement.stmt)
                if isinstance(node, pb.VariableSetStmt):
                    settings.checked(node)
            if not any(self._concerns(statement) for statement in statements):
                return None
            scanned = Scanned(sql)
            count = len(statements)
            return Rewritten(tuple(self._piece(scanned, statement, count) for statement in statements))
        except RefusalError as refusal:
            return Rewritten(refusal=refusal)

    def _concerns(self, statement: pb.RawStmt) -> bool:
        node = inner(statement.stmt)
        if isinstance(node, pb.VariableShowStmt):
            return settings.shown(node.name, self._defaults) is not None
        return bool(_calls(statement.stmt, self._answered))

    def _piece(self, scanned: Scanned, statement: pb.RawStmt, count: int) -> Piece:
        node = inner(statement.stmt)
        if isinstance(node, pb.VariableShowStmt):
            select = settings.shown(node.name, self._defaults)
            if select is not None:
                return Piece(select.encode(), tag=b"SHOW")
        if isinstance(node, pb.CopyStmt) and node.is_from:
            raise RefusalError("0A000", "COPY FROM cannot share a text with a function of ruvector-proxy")
        return _piece(scanned, statement, count, self._answered)


def _calls(
    tree: Message, answered: Collection[str]
) -> list[tuple[pb.FuncCall, pb.RangeFunction | None, bool]]:
    """Return all calls in a tree with the place that they stand in."""
    found = []
    pending: list[tuple[Message, pb.RangeFunction | None, bool]] = [(tree, None, False)]
    while pending:
        node, source, column = pending.pop()
        if isinstance(node, pb.FuncCall) and _name(node) in answered:
            found.append((node, source, column))
        if isinstance(node, pb.RangeFunction):
            for one in node.functions:
                items = one.list.items
                if items:
                    pending.append((inner(items[0]), node, False))
            continue
        target = isinstance(node, pb.ResTarget) and not node.name
        for _, child in children(node):
            is_node = isinstance(child, pb.Node)
            unwrapped = inner(child) if is_node else child
            if unwrapped is not None:
                pending.append((unwrapped, None, target))
    return found


def _name(node: pb.FuncCall) -> str:
    parts = names(node.funcname)
    return parts[0] if len(parts) == 1 else ""


def _piece(scanned: Scanned, statement: pb.RawStmt, count: int, answered: Collection[str]) -> Piece:
    """Return one statement with its calls replaced."""
    sql = scanned.sql
    start = statement.stmt_location
    end = start + statement.stmt_len if statement.stmt_len else len(sql)
    found = _nested(scanned, statement.stmt, answered)
    node = inner(statement.stmt)
    executed = _executed(sql, node, found[0].start) if found else True
    writer = _Writer(scanned, _slots(node))
    text = writer.render(start, end, found)
    blanks = len(sql[:start].decode()) if count > 1 else 0
    splices = tuple(
        (len(sql[:a].decode()), len(sql[:b].decode()), len(new.decode()))
        for a, b, new in writer.spliced(found)
    )
    body = text if count == 1 else b" " * blanks + text
    if count == 1:
        body = sql[:start] + text + (b"" if not statement.stmt_len else sql[end:])
    calls = tuple(writer.calls)
    if isinstance(node, pb.PrepareStmt) and calls:
        return Piece(body, (), splices, Deferred(node.name, calls, declared_types(scanned, statement)))
    return Piece(body, calls if executed else (), splices)


def _slots(node: Message) -> str:
    """Return what the settings of a statement's answers begin with."""
    if not isinstance(node, pb.DeclareCursorStmt):
        return ""
    return f"cursor_{hashlib.blake2b(node.portalname.encode(), digest_size=8).hexdigest()}_"


def _executed(sql: bytes, node: Message, first: int) -> bool:
    """Tell whether a statement runs its calls; EXPLAIN does not.

    Raises
    ------
    RefusalError
        It is no statement that a call can stand in.
    """
    if isinstance(node, _EXECUTED):
        return True
    if isinstance(node, pb.ExplainStmt):
        options = {option.def_elem.defname: option.def_elem for option in node.options}
        analyze = options.get("analyze")
        _executed(sql, inner(node.query), first)
        return analyze is not None and analyze.arg.string.sval.lower() not in ("false", "off", "0")
    if isinstance(node, pb.CreateTableAsStmt) and node.objtype == pb.OBJECT_TABLE:
        return True
    if isinstance(node, pb.CopyStmt) and not node.is_from:
        return True
    if isinstance(node, pb.DeclareCursorStmt):
        return _executed(sql, inner(node.query), first)
    if isinstance(node, pb.PrepareStmt) and isinstance(inner(node.query), _EXECUTED):
        return False
    raise RefusalError(
        "0A000",
        "a function of ruvector-proxy cannot be called here",
        detail="It is answered once, when the statement is executed; it cannot be kept in a view, a rule, "
        "a function or a default.",
        hint="Use it in SELECT, INSERT, UPDATE, DELETE, MERGE, CREATE TABLE AS, COPY (...) TO, PREPARE, "
        "EXPLAIN or DECLARE CURSOR; of what it returns now CREATE TABLE AS keeps a copy.",
        position=_characters(sql, first),
    )


def _characters(sql: bytes, offset: int) -> int:
    return len(sql[:offset].decode(errors="replace")) + 1


def _nested(scanned: Scanned, tree: Message, answered: Collection[str]) -> list[_Found]:
    """Return the outermost calls in the order of the text, each with those in its arguments."""
    found = []
    for node, source, column in _calls(tree, answered):
        bounds = scanned.call(node.location)
        if bounds is None:
            continue
        found.append(_Found(node, _name(node), node.location, bounds[0], bounds[1], source, column))
    found.sort(key=lambda one: one.start)
    outermost: list[_Found] = []
    for one in found:
        inside = outermost
        while inside and one.start < inside[-1].end:
            inside = inside[-1].inside
        inside.append(one)
    return outermost


class _Writer:
    """Replaces calls, the inner ones first; numbers them in that order."""

    def __init__(self, scanned: Scanned, slots: str) -> None:
        self._scanned = scanned
        self._slots = slots
        self._sql = scanned.sql
        self.calls: list[Call] = []
        self._replacements: dict[int, bytes] = {}
        self._behind: dict[int, tuple[int, bytes]] = {}  # by the call's start: an alias and where it goes

    def render(self, start: int, end: int, found: Sequence[_Found]) -> bytes:
        """Return the text between two offsets with the calls in it replaced."""
        parts, last = [], start
        for one in found:
            self._replacements[one.start] = self._replacement(one)
        for a, b, new in self.spliced(found):
            parts += [self._sql[last:a], new]
            last = b
        return b"".join([*parts, self._sql[last:end]])

    def spliced(self, found: Sequence[_Found]) -> Iterator[tuple[int, int, bytes]]:
        """Yield what is replaced by what: start, end, new text."""
        for one in found:
            yield one.start, one.end, self._replacements[one.start]
            if one.start in self._behind:
                place, text = self._behind[one.start]
                yield place, place, text

    def _replacement(self, one: _Found) -> bytes:
        position = _characters(self._sql, one.start)
        node = one.node
        if (
            node.HasField("over") or node.HasField("agg_filter") or node.agg_order or node.agg_star
            or node.agg_distinct or node.func_variadic
        ):  # fmt: skip
            raise RefusalError(
                "42809", f"{one.function} is a plain function: no OVER, FILTER, DISTINCT, VARIADIC",
                position=position,
            )  # fmt: skip
        if len(self.calls) >= MAX_CALLS:
            raise RefusalError("54000", f"more than {MAX_CALLS} calls of ruvector functions in one text")
        function, given = function_for(one.function, node.args)
        texts = [self._argument(bounds, one) for bounds in one.arguments]
        written = assigned(function, given, [text for text, _ in texts], position)
        for argument in node.args:
            if depends_on_rows(
                argument.named_arg_expr.arg if argument.HasField("named_arg_expr") else argument
            ):
                raise RefusalError(
                    "0A000", f"the arguments of {function.name} must not depend on rows of the statement",
                    hint="It is called once per statement; take the argument from a subquery: (SELECT ...).",
                    position=position,
                )  # fmt: skip
        asked, parameters = question(function, written)
        slot = f"{self._slots}{len(self.calls)}"
        source = one.in_from
        alias = source.alias.aliasname if source is not None and source.HasField("alias") else function.name
        key = alias if source is not None and not function.returns_rows else "v"
        self.calls.append(Call(function, slot, asked, parameters, position, key))
        kept = [
            f"({text.decode()}\n)::{_type_of(function, name)}"
            for name, text in written.items()
            if next(iter(Scanned(text).parameters(0, len(text))), None)
        ]
        return self._expression(function, _answer(slot, kept), one)

    def _argument(self, bounds: tuple[int, int], one: _Found) -> tuple[bytes, bool]:
        inside = [other for other in one.inside if bounds[0] <= other.start < bounds[1]]
        return self.render(bounds[0], bounds[1], inside), bool(inside)

    def _expression(self, function: Function, answer: str, one: _Found) -> bytes:
        name = function.name
        if function.returns_rows:
            columns = ", ".join(f"{column.name} {column.type}" for column in function.columns)
            rows = f"pg_catalog.jsonb_to_recordset({answer})"
            if one.in_from is not None:
                return self._in_from(f"{rows} AS ({columns})", name, one)
            if one.column:
                self._behind[one.start] = (one.end, f" AS {name}".encode())
            return f"pg_catalog.unnest(ARRAY(SELECT s FROM {rows} AS s({columns})))".encode()
        kind = function.columns[0].type
        if one.in_from is not None:
            quoted = '"' + self.calls[-1].key.replace('"', '""') + '"'
            return self._in_from(f"pg_catalog.jsonb_to_record({answer}) AS ({quoted} {kind})", name, one)
        return f"(SELECT r.v AS {name} FROM pg_catalog.jsonb_to_record({answer}) AS r(v {kind}))".encode()

    def _in_from(self, item: str, name: str, one: _Found) -> bytes:
        source = one.in_from
        assert source is not None
        if source.is_rowsfrom:
            return item.encode()
        if not source.HasField("alias"):
            tokens = self._scanned.tokens
            place = self._scanned.at(one.end)
            at = tokens[place + 1].end if source.ordinality else one.end
            self._behind[one.start] = (at, f" AS {name}".encode())
        return f"ROWS FROM ({item})".encode()


def _answer(slot: str, kept: Sequence[str]) -> str:
    # Where there is no answer this fails: nothing must be taken for an empty one.
    read = f"pg_catalog.current_setting('{ANSWER}{slot}')::pg_catalog.jsonb"
    if not kept:
        return f"({read})"
    return f"(SELECT p.v FROM (SELECT {read} AS v, {', '.join(kept)}) AS p)"


def _type_of(function: Function, name: str) -> str:
    return next(argument.type for argument in function.arguments if argument.name == name)
