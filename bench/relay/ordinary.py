"""pgbench -S through each way: transactions per second, latency of single transactions, processor time.

pgbench's log gives the latency of a sample of transactions (all of them with one client), so that quantiles
are known.  The server, pgbench and the hop share the machine.  Where a hop has two processes that does not
show: two cores are full before it has work for both.  So its scaling is measured a second time with every
process of every hop held to the same small share of one core: then a hop is the narrow place, as it is on a
machine with cores to spare, and two processes can show that they carry more than one.

What server, pgbench and hop spend on a transaction says how many of them the cores can carry at most.
"""

from __future__ import annotations

import re
import resource
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.embedded import EmbeddedPostgres
from bench.relay.results import TWO_WORKERS, Results
from bench.relay.ways import Way, cpu_seconds_of_family, cpu_share

GROUP = "ordinary traffic"
SCALING = "two workers"
MODES = ("simple", "extended", "prepared")
CLIENTS = (1, 8, 32, 100)
SHARE = 0.25
"""Of one core, for each process of a hop, where two workers are compared with one."""

TPS = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)
_SAMPLE = 20_000  # latencies a run, about


def fill(server: EmbeddedPostgres) -> None:
    """Make pgbench's tables in the database ``postgres``."""
    command = [str(server.bin("pgbench")), "-i", "-q", "-s", "5", "-h", server.host, "-p", str(server.port)]
    subprocess.run([*command, "-U", server.user, "postgres"], check=True, capture_output=True)


def measure(
    server: EmbeddedPostgres, way: Way, mode: str, clients: int, seconds: int, sampled: float = 1.0
) -> dict[str, float]:
    """Run ``pgbench -S`` once; return tps, latencies in microseconds, CPU seconds per 1,000 transactions."""
    with tempfile.TemporaryDirectory(prefix="ruvector-bench-") as directory:
        command = [str(server.bin("pgbench")), "-n", "-S", "-M", mode, "-c", str(clients), "-j", "1"]
        command += ["-T", str(seconds), "-l", f"--sampling-rate={sampled:g}", "--log-prefix=log"]
        command += ["-h", "127.0.0.1", "-p", str(way.port), "-U", server.user, "postgres"]
        before = _spent(server, way)
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=directory)
        hop, serving, asking = (now - then for now, then in zip(_spent(server, way), before, strict=True))
        found = TPS.search(done.stdout)
        if found is None:  # the time was over before all had connected
            return measure(server, way, mode, clients, 2 * seconds, sampled)
        lines = "".join(path.read_text() for path in Path(directory).glob("log*")).splitlines()
        if not lines:  # too few transactions for the sample
            return measure(server, way, mode, clients, seconds)
    tps = float(found.group(1))
    latencies = np.array([int(line.split(" ", 3)[2]) for line in lines], dtype=np.float64)
    p50, p99, p999 = np.percentile(latencies, [50, 99, 99.9])
    per_thousand = 1000 / (tps * seconds)
    cpu = {"cpu": hop * per_thousand} if way.processes else {}
    others = {"server": serving * per_thousand, "pgbench": asking * per_thousand}
    return {"tps": tps, "p50": p50, "p99": p99, "p99.9": p999, **cpu, **others}


def _spent(server: EmbeddedPostgres, way: Way) -> tuple[float, float, float]:
    """Return the processor time so far of the hop, the server, and all pgbench that were waited for."""
    assert server.pid is not None
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return way.cpu(), cpu_seconds_of_family(server.pid), used.ru_utime + used.ru_stime


def run(
    server: EmbeddedPostgres,
    ways: Sequence[Way],
    results: Results,
    *,
    rounds: int,
    seconds: int,
    modes: Sequence[str] = MODES,
    clients: Sequence[int] = CLIENTS,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Measure every way in turns; two workers where there is something for both to do."""
    sampled = {count: 1.0 if count == 1 else min(1.0, _SAMPLE / (30_000 * seconds)) for count in clients}
    for _ in range(rounds):
        for mode in modes:
            for count in clients:
                for way in ways:
                    if way.name == TWO_WORKERS and (mode != "prepared" or count == 1):
                        continue
                    found = measure(server, way, mode, count, seconds, sampled[count])
                    results.add(GROUP, f"{mode}, {count} clients", way.name, **found)
                advance()


def scale(
    server: EmbeddedPostgres,
    ways: Sequence[Way],
    results: Results,
    *,
    rounds: int,
    seconds: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Compare the hops with `SHARE` of a core for each of their processes, where groups may be made."""
    hops = [way for way in ways if way.processes]
    with cpu_share(hops, SHARE) as possible:
        if not possible():
            return
        for _ in range(rounds):
            for way in hops:
                found = measure(server, way, "prepared", 32, seconds, 0.1)
                results.add(SCALING, f"prepared, 32 clients, {SHARE:.0%} of a core each", way.name, **found)
            advance()
