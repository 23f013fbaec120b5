"""What texts do to the session, and where in a text the vector query stands."""

from __future__ import annotations

import pytest

from proxy.sql import Recogniser, Scope, Statement, TransactionVerb, VectorQuery
from proxy.sql.statements import EMPTY, PLAIN

SEARCH = "SELECT id FROM items ORDER BY embedding <=> '[1,2]' LIMIT 5"


def recognise(sql: str | bytes) -> Statement:
    return Recogniser().recognise(sql.encode() if isinstance(sql, str) else sql, Scope("shop", "app", None))


def query(sql: str) -> VectorQuery:
    statement = recognise(sql)
    assert statement.vector is not None, statement.reason
    return statement.vector


# -- effects on the session -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "verb"),
    [
        ("BEGIN", TransactionVerb.BEGIN),
        (" -- x\n start transaction READ ONLY", TransactionVerb.BEGIN),
        ("/* a /* nested */ */ COMMIT", TransactionVerb.COMMIT),
        ("END", TransactionVerb.COMMIT),
        ("ABORT", TransactionVerb.ROLLBACK),
        ("rollback;", TransactionVerb.ROLLBACK),
        ("SAVEPOINT a", TransactionVerb.SAVEPOINT),
        ("RELEASE a", TransactionVerb.RELEASE),
        ("ROLLBACK TO a", TransactionVerb.ROLLBACK_TO),
        ("COMMIT AND CHAIN", TransactionVerb.OTHER),
        ("PREPARE TRANSACTION 'x'", TransactionVerb.OTHER),
        ("CALL p()", None),
        ("DO $$ BEGIN COMMIT; END $$", None),
        ("SELECT 1; COMMIT", None),
    ],
)
def test_transaction_control_is_seen(sql: str, verb: TransactionVerb | None) -> None:
    statement = recognise(sql)
    assert statement.controls_transaction
    assert statement.transaction == verb


@pytest.mark.parametrize(
    ("sql", "touches", "resets"),
    [
        ("SET hnsw.ef_search = 100", {"hnsw.ef_search"}, set()),
        ('SET LOCAL "HNSW.Ef_Search" TO 100', {"hnsw.ef_search"}, set()),
        ("SELECT set_config('hnsw.EF_search', '1', false)", {"hnsw.ef_search"}, set()),
        ("SELECT Set_Config('a'::text, '1', false), set_config($1, '', true)", {"a", "*"}, set()),
        ("SET SESSION AUTHORIZATION x", {"session_authorization"}, set()),
        ("SET ROLE x", {"role"}, set()),
        ("SET TRANSACTION READ ONLY", {"transaction_read_only"}, set()),
        ("SELECT 1; set a = 1; RESET b", {"a"}, {"b"}),
        ("SET a TO DEFAULT", set(), {"a"}),
        ("RESET ALL", set(), {"*"}),
        ("DISCARD ALL", set(), {"*"}),
        ("DISCARD TEMP", set(), set()),
        ("ALTER SYSTEM SET a = 1", set(), set()),
        ("ALTER ROLE x SET a = 1", set(), set()),
        ("UPDATE t SET a = 1", set(), set()),
    ],
)
def test_settings_of_its_own_are_seen(sql: str, touches: set[str], resets: set[str]) -> None:
    statement = recognise(sql)
    assert statement.touches == touches
    assert statement.resets == resets
    assert not statement.controls_transaction


def test_settings_for_the_transaction_only_are_told_apart() -> None:
    statement = recognise("SET LOCAL a = 1; SET LOCAL b = 1; SET b = 2; SELECT set_config('c', '1', true)")
    assert statement.touches == {"a", "b", "c"}
    assert statement.local == {"a"}


@pytest.mark.parametrize(
    ("sql", "drops"),
    [
        ("DISCARD ALL", True),
        ("DEALLOCATE ALL", True),
        ("DEALLOCATE PREPARE all", True),
        ("DEALLOCATE x", False),
        ("DISCARD PLANS", False),
    ],
)
def test_dropping_all_prepared_statements_is_seen(sql: str, drops: bool) -> None:
    assert recognise(sql).drops_prepared is drops


@pytest.mark.parametrize("sql", ["", " ;\n; ", ";"])
def test_empty_texts_have_no_statement(sql: str) -> None:
    assert recognise(sql) is EMPTY


@pytest.mark.parametrize(
    "sql", ["SELECT 1", "SELECT 1;", "UPDATE t SET a = ';b'", "select settings from begins"]
)
def test_texts_of_no_interest_share_one_answer(sql: str) -> None:
    assert recognise(sql) is PLAIN


# -- position in the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "completions"),
    [
        ("SELECT 1", 2),
        ("SELECT 'é – 日本'; VALUES (1)", 4),
        ("SELECT 1 INTO x", 1),
        ("SELECT 1 INTO x UNION SELECT 2", 1),
        ("INSERT INTO t VALUES (1)", None),
        ("UPDATE t SET a = 1 RETURNING a", None),
        ("DELETE FROM t", None),
        ("SET a = 1; SHOW a; BEGIN", 4),
        ("EXPLAIN SELECT 1", 2),
        ("FETCH 1 FROM c; MOVE 1 FROM c", 3),
        ("COPY t FROM STDIN", None),
        ("CALL p()", None),
        ("EXECUTE x", None),
    ],
)
def test_offsets_are_bytes_and_replies_before_are_counted(before: str, completions: int | None) -> None:
    text = f"  {before} ;;\n  /* ü */ {SEARCH} -- ñ\n ; SELECT 'ö'"
    found = query(text)
    assert found.completions_before == completions
    assert text.encode()[found.start : found.end].decode() == f"{SEARCH} -- ñ\n "
    statements = before.count(";") + 3
    assert (found.index, recognise(text).count) == (statements - 2, statements)


def test_a_single_statement_spans_its_text() -> None:
    found = query(f"\n {SEARCH}")
    assert (found.index, found.completions_before) == (0, 0)
    assert (found.start, found.end) == (2, len(SEARCH) + 2)
