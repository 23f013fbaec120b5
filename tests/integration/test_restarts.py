"""Restarts without downtime, of the workers and of the whole: clients stay, clients come, none sees an error."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.test_serve import Served, is_alive, serving, tcp, until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

WORKERS_REPLACED = "every worker has been replaced"
WHOLE_REPLACED = "the restart is complete"


class Clients:
    """What an application does meanwhile: it comes and goes, works on old connections, holds a transaction."""

    def __init__(self, served: Served, unix: str) -> None:
        self._served = served
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self.connected = 0
        self.staying = [served.connect(autocommit=True) for _ in range(5)]
        self.staying.append(psycopg.connect(host=unix, port=served.port, user="postgres", autocommit=True))
        self.transaction = served.connect()
        self.transaction.execute("CREATE TEMPORARY TABLE kept (x integer)")
        works = [self._come_and_go, *(lambda one=one: self._work(one) for one in self.staying[:2])]
        self._threads = [threading.Thread(target=self._noting_errors, args=[work]) for work in works]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for connection in (*self.staying, self.transaction):
            connection.close()

    def check(self) -> None:
        """Every connection of before still works, the open transaction as well."""
        for connection in self.staying:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        self.transaction.execute("INSERT INTO kept VALUES (1)")
        assert self.errors == []

    def wait_for_new(self) -> None:
        """Return when clients have come since."""
        wanted = self.connected + 3
        until(lambda: self.connected >= wanted or bool(self.errors))

    def _noting_errors(self, work: object) -> None:
        assert callable(work)
        try:
            while not self._stop.is_set():
                work()
                time.sleep(0.005)
        except BaseException as error:
            self.errors.append(error)

    def _come_and_go(self) -> None:
        with self._served.connect(autocommit=True) as connection:
            connection.execute("SELECT 1")
        self.connected += 1

    def _work(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        connection.execute("SELECT 1")


@contextlib.contextmanager
def two_workers(postgres: EmbeddedPostgres, directory: Path) -> Iterator[tuple[Served, str]]:
    """Yield a proxy with two workers, a learner and a unix socket; and that socket's directory."""
    with tempfile.TemporaryDirectory(prefix="rvu-") as unix:
        more = f'[workers]\ncount = 2\n[listen]\nunix_socket = "{unix}"\n'
        with serving(directory, tcp(postgres), more, postgres.uri()) as served:
            served.wait_ready()
            until(lambda: len(served.pids("worker [12]")) == 2)
            yield served, unix


def restart(served: Served, number: signal.Signals, said: str) -> None:
    before = served.log.count(said)
    served.process.send_signal(number)
    until(lambda: served.log.count(said) > before or served.process.poll() is not None)
    assert served.process.poll() is None


def test_workers_are_replaced_and_no_client_notices(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with two_workers(postgres, tmp_path) as (served, unix):
        first = served.pids("worker [12]")
        with Clients(served, unix) as clients:
            restart(served, signal.SIGURG, WORKERS_REPLACED)
            clients.wait_for_new()
            clients.check()
            connected = clients.connected
        assert clients.errors == []
        assert len(served.pids("worker [12]")) == 4
        until(lambda: not any(is_alive(pid) for pid in first))  # their clients have left
        # What the replaced ones counted is not lost.
        until(lambda: served.metric("ruvector_connections_total") >= connected + 7)
        until(lambda: served.metric("ruvector_connections_open") == 0)
        assert served.metric("ruvector_workers_up") == 2
    assert "ERROR" not in served.log


def test_the_whole_is_replaced_twice_and_no_client_notices(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with two_workers(postgres, tmp_path) as (served, unix):
        first = served.pids("worker [12]")
        with Clients(served, unix) as clients:
            for _ in range(2):
                restart(served, signal.SIGQUIT, WHOLE_REPLACED)
                clients.wait_for_new()
                clients.check()
            connected = clients.connected
        assert clients.errors == []
        assert len(served.pids("worker [12]")) == 6
        until(lambda: len(served.pids("learner")) == 3)
        until(lambda: not any(is_alive(pid) for pid in first))
        until(lambda: served.metric("ruvector_connections_total") >= connected + 7)
        assert os.path.exists(f"{unix}/.s.PGSQL.{served.port}")
    assert not os.path.exists(f"{unix}/.s.PGSQL.{served.port}")
    assert "ERROR" not in served.log


def test_a_program_that_would_not_run_is_not_made_way_for(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with two_workers(postgres, tmp_path) as (served, _):
        file = tmp_path / "proxy.toml"
        good = file.read_text()
        with served.connect(autocommit=True) as connection:
            file.write_text(good + "[learning]\ntarget_recall = 7\n")
            restart(served, signal.SIGQUIT, "no restart, everything goes on as it is")
            assert "target_recall" in served.log
            assert connection.execute("SELECT 1").fetchone() == (1,)
        file.write_text(good)
        served.connect().close()
        assert len(served.pids("worker [12]")) == 2


def test_a_replaced_worker_drains_when_its_time_is_over(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    more = "[limits]\nhandover_timeout = 0.5\n"
    with serving(tmp_path, tcp(postgres), more) as served:
        served.wait_ready()
        old = served.pids("worker 1")
        idle = served.connect(autocommit=True)
        restart(served, signal.SIGURG, WORKERS_REPLACED)
        until(lambda: not is_alive(old[0]))
        with pytest.raises(psycopg.errors.AdminShutdown):
            idle.execute("SELECT 1")
        idle.close()
        served.connect().close()
