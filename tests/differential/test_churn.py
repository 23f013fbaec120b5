"""Connections that come and go in every state leave nothing behind: no task, no socket, no backend, no memory."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from tests.differential.churn import ENDS, STATES, Churn
from tests.differential.world import Server, World, world
from tests.integration.test_serve import Served, serving, until

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# A session with its buffers and its two transports weighs more than 10 kB: a hundredth of them, kept, would show.
COUNT = int(os.environ.get("CHURN", "150"))
MEMORY_TOLERANCE = 3 << 20
"""Bytes of resident memory; pages that the allocator has not given back, seen to be below 1 MB in 1,000."""


@pytest.fixture(scope="module")
def there() -> Iterator[World]:
    """Return a server that notices a client that is gone while its statement runs."""
    settings = {**FAST_SETTINGS, "client_connection_check_interval": "100ms", "max_connections": "100"}
    hba = ["host all auth_password 127.0.0.1/32 password"]
    with EmbeddedPostgres(settings=settings, listen=True, hba=hba) as server:
        with psycopg.connect(server.dsn("template1"), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            connection.execute("CREATE ROLE auth_password LOGIN PASSWORD 'auth_password'")
        with world(Server(server.host, server.port, server.user), "churn") as there:
            yield there


def churn(there: World, address: tuple[str, int], count: int, seed: int) -> None:
    crowd = Churn(address, there.database, there.server.user, seed)
    crowd.run(count)
    if count >= 100:
        assert set(crowd.done) == {*STATES, *ENDS}


def backends(there: World) -> int:
    row = there.control.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    ).fetchone()
    assert row is not None
    return int(str(row[0]))


@pytest.mark.timeout(600)
def test_a_worker_with_forced_injection_is_left_as_it_was(there: World) -> None:
    proxy = there.forced

    def tasks() -> int:
        return len(asyncio.all_tasks(proxy._loop))

    before = proxy.call(tasks)
    churn(there, (proxy.host, proxy.port), 150, seed=1)
    until(lambda: backends(there) == 0)
    until(lambda: not proxy.connections)
    assert proxy.call(tasks) == before
    assert proxy.counters.connections_opened == proxy.counters.connections_closed
    assert sum(proxy.counters.adapted.values()) > 100


@pytest.mark.timeout(3600)
def test_a_worker_process_is_left_as_it_was(there: World, tmp_path: Path) -> None:
    """CHURN=1000 for the long run: 1,000 to warm up, 1,000 to be compared."""
    with serving(tmp_path, ("127.0.0.1", there.server.port)) as served:
        served.wait_ready()
        worker = served.pids("worker 1")[0]
        churn(there, ("127.0.0.1", served.port), 5, seed=0)  # the event loop keeps a file from the first on
        until(lambda: is_over(served) and backends(there) == 0)
        files = open_files(worker)
        sizes = []
        for seed in (1, 2):
            churn(there, ("127.0.0.1", served.port), COUNT, seed)
            until(lambda: backends(there) == 0)
            until(lambda: open_files(worker) == files)
            until(lambda: is_over(served))
            sizes.append(resident(worker))
        print(f"{2 * COUNT} connections; resident memory {sizes[0]} and {sizes[1]} bytes; {files} files open")
        assert sizes[1] - sizes[0] < MEMORY_TOLERANCE
        assert served.pids("worker 1") == [worker]
        assert not re.search("Traceback|ERROR", served.log)


def is_over(served: Served) -> bool:
    return served.metric("ruvector_connections_open") == 0


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_count_would_find_what_is_left(there: World) -> None:
    """The measures themselves: one connection more is one backend more, and one file in each process."""
    files = open_files(os.getpid())
    with psycopg.connect(there.server.dsn(there.database)):
        assert backends(there) == 1
        assert open_files(os.getpid()) > files
    until(lambda: backends(there) == 0)
