"""What the faults act upon: a server, a forwarder in front of it, the proxy's processes, its state."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg

from bench.embedded import EmbeddedPostgres, free_port
from tests.chaos.forwarder import Forwarder
from tests.chaos.load import Load, vector_literal

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).parent / "shim"
MAX_CONNECTIONS = 60


class World:
    """Everything; made by `world`."""

    def __init__(self, server: EmbeddedPostgres, forwarder: Forwarder, directory: Path, seed: int) -> None:
        self.server, self.forwarder, self.directory, self.seed = server, forwarder, directory, seed
        self.state = directory / "state"
        self.clock = directory / "clock"
        self.port, self.admin_port = free_port(), free_port()
        self.truth = self._prepare()
        self.process: subprocess.Popen[bytes] | None = None
        self.direct: Load
        self.proxied: Load

    @property
    def in_namespace(self) -> bool:
        """Whether the network is this run's own."""
        return {
            line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]
        } == {"lo"}

    @property
    def log(self) -> str:
        """The proxy's log."""
        return (self.directory / "log").read_text()

    def start(self) -> None:
        """Start the proxy."""
        file = self.directory / "proxy.toml"
        file.write_text(
            f'[upstream]\nhost = "127.0.0.1"\nport = {self.forwarder.port}\nsslmode = "disable"\n'
            f'[learner]\ndsn = "{self.server.uri()}"\n[store]\npath = "{self.state}"\n'
            f"[listen]\nport = {self.port}\n[admin]\nport = {self.admin_port}\n[workers]\ncount = 2\n"
            "[limits]\nauthentication_timeout = 10.0\nconnect_timeout = 3.0\ndrain_timeout = 2.0\n"
            "max_logins = 50\n[learning]\nmin_samples = 30\n"
        )
        path = os.pathsep.join([str(ROOT), str(SHIM)])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "CHAOS_CLOCK": str(self.clock),
            "PYTHONNOUSERSITE": "1",
        }
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "proxy.main", "serve", "--config", str(file)],
                env=environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stderr=log,
            )

    def stop(self) -> int:
        """Stop the proxy; return its exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def pid(self, child: str) -> int:
        """Return the process id of "worker 1", "worker 2" or "learner"."""
        return int(re.findall(rf"{child} is up \(pid (\d+)\)", self.log)[-1])

    def is_ready(self, seconds: float = 60.0) -> float | None:
        """Wait until /readyz says so; return how long it took."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                url = f"http://127.0.0.1:{self.admin_port}/readyz"
                with urllib.request.urlopen(url, timeout=5) as response:
                    if response.status == 200:
                        return time.monotonic() - started
            time.sleep(0.1)
        return None

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.admin_port}/metrics", timeout=10
            ) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            return 0.0
        wanted = re.compile(rf"{name}(\{{.*\}})? (\S+)")
        return sum(float(found[2]) for line in lines if (found := wanted.fullmatch(line)))

    def learner_is_back(self, seconds: float = 60.0) -> bool:
        """Wait until both workers are connected to a learner."""
        deadline = time.monotonic() + seconds
        while self.metric("ruvector_learner_connected") < 2:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def backends(self) -> list[int]:
        """Return the server's processes, the postmaster first."""
        assert self.server.pid is not None
        children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children").read_text().split()
        return [self.server.pid, *map(int, children)]

    def _prepare(self) -> dict[str, list[bytes]]:
        """Make the tables; return vectors whose neighbours any setting of the index finds, and these."""
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.execute("CREATE TABLE items (id int PRIMARY KEY, embedding vector(3))")
            connection.execute("CREATE UNLOGGED TABLE copied (id int)")
            connection.execute("CREATE TABLE journal (token text)")
            connection.execute(
                "INSERT INTO items SELECT i, ARRAY[sin(i), cos(i * 1.7), sin(i * 0.3)]::vector "
                "FROM generate_series(1, 600) i"
            )
            connection.execute("CREATE INDEX ON items USING hnsw (embedding vector_l2_ops)")
            connection.execute("ALTER DATABASE postgres SET enable_seqscan = off")
            connection.execute("VACUUM ANALYZE items")
        truth: dict[str, list[bytes]] = {}
        sql = "SELECT id FROM items ORDER BY embedding <-> %s::vector LIMIT 5"
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            for number in range(400):
                vector = vector_literal(((number % 19) / 10 - 0.9, (number % 7) / 4 - 0.7, number / 200 - 1))
                found = set()
                for effort in (5, 10, 14, 20, 40, 100, 400):
                    connection.execute(f"SET hnsw.ef_search = {effort}")
                    found.add(tuple(row[0] for row in connection.execute(sql, (vector,))))
                connection.execute("SET enable_indexscan = off; SET enable_seqscan = on")
                found.add(tuple(row[0] for row in connection.execute(sql, (vector,))))
                connection.execute("RESET ALL")
                if len(found) == 1:
                    truth[vector] = [str(number).encode() for number in found.pop()]
        assert len(truth) > 50
        return truth


@contextlib.contextmanager
def world(seed: int, clients: int) -> Iterator[World]:
    """Set everything up, with `clients` on each road; nothing is left of it."""
    settings = {"max_connections": str(MAX_CONNECTIONS), "fsync": "off", "autovacuum": "off"}
    with (
        tempfile.TemporaryDirectory(prefix="rvc-") as name,
        EmbeddedPostgres(listen=True, settings=settings) as server,
        Forwarder(("127.0.0.1", server.port), seed) as forwarder,
    ):
        directory = Path(name)
        found = World(server, forwarder, directory, seed)
        with small_disk(directory / "state"):
            found.start()
            try:
                if found.is_ready() is None or not found.learner_is_back():
                    raise RuntimeError(f"the proxy did not start:\n{found.log}")
                with (
                    Load("direct", ("127.0.0.1", forwarder.port), clients, seed, found.truth) as found.direct,
                    Load("proxied", ("127.0.0.1", found.port), clients, seed, found.truth) as found.proxied,
                ):
                    yield found
            finally:
                forwarder.calm()
                for pid in found.backends() if server.pid else ():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
                found.stop()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """Put a file system of 16 MB at `path` where that is allowed, so that it can be full; else a directory."""
    path.mkdir()
    mounted = os.geteuid() == 0 and _run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path))
    try:
        yield
    finally:
        if mounted:
            _run("umount", "-l", str(path))


def _run(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
