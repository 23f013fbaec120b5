"""The SQL interface, from psycopg in both protocols: results, descriptions, errors, transactions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from proxy.interface.signatures import FUNCTIONS
from tests.integration.interface_kit import Interface, interface

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

CURSORS = [psycopg.ClientCursor, psycopg.Cursor]


@pytest.fixture(scope="module")
def learned(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interface]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for role in ("stranger", "reader"):
            connection.execute(f"DROP ROLE IF EXISTS {role}")
            connection.execute(f"CREATE ROLE {role} LOGIN")
    with interface(postgres, tmp_path_factory.mktemp("interface"), "interface") as found:
        with found.direct() as connection:
            connection.execute("GRANT SELECT ON items TO reader")
        yield found
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("DROP ROLE stranger, reader")


@pytest.fixture(params=CURSORS)
def proxied(request: pytest.FixtureRequest, learned: Interface) -> Iterator[psycopg.Connection[Any]]:
    with learned.connect(cursor_factory=request.param) as connection:
        yield connection


def refused(connection: psycopg.Connection[Any], sql: str, parameters: Any = None) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(sql, parameters)
    return caught.value


def test_rows_have_the_columns_that_are_declared(proxied: psycopg.Connection[Any]) -> None:
    cursor = proxied.execute("SELECT * FROM ruvector_learning_stats('items')")
    declared = [column.name for column in FUNCTIONS["ruvector_learning_stats"].columns]
    assert [column.name for column in cursor.description or ()] == declared


def test_parameters_and_conditions(proxied: psycopg.Connection[Any]) -> None:
    sql = "SELECT arm, recall FROM ruvector_learning_stats(%s) s WHERE recall > %s"
    cursor = proxied.execute(sql, ("public.items", 2.0))
    assert [column.type_code for column in cursor.description or ()] == [25, 701]
    assert cursor.fetchall() == []


def test_errors_point_into_the_clients_own_text(proxied: psycopg.Connection[Any]) -> None:
    sql = "SELECT 'é', x FROM ruvector_learning_stats('items') s"
    error = refused(proxied, sql)
    assert (error.sqlstate, error.diag.statement_position) == ("42703", str(sql.index("x FROM") + 1))
    error = refused(proxied, "SELECT ruvector_learning_stats('items'), y")
    assert (error.sqlstate, error.diag.statement_position) == ("42703", "42")
    error = refused(proxied, "SELECT * FROM ruvector_learning_stats('nowhere')")
    assert (error.sqlstate, error.diag.statement_position) == ("42P01", "15")
    error = refused(proxied, "SELECT * FROM ruvector_learning_stats(tabel := 'items')")
    assert error.sqlstate == "42883"
    assert "ruvector_learning_stats(table_name text)" in (error.diag.message_hint or "")


def test_an_unknown_function_is_the_servers_business(proxied: psycopg.Connection[Any]) -> None:
    error = refused(proxied, "SELECT ruvector_version()")
    assert error.diag.message_primary == "function ruvector_version() does not exist"
    error = refused(proxied, "SELECT public.ruvector_learning_stats('items')")
    assert error.diag.message_primary == "function public.ruvector_learning_stats(unknown) does not exist"


def test_it_composes(proxied: psycopg.Connection[Any]) -> None:
    proxied.execute("CREATE TABLE kept AS SELECT * FROM ruvector_learning_stats('items')")
    assert proxied.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    proxied.execute("DROP TABLE kept")
    joined = (
        "WITH s AS (SELECT * FROM ruvector_learning_stats('items')) SELECT count(s.arm), "
        "(SELECT count(*) FROM ruvector_recommend_params('items')), ruvector_last_query_id() IS NULL FROM s "
        "LEFT JOIN ruvector_learning_stats('items') WITH ORDINALITY t(a, b) ON t.a = s.template"
    )
    assert proxied.execute(joined).fetchone() == (0, 0, True)


def test_in_a_transaction_and_in_a_failed_one(proxied: psycopg.Connection[Any]) -> None:
    with proxied.transaction():
        assert proxied.execute("SELECT count(*) FROM ruvector_learning_stats('items')").fetchone() == (0,)
        assert proxied.execute("SELECT current_setting('ruvector_proxy.answer_0', true)").fetchone()
    proxied.execute("BEGIN")
    refused(proxied, "SELECT 1/0")
    assert refused(proxied, "SELECT * FROM ruvector_learning_stats('items')").sqlstate == "25P02"
    proxied.execute("ROLLBACK")
    assert proxied.execute("SELECT 1").fetchone() == (1,)


def test_explain_runs_nothing(proxied: psycopg.Connection[Any]) -> None:
    plan = proxied.execute("EXPLAIN SELECT * FROM ruvector_learning_stats('items')").fetchall()
    assert "Function Scan" in plan[0][0]
    plan = proxied.execute("EXPLAIN SELECT * FROM ruvector_learning_stats('nowhere')").fetchall()
    assert "Function Scan" in plan[0][0]


def test_reading_needs_select_on_the_table(learned: Interface) -> None:
    for cursor in CURSORS:
        with learned.connect(user="stranger", cursor_factory=cursor) as connection:
            error = refused(connection, "SELECT * FROM ruvector_learning_stats('items')")
            assert (error.sqlstate, error.diag.message_primary) == (
                "42501",
                "permission denied for table public.items",
            )
            assert connection.execute("SELECT 1").fetchone() == (1,)
        with learned.connect(user="reader", cursor_factory=cursor) as connection:
            connection.execute("SELECT * FROM ruvector_learning_stats('items')")


def test_several_statements_in_one_simple_query(learned: Interface) -> None:
    with learned.connect(cursor_factory=psycopg.ClientCursor) as connection:
        cursor = connection.execute(
            "SELECT 1; SELECT count(*) FROM ruvector_learning_stats('items'); VALUES (3)"
        )
        found = [cursor.fetchone()]
        while cursor.nextset():
            found.append(cursor.fetchone())
        assert found == [(1,), (0,), (3,)]
        error = refused(connection, "SELECT 1; SELECT zz, ruvector_learning_stats('items'); SELECT 3")
        assert (error.sqlstate, error.diag.statement_position) == ("42703", "18")
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_prepared_statement_sees_fresh_values(learned: Interface) -> None:
    with learned.connect() as connection:
        sql = "SELECT count(*) + %s FROM ruvector_learning_stats(%s)"
        for i in range(8):  # psycopg prepares from the sixth on
            assert connection.execute(sql, (i, "items")).fetchone() == (i,)
            assert refused(connection, sql, (i, "nowhere")).sqlstate == "42P01"


def test_a_document_of_megabytes_as_a_parameter(learned: Interface) -> None:
    document = (
        '{"format": "ruvector-patterns", "version": 1, "templates": [], "note": "' + "x" * (3 << 20) + '"}'
    )
    sql = "SELECT ruvector_import_patterns('items', %s::jsonb)"
    with learned.connect() as connection:
        for _ in range(2):
            row = connection.execute(sql, (document,)).fetchone()
            assert row == ("0 measured queries of 0 kinds imported",)
        error = refused(connection, sql, (document.replace('"version": 1', '"version": 99'),))
        assert error.sqlstate == "22023"
        assert connection.execute("SELECT 1").fetchone() == (1,)
