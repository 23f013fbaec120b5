"""What a suite is, the three ways it is run, and how two runs are told apart.

Theory
------
Nobody's test-suite passes everywhere: some tests need another server, another platform, more time.  So no
suite is held against an ideal; each is held against itself.  It is run

    direct    against a server of its own, nothing in between
    proxied   through the proxy, with a dictated arm for every vector query that is recognised
    forced    through the proxy, with that arm put in force for every SELECT that can carry settings

and its outcome, test by test, must be the same three times: passed, failed or skipped, and, where the suite
produces a text, the same text byte for byte.

Rules
-----
* Every run has a server of its own, made for it: no run sees what another left behind.
* The arm cannot change a result: it widens an HNSW scan, and moves ``work_mem`` by one kilobyte.
* A run in which forced injection did not take place proves nothing: the suite says how many statements must
  have been adapted at the least, and fewer count as a difference.
* When a suite has ended, no session of a client's may be left on the server.
* What cannot be run here is reported as such, with the reason.  It never counts as passed.
"""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psycopg

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".conformance"
"""What is downloaded, built and written by runs; never committed, safe to delete."""

DATABASE = "conformance"
ARM = ("hnsw.ef_search=77", "work_mem=4097kB")
STRAGGLERS = "no session left behind"
ADAPTED = "settings were put in force"
_GOODBYE_SECONDS = 5.0


class Way(enum.StrEnum):
    """How a suite reaches the server."""

    DIRECT = "direct"
    PROXIED = "proxied"
    FORCED = "forced"


class NotRunError(Exception):
    """A suite cannot be run on this machine; the message is the reason, for the report."""


class Outcome(NamedTuple):
    """How one test ended."""

    status: str  # "pass", "fail" or "skip"
    text: str = ""  # compared as well, where a suite gives one


PASS, FAIL, SKIP = Outcome("pass"), Outcome("fail"), Outcome("skip")
Outcomes = dict[str, Outcome]
Command = list[str | Path]


@dataclass(frozen=True, slots=True)
class Target:
    """Where one run of a suite is to connect to.

    `host` and `port` are the server's own or the proxy's; `server` is for what a suite must do or look at
    beside its run, such as creating databases.
    """

    way: Way
    host: str
    port: int
    server: EmbeddedPostgres
    directory: Path  # empty, for the run's files
    dbname: str = DATABASE

    @property
    def dsn(self) -> str:
        """Connection string of the run's database."""
        return self.dsn_of(self.dbname)

    @property
    def uri(self) -> str:
        """The same as a URI."""
        return f"postgresql://{self.server.user}@{self.host}:{self.port}/{self.dbname}"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with libpq's variables pointing at the target."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return kept | {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.server.user,
            "PGDATABASE": self.dbname,
        }

    def dsn_of(self, dbname: str) -> str:
        """Return the connection string of another database."""
        return f"host={self.host} port={self.port} user={self.server.user} dbname={dbname}"

    def admin(self, sql: str, dbname: str = "postgres") -> list[tuple[object, ...]]:
        """Run a statement on the server itself, never through the proxy; return its rows."""
        with psycopg.connect(self.server.dsn(dbname), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []


@dataclass(frozen=True, slots=True)
class Suite:
    """One suite: what it is, what it needs, how it is run.

    `prepare` downloads and builds what the suite needs below `CACHE`, returns the version for the report
    and raises `NotRunError` where that is not possible.  `run` returns the outcome of every test.
    """

    name: str
    title: str
    prepare: Callable[[], str]
    run: Callable[[Target], Outcomes]
    adapted_at_least: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)  # of the server
    seconds: float = 600.0


# -- running ---------------------------------------------------------------------------------------------


def run_suite(suite: Suite, way: Way, directory: Path) -> Outcomes:
    """Run a suite one way, against a fresh server, and return every test's outcome."""
    directory.mkdir(parents=True)
    settings = {**FAST_SETTINGS, "shared_buffers": "128MB", "max_connections": "100", **suite.settings}
    with EmbeddedPostgres(settings=settings, listen=True) as server:
        with psycopg.connect(server.dsn("template1"), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            connection.execute(f"CREATE DATABASE {DATABASE} STRATEGY file_copy".encode())
        if way is Way.DIRECT:
            target = Target(way, "127.0.0.1", server.port, server, directory)
            return _finished(suite, target)
        with proxy(server, way, directory / "proxy.log") as relay:
            target = Target(way, "127.0.0.1", relay.port, server, directory)
            outcomes = _finished(suite, target)
        (directory / "counted.json").write_text(json.dumps(relay.counted))
        if way is Way.FORCED:
            enough = relay.counted.get("adapted", 0) >= suite.adapted_at_least
            outcomes[ADAPTED] = PASS if enough else FAIL
        else:
            outcomes[ADAPTED] = PASS
        return outcomes


def _finished(suite: Suite, target: Target) -> Outcomes:
    outcomes = dict(suite.run(target))
    if not outcomes:
        raise RuntimeError(f"{suite.name}, {target.way}: no test was run; see {target.directory}")
    outcomes[STRAGGLERS] = PASS if _all_gone(target.server) else FAIL
    if target.way is Way.DIRECT:
        outcomes[ADAPTED] = PASS
    return outcomes


def _all_gone(server: EmbeddedPostgres) -> bool:
    """Wait until no client's session is left, apart from the one that looks.

    One that still executes a statement does not count: the server notices only afterwards that its client
    is gone.
    """
    others = (
        b"SELECT 1 FROM pg_stat_activity WHERE backend_type IN ('client backend', 'walsender')"
        b" AND pid <> pg_backend_pid() AND state <> 'active'"
    )
    deadline = time.monotonic() + _GOODBYE_SECONDS
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        while connection.execute(others).fetchone() is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    return True


@dataclass(slots=True)
class Relay:
    """A proxy process; `counted` is what it counted, once it has ended."""

    port: int
    counted: dict[str, int]


@contextmanager
def proxy(server: EmbeddedPostgres, way: Way, log: Path) -> Iterator[Relay]:
    """Run a proxy before `server`, in a process of its own."""
    command = [sys.executable, "-m", "tests.forced", "--upstream-host", "127.0.0.1"]
    command += ["--upstream-port", str(server.port)]
    command += [word for setting in ARM for word in ("--set", setting)]
    command += ["--as-is"] if way is Way.PROXIED else []
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            if len(words) != 2:
                raise RuntimeError(f"the proxy did not start; see {log}")
            relay = Relay(int(words[1]), {})
            yield relay
            out, _ = process.communicate(timeout=30)  # closes its standard input, which ends it
            relay.counted.update(json.loads(out))
        finally:
            process.kill()
            process.wait()


# -- commands --------------------------------------------------------------------------------------------


def call(
    command: Sequence[str | Path],
    *,
    log: Path | None = None,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    text: str = "",
    timeout: float = 600.0,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with standard error in its output; keep that in `log`."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=None if environment is None else dict(environment),
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        check=False,
        timeout=timeout,
    )
    if log is not None:
        log.write_text(result.stdout)
    return result


def build(command: Sequence[str | Path], what: str, *, cwd: Path = ROOT, timeout: float = 900.0) -> str:
    """Run a command of a suite's preparation and return its output.

    Raises
    ------
    NotRunError
        It failed, or there is no such program.
    """
    try:
        result = call(command, cwd=cwd, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotRunError(f"{what}: {error}") from error
    if result.returncode != 0:
        lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        raise NotRunError(f"{what} failed: {lines[-1] if lines else f'status {result.returncode}'}")
    return result.stdout


# -- comparing -------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A test whose outcome depends on the way."""

    test: str
    outcomes: dict[Way, Outcome | None]  # None: the test did not take place

    @property
    def ways(self) -> frozenset[Way]:
        """The ways in which it did not go as it did directly."""
        return frozenset(
            way for way, outcome in self.outcomes.items() if outcome != self.outcomes[Way.DIRECT]
        )

    def __str__(self) -> str:
        """Return it in one line."""
        if len({outcome and outcome.status for outcome in self.outcomes.values()}) == 1:
            return f"{self.test}: the text differs, {' and '.join(sorted(self.ways))}"
        return f"{self.test}: " + ", ".join(
            f"{way} {outcome.status if outcome else 'did not run'}" for way, outcome in self.outcomes.items()
        )


def compare(runs: Mapping[Way, Outcomes]) -> list[Difference]:
    """Return the tests whose outcomes are not the same in all runs, in order of name."""
    names = sorted({name for outcomes in runs.values() for name in outcomes})
    found = []
    for name in names:
        outcomes = {way: run.get(name) for way, run in runs.items()}
        if len(set(outcomes.values())) > 1:
            found.append(Difference(name, outcomes))
    return found
