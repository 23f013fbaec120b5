"""The distribution's own PostgreSQL: the real server with TLS, which the embedded one lacks.

Debian and Ubuntu install it under /usr/lib/postgresql; where it is missing the tests that need it are skipped.
It refuses to run as root, so root runs it as the user ``postgres`` that comes with the package.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psycopg

from bench.embedded import FAST_SETTINGS, free_port
from bench.guard import Guard

MISSING = "Debian's PostgreSQL is not installed (apt-get install postgresql)"


def programs() -> Path | None:
    """Return the directory of the newest version's programs; None where there is none."""
    found = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "postgres").exists()]
    return max(found, key=lambda path: int(path.parent.name), default=None)


def identity() -> dict[str, Any]:
    """Return what makes a child process run as an unprivileged user, where this one is root."""
    if os.getuid() != 0:
        return {}
    account = pwd.getpwnam("postgres")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


class DebianPostgres:
    """One server with TLS on a free port of 127.0.0.1 and on a unix socket; a context manager.

    Parameters
    ----------
    certificate, key
        Files (PEM) that the server shows; without them it has no TLS.
    root
        File by which clients' certificates are checked, where `hba` asks for them.
    hba
        Lines of pg_hba.conf; without any everybody is trusted.
    """

    user = "postgres"

    def __init__(
        self,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        root: Path | None = None,
        hba: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        found = programs()
        assert found is not None, MISSING
        self._programs = found
        self._home = Path(tempfile.mkdtemp(prefix="rvd-"))
        self._data = self._home / "data"
        self.socket_directory = str(self._home)
        self.host = "127.0.0.1"
        self.port = free_port()
        self._hba = list(hba) or [
            "host all all 127.0.0.1/32 trust",
            "host replication all 127.0.0.1/32 trust",
        ]
        self._settings = {**FAST_SETTINGS, "wal_level": "replica", **(settings or {})}
        for name, source in (("ssl_cert_file", certificate), ("ssl_key_file", key), ("ssl_ca_file", root)):
            if source is not None:
                copy = self._home / name
                shutil.copy(source, copy)
                copy.chmod(0o600)
                self._settings |= {"ssl": "on", name: str(copy)}
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    def __enter__(self) -> DebianPostgres:
        if identity():
            shutil.chown(self._home, identity()["user"])
            for path in self._home.iterdir():
                shutil.chown(path, identity()["user"])
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", self.user, "--no-sync")
        (self._data / "pg_hba.conf").write_text("\n".join(["local all all trust", *self._hba, ""]))
        options = {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": self.socket_directory,
            **self._settings,
        }
        arguments = [argument for name, value in options.items() for argument in ("-c", f"{name}={value}")]
        with (self._home / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [self._programs / "postgres", "-D", str(self._data), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                **identity(),
            )
        self._guard = Guard(self._server.pid, "INT", [self._home], identity())
        self._wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._guard is not None:
            self._guard.release()
        if self._server is not None:
            self._server.send_signal(2)  # SIGINT: fast shutdown
            try:
                self._server.wait(20)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / name, *arguments], check=True, capture_output=True, cwd="/", **identity()
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.local_dsn()).close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise AssertionError(self.log) from None
                time.sleep(0.1)
            else:
                return

    @property
    def log(self) -> str:
        return (self._home / "log").read_text(errors="replace")

    def local_dsn(self, dbname: str = "postgres") -> str:
        """Return how to connect over the unix socket, past all rules."""
        return f"host={self.socket_directory} port={self.port} dbname={dbname} user={self.user}"

    def execute(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement over the unix socket; return its rows."""
        with psycopg.connect(self.local_dsn(), autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []
