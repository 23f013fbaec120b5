"""Texts that cannot be read, and caches that must never change an answer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from learning.records import Value
from proxy.sql import UNKNOWN, Recogniser, Scope, Statement
from proxy.sql.recogniser import MAX_CODE, MAX_TEXT
from proxy.sql.statements import CONTROL, PLAIN

SCOPE = Scope("shop", "app", None)
SEARCH = "SELECT id FROM items ORDER BY embedding <=> '[1,2]' LIMIT 5"


def recognise(sql: str | bytes, scope: Scope = SCOPE) -> Statement:
    return Recogniser().recognise(sql.encode() if isinstance(sql, str) else sql, scope)


# -- what cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        (SEARCH.encode() + b" \xff", PLAIN),
        (b"SET a = '\xff'", UNKNOWN),
        (b"SELEC 1 <-> 2", PLAIN),
        (b"BEGIN WITH SOMETHING", CONTROL),
        (SEARCH.encode() + b"\0", PLAIN),
        (b"BEGIN\0", CONTROL),
        (b"SET a = '" + b"x" * MAX_TEXT + b"'", UNKNOWN),
        (SEARCH.encode() + b"-" * MAX_TEXT, PLAIN),
        (b"BEGIN; SELECT " + b"1+" * MAX_CODE + b"1", CONTROL),
        (b"BEGIN; SELECT " + b"1+" * 100 + b"1", CONTROL),
        (b"SELECT " + b"1+" * 100 + b"1; /* */ set a = 1", UNKNOWN),
        (b"SELECT set_config('a', 'b', " + b"1+" * 100 + b"1)", UNKNOWN),
    ],
    ids=lambda value: str(value[:20]) if isinstance(value, bytes) else "",
)
def test_what_cannot_be_read_gets_the_careful_answer(sql: bytes, expected: Statement) -> None:
    assert recognise(sql) is expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "link", ["1+", "a::b::", "t natural join ", "NOT ", "-", "(", "a.", "1 IS NULL AND "]
)
def test_the_deepest_text_that_is_parsed_does_not_overflow_the_stack(link: str) -> None:
    program = (
        "import sys, threading\n"
        "from proxy.sql import Recogniser, Scope\n"
        "from proxy.sql.recogniser import MAX_CODE\n"
        "text = b'SET a = 1; SELECT '\n"
        "text += sys.argv[1].encode() * ((MAX_CODE - len(text) - 1) // len(sys.argv[1])) + b'a'\n"
        "threading.stack_size(4 << 20)\n"
        "thread = threading.Thread(target=lambda: Recogniser().recognise(text, Scope('', '', None)))\n"
        "thread.start(); thread.join(); print('survived')\n"
    )
    run = subprocess.run([sys.executable, "-c", program, link], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "survived", run.stderr


def test_a_mistake_of_our_own_is_logged_and_does_no_harm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("proxy.sql.recogniser.find", None)
    assert recognise(SEARCH) is PLAIN
    assert "could not be analysed" in caplog.text


def test_a_known_shape_does_not_let_other_encodings_through() -> None:
    recogniser = Recogniser()
    assert recogniser.recognise(b"/* x */ " + SEARCH.encode(), SCOPE).vector is not None
    assert recogniser.recognise(b"/* \xe9 */ " + SEARCH.encode(), SCOPE) is PLAIN


# -- caches ---------------------------------------------------------------------------------------------------


def test_a_repeated_text_gets_the_same_answer_object() -> None:
    recogniser = Recogniser()
    first = recogniser.recognise(SEARCH.encode(), SCOPE)
    assert recogniser.recognise(bytes(bytearray(SEARCH.encode())), Scope("shop", "app", None)) is first


def test_texts_that_differ_in_literals_share_a_template_without_a_parse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def text(category: int, name: str, vector: str, limit: int) -> bytes:
        return (
            f"/* {name} */ SELECT id, e <=> '{vector}'::vector(2) AS d FROM t WHERE c = {category}"
            f" AND n = '{name}' ORDER BY e <=> '{vector}'::vector(2) LIMIT {limit};"
        ).encode()

    recogniser = Recogniser()
    first = recogniser.recognise(text(1, "x", "[1,2]", 5), SCOPE).vector
    monkeypatch.setattr("proxy.sql.recogniser.parse", None)  # a parse would now fail
    sql = text(-2 + 44, "it''s", "[3.5,4]", 70)
    second = recogniser.recognise(sql, SCOPE).vector
    assert first is not None
    assert second is not None
    assert second.template is first.template
    assert [argument.literal for argument in second.arguments] == [
        Value(0, b"[3.5,4]"),
        Value(0, b"42"),
        Value(0, b"it's"),
        Value(0, b"70"),
    ]
    assert (second.start, second.end, second.completions_before) == (sql.index(b"SELECT"), len(sql) - 1, 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT e::vector(3) FROM t ORDER BY e <-> '[1]' LIMIT 1", "(3)|(4)"),
        ("SELECT 1 - (e <-> '[1]') FROM t ORDER BY e <-> '[1]' LIMIT 1", "1 -|2 -"),
        ("SELECT a FROM t WHERE b = -5 ORDER BY e <-> '[1]' LIMIT 1", "-5|-6"),
        ("SELECT a FROM t WHERE b = 'x'\n'y' ORDER BY e <-> '[1]' LIMIT 1", "'y'|'z'"),
        ("SELECT a FROM t WHERE b = E'x\\'' ORDER BY e <-> '[1]' LIMIT 1", "x|y"),
        ("SELECT a FROM t WHERE b = $$x$$ ORDER BY e <-> '[1]' LIMIT 1", "x|y"),
        ("SELECT a, e <-> '[1]' FROM t ORDER BY e <-> '[1]' LIMIT 1", "BY e <-> '[1]'|BY e <-> '[2]'"),
        ("SELECT a, e <-> '[1]' FROM t ORDER BY 2 LIMIT 1", "BY 2|BY 1"),
        ("SELECT 1 FROM t ORDER BY e <-> '[1]' LIMIT 1; -- a", "-- a|-- bcd"),
        ("SELECT 'a' \"x'y\" FROM t ORDER BY e <-> '[1]' LIMIT 1", "'a'|'b'"),
    ],
)
def test_a_shape_never_answers_for_another_query(one: str, other: str) -> None:
    """Whatever the cache has seen before, the answer is that of a fresh recogniser."""
    old, new = other.split("|")
    changed = one.replace(old, new)
    recogniser = Recogniser()
    recogniser.recognise(one.encode(), SCOPE)
    assert recogniser.recognise(changed.encode(), SCOPE) == recognise(changed)


def test_the_caches_are_bounded() -> None:
    recogniser = Recogniser(max_entries=10, max_bytes=40_000)
    for i in range(200):
        text = f"SELECT c{i} FROM t ORDER BY e <-> '[{i}]' LIMIT 1".encode()
        assert recogniser.recognise(text, SCOPE).vector is not None
    assert len(recogniser._texts) <= 10
    assert len(recogniser._plans) <= 10
