"""pgbouncer in front of the embedded server: the yardstick of the relay, and an upstream of the proxy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.embedded import EmbeddedPostgres, free_port

PoolMode = Literal["session", "transaction", "statement"]


@dataclass(frozen=True)
class Pooler:
    """A running pgbouncer."""

    port: int
    pid: int


@contextmanager
def pgbouncer(server: EmbeddedPostgres, directory: Path, mode: PoolMode) -> Iterator[Pooler | None]:
    """Run pgbouncer before `server`, with its files in `directory`; yield it, or None where there is none."""
    program = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")
    if program is None:
        yield None
        return
    port = free_port()
    users = directory / "users.txt"
    users.write_text(f'"{server.user}" ""\n')
    settings = directory / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host=127.0.0.1 port={server.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {users}\npool_mode = {mode}\n"
        "max_client_conn = 300\ndefault_pool_size = 250\n"
    )
    directory.chmod(0o755)
    command = [program, "-q", str(settings)]
    if os.geteuid() == 0:
        command[1:1] = ["-u", "nobody"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for_port(port)
            yield Pooler(port, process.pid)
        finally:
            process.terminate()


def wait_for_port(port: int, seconds: float = 20.0) -> None:
    """Return when something listens on a local port; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port} after {seconds:g} s")
