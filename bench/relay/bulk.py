"""What moves many bytes: results of 100,000 rows and of 100 MB, COPY out and in; and a storm of connections.

The reader takes the bytes and throws them away, so that the hop and not a driver is measured.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from bench.embedded import EmbeddedPostgres
from bench.relay.raw import RawClient
from bench.relay.results import Results
from bench.relay.ways import Way
from proxy.wire.frontend import Query

GROUP = "many bytes"
STORM = "connection storm"
_MEGABYTES = 100
_ROWS = "SELECT aid, bid, abalance, filler FROM pgbench_accounts LIMIT 100000"
_LARGE = f"SELECT repeat('x', 10000) FROM generate_series(1, {_MEGABYTES * 100})"
_LINE = b"1234567\t" + b"y" * 92 + b"\n"
_CHUNK_LINES = 320  # about 32 kB, as libpq and psql send
_COPY_IN = "COPY bench_copy FROM STDIN"
_COPY_OUT = b"COPY (TABLE bench_copy) TO STDOUT"


def fill(server: EmbeddedPostgres) -> None:
    """Make what is copied."""
    with RawClient(server.port, server.user, "postgres") as client:
        client.query("CREATE UNLOGGED TABLE bench_copy (id integer, filler text)")


def run(
    server: EmbeddedPostgres,
    ways: Sequence[Way],
    results: Results,
    *,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Measure every way in turns: megabytes a second."""
    chunk = _LINE * _CHUNK_LINES
    message = b"d" + struct.pack("!I", 4 + len(chunk)) + chunk
    copies = [message] * (_MEGABYTES * 1_000_000 // 2 // len(message))
    for _ in range(rounds):
        for way in ways:
            with RawClient(way.port, server.user, "postgres") as client:
                for case, sql in (("100,000 rows", _ROWS), ("100 MB result", _LARGE)):
                    _timed(results, case, way, partial(client.drain, Query(sql.encode()).encode()))
                client.query("TRUNCATE bench_copy")
                _timed(results, "COPY in", way, partial(client.copy_in, _COPY_IN, copies))
                _timed(results, "COPY out", way, partial(client.drain, Query(_COPY_OUT).encode()))
        advance()


def _timed(results: Results, case: str, way: Way, move: Callable[[], int]) -> None:
    before, start = way.cpu(), time.perf_counter()
    size = move()
    seconds = time.perf_counter() - start
    cpu = {"cpu": (way.cpu() - before) / (size / 1e6) * 1000} if way.processes else {}
    results.add(GROUP, case, way.name, rate=size / 1e6 / seconds, **cpu)


def storm(
    server: EmbeddedPostgres,
    ways: Sequence[Way],
    results: Results,
    *,
    rounds: int,
    connections: int,
    threads: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Open connections, each for one statement, from several threads: connections a second."""
    for _ in range(rounds):
        for way in ways:

            def connect(way: Way = way) -> None:
                for _ in range(connections // threads):
                    with RawClient(way.port, server.user, "postgres") as client:
                        client.query("SELECT 1")

            before, start = way.cpu(), time.perf_counter()
            started = [threading.Thread(target=connect) for _ in range(threads)]
            for thread in started:
                thread.start()
            for thread in started:
                thread.join()
            seconds = time.perf_counter() - start
            cpu = {"cpu": 1000 * (way.cpu() - before) / connections} if way.processes else {}
            results.add(STORM, "connect, one statement, close", way.name, rate=connections / seconds, **cpu)
        advance()
