"""What a client is told when it may not come in, beside what the server says; order and time of messages."""

from __future__ import annotations

import asyncio
import base64
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from config.schema import Auth
from tests.conftest import PASSWORD_ROLES
from tests.integration.logins import (
    DATABASE,
    SCRAM_ROLE,
    Talk,
    address,
    direct,
    error_of,
    eventually,
    initial,
)
from tests.integration.proxied import Proxy
from tests.integration.raw import message

pytestmark = pytest.mark.integration


FIRST = (
    b"",
    b"x",
    b"x,,n=,r=a",
    b"n,,n=,r=a\0",
    b"nn,,n=,r=a",
    b"n,a=b,n=,r=a",
    b"n,b,n=,r=a",
    b"n,,m=1,n=,r=a",
    b"n,,r=a",
    b"n,,n",
    b"n,,n=",
    b"n,,n=,r=\x01",
    b"n,,n=,r=a,1=2",
    b"n,,n=,r=a,x",
    b"p=tls-server-end-point,,n=,r=a",
    b"p=x,,n=,r=a",
    b"\xff",
)


class TestErrors:
    """What the client is told, beside what the server itself says."""

    @pytest.mark.parametrize("first", FIRST)
    def test_a_malformed_first_message(
        self, postgres: EmbeddedPostgres, by_file: Proxy, first: bytes
    ) -> None:
        assert self.both(postgres, by_file, lambda talk: talk.send(initial(first)))["S"] == "FATAL"

    @pytest.mark.parametrize(
        "data",
        [
            initial(b"n,,n=,r=a", b"SCRAM-SHA-256-PLUS"),
            initial(b"n,,n=,r=a", b"SCRAM-SHA-1"),
            initial(b"n,,n=,r=a", b""),
            message("Q", b"SELECT 1\0"),
            message("X"),
        ],
    )
    def test_another_message(self, postgres: EmbeddedPostgres, by_file: Proxy, data: bytes) -> None:
        assert self.both(postgres, by_file, lambda talk: talk.send(data))["S"] == "FATAL"

    @pytest.mark.parametrize(
        "final",
        [
            b"",
            b"c=eSws,r={nonce},p=AAAA",
            b"c=biws",
            b"c=biws,r={nonce}",
            b"c=biws,r={nonce},p=AAAA",
            b"c=biws,r={nonce},p=%",
            b"c=biws,r={nonce}x,p=" + base64.b64encode(bytes(32)),
            b"c=biws,r={nonce},p=" + base64.b64encode(bytes(32)),
            b"c=biws,r={nonce},x=y,p=" + base64.b64encode(bytes(32)),
            b"c=biws,r={nonce},p=" + base64.b64encode(bytes(32)) + b",x=y",
        ],
    )
    @pytest.mark.parametrize("user", [SCRAM_ROLE, "auth_unknown"])
    def test_a_wrong_last_message(
        self, postgres: EmbeddedPostgres, by_file: Proxy, final: bytes, user: str
    ) -> None:
        def act(talk: Talk) -> None:
            nonce = talk.challenge()["r"].encode()
            talk.send(message("p", final.replace(b"{nonce}", nonce)))

        if user == SCRAM_ROLE:
            self.both(postgres, by_file, act)
        else:  # the server trusts it: compare with the known user instead
            with Talk(address(by_file), user, DATABASE) as talk:
                act(talk)
                unknown = error_of(talk.all())
            with Talk(address(by_file), SCRAM_ROLE, DATABASE) as talk:
                act(talk)
                known = error_of(talk.all())
            known["M"] = known["M"].replace(SCRAM_ROLE, user)
            assert unknown == known

    def test_an_empty_initial_response(self, postgres: EmbeddedPostgres, by_file: Proxy) -> None:
        def act(talk: Talk) -> None:
            talk.receive()
            talk.send(initial(None))
            assert talk.receive() == ("R", b"\0\0\0\x0b")
            talk.send(message("p", b"x"))

        self.both(postgres, by_file, act)

    def test_no_user(self, postgres: EmbeddedPostgres, by_file: Proxy) -> None:
        self.both(postgres, by_file, lambda talk: None, user=None)

    def both(
        self,
        postgres: EmbeddedPostgres,
        proxy: Proxy,
        act: Callable[[Talk], None],
        user: str | None = SCRAM_ROLE,
    ) -> dict[str, str]:
        """Do the same to server and proxy, and compare what they say."""
        errors = []
        for where in (direct(postgres), address(proxy)):
            with Talk(where, user, DATABASE) as talk:
                act(talk)
                errors.append(error_of(talk.all()))
        assert errors[0] == errors[1]
        return errors[1]

    def test_too_long_a_message_is_refused_before_it_has_come(self, by_file: Proxy) -> None:
        with Talk(address(by_file), SCRAM_ROLE, DATABASE) as talk:
            talk.send(b"p" + struct.pack("!I", 100_000) + b"x" * 2000)
            assert error_of(talk.all())["C"] == "08P01"

    @pytest.mark.parametrize(
        "garbage", [b"\0" * 20, b"p\0\0\0\0", b"p\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"]
    )
    def test_garbage(self, by_file: Proxy, garbage: bytes) -> None:
        with Talk(address(by_file), SCRAM_ROLE, DATABASE) as talk:
            talk.send(garbage)
            assert error_of(talk.all())["C"] == "08P01"

    def test_an_unknown_user_gets_the_same_salt_each_time_as_a_known_one_does(self, ending: Proxy) -> None:
        found = []
        for user in (SCRAM_ROLE, SCRAM_ROLE, "auth_unknown", "auth_unknown", "auth_unknown_2"):
            with Talk(address(ending), user, DATABASE) as talk:
                found.append(talk.challenge())
        assert found[0]["s"] == found[1]["s"]
        assert found[2]["s"] == found[3]["s"]
        assert len({each["s"] for each in found}) == 3
        assert len({each["r"] for each in found}) == 5
        assert {len(base64.b64decode(each["s"])) for each in found} == {16}
        assert {each["i"] for each in found} == {"4096"}

    @pytest.mark.parametrize(
        ("prepare", "undo", "dbname", "code"),
        [
            ("SELECT 1", "SELECT 1", "no_such_database", "3D000"),
            (
                "ALTER ROLE auth_scram CONNECTION LIMIT 0",
                "ALTER ROLE auth_scram CONNECTION LIMIT -1",
                None,
                "53300",
            ),
        ],
    )
    def test_what_the_server_has_against_it_comes_as_it_is(
        self,
        postgres: EmbeddedPostgres,
        ending: Proxy,
        prepare: str,
        undo: str,
        dbname: str | None,
        code: str,
    ) -> None:
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute(prepare)
            try:
                answers = []
                for where in (direct(postgres), address(ending)):
                    with Talk(where, SCRAM_ROLE, dbname or DATABASE) as talk:
                        talk.prove(SCRAM_ROLE, talk.challenge())
                        answers.append([each for each in talk.all() if each[1][:4] != b"\0\0\0\x0c"])
            finally:
                connection.execute(undo)
        assert answers[0] == answers[1]
        assert error_of(answers[1])["C"] == code

    def test_a_server_that_is_not_there(self, users_file: Path) -> None:
        with (
            Proxy("127.0.0.1", 1, auth=Auth(mode="scram", users_file=users_file)) as proxy,
            pytest.raises(psycopg.OperationalError, match="cannot reach the upstream server"),
        ):
            psycopg.connect(f"{proxy.dsn(DATABASE, SCRAM_ROLE)} password={SCRAM_ROLE}")


class TestOrderAndTime:
    def test_negotiation_of_the_version_comes_before_authentication_is_over(self, by_file: Proxy) -> None:
        with Talk(address(by_file), SCRAM_ROLE, DATABASE, version=(3 << 16) + 9999) as talk:
            talk.prove(SCRAM_ROLE, talk.challenge())
            messages = talk.all()
        kinds = [tag if tag != "R" else f"R{body[3]}" for tag, body in messages]
        assert kinds[:3] == ["R12", "v", "R0"]
        assert kinds[-1] == "Z"
        assert set(kinds[3:-1]) == {"S", "K"}
        assert len(dict(messages)["K"]) == 36  # a long key, of protocol 3.2

    def test_what_is_sent_along_with_the_proof_is_not_lost(self, by_file: Proxy) -> None:
        with Talk(address(by_file), SCRAM_ROLE, DATABASE) as talk:
            challenge = talk.challenge()
            held, talk.send = [], lambda data: held.append(data)  # type: ignore[method-assign]
            talk.prove(SCRAM_ROLE, challenge)
            talk.socket.sendall(held[0] + message("Q", b"SELECT 1\0"))
            assert talk.all()[-1][0] == "Z"
            assert [tag for tag, _ in talk.all()] == ["T", "D", "C", "Z"]

    def test_byte_by_byte(self, by_file: Proxy) -> None:
        with Talk(address(by_file), SCRAM_ROLE, DATABASE) as talk:
            whole = talk.socket.sendall

            def slowly(data: bytes) -> None:
                for i in range(len(data)):
                    whole(data[i : i + 1])
                    time.sleep(0.001)

            talk.send = slowly  # type: ignore[method-assign]
            talk.prove(SCRAM_ROLE, talk.challenge())
            assert talk.all()[-1][0] == "Z"

    @pytest.mark.parametrize("mode", ["relay", "scram"])
    def test_a_silent_client_does_not_keep_its_place(
        self, postgres: EmbeddedPostgres, users_file: Path, mode: str
    ) -> None:
        auth = Auth(mode="scram", users_file=users_file) if mode == "scram" else Auth()
        with Proxy(postgres.host, postgres.port, auth=auth, authentication_timeout=0.2) as proxy:
            with socket.create_connection(address(proxy), timeout=5) as silent:
                assert silent.recv(1) == b""
            assert eventually(lambda: not proxy.connections)

    def test_a_client_that_stops_in_the_middle_is_told_so(
        self, postgres: EmbeddedPostgres, users_file: Path
    ) -> None:
        auth = Auth(mode="scram", users_file=users_file)
        with Proxy(postgres.host, postgres.port, auth=auth, authentication_timeout=0.3) as proxy:
            with Talk(address(proxy), SCRAM_ROLE, DATABASE) as talk:
                talk.challenge()
                error = error_of(talk.all())
            assert (error["C"], error["M"]) == ("57014", "canceling authentication due to timeout")
            assert proxy.counters.logins_failed == {"timeout": 1}
            assert eventually(lambda: not proxy.connections)

    def test_the_limit_ends_with_the_login(self, postgres: EmbeddedPostgres, users_file: Path) -> None:
        auth = Auth(mode="scram", users_file=users_file)
        for each in (auth, Auth()):
            with Proxy(postgres.host, postgres.port, auth=each, authentication_timeout=0.3) as proxy:
                dsn = f"{proxy.dsn(DATABASE, SCRAM_ROLE)} password={SCRAM_ROLE}"
                with psycopg.connect(dsn) as connection:
                    time.sleep(0.5)
                    assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_nobody_reaches_the_server_before_it_has_proved_itself(
        self, postgres: EmbeddedPostgres, by_file: Proxy
    ) -> None:
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:

            def backends() -> object:
                sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
                row = connection.execute(sql, (SCRAM_ROLE,)).fetchone()
                assert row is not None
                return row[0]

            assert eventually(lambda: backends() == 0)  # those of tests before
            talks = [Talk(address(by_file), SCRAM_ROLE, DATABASE) for _ in range(5)]
            for talk in talks:
                talk.challenge()
            assert backends() == 0
            for talk in talks:
                talk.socket.close()
        assert eventually(lambda: not by_file.connections)

    @pytest.mark.slow
    def test_nothing_is_left_of_clients_that_vanish_at_any_time(
        self, postgres: EmbeddedPostgres, by_file: Proxy
    ) -> None:
        random = Random(20)
        tasks = by_file.call(lambda: len(asyncio.all_tasks()))
        for _ in range(150):
            with Talk(address(by_file), SCRAM_ROLE, DATABASE) as talk:
                stage = random.randrange(6)
                if stage >= 1:
                    challenge = talk.challenge()
                if stage == 2:
                    talk.send(b"p\0\0\0\x40half")
                if stage >= 3:
                    talk.prove(SCRAM_ROLE, challenge)
                if stage == 4:
                    time.sleep(random.random() * 0.01)
                if stage == 5:
                    talk.all()
                if random.random() < 0.5:
                    talk.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert eventually(lambda: not by_file.connections)
        counters = by_file.counters
        assert counters.connections_opened == counters.connections_closed
        assert eventually(lambda: by_file.call(lambda: len(asyncio.all_tasks())) == tasks)
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
            assert eventually(lambda: connection.execute(sql, (SCRAM_ROLE,)).fetchone() == (0,))

    def test_wrong_passwords_are_counted_and_logged_without_secrets(
        self, by_file: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = by_file.counters.logins_failed["password"]
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(f"{by_file.dsn(DATABASE, SCRAM_ROLE)} password=hush-hush")
        assert by_file.counters.logins_failed["password"] == before + 1
        assert 'password authentication failed for user "auth_scram"' in caplog.text
        assert "127.0.0.1" in caplog.text
        for secret in ("hush", "SCRAM-SHA-256$"):
            assert secret not in caplog.text


class TestRelayed:
    @pytest.mark.parametrize("role", PASSWORD_ROLES)
    def test_a_wrong_password_gives_the_servers_own_error_byte_by_byte(
        self, postgres: EmbeddedPostgres, relay: Proxy, role: str
    ) -> None:
        answers = []
        for where in (direct(postgres), address(relay)):
            with Talk(where, role, DATABASE) as talk:
                if role == SCRAM_ROLE:
                    talk.prove("wrong", talk.challenge())
                else:
                    assert talk.receive() is not None
                    talk.send(message("p", b"wrong\0"))
                answers.append(talk.all())
        assert answers[0] == answers[1]
        assert error_of(answers[1])["C"] == "28P01"

    def test_it_is_counted(self, relay: Proxy) -> None:
        before = relay.counters.logins_failed["server"]
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(f"{relay.dsn(DATABASE, SCRAM_ROLE)} password=wrong")
        assert relay.counters.logins_failed["server"] == before + 1
