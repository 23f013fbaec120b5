"""``ruvector-proxy serve``, started as a user would: a short file, a real server, clients, accidents."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres, free_port
from tests.integration.logins import Talk

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent.parent
PASSWORD = "hunter2"


class Served:
    """A running proxy."""

    def __init__(
        self, directory: Path, temporary: Path, upstream: tuple[str, int], more: str, dsn: str
    ) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self._log_path = directory / "log"
        host, port = upstream
        self.file = file = directory / "proxy.toml"
        learner = f'[learner]\ndsn = "{dsn}"\n' if dsn else ""
        file.write_text(f'[upstream]\nhost = "{host}"\nport = {port}\n{learner}{more}')
        environment = {
            **os.environ,
            "RUVECTOR_LISTEN_PORT": str(self.port),
            "RUVECTOR_ADMIN_PORT": str(self.admin_port),
            "RUVECTOR_LEARNING_CANARY_SHARE": "0",  # policies are in force at once; trials have their own tests
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(temporary),
        }
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "proxy.main", "serve", "--config", str(file)],
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def connect(
        self, database: str = "postgres", **options: object
    ) -> psycopg.Connection[tuple[object, ...]]:
        """Connect as an application does."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user="postgres",
            dbname=database,
            **options,  # type: ignore[arg-type]
        )

    def get(self, path: str) -> tuple[int, str]:
        """Ask the admin server; no answer is status 0."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def wait_ready(self) -> None:
        until(lambda: self.get("/readyz")[0] == 200)

    def pids(self, name: str) -> list[int]:
        """Return the process ids that a child has had, oldest first."""
        return [int(pid) for pid in re.findall(rf"{name} is up \(pid (\d+)\)", self.log)]

    def stop(self) -> int:
        """Stop the proxy as a service manager does; return its exit code."""
        self.process.terminate()
        return self.process.wait(30)


def until(condition: Callable[[], bool], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def serving(directory: Path, upstream: tuple[str, int], more: str = "", dsn: str = "") -> Iterator[Served]:
    """Run a proxy; at the end no process of it may be left, and it must have ended well."""
    temporary = tempfile.mkdtemp(prefix="rvt-")  # short: a unix socket's path may have 107 bytes
    served = Served(directory, Path(temporary), upstream, more, dsn)
    try:
        yield served
        if served.process.poll() is None:
            assert served.stop() == 0
    finally:
        served.process.kill()
        served.process.wait()
        print(served.log)  # shown where a test fails
        shutil.rmtree(temporary)
    assert not any(is_alive(pid) for pid in [*served.pids("worker 1"), *served.pids("learner")])
    assert PASSWORD not in served.log


def tcp(server: EmbeddedPostgres) -> tuple[str, int]:
    return "127.0.0.1", server.port


def test_four_lines_serve_over_tcp_and_say_so(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with serving(tmp_path, tcp(postgres), dsn=postgres.uri()) as served:
        served.wait_ready()
        with served.connect() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        until(lambda: served.metric("ruvector_statements_total") >= 1)
        assert served.metric("ruvector_connections_total") == 1
        assert json.loads(served.get("/readyz")[1]) == {"ready": True, "reasons": []}
    assert (
        f"listens on 127.0.0.1:{served.port} for 127.0.0.1:{postgres.port}; workers: 1; learner: on"
        in served.log
    )
    assert served.log.rstrip().endswith("stopped")
    assert "ERROR" not in served.log


def test_the_server_may_be_behind_a_unix_socket_and_the_learner_off(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with serving(tmp_path, (str(postgres.host), postgres.port)) as served:
        served.wait_ready()
        with served.connect() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert served.pids("learner") == []
    assert "learner: off (no learner.dsn)" in served.log
    assert "ERROR" not in served.log


def test_the_proxy_authenticates_clients_itself_in_every_worker(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """Also the made-up salts are the same, whichever worker answers, and after a restart."""
    (tmp_path / "users.txt").write_text(f'"postgres" "{PASSWORD}"\n')
    more = '[workers]\ncount = 2\n[auth]\nmode = "scram"\nusers_file = "users.txt"\n'
    salts = set()
    for _ in range(2):
        with serving(tmp_path, tcp(postgres), more) as served:
            served.wait_ready()
            until(lambda: all(served.pids(f"worker {number}") for number in (1, 2)))
            for _ in range(8):
                with served.connect(password=PASSWORD) as connection:
                    assert connection.execute("SELECT 1").fetchone() == (1,)
                with Talk(("127.0.0.1", served.port), "nobody", "postgres") as talk:
                    salts.add(talk.challenge()["s"])
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                served.connect(password="wrong")
            until(lambda: served.metric("ruvector_logins_failed_total") == 1)
    assert len(salts) == 1
    assert (tmp_path / "state" / "auth-secret").stat().st_size == 32


def test_a_killed_learner_costs_no_client_an_error(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    answers: list[object] = []
    done = threading.Event()

    def traffic() -> None:
        with served.connect(autocommit=True) as connection:
            while not done.is_set():
                answers.append(connection.execute("SELECT 1").fetchone())
        answers.append("ended well")

    with serving(tmp_path, tcp(postgres), dsn=postgres.uri()) as served:
        served.wait_ready()
        until(lambda: len(served.pids("learner")) == 1)
        client = threading.Thread(target=traffic)
        client.start()
        until(lambda: len(answers) > 100 and "learner connected" in served.log)
        os.kill(served.pids("learner")[0], signal.SIGKILL)
        until(lambda: len(served.pids("learner")) == 2)
        until(lambda: len(re.findall("learner (?:re)?connected", served.log)) == 2)
        done.set()
        client.join(10)
        assert set(answers) == {(1,), "ended well"}
        assert len(served.pids("worker 1")) == 1


def test_a_killed_worker_is_back_at_once(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with serving(tmp_path, tcp(postgres)) as served:
        served.wait_ready()
        with served.connect(autocommit=True) as before:
            assert before.execute("SELECT 1").fetchone() == (1,)
            worker = served.pids("worker 1")[0]
            os.kill(worker, signal.SIGKILL)
            until(lambda: not is_alive(worker))
            with pytest.raises(psycopg.OperationalError):
                before.execute("SELECT 1")
        with served.connect(connect_timeout=60) as after:
            assert after.execute("SELECT 1").fetchone() == (1,)
        assert "worker 1 was killed by SIGKILL; starting it again in 0.1 s" in served.log


def test_a_server_that_is_away_is_said_to_clients_and_served_when_it_is_back(tmp_path: Path) -> None:
    with EmbeddedPostgres(settings=FAST_SETTINGS, listen=True) as server:
        upstream = tcp(server)
        server.stop()
        with serving(tmp_path, upstream) as served:
            until(lambda: served.get("/healthz")[0] == 200)
            until(
                lambda: f"upstream 127.0.0.1:{server.port} is unreachable: Connection refused" in served.log
            )
            until(lambda: "no worker" not in served.get("/readyz")[1])
            assert served.get("/readyz")[0] == 503
            with pytest.raises(psycopg.OperationalError, match=f"127.0.0.1:{server.port}") as caught:
                served.connect()
            assert caught.value.sqlstate is None or caught.value.sqlstate.startswith("08")
            server.start()
            served.wait_ready()
            with served.connect() as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            assert f"upstream 127.0.0.1:{server.port} is reachable again" in served.log


def test_a_learner_that_cannot_log_in_is_said_and_traffic_flows(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    dsn = f"postgresql://auth_scram:{PASSWORD}@127.0.0.1:{postgres.port}/postgres"
    with serving(tmp_path, tcp(postgres), dsn=dsn) as served:
        served.wait_ready()
        until(lambda: "the learner cannot connect to" in served.log)
        assert re.search(r"auth_scram:\*\*\*@.*password authentication failed", served.log)
        with served.connect() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_draining_lets_a_transaction_end_and_refuses_newcomers(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with serving(tmp_path, tcp(postgres), more="[limits]\ndrain_timeout = 20\n") as served:
        served.wait_ready()
        with served.connect(autocommit=True) as idle, served.connect() as busy:
            idle.execute("SELECT 1")
            busy.execute("CREATE TEMPORARY TABLE kept (x int)")
            served.process.terminate()
            until(lambda: "the proxy is stopping" in served.get("/readyz")[1])
            until(lambda: "AdminShutdown" in end_of(idle))
            with pytest.raises(psycopg.OperationalError, match="refused"):
                served.connect()
            assert served.get("/metrics")[0] == 200
            busy.execute("INSERT INTO kept VALUES (1)")
            assert busy.execute("SELECT * FROM kept").fetchone() == (1,)
            busy.commit()
            assert served.process.wait(10) == 0


def end_of(connection: psycopg.Connection[tuple[object, ...]]) -> str:
    """Return the name of the error with which a connection has ended, if it has."""
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError as error:
        return type(error).__name__
    return ""


def test_a_second_signal_ends_everything_at_once(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with serving(tmp_path, tcp(postgres), dsn=postgres.uri()) as served:
        served.wait_ready()
        with contextlib.closing(served.connect()) as busy:
            busy.execute("SELECT 1")  # leaves its transaction open
            served.process.send_signal(signal.SIGINT)
            until(lambda: "stopping" in served.log)
            served.process.send_signal(signal.SIGINT)
            assert served.process.wait(5) == 0
        assert "starting it again" not in served.log


def test_a_killed_supervisor_leaves_no_process(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with serving(tmp_path, tcp(postgres), dsn=postgres.uri()) as served:
        served.wait_ready()
        until(lambda: len(served.pids("learner")) == 1)
        children = [*served.pids("worker 1"), *served.pids("learner")]
        assert all(map(is_alive, children))
        served.process.kill()
        until(lambda: not any(map(is_alive, children)))


def test_two_workers_share_the_port(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with serving(tmp_path, tcp(postgres), more="[workers]\ncount = 2\n") as served:
        served.wait_ready()
        until(lambda: served.metric("ruvector_workers_up") == 2)
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(served.connect()) for _ in range(24)]
            assert all(each.execute("SELECT 1").fetchone() == (1,) for each in connections)
            until(lambda: served.metric("ruvector_connections_open") == 24)
            for pid in (*served.pids("worker 1"), *served.pids("worker 2")):
                assert (
                    sockets_of(pid) > 4
                )  # the kernel spreads connections at random: all on one has chance 2e-7


def sockets_of(pid: int) -> int:
    return sum(os.readlink(entry).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir())
