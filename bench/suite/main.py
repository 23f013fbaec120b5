"""``make bench``: all scenarios one after the other, unattended.

A scenario that fails, or takes longer than it may, is reported as failed, the others go on, and the exit code
is one.  What was measured does not change the exit code: a claim that falls short is a result.  Tables and
indexes are kept in ``.bench/`` for the next run.  A complete run writes ``bench/results/`` and
docs/benchmarks.md, a run of some scenarios ``.bench/results/``, a rehearsal nothing, unless it is said where.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import asyncpg
from rich.console import Console

from bench.demo.database import data_directory
from bench.demo.proxy import Upstream
from bench.embedded import EmbeddedPostgres
from bench.suite import compare, loaders, plots, report
from bench.suite.records import Report, Result, rounded
from bench.suite.scenarios import SCENARIOS
from bench.suite.stage import FULL, QUICK, Stage, processors

HOME = Path(".bench")
RESULTS = Path(__file__).parents[1] / "results"
DATABASE = "bench"
SETTINGS = {
    "shared_buffers": "1GB",
    "maintenance_work_mem": "1GB",
    "max_wal_size": "4GB",
    "max_parallel_workers_per_gather": "0",
}
"""All tables fit into the memory: disks are not what is compared.  A query uses one processor."""


async def run(stage: Stage, names: Sequence[str], directory: Path | None) -> Report:
    """Run scenarios; write what is known after each of them."""
    found = Report(await environment(stage), [])
    started = time.monotonic()
    for name in names:
        begun = time.monotonic()
        stage.begin(name)
        results = await _one(stage, name, directory)
        for result in results:
            result.seconds = (time.monotonic() - begun) / len(results)
        found.results += results
        found.seconds = time.monotonic() - started
        for result in results:
            report.tell(result, stage.console)
        if directory is not None:
            await asyncio.to_thread(write, found, directory, pictures=False)
    stage.begin("")
    return found


async def _one(stage: Stage, name: str, directory: Path | None) -> list[Result]:
    """Run one scenario and draw it; whatever goes wrong in it becomes its record."""
    try:
        async with stage.deadline(stage.scale.limit):
            found = rounded(Report({}, await SCENARIOS[name](stage))).results
            if directory is not None:
                await asyncio.to_thread(draw, found, directory)
            return found
    except TimeoutError:
        error = f"took longer than the {stage.scale.limit:.0f} s that it may"
    except Exception as exception:  # a scenario must not end the run
        error = f"{type(exception).__name__}: {exception}"
    stage.say(f"FAILED: {error}")
    try:
        await asyncio.to_thread(stage.revive)
    except Exception as exception:
        error += f"; and the server did not come back: {exception}"
    return [Result(name, name, "", error=error)]


def write(found: Report, directory: Path, *, pictures: bool = True) -> None:
    """Write JSON, Markdown and, unless they are there, pictures."""
    directory.mkdir(parents=True, exist_ok=True)
    found.save(directory / "results.json")
    if pictures:
        draw(found.results, directory)
    (directory / "results.md").write_text(report.markdown(found))


def draw(results: Sequence[Result], directory: Path) -> None:
    """Draw a picture of each result that has something to draw."""
    directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        if result.panels:
            plots.draw(result, directory / report.picture(result))


async def environment(stage: Stage) -> dict[str, str]:
    """Return versions and machine."""
    async with stage.connection() as connection:
        server = await connection.fetchval("SELECT current_setting('server_version')")
        vector = await connection.fetchval(
            "SELECT default_version FROM pg_available_extensions WHERE name = 'vector'"
        )
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "data": stage.data.fingerprint,
        "rows": f"{len(stage.data.base):,}",
        "dimensions": str(stage.data.dimensions),
        "PostgreSQL": str(server),
        "pgvector": str(vector),
        "Python": platform.python_version(),
        "processors": str(processors()),
        "processor": _processor(),
        "load at the begin": load,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


async def _create_database(server: EmbeddedPostgres) -> None:
    admin = await asyncpg.connect(host=server.host, port=server.port, user=server.user, database="postgres")
    try:
        if not await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
            await admin.execute(f"CREATE DATABASE {DATABASE}")
    finally:
        await admin.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    options = _parse(arguments)
    if options.compare:
        return compare.main(*options.compare)
    if options.docs or options.redraw:
        known = Report.load((options.results or RESULTS) / "results.json")
        if options.redraw:
            write(known, options.results or RESULTS)
        if options.docs:
            report.write_page(known)
        return 0
    console = Console(width=150, soft_wrap=True)
    options.home.mkdir(parents=True, exist_ok=True)
    data = loaders.dataset_of(options.data, limit=QUICK.small * 2 if options.quick else None)
    scale = QUICK if options.quick else FULL
    if options.limit is not None:
        scale = replace(scale, limit=options.limit)
    complete = not options.quick and options.data is None and options.only == list(SCENARIOS)
    directory = options.results or (
        RESULTS if complete else None if options.quick else options.home / "results"
    )
    try:
        with EmbeddedPostgres(data_directory(options.home), settings=SETTINGS) as server:
            asyncio.run(_create_database(server))
            stage = Stage(
                Upstream.of(server, DATABASE),
                data,
                options.home,
                scale,
                console,
                server,
            )
            found = asyncio.run(run(stage, options.only, directory))
    except KeyboardInterrupt:
        console.print("Stopped; nothing is left running, and what was measured so far is written.")
        return 130
    failed = [result.scenario for result in found.results if result.error]
    report.tell_verdicts(found, console)
    if directory is not None:
        console.print(f"Written to {directory}.")
    if directory == RESULTS:
        report.write_page(found)
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="bold red")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description="The benchmark suite.")
    parser.add_argument("--only", default="", help=f"of {', '.join(SCENARIOS)}; separated by commas")
    parser.add_argument("--quick", action="store_true", help="a rehearsal; its figures mean nothing")
    parser.add_argument("--limit", type=float, help="seconds after which a scenario is given up")
    parser.add_argument("--data", type=Path, help=f"own vectors: {loaders.FORMATS}")
    parser.add_argument("--home", type=Path, default=HOME, help="where the server's data is kept")
    parser.add_argument("--results", type=Path, help="where results are written, or read for --docs")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md from the results")
    parser.add_argument(
        "--redraw", action="store_true", help="write tables and pictures anew from results.json"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="JSON", help="do two runs give the same verdicts?"
    )
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name] or list(SCENARIOS)
    unknown = [name for name in options.only if name not in SCENARIOS]
    if unknown:
        parser.error(f"unknown scenarios: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    return options
