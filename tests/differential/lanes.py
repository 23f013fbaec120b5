"""Many random scripts: shared among a few processes, each with a database and proxies of its own."""

from __future__ import annotations

import multiprocessing
import queue
import time
import traceback
from collections import Counter
from functools import partial
from typing import TypeAlias

from tests.differential.comparison import difference, differences, differs, shrink
from tests.differential.generator import Generator
from tests.differential.world import Server, world

Reports: TypeAlias = "multiprocessing.Queue[str | Counter[str]]"

_PROGRESS = 250  # scripts of a lane between two reports


def run(server: Server, seeds: range, jobs: int, stop_after: int, *, control: bool = False) -> int:
    """Play the scripts of all seeds; print every difference, shrunk.  Return how many differed.

    `control` leaves the proxy out: see `forwarder`.
    """
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    reports: Reports = spawn.Queue()
    lanes = [
        spawn.Process(target=lane, args=(server, n, seeds[n::jobs], reports, control)) for n in range(jobs)
    ]
    for process in lanes:
        process.start()
    done: Counter[str] = Counter()
    failures = finished = 0
    while finished < len(lanes) and failures < stop_after:
        try:
            report = reports.get(timeout=5)
        except queue.Empty:
            finished = sum(not process.is_alive() for process in lanes)
            continue
        if isinstance(report, str):
            failures += 1
            print(report, flush=True)
        else:
            done += report
            finished = done["lanes"]
            print(f"{done['scripts']} scripts, {time.monotonic() - started:.0f} s", flush=True)
    for process in lanes:
        if failures >= stop_after:
            process.terminate()
        process.join()
        failures += process.exitcode not in (0, -15)
    print(f"{failures} failures, {time.monotonic() - started:.0f} s; {dict(done)}")
    return failures


def lane(server: Server, number: int, seeds: range, reports: Reports, control: bool) -> None:
    """Play the scripts of some seeds in a database of one's own."""
    done: Counter[str] = Counter()
    try:
        with world(server, f"lane_{number}", control=control) as there:
            for seed in seeds:
                script = Generator(seed).script()
                for way, found in differences(there, script).items():
                    shrunk = shrink(script, partial(differs, there, way))
                    again = difference(there, shrunk, way)
                    reports.put(
                        f"== seed {seed}, {way}: {found}\n-- shrunk to\n{shrunk}-- which gives: {again}"
                    )
                done["scripts"] += 1
                if done["scripts"] == _PROGRESS:
                    reports.put(done)
                    done = Counter()
            done["adapted, normal"] = sum(there.normal.counters.adapted.values())
            done["adapted, forced"] = sum(there.forced.counters.adapted.values())
            done["refused"] = there.normal.counters.injection_errors + there.forced.counters.injection_errors
    except Exception:
        reports.put(traceback.format_exc())
    done["lanes"] = 1
    reports.put(done)
