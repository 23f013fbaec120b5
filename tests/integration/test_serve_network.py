"""``ruvector-proxy serve`` with several workers, TLS and a unix socket: what belongs to the connections."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.certificates import Authority, Issued
from tests.integration.debian_postgres import MISSING, DebianPostgres, programs
from tests.integration.raw import SYNC, execute, parse
from tests.integration.test_serve import ROOT, Served, serving, tcp, until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MEGABYTE = 1 << 20
LONG = 300 * MEGABYTE


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def put(issued: Issued, directory: Path) -> None:
    """Put a certificate in place as certbot does: each file at once."""
    for source, name in ((issued.cert, "server.crt"), (issued.key, "server.key")):
        shutil.copy(source, directory / "new")
        os.replace(directory / "new", directory / name)


def fingerprint(served: Served, authority: Authority) -> bytes:
    """Return the certificate that a new client is shown."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as plain:
        plain.sendall(struct.pack("!II", 8, 80877103))
        assert plain.recv(1) == b"S"
        context = ssl.create_default_context(cafile=authority.root)
        with context.wrap_socket(plain, server_hostname="localhost") as sock:
            return sock.getpeercert(binary_form=True) or b""


def der(issued: Issued) -> bytes:
    pem, end, _ = issued.cert.read_text().partition("-----END CERTIFICATE-----\n")
    return ssl.PEM_cert_to_DER_cert(pem + end)


def all_workers_up(served: Served, count: int = 2) -> None:
    served.wait_ready()
    until(lambda: all(served.pids(f"worker {number}") for number in range(1, count + 1)))


def test_certificates_are_replaced_under_open_connections(
    postgres: EmbeddedPostgres, authority: Authority, tmp_path: Path
) -> None:
    """By SIGHUP and by itself, in every worker; a half-written one is not taken."""
    first, second, third = (authority.issue("localhost") for _ in range(3))
    put(first, tmp_path)
    more = f"""
        [listen]
        tls_cert = "server.crt"
        tls_key = "server.key"
        unix_socket = "{tmp_path}"
        [workers]
        count = 2
    """
    with serving(tmp_path, tcp(postgres), more) as served:
        all_workers_up(served)
        connections = [served.connect(sslmode="require") for _ in range(6)]
        assert {fingerprint(served, authority) for _ in range(8)} == {der(first)}

        put(second, tmp_path)
        served.process.send_signal(signal.SIGHUP)
        until(lambda: served.log.count("new connections from clients use") == 2)
        assert {fingerprint(served, authority) for _ in range(8)} == {der(second)}

        whole = third.cert.read_bytes()
        (tmp_path / "server.crt").write_bytes(whole[: len(whole) // 3])
        until(lambda: served.log.count("holds no certificate in PEM format") == 2)
        assert {fingerprint(served, authority) for _ in range(8)} == {der(second)}

        put(third, tmp_path)
        until(lambda: served.log.count("new connections from clients use") == 4)
        assert {fingerprint(served, authority) for _ in range(8)} == {der(third)}

        for connection in connections:
            assert connection.execute("SELECT 1").fetchone() == (1,)
            connection.close()


def test_a_unix_socket_is_shared_by_the_workers(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    directory = Path(served_directory())
    more = f'[listen]\nunix_socket = "{directory}"\nunix_socket_mode = "0770"\n[workers]\ncount = 2\n'
    try:
        with serving(tmp_path, tcp(postgres), more) as served:
            all_workers_up(served)
            path = directory / f".s.PGSQL.{served.port}"
            assert stat.S_IMODE(path.stat().st_mode) == 0o770
            assert str(path) in served.log
            for _ in range(10):
                with psycopg.connect(
                    host=str(directory), port=served.port, user="postgres", dbname="postgres"
                ) as connection:
                    assert connection.execute("SELECT 1").fetchone() == (1,)
            until(lambda: served.metric("ruvector_connections_total") == 10)
            # Another proxy does not take it.
            code, error = start_and_fail(tmp_path, served, directory)
            assert code == 1
            assert f"cannot listen on {path}: another server accepts connections there" in error
            assert "listen.unix_socket" in error
            assert path.exists()
        assert list(directory.iterdir()) == []
    finally:
        shutil.rmtree(directory)


def served_directory() -> str:
    import tempfile

    return tempfile.mkdtemp(prefix="rvu-")


def start_and_fail(tmp_path: Path, served: Served, directory: Path) -> tuple[int, str]:
    """Start another proxy for the same unix socket; return its exit code and what it says."""
    environment = {
        **os.environ,
        "RUVECTOR_LISTEN_HOST": "127.0.0.2",
        "RUVECTOR_LISTEN_PORT": str(served.port),
        "RUVECTOR_LISTEN_UNIX_SOCKET": str(directory),
        "RUVECTOR_ADMIN_PORT": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "proxy.main", "serve"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("protocol", ["3.0", "3.2"])
def test_cancel_reaches_the_right_session_whichever_worker_gets_it(
    postgres: EmbeddedPostgres, tmp_path: Path, protocol: str
) -> None:
    """Keys are 4 bytes in protocol 3.0 and 32 in 3.2; the one worker never saw the other's."""
    if psycopg.pq.version() < 180000 and protocol == "3.2":
        pytest.skip("libpq is older than 18")
    with serving(tmp_path, tcp(postgres), "[workers]\ncount = 2\n") as served:
        all_workers_up(served)
        options = {"max_protocol_version": protocol} if psycopg.pq.version() >= 180000 else {}
        for _ in range(8):
            with served.connect(autocommit=True, **options) as connection:
                timer = threading.Timer(0.2, connection.cancel_safe)
                timer.start()
                with pytest.raises(psycopg.errors.QueryCanceled):
                    connection.execute("SELECT pg_sleep(20)")
                timer.join()
                assert connection.execute("SELECT 1").fetchone() == (1,)
        # Both workers took part, or the test proves nothing.
        until(lambda: served.metric("ruvector_connections_total") == 16)


def peak(pid: int) -> int:
    """Return the most memory that a process has used, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def send_long(sock: socket.socket) -> None:
    """Send a statement with a parameter of LONG bytes: ``SELECT length($1)``."""
    head = b"\0\0" + struct.pack("!HH", 0, 1) + struct.pack("!I", LONG)
    size = 4 + len(head) + LONG + 2
    sock.sendall(parse("SELECT length($1::text)") + b"B" + struct.pack("!I", size) + head)
    piece = b"x" * MEGABYTE
    for _ in range(LONG // MEGABYTE):
        sock.sendall(piece)
    sock.sendall(b"\0\0" + execute() + SYNC)


def measure(served: Served, context: ssl.SSLContext | None, slow: bool = False) -> dict[str, float]:
    """Pass LONG bytes each way; return by how many megabytes the worker's memory peaked above its rest."""
    (pid,) = served.pids("worker 1")
    sock = socket.create_connection(("127.0.0.1", served.port), timeout=100)
    if context is not None:
        sock.sendall(struct.pack("!II", 8, 80877103))
        assert sock.recv(1) == b"S"
        sock = context.wrap_socket(sock, server_hostname="localhost")
    found = {}
    with sock:
        body = struct.pack("!I", 3 << 16) + b"user\0postgres\0database\0postgres\0\0"
        sock.sendall(struct.pack("!I", len(body) + 4) + body)
        read_until_ready(sock)
        for name in ("up", "down"):
            reset_peak(pid)
            before = peak(pid)
            if name == "up":
                send_long(sock)
                assert str(LONG).encode() in read_until_ready(sock)[1]
            else:
                sql = f"SELECT repeat('y', {LONG})".encode() + b"\0"
                sock.sendall(b"Q" + struct.pack("!I", len(sql) + 4) + sql)
                time.sleep(1.0)  # a client that reads late: what does not fit waits in the server
                assert read_until_ready(sock)[0] > LONG
            found[name] = (peak(pid) - before) / MEGABYTE
    return found


def read_until_ready(sock: socket.socket) -> tuple[int, bytes]:
    """Return how many bytes came until ReadyForQuery, and the last of them."""
    count, last = 0, b""
    while not last.endswith(b"Z\0\0\0\5I"):
        data = sock.recv(MEGABYTE)
        assert data, last
        count += len(data)
        last = (last + data)[-4096:]
    return count, last


def test_long_values_take_no_memory(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with serving(tmp_path, tcp(postgres)) as served:
        served.wait_ready()
        found = measure(served, None)
    print(f"plain: the worker's memory grew by {found} MB for {LONG >> 20} MB")
    assert max(found.values()) < 16


@pytest.mark.skipif(programs() is None, reason=MISSING)
def test_long_values_take_no_memory_with_tls_on_both_sides(authority: Authority, tmp_path: Path) -> None:
    put(authority.issue("localhost"), tmp_path)
    server = authority.issue("localhost")
    more = f"""
        sslmode = "verify-full"
        sslrootcert = "{authority.root}"
        [listen]
        tls_cert = "server.crt"
        tls_key = "server.key"
    """
    with (
        DebianPostgres(certificate=server.cert, key=server.key) as upstream,
        serving(tmp_path, ("localhost", upstream.port), more) as served,
    ):
        served.wait_ready()
        found = measure(served, ssl.create_default_context(cafile=authority.root))
    print(f"TLS: the worker's memory grew by {found} MB for {LONG >> 20} MB")
    assert max(found.values()) < 16


@pytest.mark.skipif(programs() is None, reason=MISSING)
def test_readiness_knows_whether_the_servers_certificate_will_do(tmp_path: Path) -> None:
    right, wrong = Authority(tmp_path, "right"), Authority(tmp_path, "wrong")
    root = tmp_path / "root.crt"
    shutil.copy(wrong.root, root)
    server = right.issue("localhost")
    more = f'sslmode = "verify-ca"\nsslrootcert = "{root}"\n'
    with (
        DebianPostgres(certificate=server.cert, key=server.key) as upstream,
        serving(tmp_path, ("localhost", upstream.port), more) as served,
    ):
        until(lambda: "certificate verify failed" in served.get("/readyz")[1])
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            served.connect()
        shutil.copy(right.root, root)
        served.wait_ready()
        until(lambda: served.log.count("new connections to the server use") == 2)  # worker and supervisor
        with served.connect() as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
