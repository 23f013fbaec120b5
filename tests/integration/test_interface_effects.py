"""Settings, effects, rights, feedback, cancellation: what the SQL interface changes, and when it must not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.interface_kit import Interface, interface
from tests.integration.learner_kit import text
from tests.integration.test_serve import until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(400)]

CURSORS = [psycopg.ClientCursor, psycopg.Cursor]


@pytest.fixture(scope="module")
def effects(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interface]:
    roles = ("iface_owner", "iface_curator", "iface_other", "iface_steered")
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        for role in roles:
            connection.execute(f"CREATE ROLE {role} LOGIN")
        connection.execute("CREATE ROLE iface_managers")
        connection.execute("GRANT iface_managers TO iface_curator")
        connection.execute("ALTER ROLE iface_steered SET ruvector.adaptive_search = off")
    options = '[sql]\nmanager = "iface_managers"\nreport_query_id = true\n'
    with interface(
        postgres, tmp_path_factory.mktemp("effects"), "interface_effects", options, target=0.98
    ) as found:
        with found.direct() as connection:
            connection.execute("ALTER TABLE items OWNER TO iface_owner")
            connection.execute("GRANT SELECT ON items TO iface_other, iface_curator, iface_steered")
        yield found
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP ROLE {', '.join(roles)}, iface_managers")


def refused(connection: psycopg.Connection[Any], sql: str, parameters: Any = None) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(sql, parameters)
    return caught.value


def one(connection: psycopg.Connection[Any], sql: str, parameters: Any = None) -> Any:
    row = connection.execute(sql, parameters).fetchone()
    assert row is not None
    return row[0]


QUERY = (
    "SELECT current_setting('hnsw.ef_search', true), current_setting('enable_indexscan'), id "
    "FROM items ORDER BY embedding <-> %s::vector LIMIT 10"
)
"""Tells what is in force for itself alone."""
STATS = "SELECT template, trust, arm, labels, audited_recall FROM ruvector_learning_stats('items')"
EXACT = 100_000
"""The effort of an exact search: more than any index search's."""


@pytest.fixture(scope="module")
def learned(effects: Interface) -> Interface:
    """The kind of query that `effort` sends has been learned about, and its effort is not the server's.

    Queries go on while this waits, as an application's do: without them there would be nothing new to measure.
    """
    deadline = time.monotonic() + 200.0
    with effects.connect() as connection:
        connection.execute("LOAD 'vector'")
        for number in range(100_000):
            connection.execute(QUERY, (text(effects.vectors[number % 500] + 0.3),))
            if number % 50 == 49 and adapted(connection, effects):
                return effects
            assert time.monotonic() < deadline, connection.execute(STATS).fetchall()
            time.sleep(0.01)
    raise AssertionError("no other effort was ever chosen")


def effort(connection: psycopg.Connection[Any], learned: Interface, clause: str = "") -> list[int]:
    """Return hnsw.ef_search as each of a few new vector queries sees it; the server's own is 40."""
    found = []
    for vector in learned.vectors[600:608] - 0.3:
        row = connection.execute(f"{QUERY} {clause}", (text(vector),)).fetchone()
        assert row is not None
        found.append(int(row[0]) if row[1] == "on" else EXACT)
    return found


def adapted(connection: psycopg.Connection[Any], learned: Interface, clause: str = "") -> bool:
    """Return whether queries get another effort than the server's own; which may change at any time."""
    return set(effort(connection, learned, clause)) != {40}


# -- settings -------------------------------------------------------------------------------------------------


@pytest.fixture(params=CURSORS)
def proxied(request: pytest.FixtureRequest, learned: Interface) -> Iterator[psycopg.Connection[Any]]:
    with learned.connect(cursor_factory=request.param) as connection:
        connection.execute("LOAD 'vector'")
        yield connection


def test_a_session_can_switch_adapting_off_and_on(
    proxied: psycopg.Connection[Any], learned: Interface
) -> None:
    assert adapted(proxied, learned)
    proxied.execute("SET ruvector.adaptive_search = off")
    assert one(proxied, "SHOW ruvector.adaptive_search") == "off"
    assert not adapted(proxied, learned)
    proxied.execute("RESET ruvector.adaptive_search")
    assert adapted(proxied, learned)
    proxied.execute("SET ruvector.adaptive_search TO false")
    proxied.execute("RESET ALL")
    assert adapted(proxied, learned)
    one(proxied, "SELECT set_config('ruvector.adaptive_search', 'off', false)")
    assert not adapted(proxied, learned)
    proxied.execute("DISCARD ALL")
    proxied.execute("LOAD 'vector'")
    assert adapted(proxied, learned)


def test_local_ends_with_its_transaction_and_rollback_undoes(
    proxied: psycopg.Connection[Any], learned: Interface
) -> None:
    with proxied.transaction():
        proxied.execute("SET LOCAL ruvector.adaptive_search = off")
        assert not adapted(proxied, learned)
    assert adapted(proxied, learned)
    with proxied.transaction(force_rollback=True):
        proxied.execute("SET ruvector.adaptive_search = off")
        assert not adapted(proxied, learned)
    assert adapted(proxied, learned)
    assert one(proxied, "SHOW ruvector.adaptive_search") == "on"
    with proxied.transaction():
        proxied.execute("SAVEPOINT here")
        proxied.execute("SET LOCAL ruvector.adaptive_search = off")
        assert not adapted(proxied, learned)
        proxied.execute("ROLLBACK TO here")
        assert adapted(proxied, learned)
    with proxied.transaction():
        proxied.execute("SET ruvector.adaptive_search = off")
    assert not adapted(proxied, learned)


def test_another_target_gets_another_effort(proxied: psycopg.Connection[Any], learned: Interface) -> None:
    usual = sum(effort(proxied, learned))
    proxied.execute("SET ruvector.target_recall = 0.6")
    assert one(proxied, "SHOW ruvector.target_recall") == "0.6"
    assert sum(effort(proxied, learned)) < usual
    lower = sum(effort(proxied, learned, "WITH (adaptive_search := true, target_recall => 0.6)"))
    assert lower < sum(effort(proxied, learned, "WITH (target_recall := 0.98)"))
    parameters = (text(learned.vectors[3]),)
    rows = proxied.execute(f"{QUERY} WITH (target_recall := 1.0)", parameters).fetchall()
    with learned.direct() as connection:
        connection.execute("SET enable_indexscan = off")
        exact = connection.execute(QUERY, parameters).fetchall()
    assert int(rows[0][0]) > 40 or [row[2] for row in rows] == [row[2] for row in exact]
    assert not adapted(proxied, learned, "WITH (adaptive_search := false)")
    assert sum(effort(proxied, learned)) < usual


def test_an_effort_that_the_client_fixes_itself(proxied: psycopg.Connection[Any], learned: Interface) -> None:
    assert one(proxied, "SHOW ruvector.ef_search") == "auto"
    proxied.execute("SET ruvector.ef_search = 77")
    assert one(proxied, "SHOW ruvector.ef_search") == "77"
    assert set(effort(proxied, learned)) == {77}
    other = "SELECT current_setting('hnsw.ef_search', true) AS never_learned FROM items ORDER BY embedding <-> %s::vector LIMIT 9"
    assert one(proxied, other, (text(learned.vectors[3]),)) == "77"
    assert set(effort(proxied, learned, "WITH (ef_search := 55)")) == {55}
    assert set(effort(proxied, learned, "WITH (ef_search := auto)")) == {77}
    with proxied.transaction():
        proxied.execute("SET LOCAL ruvector.ef_search = 66")
        assert set(effort(proxied, learned)) == {66}
    assert set(effort(proxied, learned)) == {77}
    proxied.execute("RESET ruvector.ef_search")
    assert adapted(proxied, learned)
    assert refused(proxied, "SET ruvector.ef_search = 1001").sqlstate == "22023"
    with learned.connect(options="-c ruvector.ef_search=88") as connection:
        connection.execute("LOAD 'vector'")
        assert set(effort(connection, learned)) == {88}


@pytest.mark.parametrize("cursors", CURSORS)
def test_settings_of_the_role_and_at_start_up(learned: Interface, cursors: Any) -> None:
    with learned.connect("iface_steered", cursor_factory=cursors) as connection:
        connection.execute("SELECT '[1]'::vector")
        assert one(connection, "SHOW ruvector.adaptive_search") == "off"
        assert not adapted(connection, learned)
        connection.execute("SET ruvector.adaptive_search = on")
        connection.execute("RESET ruvector.adaptive_search")
        assert not adapted(connection, learned)
    options = "-c ruvector.adaptive_search=off"
    with learned.connect(cursor_factory=cursors, options=options) as connection:
        connection.execute("SELECT '[1]'::vector")
        assert not adapted(connection, learned)
        connection.execute("SET ruvector.adaptive_search = on")
        assert adapted(connection, learned)


# -- effects --------------------------------------------------------------------------------------------------


def window(connection: psycopg.Connection[Any]) -> Any:
    """Return how many ratings were counted: a number that grows by one with each execution."""
    return one(connection, "SELECT max(feedback) FROM ruvector_learning_stats('items')")


def test_effects_happen_once_per_execution_and_only_then(
    proxied: psycopg.Connection[Any], learned: Interface
) -> None:
    proxied.execute(f"{QUERY} /*query_id='once'*/", (text(learned.vectors[5]),))
    assert one(proxied, "SELECT ruvector_last_query_id()") == "once"
    assert proxied.info.parameter_status("ruvector.last_query_id") == "once"
    rate = "SELECT ruvector_record_feedback(query_id := 'once', relevant_ids := ARRAY[%s]::text[])"
    before = window(proxied)
    for expected in range(1, 8):  # psycopg prepares from the sixth on
        assert one(proxied, rate, ("3",)) is True
        until(lambda expected=expected: window(proxied) >= before + expected)  # type: ignore[misc]
    before = window(proxied)
    proxied.execute("BEGIN READ ONLY")
    assert refused(proxied, rate, ("3",)).sqlstate == "25006"
    assert refused(proxied, rate, ("3",)).sqlstate == "25P02"
    proxied.execute("ROLLBACK")
    refused(proxied, rate + " FROM nowhere", ("3",))
    proxied.execute("EXPLAIN " + rate, ("3",))
    time.sleep(1.0)
    assert window(proxied) == before
    assert one(proxied, "SELECT ruvector_record_feedback('never seen', ARRAY['1'])") is False


def test_describing_does_not_execute(learned: Interface) -> None:
    with learned.connect() as connection:
        before = window(connection)
        raw = connection.pgconn
        raw.prepare(b"s", b"SELECT ruvector_record_feedback($1, ARRAY[$2]::text[]) AS done, $3::int4 AS n")
        described = raw.describe_prepared(b"s")
        assert [described.param_type(i) for i in range(described.nparams)] == [25, 25, 23]
        assert [(described.fname(i), described.ftype(i)) for i in range(described.nfields)] == [
            (b"done", 16),
            (b"n", 23),
        ]
        time.sleep(0.5)
        assert window(connection) == before
        done = raw.exec_prepared(b"s", [b"never seen", b"1", b"\x00\x00\x00\x07"], [0, 0, 1], 1)
        assert (done.get_value(0, 0), done.get_value(0, 1)) == (b"\0", b"\0\0\0\7")


def test_older_rating_by_vector(proxied: psycopg.Connection[Any], learned: Interface) -> None:
    effort(proxied, learned)
    rate = "SELECT ruvector_record_feedback('items', %s::vector, ARRAY['1'], ARRAY['2'])"
    time.sleep(0.5)
    assert one(proxied, rate, (text(learned.vectors[3]),)) is True


# -- patterns -------------------------------------------------------------------------------------------------


def test_a_bad_document_changes_nothing(proxied: psycopg.Connection[Any], learned: Interface) -> None:
    export = "SELECT ruvector_export_patterns('items')"
    until(lambda: len(one(proxied, export)["templates"]) > 0, 60.0)
    document = one(proxied, export)
    # A few of them: a longer text than 1 MiB would not be looked at.
    others = [{**each, "patterns": each["patterns"][:3]} for each in document["templates"]]
    entry = others.pop(next(place for place, each in enumerate(others) if len(each["patterns"]) == 3))
    document = {**document, "templates": [entry, *others]}
    (pattern, *rest) = entry["patterns"]
    bad = [
        {**document, "version": 99},
        {**document, "format": "something else"},
        {**document, "templates": {}},
        {**document, "templates": [{**entry, "patterns": [*rest, {**pattern, "k": "ten"}]}, *others]},
        {**document, "templates": [{**entry, "template": {**entry["template"], "slots": 7}}, *others]},
        {**document, "templates": [{**entry, "rows": "many"}, *others]},
        {**document, "templates": [*others, {**entry, "table": "public.elsewhere"}]},
    ]
    new = {**pattern, "timestamp": pattern["timestamp"] + 0.5}  # it would be taken, were nothing else wrong
    for wrong in bad:
        if wrong["templates"]:
            first, *more = wrong["templates"]
            wrong = {**wrong, "templates": [{**first, "patterns": [new, *first["patterns"]]}, *more]}
        before = known(proxied)
        error = refused(proxied, "SELECT ruvector_import_patterns('items', %s)", (json.dumps(wrong),))
        assert error.sqlstate == "22023", error
        assert new["timestamp"] not in known(proxied)
        assert before <= known(proxied)  # learning goes on meanwhile: more may be known, never less


def known(connection: psycopg.Connection[Any]) -> set[float]:
    """Return when each of the measured queries was measured, which names it."""
    document = one(connection, "SELECT ruvector_export_patterns('items')")
    return {pattern["timestamp"] for entry in document["templates"] for pattern in entry["patterns"]}


def test_the_numbers_of_patterns_functions_are_used(
    proxied: psycopg.Connection[Any], learned: Interface
) -> None:
    stats = "SELECT max(patterns) FROM ruvector_learning_stats('items') WHERE trust = 'query'"
    assert refused(proxied, "SELECT ruvector_extract_patterns('items', 0)").sqlstate == "22023"
    assert refused(proxied, "SELECT ruvector_consolidate_patterns('items', 1.5)").sqlstate == "22023"
    one(proxied, "SELECT ruvector_extract_patterns('items', 12)")
    few = one(proxied, stats)
    assert few is None or few <= 12  # None: nothing is chosen by query vector, so there are no patterns
    assert one(proxied, "SELECT ruvector_extract_patterns('items', 1000)") >= 1
    assert one(proxied, "SELECT ruvector_consolidate_patterns('items', 0.999)") >= 1
    assert one(proxied, "SELECT ruvector_consolidate_patterns('items')") >= 1


# -- rights ---------------------------------------------------------------------------------------------------


def test_who_may_change_and_who_may_move_patterns(learned: Interface) -> None:
    change = "SELECT ruvector_enable_learning('items', min_samples := 90)"
    for user, code in {
        "iface_other": "42501",
        "iface_owner": None,
        "iface_curator": None,
        "postgres": None,
    }.items():
        for cursors in CURSORS:
            with learned.connect(user, cursor_factory=cursors) as connection:
                if code is None:
                    assert one(connection, change) == "learning about public.items is on"
                else:
                    error = refused(connection, change)
                    assert error.sqlstate == code
                    assert "iface_managers" in (error.diag.message_hint or "")
    for user in ("iface_owner", "iface_curator"):
        with learned.connect(user) as connection:
            assert refused(connection, "SELECT ruvector_export_patterns('items')").sqlstate == "42501"
            error = refused(connection, "SELECT ruvector_import_patterns('items', '{}')")
            assert error.sqlstate == "42501"


def test_search_path_and_quoted_names(proxied: psycopg.Connection[Any], learned: Interface) -> None:
    with learned.direct() as connection:
        connection.execute('CREATE SCHEMA IF NOT EXISTS "Odd"')
        connection.execute('CREATE TABLE IF NOT EXISTS "Odd"."My Table" (id int, embedding vector(3))')
    assert proxied.execute("""SELECT * FROM ruvector_learning_stats('"Odd"."My Table"')""").fetchall() == []
    assert refused(proxied, """SELECT * FROM ruvector_learning_stats('"My Table"')""").sqlstate == "42P01"
    proxied.execute('SET search_path = "Odd", public')
    assert proxied.execute("""SELECT * FROM ruvector_learning_stats('"My Table"')""").fetchall() == []
    assert refused(proxied, "SELECT * FROM ruvector_learning_stats(NULL)").sqlstate == "22004"


# -- long calls -----------------------------------------------------------------------------------------------

LONG = "SELECT * FROM ruvector_benchmark_latency('items', num_queries := 100000, k := 10)"


def test_a_long_call_tells_how_far_it_is_and_can_be_cancelled(
    proxied: psycopg.Connection[Any], learned: Interface
) -> None:
    told: list[str] = []
    proxied.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
    timer = threading.Timer(4.0, proxied.cancel)
    timer.start()
    started = time.monotonic()
    error = refused(proxied, LONG)
    timer.cancel()
    assert error.sqlstate == "57014"
    assert 3.5 < time.monotonic() - started < 8.0
    assert any(words.endswith("of 100000 queries done") for words in told)
    assert one(proxied, "SELECT 1") == 1
    with learned.direct() as connection:  # nothing of it is left on the server
        active = (
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ruvector-proxy learner' "
            "AND state = 'active' AND query LIKE '%%OPERATOR(public.<->)%%'"
        )
        until(lambda: one(connection, active) == 0)


def test_only_one_at_a_time_and_the_timeout_holds(
    proxied: psycopg.Connection[Any], learned: Interface
) -> None:
    with learned.connect() as other:
        thread = threading.Thread(target=_run, args=(other,))
        thread.start()
        time.sleep(1.0)
        assert refused(proxied, LONG).sqlstate == "53400"
        other.cancel()
        thread.join(10)
    time.sleep(0.5)
    proxied.execute("SET statement_timeout = '1s'")
    started = time.monotonic()
    assert refused(proxied, LONG).sqlstate == "57014"
    assert time.monotonic() - started < 5.0


def _run(connection: psycopg.Connection[Any]) -> None:
    with contextlib.suppress(psycopg.Error):
        connection.execute(LONG)


# -- a learner that is away -----------------------------------------------------------------------------------


def test_a_dead_learner_is_said_and_traffic_goes_on(
    proxied: psycopg.Connection[Any], learned: Interface
) -> None:
    pid = learned.served.pids("learner")[-1]
    os.kill(pid, signal.SIGKILL)
    error = None
    for _ in range(50):
        try:
            proxied.execute("SELECT * FROM ruvector_learning_stats('items')")
        except psycopg.Error as caught:
            error = caught
            break
    assert error is not None
    assert (error.sqlstate, "learner" in str(error)) == ("57P03", True)
    assert one(proxied, "SELECT 1") == 1

    def answers() -> bool:
        with contextlib.suppress(psycopg.Error):
            return proxied.execute("SELECT count(*) FROM ruvector_learning_stats('items')").fetchone() != (0,)
        return False

    until(answers)
    options = "SELECT ruvector_enable_learning('items')"
    assert one(proxied, options) == "learning about public.items is on"
