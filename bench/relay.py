"""What the hop costs: pgbench direct, through pgbouncer and through the proxy, in one run.

Protocol: the same embedded server, all three over loopback TCP, ``pgbench -S`` in the modes and with the
numbers of clients asked for, interleaved in rounds so that noise hits all alike.  Reported are transactions
per second (median, least and most over the rounds) and the median over rounds of each round's ratio to
pgbouncer.  The load generator, the server and the pooler share this machine's cores, so that a ratio says
more than any absolute number.

pgbouncer (session mode, Debian's package or any other) is left out where it is not installed.

    python -m bench.relay --rounds 5 --modes prepared,extended,simple --clients 1,8
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres, free_port
from bench.pooler import pgbouncer, wait_for_port

TPS = re.compile(r"^tps = ([0-9.]+)", re.MULTILINE)


@contextmanager
def proxy(server: EmbeddedPostgres, directory: Path) -> Iterator[int]:
    """Run ``ruvector-proxy serve`` before `server`, learner on; yield its port."""
    port = free_port()
    settings = directory / "proxy.toml"
    settings.write_text(
        f'[listen]\nport = {port}\n[upstream]\nhost = "127.0.0.1"\nport = {server.port}\n'
        f'[admin]\nport = 0\n[learner]\ndsn = "{server.uri()}"\n[log]\nlevel = "warning"\n'
    )
    command = [sys.executable, "-m", "proxy.main", "serve", "--config", str(settings)]
    with subprocess.Popen(command) as process:
        try:
            wait_for_port(port)
            yield port
        finally:
            process.terminate()


def measure(server: EmbeddedPostgres, port: int, mode: str, clients: int, seconds: float) -> float:
    """Return transactions per second of one ``pgbench -S`` run."""
    command = [str(server.bin("pgbench")), "-n", "-S", "-M", mode, "-c", str(clients), "-j", "1"]
    command += ["-T", f"{seconds:g}", "-h", "127.0.0.1", "-p", str(port), "-U", server.user, "postgres"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = TPS.search(done.stdout)
    assert found is not None, done.stdout
    return float(found.group(1))


def main() -> int:
    """Run the benchmark and print its table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=3.0, help="of each run")
    arguments.add_argument("--modes", default="prepared,extended,simple")
    arguments.add_argument("--clients", default="1,8")
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    options = arguments.parse_args()
    cases = [(mode, int(c)) for mode in options.modes.split(",") for c in options.clients.split(",")]
    results: dict[tuple[str, str, int], list[float]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ruvector-bench-")))
        settings = {**FAST_SETTINGS, "max_connections": "300", "shared_buffers": "256MB"}
        server = stack.enter_context(EmbeddedPostgres(settings=settings, listen=True))
        init = [str(server.bin("pgbench")), "-i", "-q", "-s", "5", "-h", server.host, "-p", str(server.port)]
        subprocess.run([*init, "-U", server.user, "postgres"], check=True, capture_output=True)
        ways: dict[str, int | None] = {"direct": server.port}
        ways["pgbouncer"] = stack.enter_context(pgbouncer(server, directory, "session"))
        ways["proxy"] = stack.enter_context(proxy(server, directory))
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("pgbench -S", total=options.rounds * len(cases) * len(ways))
            for _ in range(options.rounds):
                for mode, clients in cases:
                    for way, port in ways.items():
                        if port is not None:
                            tps = measure(server, port, mode, clients, options.seconds)
                            results.setdefault((way, mode, clients), []).append(tps)
                        progress.advance(task)
    report(results, cases)
    if options.json:
        figures = [{"way": w, "mode": m, "clients": c, "tps": v} for (w, m, c), v in results.items()]
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


def report(results: dict[tuple[str, str, int], list[float]], cases: list[tuple[str, int]]) -> None:
    """Print one line per case and way."""
    table = Table(title="pgbench -S, transactions per second")
    for heading in ("mode", "clients", "way", "median", "least", "most", "ratio to pgbouncer"):
        table.add_column(heading, justify="left" if heading in ("mode", "way") else "right")
    for mode, clients in cases:
        reference = results.get(("pgbouncer", mode, clients))
        for way in ("direct", "pgbouncer", "proxy"):
            tps = results.get((way, mode, clients))
            if tps is None:
                continue
            ratio = "-"
            if reference is not None:
                ratio = f"{statistics.median(a / b for a, b in zip(tps, reference, strict=True)):.2f}"
            row = (f"{statistics.median(tps):.0f}", f"{min(tps):.0f}", f"{max(tps):.0f}", ratio)
            table.add_row(mode, str(clients), way, *row)
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
