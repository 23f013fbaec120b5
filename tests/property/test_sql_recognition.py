"""Properties of recognition over generated texts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learning.records import SlotRole, Value
from proxy.sql import Recogniser, Scope, Statement, VectorQuery
from proxy.sql.glance import (
    OPERATORS,
    is_of_interest,
    mentions_control,
    mentions_interface,
    mentions_operator,
)
from proxy.sql.vectors import decode_limit, decode_vector

SCOPE = Scope("shop", "app", None)
SHARED = Recogniser(max_entries=64, max_bytes=1 << 20)  # keeps shapes from one example to the next


def recognise(sql: str | bytes) -> Statement:
    """Ask a recogniser that has seen other texts, and check that this made no difference."""
    data = sql.encode() if isinstance(sql, str) else sql
    statement = SHARED.recognise(data, SCOPE)
    assert statement == Recogniser().recognise(data, SCOPE)
    return statement


# -- anything at all -------------------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    [
        "SELECT", "FROM", "t", "ORDER BY", "e", "<->", "<=>", "$1", "'[1,2]'", "'", "''", '"', "LIMIT", "5", ";",
        "--", "/*", "*/", "\n", "$$", "$a$", "E'", "\\'", "(", ")", ",", "::vector", "BEGIN", "SET", "a.b", "=",
        "set_config", "WITH", "AS", "UNION", "NULL", "1.5", "-", "é", "\t", "FOR UPDATE", "DISCARD ALL", "U&'",
    ]
)  # fmt: skip


@pytest.mark.slow
@given(
    st.one_of(st.binary(max_size=200), st.lists(FRAGMENTS, max_size=25).map(lambda p: " ".join(p).encode()))
)
def test_no_text_makes_it_raise(sql: bytes) -> None:
    statement = recognise(sql)
    if statement.vector is not None:
        assert 0 <= statement.vector.start < statement.vector.end <= len(sql)
        assert 0 <= statement.vector.index < statement.count


@given(st.sampled_from([0, 1]), st.binary(max_size=80))
def test_no_bytes_make_decoding_raise(format_code: int, data: bytes) -> None:
    vector = decode_vector(format_code, data)
    assert vector is None or (vector.ndim == 1 and np.isfinite(vector).all())
    limit = decode_limit(Value(format_code, data))
    assert limit is None or isinstance(limit, int)


@given(
    st.sampled_from(
        ["", "select ", "SELECT", "Update x", "insert", "delete;", "selection", "set", "\n", "-- x\n"]
    ),
    st.lists(FRAGMENTS, max_size=12),
    st.sampled_from(["", ";", "; ", ";;", ";COMMIT", "; set x=1", "ruvector", "do"]),
)
def test_the_glance_finds_what_each_of_its_checks_finds(head: str, middle: list[str], end: str) -> None:
    sql = (head + " ".join(middle) + end).encode()
    assert is_of_interest(sql) == (mentions_operator(sql) or mentions_control(sql) or mentions_interface(sql))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60))
def test_numbers_in_text_are_those_that_python_reads(numbers: list[float]) -> None:
    text = "[" + ",".join(map(repr, numbers)) + "]"
    vector = decode_vector(0, text.encode())
    assert vector is not None
    np.testing.assert_array_equal(vector, np.array([float(repr(number)) for number in numbers], np.float32))


TAIL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@pytest.mark.slow
@given(TAIL, st.sampled_from(OPERATORS))
def test_operators_in_strings_and_comments_are_not_queries(noise: str, operator: str) -> None:
    inside = f"{noise} ORDER BY e {operator} '[1]' LIMIT 5 {noise}"
    quoted = inside.replace("'", "''")
    comment = inside.replace("/*", "").replace("*/", "").replace("/", "").replace("*", "")
    line = re.sub(r"[\r\n]", " ", inside)
    name = inside.replace('"', '""')[:60].removesuffix('"')
    for text in (
        f"SELECT '{quoted}'",
        f"SELECT 1 /*{comment}*/",
        f"SELECT 1 --{line}",
        f'SELECT 1 AS "{name}_"',
    ):
        assert recognise(text).vector is None


# -- generated vector queries ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A generated query: the parts of its text, and what was put into each slot, in the order of the text."""

    select: str
    conditions: tuple[tuple[str, str, str, bool], ...]  # column, operator, value, is a number
    operator: str
    vector: str
    cast: str
    limit: int
    offset: int | None

    def render(self, *, literal: bool, upper: bool, blank: str) -> tuple[str, list[bytes]]:
        """Return the text, and the values in the order of their (0-based) parameters."""
        values: list[bytes] = []

        def place(value: str, *, number: bool = False) -> str:
            values.append(value.encode())
            if not literal:
                return f"${len(values)}"
            return value if number else "'" + value.replace("'", "''") + "'"

        def word(text: str) -> str:
            return text.upper() if upper else text.lower()

        parts = [word("select"), self.select, word("from"), "items"]
        for i, (column, operator, value, number) in enumerate(self.conditions):
            parts += [word("and" if i else "where"), column, operator, place(value, number=number)]
        parts += [word("order by"), "embedding", self.operator, place(self.vector) + self.cast]
        parts += [word("limit"), place(str(self.limit), number=True)]
        if self.offset is not None:
            parts += [word("offset"), place(str(self.offset), number=True)]
        return blank.join(part.replace(" ", blank) if part == "order by" else part for part in parts), values


NUMBERS = st.integers(0, 10**6).map(str)
STRINGS = st.text(st.characters(codec="utf-8", exclude_characters="\0["), max_size=12)
CONDITIONS = st.tuples(
    st.sampled_from(["category", "items.price", '"Name"']), st.sampled_from(["=", "<>", "<", ">="])
).flatmap(
    lambda head: st.one_of(
        NUMBERS.map(lambda value: (*head, value, True)), STRINGS.map(lambda value: (*head, value, False))
    )
)
VECTORS = st.lists(st.integers(-100, 100), min_size=1, max_size=4).map(lambda v: str(v).replace(" ", ""))
BLANKS = st.sampled_from([" ", "\n", " \t ", " /* 'x' <-> 5 */ ", " -- it's 7\n", '/* " */'])
SEARCHES = st.builds(
    Search,
    select=st.sampled_from(["id", "*", "id, name", "id, 1 - (embedding <=> embedding) AS s"]),
    conditions=st.lists(CONDITIONS, max_size=3).map(tuple),
    operator=st.sampled_from(OPERATORS),
    vector=VECTORS,
    cast=st.sampled_from(["", "::vector", "::halfvec(3)"]),
    limit=st.integers(0, 10_000),
    offset=st.none() | st.integers(0, 1000),
)


def vector_query(sql: str) -> VectorQuery:
    statement = recognise(sql)
    assert statement.vector is not None, (sql, statement.reason)
    return statement.vector


@pytest.mark.slow
@settings(max_examples=150)
@given(SEARCHES, st.booleans(), BLANKS)
def test_slots_hold_what_was_put_in(search: Search, upper: bool, blank: str) -> None:
    expected_roles = [SlotRole.FILTER] * len(search.conditions) + [SlotRole.VECTOR, SlotRole.LIMIT]
    if search.offset is not None:
        expected_roles.append(SlotRole.OFFSET)
    sql, values = search.render(literal=True, upper=upper, blank=blank)
    found = vector_query(sql)
    assert [slot.role for slot in found.template.slots] == expected_roles
    assert [argument.literal for argument in found.arguments] == [Value(0, value) for value in values]
    columns = [column.split(".")[-1].strip('"') for column, *_ in search.conditions]
    assert [slot.column for slot in found.template.slots[: len(columns)]] == columns

    bound, _ = search.render(literal=False, upper=not upper, blank=" ")
    parameters = vector_query(bound)
    assert [argument.parameter for argument in parameters.arguments] == list(range(len(values)))
    assert parameters.template == found.template


@pytest.mark.slow
@given(SEARCHES, st.booleans(), st.booleans(), BLANKS, BLANKS)
def test_the_key_ignores_blanks_comments_and_case(
    search: Search, literal: bool, upper: bool, one: str, other: str
) -> None:
    first, _ = search.render(literal=literal, upper=upper, blank=one)
    second, _ = search.render(literal=literal, upper=not upper, blank=other)
    assert vector_query(first).template == vector_query(f"{other}{second} ;").template


@pytest.mark.slow
@given(SEARCHES, st.lists(STRINGS, max_size=3), STRINGS)
def test_offsets_cut_the_statement_out(search: Search, before: list[str], after: str) -> None:
    own, _ = search.render(literal=True, upper=True, blank=" ")
    head = "".join(f"SELECT '{text.replace(chr(39), chr(39) * 2)}';" for text in before)
    text = f"{head} {own};SELECT '{after.replace(chr(39), chr(39) * 2)}'"
    found = vector_query(text)
    assert text.encode()[found.start : found.end].decode() == own
    assert (found.index, found.completions_before) == (len(before), 2 * len(before))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_vectors_survive_both_formats(numbers: list[float]) -> None:
    array = np.array(numbers, dtype=np.float32)
    text = ("[" + ",".join(map(repr, numbers)) + "]").encode()
    binary = len(numbers).to_bytes(2, "big") + b"\0\0" + array.astype(">f4").tobytes()
    for decoded in (decode_vector(0, text), decode_vector(1, binary)):
        assert decoded is not None
        np.testing.assert_array_equal(decoded, array)
