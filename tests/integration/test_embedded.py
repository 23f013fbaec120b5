"""The embedded server does what its docstring promises, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from bench.embedded import FAST_SETTINGS, EmbeddedError, EmbeddedPostgres

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def _one(dsn: str, sql: str) -> object:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(sql).fetchone()
    assert row is not None
    return row[0]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_until_gone(pid: int, path: Path) -> None:
    deadline = time.monotonic() + 20
    while (_alive(pid) or path.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)
    assert not path.exists()


def test_server_answers_on_socket_and_tcp_with_pgvector(postgres: EmbeddedPostgres, database: str) -> None:
    for dsn in (postgres.dsn(database), postgres.uri(database), postgres.dsn(database, host="127.0.0.1")):
        assert _one(dsn, "SELECT '[1,2]'::vector <-> '[1,4]'::vector") == 2.0
    assert _one(postgres.dsn(), "SHOW server_version_num") >= "180000"  # type: ignore[operator]


def test_each_test_gets_an_empty_database(postgres: EmbeddedPostgres, database: str) -> None:
    with psycopg.connect(postgres.dsn(database)) as connection:
        connection.execute("CREATE TABLE left_behind ()")
    assert _one(postgres.dsn(database), "SELECT count(*) FROM pg_stat_user_tables") == 1
    assert _one(postgres.dsn(), "SELECT count(*) FROM pg_database WHERE datname LIKE 'test\\_%'") == 1


@pytest.mark.parametrize("role", ["auth_password", "auth_md5", "auth_scram"])
@pytest.mark.parametrize("tcp", [False, True])
def test_password_roles_must_give_their_password(postgres: EmbeddedPostgres, role: str, tcp: bool) -> None:
    host = "127.0.0.1" if tcp else postgres.host
    assert _one(postgres.dsn(host=host, user=role, password=role), "SELECT current_user") == role
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres.dsn(host=host, user=role, password="wrong"))


def test_data_and_settings_survive_restart_and_crash(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "a name 'with' blanks", settings={"work_mem": "7MB"}) as server:
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        address = (server.host, server.port)
        server.restart()
        assert _one(server.dsn(), "SELECT answer FROM kept") == 42
        server.kill()
        assert server.pid is None
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.dsn())
        server.start()
        assert _one(server.dsn(), "SELECT answer FROM kept") == 42
        assert _one(server.dsn(), "SHOW work_mem") == "7MB"
        assert (server.host, server.port) == address


def test_second_server_in_the_same_directory_is_refused_with_the_process_to_stop(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "data", settings=FAST_SETTINGS) as server:
        second = EmbeddedPostgres(tmp_path / "data")
        with pytest.raises(EmbeddedError, match=f"kill -INT {server.pid}"):
            second.start()
        second.close()
        assert _one(server.dsn(), "SELECT 1") == 1


def test_bad_setting_shows_the_servers_own_words() -> None:
    with (
        pytest.raises(EmbeddedError, match="no_such_setting"),
        EmbeddedPostgres(settings={"no_such_setting": "1"}),
    ):
        pass


def test_data_directory_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "PG_VERSION").write_text("16\n")
    server = EmbeddedPostgres(tmp_path)
    with pytest.raises(EmbeddedError, match="PostgreSQL 16"):
        server.start()
    server.close()


def test_programs_are_found_and_a_missing_one_is_named(postgres: EmbeddedPostgres) -> None:
    assert subprocess.run([postgres.bin("pgbench"), "--version"], check=True, capture_output=True).stdout
    with pytest.raises(EmbeddedError, match="no_such_program"):
        postgres.bin("no_such_program")


def test_close_leaves_no_process_and_no_directory() -> None:
    with EmbeddedPostgres(settings=FAST_SETTINGS) as server:
        pid, paths = server.pid, [server.data_directory, Path(server.host)]
    assert pid is not None
    assert not _alive(pid)
    assert not any(path.exists() for path in paths)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_server_ends_when_its_owner_dies(how: signal.Signals) -> None:
    owner = (
        "import time; from bench.embedded import *; s = EmbeddedPostgres(settings=FAST_SETTINGS); s.start(); "
        "print(s.pid, s.data_directory, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", owner], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        pid, path = process.stdout.readline().split(maxsplit=1)
        process.send_signal(how)
        process.wait(20)
    _wait_until_gone(int(pid), Path(path.strip()))
