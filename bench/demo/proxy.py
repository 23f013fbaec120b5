"""The proxy, started as a user would: ``ruvector-proxy serve --config .demo/proxy.toml``, and its figures."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bench.demo.database import DATABASE
from bench.embedded import EmbeddedPostgres, free_port
from bench.guard import Guard

STATE = "state"
"""Name of the proxy's state directory, beside its configuration."""

START_SECONDS = 30.0
STOP_SECONDS = 15.0

_CONFIGURATION = """\
# Written anew by each run of the demo.
[listen]
port = {port}
{unix_socket}
[upstream]
host = "{host}"
port = {upstream_port}
{sslmode}
[admin]
port = {admin_port}

[store]
path = "{STATE}"

[learner]
dsn = "{dsn}"
"""


class ProxyError(RuntimeError):
    """The proxy did not start, or ended by itself; the message holds the end of its log."""


@dataclass(frozen=True)
class Figures:
    """One scrape of /metrics: sample name to (labels, value) pairs."""

    samples: dict[str, list[tuple[dict[str, str], float]]]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of all samples called `name` that carry `labels`; 0 where there is none."""
        return sum(
            value
            for found, value in self.samples.get(name, [])
            if all(found.get(label) == wanted for label, wanted in labels.items())
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the samples called `name`, added up by the value of `label`."""
        result: dict[str, float] = {}
        for labels, value in self.samples.get(name, []):
            result[labels.get(label, "")] = result.get(labels.get(label, ""), 0.0) + value
        return result


class Proxy:
    """A running proxy; made by `serve`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        port: int,
        admin_port: int,
        log: Path,
        login: Mapping[str, object] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.host = host
        self.port = port
        self.admin_port = admin_port
        self.log = log
        self.pid = process.pid
        self._process = process
        self._login = dict(login or {"user": "postgres", "database": DATABASE})

    @property
    def address(self) -> dict[str, object]:
        """Connection arguments for an application: all that it has to change."""
        return {"host": self.host, "port": self.port, **self._login}

    def check(self) -> None:
        """Raise ProxyError if the process has ended."""
        if self._process.poll() is not None:
            raise ProxyError(
                f"the proxy ended with exit code {self._process.returncode}; the end of {self.log}:\n"
                f"{self._log_end()}"
            )

    async def figures(self) -> Figures:
        """Scrape the proxy's /metrics.

        Raises
        ------
        ProxyError
            The proxy ended, or does not answer.
        """
        self.check()
        try:
            text = await asyncio.to_thread(self._get, "/metrics")
        except OSError as error:
            raise ProxyError(f"the proxy's /metrics does not answer: {error}") from error
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((dict(sample.labels), float(sample.value)))
        return Figures(samples)

    async def wait_until_ready(self) -> None:
        """Return when /readyz says that clients can be served; raise ProxyError where it does not in time."""
        deadline = time.monotonic() + START_SECONDS
        reason = "no answer"
        while time.monotonic() < deadline:
            self.check()
            try:
                await asyncio.to_thread(self._get, "/readyz")
            except urllib.error.HTTPError as error:
                reason = error.read().decode(errors="replace")
            except OSError as error:
                reason = str(error)
            else:
                return
            await asyncio.sleep(0.1)
        raise ProxyError(f"the proxy did not get ready ({reason}); the end of {self.log}:\n{self._log_end()}")

    def stop(self) -> None:
        """Ask the proxy to end, wait for it, and kill it if it does not."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin_port}{path}", timeout=5) as response:
            return str(response.read().decode())

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])


@dataclass(frozen=True)
class Upstream:
    """A PostgreSQL server: how the proxy reaches it, and how the learner logs in."""

    host: str
    port: int
    dsn: str
    user: str = "postgres"
    database: str = DATABASE
    password: str | None = None
    sslmode: str | None = None

    @classmethod
    def of(cls, server: EmbeddedPostgres, database: str = DATABASE) -> Upstream:
        """Return an embedded server's."""
        return cls(server.host, server.port, server.uri(database), server.user, database)

    @property
    def address(self) -> dict[str, object]:
        """Connection arguments for an application that is not behind the proxy."""
        found: dict[str, object] = {"host": self.host, "port": self.port, **self.login}
        return found

    @property
    def login(self) -> dict[str, object]:
        """User, database and password, as connection arguments."""
        secret = {} if self.password is None else {"password": self.password}
        return {"user": self.user, "database": self.database, **secret}


@asynccontextmanager
async def serve(
    server: EmbeddedPostgres | Upstream, home: Path, more: str = "", *, admin_port: int | None = None
) -> AsyncIterator[Proxy]:
    """Start the proxy in front of `server` on free ports, with its state in `home`; stop it at the end.

    `more` is TOML that is put behind the demo's configuration; `admin_port` is where the dashboard is to be.
    The configuration holds the DSN, so only the user can read it.  Where the server is reached by a unix
    socket, so is the proxy (by TCP as well): what is compared with a direct connection is one more hop of the
    same kind.

    Raises
    ------
    ProxyError
        It did not get ready.
    """
    upstream = Upstream.of(server) if isinstance(server, EmbeddedPostgres) else server
    port, admin_port = free_port(), admin_port or free_port()
    sockets = tempfile.mkdtemp(prefix="rvp-") if upstream.host.startswith("/") else None
    configuration = home / "proxy.toml"
    configuration.touch(mode=0o600)
    configuration.write_text(
        _CONFIGURATION.format(
            port=port,
            unix_socket=f'unix_socket = "{sockets}"\n' if sockets else "",
            host=upstream.host,
            upstream_port=upstream.port,
            dsn=upstream.dsn,
            sslmode=f'sslmode = "{upstream.sslmode}"\n' if upstream.sslmode else "",
            admin_port=admin_port,
            STATE=STATE,
        )
        + more
    )
    log = home / "proxy.log"
    process = _start(configuration, log)
    guard = Guard(process.pid, "TERM")
    proxy = Proxy(process, port, admin_port, log, upstream.login, sockets or "127.0.0.1")
    try:
        await proxy.wait_until_ready()
        yield proxy
    finally:
        guard.release()
        proxy.stop()
        if sockets:
            shutil.rmtree(sockets, ignore_errors=True)


def _start(configuration: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command(), "serve", "--config", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal reaches the demo alone, which stops the proxy
        )


def command() -> list[str]:
    """Return how to call ``ruvector-proxy`` in this environment."""
    script = Path(sys.executable).with_name("ruvector-proxy")
    return [str(script)] if script.exists() else [sys.executable, "-m", "proxy.main"]
