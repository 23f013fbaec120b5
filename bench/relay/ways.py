"""The ways to the server: direct, pgbouncer, the proxy with one worker and with two; and what each one takes.

All listen on loopback TCP.  Processor time and memory of a hop are those of the processes that carry traffic:
pgbouncer, or the proxy's workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.embedded import free_port
from bench.guard import Guard
from bench.pooler import wait_for_port

_START_SECONDS = 60.0


@dataclass(frozen=True)
class Way:
    """One way to the server; `processes` are those that carry its traffic, none for direct."""

    name: str
    port: int
    processes: tuple[int, ...] = ()
    learner: int | None = None  # process id
    admin_port: int = 0

    def cpu(self) -> float:
        """Return the processor time that the hop has taken so far, in seconds."""
        return sum(cpu_seconds(pid) for pid in self.processes)

    def memory(self) -> int:
        """Return the hop's own memory (unique set size), in bytes: what would be free without it."""
        return sum(unique_memory(pid) for pid in self.processes)


def cpu_seconds(pid: int) -> float:
    """Return what all threads of a process have spent on a processor, in seconds."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) * 1e-9


def cpu_seconds_of_family(pid: int) -> float:
    """Return the processor time of a process, of its children that live, and of those that have ended."""
    while True:  # a child that is waited for meanwhile would be counted in neither place
        known, ended = children(pid), _cpu_seconds_ended(pid)
        total = ended + cpu_seconds(pid)
        for child in known:
            with suppress(OSError):  # ended meanwhile
                total += cpu_seconds(child)
        if (children(pid).keys(), _cpu_seconds_ended(pid)) == (known.keys(), ended):
            return total


def _cpu_seconds_ended(pid: int) -> float:
    """Return the processor time of a process's children that have ended and were waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime


def unique_memory(pid: int) -> int:
    """Return the bytes that a process shares with no other (USS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(
        int(line.split()[1]) * 1024
        for line in text.splitlines()
        if line.startswith(("Private_Clean:", "Private_Dirty:"))
    )


def children(pid: int) -> dict[int, str]:
    """Return the children of a process: process id to command line."""
    found = {}
    for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
        found[int(number)] = b" ".join(words).decode(errors="replace")
    return found


@contextmanager
def proxy(
    name: str, upstream: str, port: int, directory: Path, *, workers: int = 1, more: str = ""
) -> Iterator[Way]:
    """Run ``ruvector-proxy serve`` before the server at `upstream`, `port`; `more` is TOML for a learner."""
    own, admin = free_port(), free_port()
    directory.mkdir(parents=True, exist_ok=True)
    settings = directory / "proxy.toml"
    settings.write_text(
        f'[listen]\nport = {own}\n[upstream]\nhost = "{upstream}"\nport = {port}\nsslmode = "disable"\n'
        f'[admin]\nport = {admin}\n[workers]\ncount = {workers}\n[store]\npath = "{directory / "state"}"\n'
        f'[log]\nlevel = "warning"\n{more}'
    )
    command = [sys.executable, "-m", "proxy.main", "serve", "--config", str(settings)]
    with subprocess.Popen(command) as process:
        guard = Guard(process.pid, "TERM")
        try:
            pids, learner = _wait_for_children(process.pid, workers, "_learner" if more else None)
            wait_for_port(own)
            yield Way(name, own, pids, learner, admin)
        finally:
            guard.release()
            process.terminate()


def _wait_for_children(pid: int, workers: int, learner: str | None) -> tuple[tuple[int, ...], int | None]:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        known = children(pid)
        found = tuple(number for number, line in known.items() if line.endswith("_worker"))
        learners = [number for number, line in known.items() if line.endswith("_learner")]
        if len(found) == workers and (learner is None or learners):
            return found, learners[0] if learners else None
        time.sleep(0.05)
    raise TimeoutError(f"the proxy's workers are not up after {_START_SECONDS:g} s")


@contextmanager
def cpu_share(ways: list[Way], share: float) -> Iterator[Callable[[], bool]]:
    """Give each process of the hops the same `share` of one processor, by a control group each.

    Yields a function that tells whether that is possible here: it needs Linux's cgroup v1 or v2 with the cpu
    controller, and the right to make groups.
    """
    groups: list[tuple[Path, int]] = []
    period = 10_000  # microseconds
    possible = True
    try:
        for pid in (pid for way in ways for pid in way.processes):
            group = _cgroup_root() / f"ruvector-bench-{pid}"
            groups.append((group, pid))
            group.mkdir()
            quota = str(int(period * share))
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(quota)
            else:
                (group / "cpu.max").write_text(f"{quota} {period}")
            (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        possible = False
    try:
        yield lambda: possible
    finally:
        for group, pid in groups:
            try:
                (group.parent / "cgroup.procs").write_text(str(pid))
                group.rmdir()
            except OSError:
                pass


def _cgroup_root() -> Path:
    version_1 = Path("/sys/fs/cgroup/cpu")
    return version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
