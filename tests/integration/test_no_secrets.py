"""Canaries: a vector, a filter value, passwords and a token go through everything, and turn up nowhere.

Looked through: the log at its most talkative, the metrics, what the admin server says to those without a token,
every error that the proxy makes, the files in the state directory (with `learning.anonymize`), the temporary
directory, and the command lines and environments of all processes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.learner_kit import create_items, text
from tests.integration.raw import RawClient, message, query
from tests.integration.test_serve import PASSWORD, Served, serving, until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NUMBER = 0.731289413
VECTOR = np.full(32, NUMBER, dtype=np.float32)
VALUE = 918273645
TOKEN = "canary-token-0123456789"
CANARIES = {
    "the vector as text": text(VECTOR).encode()[1:9],
    "the vector in binary": VECTOR[:2].tobytes(),
    "the vector as the server sends it": VECTOR[:2].byteswap().tobytes(),
    "the filter value": str(VALUE).encode(),
    "the learner's password": PASSWORD.encode(),
    "a client's password": b"canary-client-password",
    "the admin token": TOKEN.encode(),
    "a word in a statement": b"canary_literal",
}
SEARCH = "SELECT id FROM items WHERE section = %s ORDER BY embedding <-> %s::vector LIMIT 5"


@pytest.fixture(scope="module")
def database(postgres: EmbeddedPostgres) -> Iterator[str]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE canaries STRATEGY file_copy")
    create_items(postgres.dsn("canaries"), 800)
    with psycopg.connect(postgres.dsn("canaries"), autocommit=True) as connection:
        connection.execute("UPDATE items SET section = %s WHERE id %% 5 = 0", (VALUE,))
        connection.execute("ANALYZE items")
    yield "canaries"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("DROP DATABASE canaries WITH (FORCE)")


def traffic(served: Served) -> None:
    """Vector searches of every form, and statements that fail."""
    with closing(
        served.connect("canaries", autocommit=True, password="canary-client-password")
    ) as connection:
        for step in range(80):
            vector = VECTOR + np.float32(step % 7)
            connection.execute(SEARCH, (VALUE, text(vector if step % 2 else VECTOR)))
            connection.execute(SEARCH.replace("%s::vector", f"'{text(VECTOR)}'::vector"), (VALUE,))
        for failing in (
            "SELECT 'canary_literal'::int",
            f"SELECT id FROM items ORDER BY embedding <-> '[{NUMBER}]'::vector LIMIT 5",
            f"SELECT id FROM items WHERE section = {VALUE} ORDER BY embedding <-> 'canary_literal'::vector LIMIT 1",
            f"SELECT ruvector_get_search_params('items', '[{NUMBER}]')",
            f"SELECT ruvector_enable_learning('canary_literal{VALUE}')",
            f"SET ruvector.target_recall = 'canary_literal'; SELECT {VALUE}/0",
        ):
            with contextlib.suppress(psycopg.Error):
                connection.execute(failing)


def errors_of_the_proxy(served: Served) -> bytes:
    """Return what the proxy says in its own name when it is given nonsense with canaries in it."""
    heard = b""
    address = ("127.0.0.1", served.port)
    secret = f"canary_literal {VALUE} {text(VECTOR)}".encode()
    for nonsense in (secret, struct.pack("!I", 40) + secret, b"\x16\x03" + secret):
        with socket.create_connection(address, timeout=60) as sock:
            sock.sendall(nonsense)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while data := sock.recv(1 << 16):
                    heard += data
    for broken in (b"Q\0\0\0\1" + secret, message("Q", secret)[:1] + b"\xff\xff\xff\xff" + secret):
        with RawClient(address, "canaries", "postgres") as client:
            client.send(query("SELECT 1"), broken)
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    tag, body = client.receive()
                    heard += tag.encode() + body
    return heard


def processes(served: Served) -> bytes:
    """Return command lines and environments."""
    pids = [served.process.pid, *served.pids("worker 1"), *served.pids("learner")]
    found = b""
    for pid in pids:
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                found += Path(f"/proc/{pid}/{name}").read_bytes()
    return found


def files(directory: Path) -> bytes:
    found = b""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with contextlib.suppress(OSError):
                found += path.read_bytes()
    return found


@pytest.mark.timeout(300)
def test_canaries_turn_up_nowhere(postgres: EmbeddedPostgres, database: str, tmp_path: Path) -> None:
    state = tmp_path / "elsewhere"
    more = (
        f'[admin]\ntoken = "{TOKEN}"\n[log]\nlevel = "debug"\n[learning]\nanonymize = true\nmin_samples = 10\n'
        f'[store]\npath = "{state}"\n'
    )
    dsn = postgres.uri(database).replace("postgres@", f"postgres:{PASSWORD}@")
    with serving(tmp_path, (postgres.host, postgres.port), more, dsn) as served:
        until(lambda: served.get("/readyz")[0] == 200, 60)
        until(lambda: "learner connected" in served.log, 60)
        deadline = time.monotonic() + 120
        while "published: public.items" not in served.log and time.monotonic() < deadline:
            traffic(served)
        assert "published: public.items" in served.log
        time.sleep(1.5)  # what was learned is written every second
        temporary = [path for path in Path("/tmp").glob("rvt-*") if path.is_dir()]
        places = {
            "log": served.log.encode(),
            "admin server without a token": "".join(
                served.get(path)[1]
                for path in ("/metrics", "/", "/readyz", "/healthz", "/api/overview", "/advice")
            ).encode(),
            "errors": errors_of_the_proxy(served),
            "processes": processes(served),
            "state": files(state),
            "temporary files": b"".join(files(path) for path in temporary),
        }
    assert all(places.values())
    assert "public.items" in places["log"].decode()
    leaks = [
        f"{name} in {place}"
        for place, data in places.items()
        for name, canary in CANARIES.items()
        if canary in data
    ]
    assert leaks == []


def test_the_search_would_find_them() -> None:
    """Each canary is found in what a client really sends."""
    sent = text(VECTOR).encode() + VECTOR.tobytes() + VECTOR.byteswap().tobytes() + str(VALUE).encode()
    assert all(canary in sent for name, canary in CANARIES.items() if "vector" in name or "value" in name)
