"""Forced injection finds what can carry settings, and says rightly where it stands."""

from __future__ import annotations

import pytest

from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.session.frontend import Session
from proxy.sql import Scope
from proxy.sql.recogniser import MAX_CODE
from tests.forced import ForcedAdapter, ForcedRecogniser
from tests.integration.proxied import Dictated
from tests.integration.raw import SYNC, bind, execute, message, parse, query

SCOPE = Scope("d", "u", None)
GREETING = message("R", b"\0\0\0\0") + message("Z", b"I")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "  -- a comment\n select 1",
        "VALUES (1), (2)",
        "TABLE t",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "SELECT 1 UNION SELECT 2",
        "SELECT 'é', pg_sleep(0);",
    ],
)
def test_carries(sql: str) -> None:
    statement = ForcedRecogniser().recognise(sql.encode(), SCOPE)
    query = statement.vector
    assert query is not None
    assert (query.index, query.completions_before, statement.count) == (0, 0, 1)
    assert (
        sql.encode()[query.start : query.end]
        .strip(b" ;\n")
        .startswith(sql.split("\n")[-1].strip(" ;").encode()[:6])
    )


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "SHOW hnsw.ef_search",
        "INSERT INTO t SELECT 1",
        "SELECT 1 INTO t",
        "SELECT 1 FROM t FOR UPDATE",
        "SELECT 1 FROM (SELECT 1 FROM t FOR SHARE) s",
        "WITH a AS (DELETE FROM t RETURNING 1) SELECT * FROM a",
        "SELECT current_setting('hnsw.ef_search')",
        "EXPLAIN SELECT 1",
        "COPY (SELECT 1) TO STDOUT",
        "DECLARE c CURSOR FOR SELECT 1",
        "CREATE TABLE t AS SELECT 1",
        "SELECT nonsense FROM FROM",
        "SELECT " + "+".join(["1"] * MAX_CODE),
        "SELECT " + "+".join(["1"] * 90),
    ],
)
def test_does_not_carry(sql: str) -> None:
    assert ForcedRecogniser().recognise(sql.encode(), SCOPE).vector is None


def test_one_of_several_is_picked_and_found_in_the_text() -> None:
    picked = set()
    for i in range(40):
        statements = [f"SELECT {i}", "SET application_name = 'é'", "SELECT 22", "VALUES (3)"]
        sql = "; ".join(statements).encode()
        query = ForcedRecogniser().recognise(sql, SCOPE).vector
        assert query is not None
        assert sql[query.start : query.end] == statements[query.index].encode()
        assert query.completions_before == [0, 2, 3, 5][query.index]
        picked.add(query.index)
    assert picked == {0, 2, 3}


def test_replies_that_cannot_be_counted_make_the_position_unknown() -> None:
    query = ForcedRecogniser().recognise(b"EXECUTE p; SELECT 1", SCOPE).vector
    assert query is not None
    assert query.completions_before is None


@pytest.mark.parametrize(("adapter_type", "forced"), [(Adapter, False), (ForcedAdapter, True)])
def test_the_session_injects(adapter_type: type[Adapter], forced: bool) -> None:
    adapter = adapter_type(Counters())
    adapter.swap(Dictated((("hnsw.ef_search", "77"),)), 1)
    for sent in (query("SELECT 1"), parse("SELECT 1") + bind() + execute() + SYNC):
        session = Session(adapter, {"user": "u", "database": "d"})
        session.from_server(GREETING)
        out = session.from_client(sent)
        assert (out != sent) is forced
        assert (b"hnsw.ef_search" in out and b"77" in out) is forced
