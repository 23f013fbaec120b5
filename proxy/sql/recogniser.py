"""From the bytes of a Parse or Query message to a `Statement`, at the cost that the text deserves.

Four steps, each for what the one before could not answer:

1. A glance at the bytes (`proxy.sql.glance`): most texts have nothing to recognise.  Those that have not are
   kept in a set of their own, where a text that returns is found with one lookup; they need no answer kept,
   and do not push others out of the cache.
2. Seen before: one dictionary lookup.
3. The shape (`proxy.sql.shape`): a text that differs from a known one in literals only gets that one's
   answer with its own literals.
4. The parser.

libpg_query recurses over the tree without a limit, and a chain such as ``1+1+1+...`` of 60 kB overflows an
8 MB stack and kills the process (tried).  So a text is only parsed if what remains of it without strings
and comments is at most `MAX_CODE` bytes long: at least two bytes are needed for each level.  protobuf
refuses to read trees that are more than 100 messages deep, which is about 45 nested expressions; such a
text counts as one that cannot be read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from postgast import PgQueryError, parse
from postgast import pg_query_pb2 as pb

from learning.naming import chosen_id
from learning.records import Template, Value
from proxy.sql.arguments import Source
from proxy.sql.cache import GenerationCache
from proxy.sql.effects import Effects, completions, effects_of
from proxy.sql.glance import (
    is_empty,
    is_of_interest,
    may_steer,
    mentions_control,
    mentions_interface,
    mentions_operator,
    mentions_set_config,
    mentions_setting,
    skip_blanks,
)
from proxy.sql.shape import Shape, shape_of
from proxy.sql.statements import CONTROL, EMPTY, PLAIN, UNKNOWN, Argument, Scope, Statement, VectorQuery
from proxy.sql.template import Found, LeftAloneError, find

if TYPE_CHECKING:
    from proxy.interface.records import Rewritten
    from proxy.interface.settings import Steering

MAX_TEXT: Final = 1 << 20
"""Bytes; a longer text is not looked at."""

MAX_CODE: Final = 16 << 10
"""Bytes; a text with more than this outside strings and comments is not parsed."""

_log = logging.getLogger(__name__)
_MAX_PLAIN: Final = 1024  # bytes of a text of no interest that is kept
_MOST_PLAIN: Final = 4096
_OVERHEAD: Final = 1024  # bytes that an entry takes besides its text, roughly


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every text of one shape gets; `slots` holds the argument, or the index of its literal's piece."""

    statement: Statement  # the answer where there is no vector query
    template: Template | None = None
    slots: tuple[Argument | int, ...] = ()
    tail: int = 0  # bytes behind the statement

    def apply(self, sql: bytes, shape: Shape) -> Statement:
        """Return the answer for a text of this shape."""
        if self.template is None:
            return self.statement
        arguments = tuple(
            Argument(None, Value(0, shape.pieces[slot].value)) if isinstance(slot, int) else slot
            for slot in self.slots
        )
        start = skip_blanks(sql, 0)
        query = VectorQuery(self.template, arguments, 0, start, len(sql) - self.tail, 0)
        return Statement(count=1, vector=query)


class Recogniser:
    """Recognises SQL texts; one per worker, shared by its connections.

    Parameters
    ----------
    max_entries, max_bytes
        Bounds of the cache of texts, and of the cache of shapes, each.
    rewrite
        Turns a parsed text that mentions the proxy's own names into one that the server understands; returns
        None for one that has nothing of the proxy's in it.
    without_clause
        Takes the proxy's own clause off a text that is no SQL; returns None where it has none.
    """

    def __init__(
        self,
        *,
        max_entries: int = 4096,
        max_bytes: int = 32 << 20,
        rewrite: Callable[[bytes, Sequence[pb.RawStmt]], Rewritten | None] | None = None,
        without_clause: Callable[[bytes], tuple[bytes, Steering] | Rewritten | None] | None = None,
    ) -> None:
        self._rewrite = rewrite
        self._without_clause = without_clause
        self._plain: set[bytes] = set()
        self._texts: GenerationCache[tuple[bytes, Scope], Statement] = GenerationCache(max_entries, max_bytes)
        self._free: GenerationCache[bytes, tuple[int, ...]] = GenerationCache(max_entries, max_bytes)
        self._plans: GenerationCache[tuple[object, ...], _Plan] = GenerationCache(max_entries, max_bytes)

    def recognise(self, sql: bytes, scope: Scope) -> Statement:
        """Return what a session must know about a text; never raises.

        `sql` is the text without the closing NUL, in the client's encoding; only UTF-8 is understood.
        """
        if sql in self._plain:
            return PLAIN
        if len(sql) > MAX_TEXT:
            return _unread(sql)
        if not is_of_interest(sql):
            if is_empty(sql):
                return EMPTY
            self._keep_plain(sql)
            return PLAIN
        key = (sql, scope)
        known = self._texts.get(key)
        if known is not None:
            return known
        try:
            statement = self._look_closer(sql, scope)
            if statement.vector is not None and b"query_id=" in sql:
                vector = dataclasses.replace(statement.vector, query_id=chosen_id(sql))
                statement = dataclasses.replace(statement, vector=vector)
        except Exception:  # a mistake of ours must not stand in the way of the client's statement
            _log.exception("a text of %d bytes could not be analysed; it passes as it is", len(sql))
            statement = _unread(sql)
        self._texts.put(key, statement, 2 * len(sql) + _OVERHEAD)
        return statement

    def _keep_plain(self, sql: bytes) -> None:
        """Know a text of no interest again; one with literals in it is likely never to return."""
        if len(sql) <= _MAX_PLAIN:
            if len(self._plain) >= _MOST_PLAIN:
                self._plain.clear()
            self._plain.add(sql)

    def _look_closer(self, sql: bytes, scope: Scope) -> Statement:
        text = _decoded(sql)
        if text is None:
            return _unread(sql)
        shape = shape_of(sql)
        if shape is not None:
            plan = self._plan(shape, scope)
            if plan is not None:
                return plan.apply(sql, shape)
        try:
            statements = read(text, len(sql) if shape is None else shape.code_size)
        except PgQueryError:
            return self._steered(sql, scope) or _unparsed(sql)
        if statements is None:
            return _unread(sql)
        if self._rewrite is not None and mentions_interface(sql):
            rewritten = self._rewrite(sql, statements)
            if rewritten is not None:
                effects = effects_of(statements, look_for_set_config=mentions_set_config(sql))
                return dataclasses.replace(
                    _statement(len(statements), effects, None, None), rewritten=rewritten
                )
        statement, found = _analyse(sql, statements, scope)
        if shape is not None:
            self._keep_plan(sql, shape, scope, statement, found)
        return statement

    def _steered(self, sql: bytes, scope: Scope) -> Statement | None:
        """Return the answer for a text with the proxy's own clause in it; None where there is none."""
        if self._without_clause is None or not may_steer(sql):
            return None
        found = self._without_clause(sql)
        if found is None:
            return None
        if not isinstance(found, tuple):
            return Statement(count=1, controls_transaction=True, rewritten=found)
        text, steering = found
        return dataclasses.replace(self._look_closer(text, scope), text=text, steering=steering)

    # -- plans -----------------------------------------------------------------------------------------------

    def _plan(self, shape: Shape, scope: Scope) -> _Plan | None:
        free = self._free.get(shape.key)
        return None if free is None else self._plans.get(_plan_key(shape, free, scope))

    def _keep_plan(
        self, sql: bytes, shape: Shape, scope: Scope, statement: Statement, found: Found | None
    ) -> None:
        """Remember what the texts of this shape get, if it does not depend on literals in other ways."""
        query = statement.vector
        if query is not None and found is not None:
            if statement.count != 1 or statement.touches:
                return
            if query.start != skip_blanks(sql, 0) or shape.last_comment >= query.end:
                return  # a comment of another length would move the statement
            slots = tuple(_slot_recipe(source, shape) for source in found.sources)
            free = _pieces_that_are_values(slots, shape)
            plan = _Plan(PLAIN, query.template, slots, len(sql) - query.end)
        elif statement.touches or statement.resets:
            return
        else:
            free = tuple(i for i, piece in enumerate(shape.pieces) if piece.is_string)
            plan = _Plan(statement)
        self._free.put(shape.key, free, len(shape.key) + _OVERHEAD)
        weight = len(shape.key) + sum(len(piece.text) for piece in shape.pieces) + 2 * _OVERHEAD
        self._plans.put(_plan_key(shape, free, scope), plan, weight)


def read(text: str, code_size: int) -> list[pb.RawStmt] | None:
    """Parse a text whose code is `code_size` bytes long; None where it is beyond what can be read safely.

    Raises
    ------
    PgQueryError
        It is no SQL.
    """
    if code_size > MAX_CODE:
        return None
    try:
        return list(parse(text).stmts)
    except PgQueryError:
        raise
    except Exception:  # protobuf's DecodeError, too deep: the server may well accept it
        return None


def _plan_key(shape: Shape, free: tuple[int, ...], scope: Scope) -> tuple[object, ...]:
    """Name a shape together with the literals that belong to it."""
    fixed = tuple(piece.text for i, piece in enumerate(shape.pieces) if i not in free)
    return scope, shape.key, free, fixed


def _slot_recipe(source: Source, shape: Shape) -> Argument | int:
    """Return where a slot's value is to be found in the next text of this shape."""
    if source.literal is not None:
        for i, piece in enumerate(shape.pieces):
            if piece.start == source.location and piece.value == source.literal.data:
                return i
    return Argument(source.parameter, source.literal)


def _pieces_that_are_values(slots: tuple[Argument | int, ...], shape: Shape) -> tuple[int, ...]:
    """Return the pieces that are slots' values, repetitions of a vector literal included."""
    indexes = {slot for slot in slots if isinstance(slot, int)}
    vectors = {shape.pieces[i].text for i in indexes if shape.pieces[i].text.startswith(b"'[")}
    repeated = {i for i, piece in enumerate(shape.pieces) if piece.text in vectors}
    return tuple(sorted(indexes | repeated))


def _analyse(sql: bytes, statements: list[pb.RawStmt], scope: Scope) -> tuple[Statement, Found | None]:
    """Return what a parsed text means, and its vector query."""
    if not statements:
        return EMPTY, None
    effects = effects_of(statements, look_for_set_config=mentions_set_config(sql))
    replies = [completions(statement) for statement in statements]
    bounds = [_bounds(sql, statement) for statement in statements]
    found: Found | None = None
    reason: str | None = None
    query: VectorQuery | None = None
    if mentions_operator(sql):
        try:
            found = find(statements, scope)
        except LeftAloneError as left_alone:
            reason = str(left_alone)
        except PgQueryError:
            reason = "deparse"
    if found is not None:
        before = replies[: found.index]
        query = VectorQuery(
            template=found.template,
            arguments=tuple(Argument(source.parameter, source.literal) for source in found.sources),
            index=found.index,
            start=bounds[found.index][0],
            end=bounds[found.index][1],
            completions_before=None if None in before else sum(count or 0 for count in before),
        )
    return _statement(len(statements), effects, query, reason), found


def _statement(count: int, effects: Effects, query: VectorQuery | None, reason: str | None) -> Statement:
    statement = Statement(
        count=count,
        controls_transaction=effects.controls_transaction,
        transaction=effects.transaction if count == 1 else None,
        touches=frozenset(effects.touches),
        local=frozenset(effects.local - effects.lasting),
        resets=frozenset(effects.resets),
        drops_prepared=effects.drops_prepared,
        vector=query,
        reason=reason,
    )
    return PLAIN if statement == PLAIN else statement


def _bounds(sql: bytes, statement: pb.RawStmt) -> tuple[int, int]:
    """Return a statement's byte offsets, without the blanks and comments before it."""
    start = statement.stmt_location
    end = start + statement.stmt_len if statement.stmt_len else len(sql)
    return min(skip_blanks(sql, start), end), end


def _decoded(sql: bytes) -> str | None:
    if b"\0" in sql:  # would end the text for libpg_query; the protocol does not allow it either
        return None
    try:
        return sql.decode()
    except UnicodeDecodeError:
        return None


def _unread(sql: bytes) -> Statement:
    """Answer for a text that cannot be looked into."""
    if mentions_setting(sql):
        return UNKNOWN
    return CONTROL if mentions_control(sql) else PLAIN


def _unparsed(sql: bytes) -> Statement:
    """Answer for a text that does not parse: the server will refuse it as well, so it sets nothing."""
    return CONTROL if mentions_control(sql) else PLAIN
