"""What the SQL interface costs statements that use none of it: on against off, measured and counted.

Measured: proxies before one embedded server, alike but for ``sql.enabled``; ``pgbench -S`` runs through one
after the other in many short rounds, who comes first in turn.  Of each round the ratio (on / off) of

    tps             transactions per second
    CPU / stmt      CPU time of the worker for one statement, by the kernel's nanosecond account: what waits
                    for the processor is not in it, so that other programs disturb it less

is taken; reported are the median of the ratios, an interval that holds the true median with a probability of
95 % (by ranks, so nothing is assumed about the noise), and the least and most of the rounds.  A third proxy,
off as well, is the control: what the same comparison finds where there is no difference.

Counted: the same conversation, as bytes, is put through a session of its own.  Executed bytecodes
are exact and the same on every machine; machine instructions (callgrind) hold what happens in C as well, and
are left out where valgrind is not installed.

    python -m bench.sql_interface --rounds 40 --seconds 1
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import which
from types import FrameType
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres, free_port
from bench.pooler import wait_for_port
from bench.relay.ordinary import TPS
from proxy.interface.options import Interface
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.session.frontend import Session

MODES = ("simple", "extended", "prepared")
SIDES = ("on", "off")
MEASURED = (*SIDES, "control")
_QUERY = "SELECT abalance FROM pgbench_accounts WHERE aid = {};"
_DONE = re.compile(r"number of transactions actually processed: (\d+)")
_INSTRUCTIONS = re.compile(r"Collected : (\d+)")


# -- measured ------------------------------------------------------------------------------------------------


class Running(NamedTuple):
    """A proxy: where clients connect, and its worker's process id."""

    port: int
    worker: int


@contextmanager
def proxy(server: EmbeddedPostgres, directory: Path, *, enabled: bool) -> Iterator[Running]:
    """Run ``ruvector-proxy serve`` before `server`, learner on."""
    directory.mkdir()
    port = free_port()
    settings = directory / "proxy.toml"
    settings.write_text(
        f'[listen]\nport = {port}\n[upstream]\nhost = "127.0.0.1"\nport = {server.port}\n'
        f'[admin]\nport = 0\n[learner]\ndsn = "{server.uri()}"\n[log]\nlevel = "warning"\n'
        f"[sql]\nenabled = {str(enabled).lower()}\n"
    )
    command = [sys.executable, "-m", "proxy.main", "serve", "--config", str(settings)]
    with subprocess.Popen(command) as process:
        try:
            wait_for_port(port)
            yield Running(port, _worker_of(process.pid))
        finally:
            process.terminate()


def _worker_of(supervisor: int) -> int:
    """Return the process id of the proxy's one worker, which may be about to start."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        found = [int(pid) for pid in children if b"_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if found:
            return found[0]
        time.sleep(0.1)
    raise RuntimeError(f"no worker below process {supervisor}")


def cpu_ns(pid: int) -> int:
    """Return the nanoseconds that a process has spent on a processor, all its threads together."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads)


def measure(
    server: EmbeddedPostgres, running: Running, mode: str, clients: int, seconds: int
) -> tuple[float, float]:
    """Return transactions per second, and microseconds of the worker's CPU for one, of one run."""
    command = [str(server.bin("pgbench")), "-n", "-S", "-M", mode, "-c", str(clients), "-j", "1"]
    command += ["-T", str(seconds), "-h", "127.0.0.1", "-p", str(running.port)]
    command += ["-U", server.user, "postgres"]
    before = cpu_ns(running.worker)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    spent = cpu_ns(running.worker) - before
    tps, count = TPS.search(done.stdout), _DONE.search(done.stdout)
    assert tps is not None, done.stdout
    assert count is not None, done.stdout
    return float(tps.group(1)), spent / 1e3 / int(count.group(1))


def interval(values: list[float]) -> tuple[float, float]:
    """Return bounds that hold the true median with a probability of at least 95 %: order statistics."""
    ordered, n = sorted(values), len(values)
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.comb(n, k) / 2.0**n
        if tail > 0.025:
            break
        k += 1
    return ordered[max(0, k - 1)], ordered[min(n - 1, n - k)]


Rounds = dict[str, list[dict[str, tuple[float, float]]]]
"""By mode: of each round, by proxy, transactions per second and microseconds of CPU for one."""


def measured(options: argparse.Namespace) -> Rounds:
    """Run the rounds."""
    found: Rounds = {mode: [] for mode in options.modes.split(",")}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ruvector-bench-")))
        settings = {**FAST_SETTINGS, "shared_buffers": "256MB"}
        server = stack.enter_context(EmbeddedPostgres(settings=settings, listen=True))
        init = [str(server.bin("pgbench")), "-i", "-q", "-s", "5", "-h", server.host, "-p", str(server.port)]
        subprocess.run([*init, "-U", server.user, "postgres"], check=True, capture_output=True)
        running = {
            side: stack.enter_context(proxy(server, directory / side, enabled=side == "on"))
            for side in MEASURED
        }
        for mode in found:  # caches fill, and the learner has seen the server
            for side in MEASURED:
                measure(server, running[side], mode, options.clients, 1)
        with Progress(console=Console(stderr=True)) as progress:
            task = progress.add_task("pgbench -S", total=options.rounds * len(found))
            for number in range(options.rounds):
                for mode, rounds in found.items():
                    turn = number % len(MEASURED)
                    order = MEASURED[turn:] + MEASURED[:turn]
                    seconds = options.seconds
                    figures = {s: measure(server, running[s], mode, options.clients, seconds) for s in order}
                    rounds.append(figures)
                    progress.advance(task)
    return found


# -- counted -------------------------------------------------------------------------------------------------


def _message(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack("!I", len(body) + 4) + body


_READY = _message(b"Z", b"I")
_GREETING = _message(b"R", b"\0\0\0\0") + _READY
_COLUMN = b"\0\x01abalance\0" + struct.pack("!IhIhih", 16384, 3, 23, 4, -1, 0)
_ROW = _message(b"T", _COLUMN) + _message(b"D", b"\0\x01\0\0\0\x010") + _message(b"C", b"SELECT 1\0")


def conversation(mode: str, number: int) -> tuple[bytes, bytes]:
    """Return what pgbench sends for one statement, and what the server answers."""
    aid = str(100_000 + number % 500_000).encode()
    if mode == "simple":
        return _message(b"Q", _QUERY.format(aid.decode()).encode() + b"\0"), _ROW + _READY
    text = _QUERY.format("$1").encode() + b"\0"
    name = b"P0_1\0" if mode == "prepared" else b"\0"
    parse = _message(b"P", name + text + b"\0\0")
    bind = _message(b"B", b"\0" + name + b"\0\0\0\x01" + struct.pack("!I", len(aid)) + aid + b"\0\x01\0\0")
    rest = _message(b"D", b"P\0") + _message(b"E", b"\0\0\0\0\0") + _message(b"S", b"")
    done = _message(b"2", b"") + _ROW + _READY
    if mode == "extended":
        return parse + bind + rest, _message(b"1", b"") + done
    return bind + rest, done


def converse(mode: str, side: str, count: int) -> None:
    """Put a conversation of `count` statements through a session."""
    interface = Interface(enabled=side == "on", reads_settings=side == "on")
    session = Session(Adapter(Counters(), interface=interface), {"user": "postgres"})
    session.from_server(_GREETING)
    if mode == "prepared":
        session.from_client(_message(b"P", b"P0_1\0" + _QUERY.format("$1").encode() + b"\0\0\0"))
        session.from_client(_message(b"S", b""))
        session.from_server(_message(b"1", b"") + _READY)
    exchange = [conversation(mode, number) for number in range(100)]
    for number in range(count):
        asked, answered = exchange[number % 100]
        session.from_client(asked)
        session.from_server(answered)


def bytecodes(mode: str, side: str, count: int) -> int:
    """Return how many bytecodes the interpreter executes for a conversation."""
    executed = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal executed
        executed += event == "opcode"
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        return local

    sys.settrace(trace)
    try:
        converse(mode, side, count)
    finally:
        sys.settrace(None)
    return executed


def instructions(mode: str, side: str, count: int) -> int:
    """Return how many machine instructions a process executes in which a conversation takes place."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    command += ["-m", "bench.sql_interface", "--converse", f"{mode},{side},{count}"]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = _INSTRUCTIONS.search(done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"valgrind failed: {done.stderr[-2000:]}")
    return int(found.group(1))


class Counted(NamedTuple):
    """Of one mode and side, for one statement; `machine` is None without valgrind."""

    bytecodes: float
    machine: float | None


def counted(modes: list[str], *, valgrind: bool) -> dict[tuple[str, str], Counted]:
    """Count for every mode and side: the difference of a long and a short conversation, per statement."""
    short, long = 100, 1100
    found = {}
    for mode in modes:
        for side in SIDES:
            executed = (bytecodes(mode, side, long) - bytecodes(mode, side, short)) / (long - short)
            machine = None
            if valgrind:
                more, few = instructions(mode, side, 10 * long), instructions(mode, side, 10 * short)
                machine = (more - few) / (10 * (long - short))
            found[mode, side] = Counted(executed, machine)
    return found


# -- reports -------------------------------------------------------------------------------------------------


def report_measured(rounds: Rounds, clients: int) -> None:
    """Print the ratios of the rounds."""
    table = Table(
        title=f"pgbench -S, {clients} clients: ratio of each of {max(map(len, rounds.values()))} rounds"
    )
    for heading in ("mode", "figure", "ratio", "median", "of", "95 %", "least", "most"):
        table.add_column(heading, justify="left" if heading in ("mode", "figure", "ratio") else "right")
    for mode, found in rounds.items():
        for place, name in enumerate(("tps", "CPU / stmt, us")):
            for side in ("on", "control"):
                ratios = [one[side][place] / one["off"][place] for one in found]
                low, high = interval(ratios)
                typical = " / ".join(
                    f"{statistics.median(one[s][place] for one in found):.5g}" for s in (side, "off")
                )
                spread = (f"{low:.3f} - {high:.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}")
                table.add_row(
                    mode, name, f"{side} / off", f"{statistics.median(ratios):.3f}", typical, *spread
                )
    Console(width=120).print(table)


def report_counted(found: dict[tuple[str, str], Counted]) -> None:
    """Print the counts."""
    table = Table(title="one statement through a session: counted, not measured")
    for heading in ("mode", "figure", "on", "off", "ratio"):
        table.add_column(heading, justify="left" if heading in ("mode", "figure") else "right")
    for mode in dict.fromkeys(mode for mode, _ in found):
        on, off = found[mode, "on"], found[mode, "off"]
        figures = (f"{on.bytecodes:.1f}", f"{off.bytecodes:.1f}", f"{on.bytecodes / off.bytecodes:.4f}")
        table.add_row(mode, "bytecodes", *figures)
        if on.machine is not None and off.machine is not None:
            figures = (f"{on.machine:.0f}", f"{off.machine:.0f}", f"{on.machine / off.machine:.4f}")
            table.add_row(mode, "machine instructions", *figures)
    Console(width=120).print(table)


def main() -> int:
    """Run the benchmark and print its tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=40)
    arguments.add_argument("--seconds", type=int, default=1, help="of each run")
    arguments.add_argument("--modes", default=",".join(MODES))
    arguments.add_argument("--clients", type=int, default=8)
    arguments.add_argument("--json", type=Path, help="where to write the figures")
    arguments.add_argument("--no-valgrind", dest="valgrind", action="store_false")
    arguments.add_argument("--converse", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.converse:
        mode, side, count = options.converse.split(",")
        converse(mode, side, int(count))
        return 0
    valgrind = options.valgrind and which("valgrind") is not None
    exact = counted(options.modes.split(","), valgrind=valgrind)
    report_counted(exact)
    if not options.rounds:
        return 0
    rounds = measured(options)
    report_measured(rounds, options.clients)
    print(f"load average at the end: {', '.join(f'{load:.1f}' for load in os.getloadavg())}, {time.ctime()}")
    if options.json:
        counts = [{"mode": mode, "side": side, **one._asdict()} for (mode, side), one in exact.items()]
        options.json.write_text(json.dumps({"counted": counts, "rounds": rounds}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
