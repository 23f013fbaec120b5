"""Users files that change, the lasting secret, and messages that arrive in pieces."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from proxy.auth.lookup import AuthQuery, Directory, LookupFailed, UsersFile, lasting_secret
from proxy.auth.users import User
from proxy.auth.verifier import Keys, StandIns
from proxy.net.authentication import Inbox
from proxy.wire.errors import ProtocolViolation

STAND_INS = StandIns(b"s" * 32)
SALT = b"0123456789abcdef"
VERIFIER = Keys.derive(b"pencil", SALT, 10_000).verifier(SALT, 10_000)


class TestUsersFile:
    def file(self, tmp_path: Path, text: str | None) -> UsersFile:
        path = tmp_path / "users.txt"
        if text is not None:
            path.write_text(text)
        file = UsersFile(path, STAND_INS)
        file.refresh()
        return file

    def test_a_password_gets_a_verifier_with_a_salt_that_lasts(self, tmp_path: Path) -> None:
        file = self.file(tmp_path, '"alice" "pencil"')
        found = file.get(b"alice")
        assert found is not None
        salt = STAND_INS.salt(b"alice")
        assert found == (User(password=b"pencil"), Keys.derive(b"pencil", salt, 4096).verifier(salt, 4096))

    def test_it_is_read_again_only_when_it_has_changed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        file = self.file(tmp_path, '"alice" "pencil"')
        file.refresh()
        assert caplog.text.count("1 users") == 1
        os.replace(self.written(tmp_path, '"bob" "pencil"\n"eve" "x"'), tmp_path / "users.txt")
        file.refresh()
        assert file.get(b"alice") is None
        assert file.get(b"bob") is not None
        assert caplog.text.count("2 users") == 1

    def written(self, tmp_path: Path, text: str) -> Path:
        path = tmp_path / "new"
        path.write_text(text)
        return path

    @pytest.mark.parametrize("text", [None, '"alice" pencil', '"a" "\udcff"'])
    def test_without_a_first_file_nobody_is_let_in_and_it_is_said_once(
        self, text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        if text is not None:
            (tmp_path / "users.txt").write_bytes(text.encode(errors="surrogateescape"))
        file = UsersFile(tmp_path / "users.txt", STAND_INS)
        file.refresh()
        file.refresh()
        assert file.get(b"alice") is None
        assert caplog.text.count("nobody in it can log in") == 1
        assert "pencil" not in caplog.text

    @pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
    def test_one_that_everybody_can_read_is_reported(
        self, mode: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "users.txt").write_text('"alice" "pencil"')
        (tmp_path / "users.txt").chmod(mode)
        UsersFile(tmp_path / "users.txt", STAND_INS).refresh()
        assert ("can be read by everybody" in caplog.text) is warned

    def test_strangers_get_the_iterations_that_are_usual(self, tmp_path: Path) -> None:
        line = f'"{{}}" "{VERIFIER.encode()}"\n'
        file = self.file(tmp_path, line.format("a") + line.format("b") + '"c" "pencil"')
        found = asyncio.run(Directory(STAND_INS, file, None).find(b"stranger"))
        assert found.user is None
        assert found.verifier == STAND_INS.verifier(b"stranger", 10_000)
        assert asyncio.run(Directory(STAND_INS, file, None).find(b"a")).verifier == VERIFIER


class TestLastingSecret:
    def test_it_lasts_and_is_private(self, tmp_path: Path) -> None:
        secret = lasting_secret(tmp_path / "state")
        assert len(secret) == 32
        assert lasting_secret(tmp_path / "state") == secret
        (file,) = (tmp_path / "state").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def test_a_damaged_one_is_reported_and_not_used(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "auth-secret").write_bytes(b"short")
        assert len(lasting_secret(tmp_path)) == 32
        assert "does not hold 32 bytes" in caplog.text

    def test_where_it_cannot_be_kept_it_is_made_up(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "state").write_text("a file in the way")
        assert lasting_secret(tmp_path / "state") != lasting_secret(tmp_path / "state")
        assert "cannot keep" in caplog.text


class Answers(AuthQuery):
    """Gives answers without a server, and counts the questions."""

    def __init__(self, max_age: float = 60.0) -> None:
        super().__init__("", "", connections=1, timeout=1.0, max_age=max_age)
        self.asked: list[str] = []
        self.rows: list[tuple[str, str | None]] | Exception = []

    async def _fetch(self, name: str) -> list[tuple[str, str | None]]:
        self.asked.append(name)
        await asyncio.sleep(0.01)
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


class TestAuthQuery:
    def test_several_clients_share_one_question(self) -> None:
        async def run() -> None:
            query = Answers()
            query.rows = [("a", VERIFIER.encode())]
            found = await asyncio.gather(*[query.find(b"a") for _ in range(10)])
            assert found == [(User(verifier=VERIFIER), None)] * 10
            assert query.asked == ["a"]
            assert query.usual_iterations == 10_000

        asyncio.run(run())

    def test_an_answer_is_remembered_until_it_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def run() -> None:
            query = Answers()
            for _ in range(3):
                assert await query.find(b"a") == (None, None)
                query.forget(b"a")  # too soon: guessing must not load the server
            assert query.asked == ["a"]
            monkeypatch.setattr("proxy.auth.lookup._LEAST_AGE_SECONDS", 0.0)
            query.forget(b"a")
            await query.find(b"a")
            assert query.asked == ["a", "a"]

        asyncio.run(run())

    def test_a_client_that_leaves_does_not_take_the_answer_away(self) -> None:
        async def run() -> None:
            query = Answers()
            query.rows = [("a", VERIFIER.encode())]
            impatient = asyncio.create_task(query.find(b"a"))
            patient = asyncio.create_task(query.find(b"a"))
            await asyncio.sleep(0.001)
            impatient.cancel()
            assert (await patient)[0] is not None
            assert query.asked == ["a"]

        asyncio.run(run())

    def test_a_failure_is_not_remembered(self) -> None:
        async def run() -> None:
            query = Answers()
            query.rows = OSError("gone")
            for _ in range(2):
                with pytest.raises(LookupFailed, match="gone"):
                    await query.find(b"a")
            query.rows = []
            assert await query.find(b"a") == (None, None)

        asyncio.run(run())

    def test_nothing_is_remembered_beyond_its_age(self) -> None:
        async def run() -> None:
            query = Answers(max_age=0.0)
            for _ in range(2):
                await query.find(b"a")
            assert query.asked == ["a", "a"]

        asyncio.run(run())

    def test_it_does_not_remember_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy.auth.lookup._MAX_CACHED", 100)

        async def run() -> None:
            query = Answers()
            await asyncio.gather(*[query.find(str(i).encode()) for i in range(150)])
            assert set(query._answers) == {str(i).encode() for i in range(50, 150)}
            assert not query._asking

        asyncio.run(run())

    @pytest.mark.parametrize(
        ("secret", "why"),
        [
            (None, "no password"),
            ("md5" + "0" * 32, "md5 password"),
            ("pencil", "is no SCRAM-SHA-256 verifier"),
            ("", "is no SCRAM-SHA-256 verifier"),
        ],
    )
    def test_a_user_without_a_verifier_is_a_stranger_and_the_log_knows_why(
        self, secret: str | None, why: str
    ) -> None:
        async def run() -> None:
            query = Answers()
            query.rows = [("a", secret)]
            found = await Directory(STAND_INS, None, query).find(b"a")
            assert found.user is None
            assert found.verifier == STAND_INS.verifier(b"a")
            assert why in (found.why or "")
            assert "pencil" not in (found.why or "")

        asyncio.run(run())

    def test_a_name_that_is_not_utf8_is_not_asked_for(self) -> None:
        async def run() -> None:
            query = Answers()
            assert await query.find(b"\xff") == (None, None)
            assert query.asked == []

        asyncio.run(run())


class TestInbox:
    def test_pieces_become_messages(self) -> None:
        async def run() -> None:
            inbox = Inbox(100)
            reader = asyncio.create_task(inbox.wait_message())
            for byte in b"p\0\0\0\x06ab":
                await asyncio.sleep(0)
                inbox.feed(bytes([byte]))
            inbox.feed(b"Q\0\0\0\x04rest")
            assert await reader == b"p\0\0\0\x06ab"
            assert await inbox.wait_message() == b"Q\0\0\0\x04"
            assert inbox.rest() == b"rest"
            assert inbox.rest() == b""

        asyncio.run(run())

    def test_the_end_ends_waiting(self) -> None:
        async def run() -> None:
            inbox = Inbox(100)
            reader = asyncio.create_task(inbox.wait_message())
            await asyncio.sleep(0)
            inbox.feed(b"p\0\0\0\x06a")
            inbox.end()
            with pytest.raises(EOFError):
                await reader

        asyncio.run(run())

    @pytest.mark.parametrize("header", [b"p\0\0\0\x03", b"p\xff\xff\xff\xff", b"p\0\0\0\x6a"])
    def test_a_header_is_believed_only_within_the_limit(self, header: bytes) -> None:
        async def run() -> None:
            inbox = Inbox(100)
            inbox.feed(header)
            with pytest.raises(ProtocolViolation):
                await inbox.wait_message()

        asyncio.run(run())

    def test_it_is_full_before_it_is_large(self) -> None:
        inbox = Inbox(100)
        inbox.feed(b"x" * 105)
        assert not inbox.full
        inbox.feed(b"x")
        assert inbox.full
