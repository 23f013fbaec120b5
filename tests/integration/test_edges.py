"""The protocol's edges: what the client sees through the proxy is what it sees without it, to the byte.

Each test holds one line of the list in docs/wire.md.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from tests.integration.pair import DICTATED, LITERAL, SETTINGS, B, E, P, Pair
from tests.integration.proxied import Proxy
from tests.integration.raw import (
    FLUSH,
    SYNC,
    Message,
    RawClient,
    bind,
    close,
    describe,
    execute,
    first_values,
    message,
    parse,
    query,
    rows,
    tags,
)

pytestmark = pytest.mark.integration

Connect = Callable[..., tuple[RawClient, RawClient]]


def masked(messages: list[Message]) -> list[Message]:
    """Return a greeting without what differs between any two connections."""
    return [(tag, f"{len(body)} bytes".encode() if tag == "K" else body) for tag, body in messages]


@pytest.fixture
def connect(postgres: EmbeddedPostgres, dictating: Proxy, items: str) -> Iterator[Connect]:
    """Return a function that opens the same connection direct and through the proxy."""
    dictating.dictate(SETTINGS)
    opened: list[RawClient] = []

    def connect(**options: Any) -> tuple[RawClient, RawClient]:
        direct, proxied = (
            RawClient(address, items, postgres.user, **options) for address in addresses(postgres, dictating)
        )
        opened.extend((direct, proxied))
        return direct, proxied

    yield connect
    for client in opened:
        client.socket.close()


def addresses(postgres: EmbeddedPostgres, proxy: Proxy) -> tuple[str, tuple[str, int]]:
    return f"{postgres.host}/.s.PGSQL.{postgres.port}", (proxy.host, proxy.port)


def same(clients: tuple[RawClient, RawClient], *messages: bytes, ready: int = 1) -> list[Message]:
    direct, proxied = (client.run(*messages, ready=ready) for client in clients)
    assert proxied == direct
    return proxied


def same_end(clients: tuple[RawClient, RawClient], *messages: bytes) -> list[Message]:
    """Send, and return what comes until the server closes: the same on both."""
    seen = []
    for client in clients:
        client.send(*messages)
        received = []
        try:
            while True:
                received.append(client.receive())
        except (EOFError, ConnectionResetError):
            seen.append(received)
    assert seen[0] == seen[1]
    return seen[1]


class TestStartup:
    @pytest.mark.parametrize("protocol", [(3, 0), (3, 1), (3, 2), (3, 3), (3, 9999)])
    def test_protocol_versions(self, connect: Connect, protocol: tuple[int, int]) -> None:
        """NegotiateProtocolVersion is the server's answer; cancel keys are longer from 3.2 on."""
        direct, proxied = connect(protocol=protocol)
        assert masked(proxied.greeting) == masked(direct.greeting)
        assert ("v" in tags(direct.greeting)) == (protocol > (3, 2))
        assert len(proxied.key) == (8 if protocol < (3, 2) else 36)
        same((direct, proxied), query("SELECT 1"))
        direct_rows, proxied_rows = (rows(client.run(P, B, E, SYNC)) for client in (direct, proxied))
        assert (direct_rows, proxied_rows) == (40, DICTATED)

    @pytest.mark.parametrize(
        "body",
        [
            struct.pack("!HH", 2, 0) + bytes(288),
            struct.pack("!HH", 4, 0) + b"user\0x\0\0",
            struct.pack("!HH", 3, 0) + b"user\0no terminator",
            struct.pack("!HH", 3, 0) + b"\0",
            struct.pack("!HH", 1234, 1) + b"\0",
        ],
    )
    def test_what_cannot_be_read_is_refused_in_the_servers_words(
        self, postgres: EmbeddedPostgres, dictating: Proxy, body: bytes
    ) -> None:
        answers = []
        for address in addresses(postgres, dictating):
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            with socket.socket(family) as sock:
                sock.settimeout(10)
                sock.connect(address)
                sock.sendall(struct.pack("!I", len(body) + 4) + body)
                answers.append(b"".join(iter(lambda sock=sock: sock.recv(4096), b"")))  # type: ignore[misc]
        assert answers[0] == answers[1]
        assert b"FATAL" in answers[1]

    def test_unknown_protocol_options_are_negotiated_by_the_server(self, connect: Connect) -> None:
        direct, proxied = connect(**{"_pq_.unheard_of": "1"})
        assert masked(proxied.greeting) == masked(direct.greeting)
        assert ("v", struct.pack("!II", 3 << 16 | 0, 1) + b"_pq_.unheard_of\0") in proxied.greeting

    def test_parameters_and_options_reach_the_server(self, connect: Connect) -> None:
        clients = connect(application_name="é x", options="-c work_mem=7MB -c search_path=a,public")
        same(clients, query("SHOW work_mem; SHOW search_path; SHOW application_name"))

    def test_refusal_of_a_database_in_the_servers_words(
        self, postgres: EmbeddedPostgres, dictating: Proxy
    ) -> None:
        greetings = []
        for address in addresses(postgres, dictating):
            with pytest.raises(EOFError) as refused:
                RawClient(address, "nowhere", postgres.user)
            greetings.append(refused.value.__notes__)
        assert greetings[0] == greetings[1]
        assert "FATAL" in greetings[1][0]


@pytest.mark.slow
def test_replication_connections_are_relayed_raw() -> None:
    settings = {**FAST_SETTINGS, "wal_level": "replica", "max_wal_senders": "4"}
    with EmbeddedPostgres(settings=settings) as server, Proxy(server.host, server.port, SETTINGS) as proxy:
        direct, proxied = (
            RawClient(address, "postgres", server.user, replication="database")
            for address in addresses(server, proxy)
        )
        with direct, proxied:
            position = first_values(same((direct, proxied), query("SELECT pg_current_wal_lsn()")))[0].decode()
            same((direct, proxied), query("SHOW server_version"))
            for client in (direct, proxied):
                client.send(query(f"START_REPLICATION PHYSICAL {position}"))
                assert client.receive()[0] == "W"  # CopyBothResponse
            end = message("c")
            for client in (direct, proxied):
                client.send(end)
                seen = [client.receive()[0]]
                while seen[-1] != "Z":
                    seen.append(client.receive()[0])
                assert [tag for tag in seen if tag != "d"][:1] == ["c"]


class TestCancel:
    @pytest.mark.parametrize("protocol", [(3, 0), (3, 2)])
    def test_keys_of_any_length(self, connect: Connect, dictating: Proxy, protocol: tuple[int, int]) -> None:
        _, client = connect(protocol=protocol)
        client.send(query("SELECT pg_sleep(30)"))
        time.sleep(0.1)
        cancel((dictating.host, dictating.port), client.key)
        assert [tag for tag, _ in client.until_ready()][-2:] == ["E", "Z"]
        assert rows(client.run(query("SELECT 1"))) == 1

    def test_of_an_injected_statement(self, pair: Pair, dictating: Proxy) -> None:
        """The search itself is what is cancelled, and once; settings are gone afterwards."""
        slow = LITERAL.replace("SELECT id", "SELECT id, pg_sleep(30)")
        for messages in ((query(slow),), (parse(slow), bind(), execute(), SYNC)):
            pair.proxied.send(*messages)
            time.sleep(0.2)
            cancel((dictating.host, dictating.port), pair.proxied.key)
            replies = pair.proxied.until_ready()
            errors = [body for tag, body in replies if tag == "E"]
            assert len(errors) == 1
            assert b"C57014\0" in errors[0]
            assert pair.setting() == b"40"


def cancel(address: tuple[str, int], key: bytes) -> None:
    """Send a CancelRequest and wait until the other side closes."""
    with socket.create_connection(address, timeout=10) as sock:
        body = struct.pack("!I", 80877102) + key
        sock.sendall(struct.pack("!I", len(body) + 4) + body)
        assert sock.recv(1) == b""


class TestErrors:
    def test_everything_up_to_sync_is_skipped_a_query_too(self, pair: Pair) -> None:
        pair.same(parse("SELECT 1/0"), bind(), E, query("SELECT 2"), parse("SELECT 3"), SYNC)
        pair.same(query("SELECT 4"))

    def test_an_error_comes_without_flush_and_parse_complete_does_not(self, pair: Pair) -> None:
        for client in (pair.direct, pair.proxied):
            client.send(parse("SELECT 1", "kept"))
            assert client.silent()
            client.send(parse("SELECT no_such_column"))
            assert [client.receive()[0] for _ in range(2)] == ["1", "E"]
            assert tags(client.run(SYNC)) == "Z"

    def test_positions_in_text_of_several_bytes_per_character(self, pair: Pair) -> None:
        for text in (
            f"SELECT 'ééé', '日本'; {LITERAL.replace('items', 'no_such_table')}",
            "/* ü */ " + LITERAL.replace("id", '"ö", no_such_column'),
            f"{LITERAL}; SELECT '日本', no_such_column",
        ):
            direct, proxied = pair.both(query(text))
            errors = [body for tag, body in direct if tag == "E"]
            assert errors
            assert errors == [body for tag, body in proxied if tag == "E"]

    def test_positions_in_another_encoding(self, connect: Connect) -> None:
        clients = connect(client_encoding="LATIN1")
        text = "SELECT 'Ã©'; " + LITERAL.replace("id", "no_such_column")
        same(clients, query(text))

    def test_syntax_errors_in_all_forms(self, pair: Pair) -> None:
        for text in (f"{LITERAL} nonsense", f"{LITERAL}; nonsense", f"nonsense; {LITERAL}", "SELECT '"):
            pair.same(query(text))
            pair.same(parse(text), bind(), E, SYNC)


class TestAsynchronousMessages:
    def test_notification_while_idle(self, pair: Pair) -> None:
        for client in (pair.direct, pair.proxied):
            client.run(query("LISTEN edges"))
        pair.direct.run(query("NOTIFY edges, 'hello'"))
        tag, body = pair.proxied.receive()
        assert tag == "A"
        assert body.endswith(b"edges\0hello\0")
        pair.direct.run(query("UNLISTEN *"))

    def test_notification_between_the_replies_of_an_adapted_query(self, pair: Pair) -> None:
        for client in (pair.direct, pair.proxied):
            client.run(query("LISTEN edges"))
        replies = pair.proxied.run(parse("NOTIFY edges, 'x'"), bind(), E, P, B, E, SYNC)
        assert tags(replies).count("A") == 1
        assert rows(replies) == DICTATED

    def test_parameter_status_that_nobody_asked_for(
        self, connect: Connect, postgres: EmbeddedPostgres
    ) -> None:
        """A changed configuration file is reported before the next ReadyForQuery."""
        clients = connect()
        with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
            try:
                admin.execute("ALTER SYSTEM SET timezone = 'Asia/Tokyo'")
                admin.execute("SELECT pg_reload_conf()")
                time.sleep(0.2)
                for client in clients:
                    assert ("S", b"TimeZone\0Asia/Tokyo\0") in client.run(P, B, E, SYNC)
            finally:
                admin.execute("ALTER SYSTEM RESET timezone")
                admin.execute("SELECT pg_reload_conf()")

    def test_notices_come_as_they_are(self, pair: Pair) -> None:
        notice = "DO $$ BEGIN RAISE NOTICE 'é %', 1; RAISE WARNING 'w'; END $$"
        pair.same(query(notice))
        pair.same(query(f"{notice}; SELECT 1"))
        pair.same(parse(notice), bind(), E, parse("SELECT 1"), bind(), E, SYNC)

    def test_a_notice_of_the_parsers_about_an_adapted_text(self, pair: Pair) -> None:
        """It comes before the first reply, when the settings' own reply is still due."""
        long_name = "x" * 70
        direct, proxied = pair.both(query(LITERAL.replace("SELECT id", f"SELECT id AS {long_name}")))
        assert [body for tag, body in direct if tag == "N"] == [body for tag, body in proxied if tag == "N"]
        assert "N" in tags(proxied)
        assert rows(proxied) == DICTATED

    def test_log_messages_about_the_proxys_own_statements_stay_hidden(self, connect: Connect) -> None:
        clients = connect(options="-c client_min_messages=log -c log_duration=on")
        messages = (parse("SELECT 1"), bind(), E, P, B, E, SYNC)
        counts = [tags(client.run(*messages)).count("N") for client in clients]
        assert counts[0] == counts[1] > 0

    def test_fatal_while_idle(self, connect: Connect, postgres: EmbeddedPostgres) -> None:
        clients = connect(options="-c idle_session_timeout=200")
        assert [tag for tag, _ in same_end(clients)] == ["E"]

    def test_timeout_of_an_idle_transaction(self, connect: Connect) -> None:
        clients = connect(options="-c idle_in_transaction_session_timeout=200")
        same(clients, query("BEGIN"))
        end = same_end(clients)
        assert b"C25P03\0" in end[0][1]

    def test_timeout_of_an_idle_transaction_with_settings_in_force(self, connect: Connect) -> None:
        clients = connect(options="-c idle_in_transaction_session_timeout=200")
        for client in clients:
            client.run(query("BEGIN"))
            client.run(P, B, E, SYNC)
        assert b"C25P03\0" in same_end(clients)[0][1]

    def test_statement_timeout_of_an_adapted_query(self, connect: Connect) -> None:
        clients = connect(options="-c statement_timeout=300")
        slow = LITERAL.replace("SELECT id", "SELECT id, pg_sleep(1)")
        for messages in ((query(slow),), (parse(slow), bind(), E, SYNC)):
            replies = same(clients, *messages)
            assert b"C57014\0" in replies[-2][1]
        for client in clients:
            assert first_values(client.run(query("SHOW hnsw.ef_search"))) == [b"40"]


class TestPortals:
    def test_the_unnamed_portal_survives_what_the_proxy_binds(self, pair: Pair) -> None:
        """Settings are bound to a named portal, and so the client's suspended unnamed one lives on."""
        pair.same(query("BEGIN"))
        pair.same(parse("SELECT generate_series(1, 5)"), bind(), execute("", 2), SYNC)
        pair.same(execute("", 2), SYNC)
        direct, proxied = pair.both(parse(LITERAL, "v"), bind(name="v", portal="v"), execute("v"), SYNC)
        assert (rows(direct), rows(proxied)) == (40, DICTATED)
        pair.same(execute("", 2), SYNC)
        pair.same(query("COMMIT"))

    def test_a_suspended_search_is_read_to_its_end_with_its_settings(self, pair: Pair) -> None:
        """Outside a transaction block, within one segment: nothing is restored while it is suspended."""
        limited = (P, B, execute("", 30), execute("", 30), execute("", 0))
        direct, proxied = pair.both(*limited, SYNC)
        assert (rows(direct), rows(proxied)) == (40, DICTATED)
        assert tags(direct).replace("D", "")[:3] == tags(proxied).replace("D", "")[:3] == "12s"
        assert pair.setting() == b"40"

    def test_portals_end_with_the_transaction(self, pair: Pair) -> None:
        pair.same(P, bind(b"[1,1,1]", portal="gone"), SYNC)
        pair.same(execute("gone"), SYNC)

    def test_close_and_describe_of_what_does_not_exist(self, pair: Pair) -> None:
        pair.same(close("S", "none"), close("P", "none"), SYNC)
        pair.same(describe("S", "none"), SYNC)
        pair.same(describe("P", "none"), SYNC)
        pair.same(execute("none"), SYNC)


def copy_data(*lines: bytes) -> bytes:
    return b"".join(message("d", line + b"\n") for line in lines)


class TestCopy:
    @pytest.fixture(autouse=True)
    def table(self, pair: Pair) -> None:
        for client in (pair.direct, pair.proxied):
            client.run(query("CREATE TEMP TABLE IF NOT EXISTS c (i int)"))

    def begin(self, pair: Pair, sql: str, extended: bool) -> None:
        for client in (pair.direct, pair.proxied):
            client.send(*((parse(sql), bind(), E, FLUSH) if extended else (query(sql),)))
            seen = [client.receive()[0]]
            while seen[-1] != "G":
                seen.append(client.receive()[0])

    @pytest.mark.parametrize("extended", [False, True])
    def test_in_and_out(self, pair: Pair, extended: bool) -> None:
        self.begin(pair, "COPY c FROM STDIN", extended)
        end = (message("c"), SYNC) if extended else (message("c"),)
        pair.same(copy_data(b"1", b"2"), *end)
        out = "COPY c TO STDOUT"
        pair.same(*((parse(out), bind(), E, SYNC) if extended else (query(out),)))
        pair.adapted(P, B, E, SYNC)

    @pytest.mark.parametrize("extended", [False, True])
    def test_bad_data(self, pair: Pair, extended: bool) -> None:
        self.begin(pair, "COPY c FROM STDIN", extended)
        end = (message("c"), SYNC) if extended else (message("c"),)
        pair.same(copy_data(b"1", b"not a number", b"3"), *end)
        pair.adapted(P, B, E, SYNC)

    @pytest.mark.parametrize("extended", [False, True])
    def test_abort(self, pair: Pair, extended: bool) -> None:
        self.begin(pair, "COPY c FROM STDIN", extended)
        fail = message("f", b"changed my mind\0")
        pair.same(copy_data(b"1"), *((fail, SYNC) if extended else (fail,)))
        pair.adapted(P, B, E, SYNC)

    @pytest.mark.parametrize("extended", [False, True])
    def test_another_message_in_the_midst_of_it(self, pair: Pair, extended: bool) -> None:
        """The server ends the connection: it cannot tell any more what it is asked."""
        self.begin(pair, "COPY c FROM STDIN", extended)
        messages = (P, B, E, SYNC) if extended else (query("SELECT 1"),)
        end = same_end((pair.direct, pair.proxied), copy_data(b"1"), *messages)
        assert tags(end) == "EE"

    def test_several_copies_in_one_text(self, pair: Pair) -> None:
        text = "COPY c FROM STDIN; COPY c FROM STDIN; SELECT count(*) FROM c"
        self.begin(pair, text, False)
        for client in (pair.direct, pair.proxied):
            client.send(copy_data(b"1"), message("c"))
            assert [client.receive()[0] for _ in range(2)] == ["C", "G"]
        pair.same(copy_data(b"2"), message("c"))
        pair.adapted(query(LITERAL))

    def test_in_a_transaction_with_settings_in_force(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(P, B, E, SYNC)
        self.begin(pair, "COPY c FROM STDIN", False)
        pair.same(copy_data(b"1"), message("c"))
        pair.same(query("SHOW hnsw.ef_search"))
        pair.same(query("ROLLBACK"))


def function_call(oid: int, *arguments: bytes) -> bytes:
    values = b"".join(struct.pack("!I", len(argument)) + argument for argument in arguments)
    return message("F", struct.pack("!IHH", oid, 0, len(arguments)) + values + struct.pack("!H", 0))


class TestFunctionCall:
    INT4ABS = 1397
    CURRENT_SETTING = 2077

    def test_result_and_error(self, pair: Pair) -> None:
        assert tags(pair.same(function_call(self.INT4ABS, b"-7"))) == "VZ"
        assert tags(pair.same(function_call(self.INT4ABS, b"x"))) == "EZ"

    def test_cannot_see_settings_put_in_force_for_a_query(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.adapted(P, B, E, SYNC)
        replies = pair.same(function_call(self.CURRENT_SETTING, b"hnsw.ef_search"))
        assert replies[0][1].endswith(b"40")
        pair.same(query("COMMIT"))


class TestSettingsStayHidden:
    def test_whatever_the_client_asks_with(self, pair: Pair) -> None:
        """In a transaction block, directly behind an adapted query, by every road to a setting."""
        pair.same(query("BEGIN"))
        for sql in (
            "SHOW hnsw.ef_search",
            "SELECT current_setting('hnsw.ef_search')",
            "SELECT setting FROM pg_settings WHERE name = 'hnsw.ef_search'",
            "EXPLAIN (SETTINGS, COSTS OFF) SELECT 1",
            "DO $$ BEGIN RAISE NOTICE '%', current_setting('hnsw.ef_search'); END $$",
        ):
            pair.adapted(P, B, E, SYNC)
            pair.same(query(sql))
            pair.adapted(query(LITERAL))
            pair.same(parse(sql), bind(), E, SYNC)
        pair.same(query("COMMIT"))

    def test_a_function_that_reads_it_in_the_same_segment(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        show = (parse("SELECT current_setting('hnsw.ef_search')"), bind(), E)
        replies = pair.proxied.run(P, B, E, *show, P, B, E, *show, SYNC)
        assert [value for value in first_values(replies) if value == b"77"] == []
        pair.proxied.run(query("COMMIT"))

    def test_explain_of_an_adapted_statement_is_the_clients_own(self, pair: Pair) -> None:
        pair.same(query(f"EXPLAIN (SETTINGS, COSTS OFF) {LITERAL}"))

    def test_isolation_level_still_comes_first(self, pair: Pair) -> None:
        for opening in (
            ("BEGIN", "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"),
            ("BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE",),
            ("START TRANSACTION", "SET TRANSACTION READ ONLY"),
        ):
            for sql in opening:
                pair.same(parse(sql), bind(), E, SYNC)
            pair.adapted(P, B, E, SYNC)
            pair.same(query("SHOW transaction_isolation"))
            pair.same(query("COMMIT"))

    def test_a_rule_that_adds_replies_to_a_statement_before(self, pair: Pair) -> None:
        """INSERT with a DO ALSO SELECT rule sends rows, which the text does not tell."""
        pair.both(query("CREATE TEMP TABLE r (i int); CREATE RULE q AS ON INSERT TO r DO ALSO SELECT 1, 2"))
        direct, proxied = pair.both(query(f"INSERT INTO r VALUES (1); {LITERAL}; SELECT 5"))
        assert tags(direct).count("T") == 3
        assert proxied == direct

    def test_rollback_of_the_transaction_in_which_the_setting_was_made(self, pair: Pair) -> None:
        pair.same(query("BEGIN"))
        pair.same(query("SAVEPOINT a"))
        pair.adapted(P, B, E, SYNC)
        pair.same(query("SELECT 1/0"))
        pair.same(query("ROLLBACK TO SAVEPOINT a"))
        assert pair.setting() == b"40"
        pair.adapted(P, B, E, SYNC)
        pair.same(query("COMMIT AND CHAIN"))
        assert pair.setting() == b"40"
        pair.adapted(P, B, E, SYNC)
        pair.same(query("ROLLBACK"))
        assert pair.setting() == b"40"
