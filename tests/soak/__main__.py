"""Run it: ``python -m tests.soak [--seconds N | --queries N] [--clients N] [--seed N] [--write docs/soak.md]``.

Every client exists twice, with the same seeded course of work: direct and through the proxy.  The courses run side
by side, and each step's messages have to be the same.  Meanwhile the proxy's memory, sockets, tasks and files are
read; they have to be flat once the first tenth of the time is over.  Exit status 1 where anything differs or grows.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from proxy.version import version
from tests.chaos.load import sqlstate
from tests.chaos.world import World, world
from tests.soak.work import Course

PROXYS_OWN = ("08006", "08P01", "57P03", "53300", "53200", "54000", "XX000")
"""SQLSTATEs that the proxy makes itself; the courses give the server no reason for them."""

_SLOW = "is unreachable: no answer in time"
"""A check of the server at the start took more than two seconds: the machine is busy, and nobody is harmed."""

GROWTH = 1.10
"""Of a process's memory from the median after the warm-up to that at the end; and 8 MB for chance."""


@dataclass
class Tally:
    """What all clients have done and seen."""

    queries: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)
    made_by_proxy: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Reading:
    """The proxy at one moment: by process, memory in bytes and open files; connections that it counts.

    `state`: the bytes of its state directory.
    """

    at: float
    memory: dict[str, int]
    files: dict[str, int]
    threads: dict[str, int]
    open_connections: float
    state: int


def read(found: World, since: float) -> Reading:
    """Read the proxy's processes."""
    assert found.process is not None
    pids = {"supervisor": found.process.pid} | {
        name: found.pid(name) for name in ("worker 1", "worker 2", "learner")
    }

    def status(pid: int, key: str) -> int:
        line = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(line[1]) if line else 0

    return Reading(
        time.monotonic() - since,
        {name: 1024 * status(pid, "VmRSS") for name, pid in pids.items()},
        {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()},
        {name: status(pid, "Threads") for name, pid in pids.items()},
        found.metric("ruvector_connections_open"),
        sum(path.stat().st_size for path in found.state.rglob("*") if path.is_file()),
    )


def work(
    found: World, number: int, seed: int, tally: Tally, began: float, seconds: float, queries: int
) -> None:
    """Run one client's course on both roads, step by step; what is wrong is told at once."""

    def moment() -> str:
        return f"after {time.monotonic() - began:.0f} s, client {number}"

    try:
        vectors = sorted(found.truth)
        direct = Course(("127.0.0.1", found.server.port), number, "d", seed, vectors)
        proxied = Course(("127.0.0.1", found.port), number, "p", seed, vectors)
        while time.monotonic() < began + seconds and tally.queries < queries:
            before = proxied.queries
            name, expected = direct.step()
            _, came = proxied.step()
            codes = [sqlstate(body) for tag, body in came if tag == "E"]
            with tally.lock:
                tally.queries += proxied.queries - before
                tally.steps[name] += 1
                tally.made_by_proxy.update(code for code in codes if code in PROXYS_OWN)
                if came != expected:
                    tally.differences.append(f"{moment()}, {name}: {came[:4]!r} instead of {expected[:4]!r}")
                    print(tally.differences[-1], flush=True)
        direct.end()
        proxied.end()
    except Exception as error:
        with tally.lock:
            tally.broken.append(f"{moment()}: {type(error).__name__} {error}")
            print(tally.broken[-1], flush=True)


def soak(seconds: float, queries: int, clients: int, seed: int) -> tuple[Tally, list[Reading], list[str]]:
    """Run it; return what was done, the readings, and what is wrong."""
    tally, readings = Tally(), []
    with world(seed, 0) as found:
        began = time.monotonic()
        pids = [found.pid(name) for name in ("worker 1", "worker 2", "learner")]
        threads = [
            threading.Thread(target=work, args=(found, number, seed, tally, began, seconds, queries))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        told = began
        while any(thread.is_alive() for thread in threads):
            with contextlib.suppress(OSError):  # a process that has ended is found out below
                readings.append(read(found, began))
            if time.monotonic() - told > 60:
                told = time.monotonic()
                print(
                    f"{told - began:.0f} s: {tally.queries} queries, {dict(readings[-1].memory)}", flush=True
                )
            time.sleep(max(0.5, min(5.0, seconds / 100)))
        wrong = [*tally.differences[:5], *tally.broken]
        if tally.made_by_proxy:
            wrong.append(f"errors made by the proxy: {dict(tally.made_by_proxy)}")
        if pids != [found.pid(name) for name in ("worker 1", "worker 2", "learner")]:
            wrong.append("a process of the proxy has ended and was started again")
        wrong += left_over(found, readings[0]) + grown(readings)
        wrong += [line for line in found.log.splitlines() if " ERROR " in line and _SLOW not in line][:5]
    return tally, readings, wrong


def left_over(found: World, first: Reading) -> list[str]:
    """Say what is left of the clients a moment after they have gone."""
    deadline = time.monotonic() + 60
    while True:
        last = read(found, 0.0)
        extra = {name: count - first.files[name] for name, count in last.files.items() if name != "learner"}
        if not last.open_connections and all(count <= 6 for count in extra.values()):
            return []
        if time.monotonic() > deadline:
            return [
                f"left over: {last.open_connections:g} connections, open files more than at first: {extra}"
            ]
        time.sleep(0.5)


def grown(readings: list[Reading]) -> list[str]:
    """Say which processes take more memory or threads in the end than after the warm-up."""
    if len(readings) < 30:
        return []
    tenth = len(readings) // 10
    found = []
    for name in readings[0].memory:
        before = median([each.memory[name] for each in readings[tenth : 3 * tenth]])
        after = median([each.memory[name] for each in readings[-2 * tenth :]])
        if after > GROWTH * before + 8e6:
            found.append(f"{name} grew from {before / 1e6:.1f} to {after / 1e6:.1f} MB")
        threads = [each.threads[name] for each in readings]
        if max(threads[-2 * tenth :]) > max(threads[: 3 * tenth]) + 2:
            found.append(f"{name} has {threads[-1]} threads, {max(threads[: 3 * tenth])} before")
    return found


def median(values: list[int]) -> float:
    """Return the middle one."""
    return float(sorted(values)[len(values) // 2])


def page(
    tally: Tally, readings: list[Reading], wrong: list[str], seed: int, clients: int, seconds: float
) -> str:
    """Return docs/soak.md."""
    steps = "\n".join(f"| {name} | {count:,} |" for name, count in sorted(tally.steps.items()))
    tenth = max(1, len(readings) // 10)
    names = list(readings[0].memory)
    samples = [readings[min(len(readings) - 1, n * tenth)] for n in range(11)]
    rows = "\n".join(
        f"| {each.at:.0f} s | "
        + " | ".join(f"{each.memory[name] / 1e6:.1f} MB, {each.files[name]}" for name in names)
        + f" | {each.open_connections:g} | {each.state / 1e6:.1f} MB |"
        for each in samples
    )
    return _PAGE.format(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        version=version(),
        seed=seed,
        clients=clients,
        seconds=seconds,
        queries=tally.queries,
        rate=tally.queries / seconds,
        differences=len(tally.differences),
        errors=sum(tally.made_by_proxy.values()),
        broken=len(tally.broken),
        wrong="\n".join(f"- {each}" for each in wrong) or "Nothing was found wrong.",
        steps=steps,
        names=" | ".join(names),
        rule="|".join("---" for _ in names),
        rows=rows,
    )


_PAGE = """\
# Soak

<!-- Written by "make soak"; do not change it by hand. -->

Mixed load for a long time: {clients} clients, each twice, direct and through a proxy with two workers and a learner
that measures meanwhile. Both do the same seeded course of work, and every message that comes back has to be the
same. Connections come, go and vanish all the time.

Run of {date}, version {version}, seed {seed}, {seconds:.0f} s: **{queries:,} queries through the proxy ({rate:.0f} a second, and as many direct), {differences}
answers that differ from the direct ones, {errors} errors made by the proxy, {broken} broken connections.**

{wrong}

| step | times |
|---|---|
{steps}

Memory and open files of each process, client connections that are open, and what the state directory holds:

| after | {names} | connections | state |
|---|{rule}|---|---|
{rows}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--queries", type=int, default=1 << 60, help="end when so many were sent")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path, help="the page to write")
    options = parser.parse_args()
    began = time.monotonic()
    tally, readings, wrong = soak(options.seconds, options.queries, options.clients, options.seed)
    took = time.monotonic() - began
    print(
        f"{tally.queries:,} queries in {took:.0f} s; {len(tally.differences)} differ; wrong: {wrong or 'nothing'}"
    )
    if options.write:
        text = page(tally, readings, wrong, options.seed, options.clients, took)
        options.write.write_text(text, encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
