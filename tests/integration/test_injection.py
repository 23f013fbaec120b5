"""In every situation the settings are in force for exactly one statement, and nobody can tell.

The number of rows tells which ef_search was in force: see tests.integration.pair.
"""

from __future__ import annotations

import struct

import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.pair import DEFAULT, DICTATED, LITERAL, SETTINGS, SQL, VECTOR, B, E, P, Pair, unrowed
from tests.integration.proxied import Proxy
from tests.integration.raw import (
    FLUSH,
    SYNC,
    RawClient,
    bind,
    close,
    describe,
    execute,
    first_values,
    parse,
    query,
    rows,
    tags,
)

pytestmark = pytest.mark.integration


def binary(*components: float) -> bytes:
    return struct.pack(f"!HH{len(components)}f", len(components), 0, *components)


class TestAutocommit:
    def test_extended_query_in_one_segment(self, pair: Pair) -> None:
        pair.adapted(P, B, describe(), E, SYNC)
        assert pair.setting() == b"40"

    def test_binary_vector(self, pair: Pair) -> None:
        pair.adapted(P, bind(binary(0.1, 0.2, 0.3), formats=(1,)), describe(), E, SYNC)

    def test_limit_as_a_parameter(self, pair: Pair) -> None:
        sql = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT $2 OFFSET 0"
        pair.adapted(parse(sql), bind(VECTOR.encode(), b"500"), E, SYNC)

    def test_prepared_once_and_bound_often(self, pair: Pair) -> None:
        pair.same(parse(SQL, "s"), describe("S", "s"), SYNC)
        for _ in range(7):
            pair.adapted(bind(VECTOR.encode(), name="s"), E, SYNC)
        assert pair.setting() == b"40"

    def test_parse_flush_then_bind(self, pair: Pair) -> None:
        """asyncpg: Parse, Describe, Flush; Bind, Execute, Sync once the answer is there."""
        for client in (pair.direct, pair.proxied):
            client.send(P, describe("S"), FLUSH)
            assert [client.receive()[0] for _ in range(3)] == ["1", "t", "T"]
        pair.adapted(B, E, SYNC)

    @pytest.mark.parametrize("then", ["BEGIN", LITERAL])
    def test_prepared_with_flush_and_then_a_simple_query(self, pair: Pair, then: str) -> None:
        """asyncpg's ``prepare``, then its ``transaction``: a Query behind unsynced, answered messages."""
        for client in (pair.direct, pair.proxied):
            client.send(parse(SQL, "s"), describe("S", "s"), FLUSH)
            assert [client.receive()[0] for _ in range(3)] == ["1", "t", "T"]
        if then == LITERAL:
            pair.adapted(query(then))
            pair.same(query("BEGIN"))
        else:
            pair.same(query(then))
        pair.adapted(bind(VECTOR.encode(), name="s"), E, SYNC)
        assert pair.setting() == b"40"
        pair.adapted(bind(VECTOR.encode(), name="s"), E, SYNC)
        for client in (pair.direct, pair.proxied):
            client.send(parse("SELECT 1"), FLUSH)
            assert client.receive()[0] == "1"
        assert pair.setting() == b"40"  # restored, although something was not synced
        pair.same(query("COMMIT"))

    def test_several_queries_in_one_segment(self, pair: Pair) -> None:
        show = (parse("SHOW hnsw.ef_search"), B_EMPTY, E)
        direct, proxied = pair.both(P, B, E, *show, P, B, E, *show, SYNC)
        assert unrowed(direct) == unrowed(proxied)
        assert rows(proxied) == 2 * DICTATED + 2
        shown = [value for value in first_values(proxied) if value == b"40"]
        assert len(shown) >= 2  # and never 77:
        assert pair.setting() == b"40"

    def test_a_pipeline_of_segments(self, pair: Pair) -> None:
        pair.adapted(P, B, E, SYNC, P, B, E, SYNC, P, B, E, SYNC, ready=3, times=3)
        assert pair.setting() == b"40"

    def test_simple_query(self, pair: Pair) -> None:
        pair.adapted(query(LITERAL))
        assert pair.setting() == b"40"

    @pytest.mark.parametrize(
        "text",
        [
            f"SELECT 1; {LITERAL}",
            f"{LITERAL}; SELECT 2",
            f"SELECT 'é'; {LITERAL}; SELECT 2, 3; SELECT 4",
            f"SET application_name = 'x'; {LITERAL};",
        ],
    )
    def test_one_of_several_statements(self, pair: Pair, text: str) -> None:
        direct, proxied = pair.both(query(text))
        assert unrowed(proxied) == unrowed(direct)
        assert rows(proxied) - rows(direct) == DICTATED - DEFAULT
        assert pair.setting() == b"40"

    def test_setting_is_not_seen_by_the_next_statement_of_the_text(self, pair: Pair) -> None:
        shown = pair.proxied.run(query(f"{LITERAL}; SHOW hnsw.ef_search"))
        assert first_values(shown)[-1] == b"40"


B_EMPTY = bind()


class TestTransactionBlock:
    def test_extended(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(P, B, E, SYNC)
        assert pair.setting() == b"40"
        pair.adapted(P, B, E, SYNC)
        pair.adapted(P, B, E, SYNC)
        pair.same(query("COMMIT"))
        assert pair.setting() == b"40"

    def test_simple(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(query(LITERAL))
        assert pair.setting() == b"40"
        pair.adapted(query(LITERAL))
        pair.adapted(P, B, E, SYNC)
        pair.same(query("ROLLBACK"))
        assert pair.setting() == b"40"

    def test_restored_before_a_bound_statement_sees_it(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(P, B, E, SYNC)
        pair.same(parse("SHOW hnsw.ef_search"), B_EMPTY, E, SYNC)

    def test_begin_in_the_same_segment(self, pair: Pair) -> None:
        begin = (parse("BEGIN"), B_EMPTY, E)
        pair.adapted(*begin, P, B, E, SYNC)
        pair.same(query("SHOW hnsw.ef_search"))
        pair.same(query("COMMIT"))

    def test_begin_under_way(self, pair: Pair) -> None:
        direct, proxied = pair.both(query("BEGIN"), P, B, E, SYNC, query("SHOW hnsw.ef_search"), ready=3)
        assert unrowed(direct) == unrowed(proxied)
        assert first_values(proxied)[-1] == b"40"
        pair.same(query("COMMIT"))

    def test_failed_transaction_is_left_alone(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.same(query("SELECT 1/0"))
        pair.same(P, B, E, SYNC)
        pair.same(query(LITERAL))
        pair.same(query("ROLLBACK"))
        assert pair.setting() == b"40"

    def test_error_after_a_query(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(P, B, E, SYNC)
        pair.same(query("SELECT 1/0"))
        pair.same(query("ROLLBACK"))
        assert pair.setting() == b"40"

    def test_savepoints(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(P, B, E, SYNC)
        pair.same(query("SAVEPOINT a"))
        assert pair.setting() == b"40"
        pair.adapted(P, B, E, SYNC)
        pair.same(query("ROLLBACK TO a"))
        assert pair.setting() == b"40"
        pair.adapted(P, B, E, SYNC)
        pair.same(query("RELEASE a"))
        assert pair.setting() == b"40"
        pair.same(query("COMMIT"))

    def test_set_transaction_still_comes_first(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.same(query("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))
        pair.adapted(P, B, E, SYNC)
        pair.same(query("COMMIT"))

    def test_cursor_is_left_alone(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.same(P, bind(VECTOR.encode(), portal="c"), SYNC)
        for _ in range(3):
            pair.same(execute("c", 10), SYNC)
        pair.same(close("P", "c"), SYNC)
        pair.same(query("COMMIT"))

    def test_a_suspended_portal_keeps_its_rows(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.same(parse("SELECT generate_series(1, 9)"), bind(portal="c"), execute("c", 4), SYNC)
        pair.adapted(P, B, E, SYNC)
        pair.same(execute("c", 4), SYNC)
        pair.same(query("COMMIT"))


class TestClientsOwnWill:
    @pytest.mark.parametrize(
        "statement", ["SET hnsw.ef_search = 55", "SELECT set_config('hnsw.ef_search', '55', false)"]
    )
    def test_session_setting_wins(self, pair: Pair, statement: str) -> None:
        pair.same(query(statement))
        assert rows(pair.same(P, B, E, SYNC)) == 55
        assert rows(pair.same(query(LITERAL))) == 55
        pair.same(query("RESET hnsw.ef_search"))
        pair.adapted(P, B, E, SYNC)

    def test_local_setting_wins(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.same(query("SET LOCAL hnsw.ef_search = 55"))
        assert rows(pair.same(P, B, E, SYNC)) == 55
        pair.same(query("COMMIT"))

    def test_local_setting_ends_with_its_transaction(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.same(query("SET LOCAL hnsw.ef_search = 55"))
        pair.same(query("COMMIT"))
        pair.adapted(P, B, E, SYNC)

    def test_setting_after_a_query_in_the_same_transaction(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(P, B, E, SYNC)
        pair.same(query("SET LOCAL hnsw.ef_search = 55"))
        assert rows(pair.same(P, B, E, SYNC)) == 55
        pair.same(query("COMMIT"))

    def test_startup_option_wins(self, postgres: EmbeddedPostgres, dictating: Proxy, items: str) -> None:
        dictating.dictate(SETTINGS)
        address = (dictating.host, dictating.port)
        with RawClient(address, items, postgres.user, options="-c hnsw.ef_search=55") as client:
            assert rows(client.run(P, B, E, SYNC)) == 55


class TestErrors:
    def test_position_points_into_the_clients_own_text(self, pair: Pair) -> None:
        for text in (
            f"{LITERAL.replace('id', 'no_such_column')}",
            f"SELECT 'ééé'; {LITERAL.replace('id', 'no_such_column')}",
            f"{LITERAL}; SELECT no_such_column",
        ):
            direct, proxied = pair.both(query(text))
            assert direct[-2][0] == proxied[-2][0] == "E"
            assert proxied[-2] == direct[-2]

    def test_error_of_the_query_itself(self, pair: Pair) -> None:
        pair.same(P, bind(b"[1,2]"), E, SYNC)  # wrong number of dimensions
        pair.adapted(P, B, E, SYNC)

    def test_error_before_the_query_in_its_segment(self, pair: Pair) -> None:
        pair.same(parse("SELECT 1/0"), B_EMPTY, E, P, B, E, SYNC)
        pair.adapted(P, B, E, SYNC)

    def test_discard_all_and_deallocate_all(self, pair: Pair) -> None:
        for statement in ("DISCARD ALL", "DEALLOCATE ALL"):
            pair.adapted(P, B, E, SYNC)
            pair.same(query(statement))
            pair.adapted(P, B, E, SYNC)
            direct, proxied = pair.both(query(statement), P, B, E, SYNC, ready=2)
            assert (rows(direct), rows(proxied)) == (DEFAULT, DICTATED)

    @pytest.mark.parametrize("settings", [(("hnsw.ef_search", "0"),), (("hnsw.no_such_setting", "1"),)])
    @pytest.mark.parametrize(
        "messages",
        [
            (P, B, E, SYNC),
            (P, B, E, SYNC, query("SHOW hnsw.ef_search")),
            (query(LITERAL),),
            (query(f"SELECT 1; {LITERAL}; SHOW hnsw.ef_search"),),
        ],
    )
    @pytest.mark.parametrize("block", [False, True])
    def test_refused_settings_cost_the_client_nothing(
        self,
        pair: Pair,
        dictating: Proxy,
        settings: tuple[tuple[str, str], ...],
        messages: tuple[bytes, ...],
        block: bool,
    ) -> None:
        before = dictating.counters.injection_errors
        dictating.dictate(settings)
        ready = sum(message in (SYNC, messages[-1]) for message in messages)
        if block:
            pair.same(query("BEGIN"))
        pair.same(*messages, ready=ready)
        assert dictating.counters.injection_errors == before + 1
        pair.same(query("SHOW hnsw.ef_search"))
        pair.same(*messages, ready=ready)
        assert dictating.counters.injection_errors == before + 1  # switched off
        if block:
            pair.same(query("COMMIT"))
        dictating.call(dictating.adapter._switched_off.clear)

    def test_settings_that_the_server_accepted_once_and_now_refuses(
        self, pair: Pair, dictating: Proxy
    ) -> None:
        """As after a fail-over to a server with another version: the client's own bytes are sent again."""
        settings = (("hnsw.ef_search", "0"),)
        dictating.dictate(settings)
        for messages in ((P, B, E, SYNC), (query(LITERAL),)):
            dictating.call(lambda: dictating.adapter.accepted.add(settings))
            assert rows(pair.same(*messages)) == DEFAULT
            assert settings not in dictating.adapter.accepted
            dictating.call(dictating.adapter._switched_off.clear)

    def test_statements_of_the_proxys_dropped_behind_its_back(self, pair: Pair) -> None:
        pair.adapted(P, B, E, SYNC)
        pair.same(query("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"))
        pair.adapted(P, B, E, SYNC)
        pair.same(
            query(
                "CREATE FUNCTION pg_temp.drop() RETURNS void LANGUAGE plpgsql AS "
                "$$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"
            )
        )
        pair.same(query("SELECT pg_temp.drop()"))  # nothing in the text tells
        assert rows(pair.both(P, B, E, SYNC)[1]) == DEFAULT  # the client's own bytes, sent again
        pair.adapted(P, B, E, SYNC)


class TestByteByByte:
    def test_any_split_of_the_stream(self, pair: Pair) -> None:
        stream = P + B + describe() + E + SYNC + query(LITERAL)
        for step in (1, 7, 64):
            for i in range(0, len(stream), step):
                pair.proxied.send(stream[i : i + step])
            assert rows(pair.proxied.until_ready(2)) in (2 * DICTATED, DICTATED + DEFAULT)
        assert pair.setting() == b"40"


def test_connection_that_never_loaded_pgvector(
    postgres: EmbeddedPostgres, dictating: Proxy, items: str
) -> None:
    """A setting made before the library is loaded is a placeholder, which the library then takes over."""
    dictating.dictate(SETTINGS)
    for messages in ((P, B, E, SYNC), (query(LITERAL),)):
        with RawClient((dictating.host, dictating.port), items, postgres.user) as client:
            replies = client.run(*messages)
            assert rows(replies) == DICTATED
            assert "N" not in tags(replies)
            assert first_values(client.run(query("SHOW hnsw.ef_search")))[0] == b"40"


def test_trajectories_tell_what_happened(pair: Pair, dictating: Proxy) -> None:
    dictating.trajectories.clear()
    pair.adapted(P, B, E, SYNC)
    pair.adapted(query(LITERAL))
    extended, simple = dictating.trajectories
    assert extended.template == simple.template
    for trajectory in (extended, simple):
        assert (trajectory.k, trajectory.offset, trajectory.rows) == (500, 0, DICTATED)
        assert trajectory.settings == (("hnsw.ef_search", "77"),)
        assert trajectory.vector == struct.pack("<3f", 0.1, 0.2, 0.3)
        assert 0 < trajectory.first_byte_ms <= trajectory.latency_ms < 5000
        assert trajectory.error is None
