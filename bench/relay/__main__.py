"""``make bench-proxy``: everything that docs/performance.md shows, in one run of about a quarter of an hour.

python -m bench.relay                      all of it
python -m bench.relay --quick              the same in about four minutes; its figures mean less
python -m bench.relay --only ordinary      one or several parts, comma-separated
python -m bench.relay --docs               and put tables and picture into docs/
python -m bench.relay --from FILE --docs   the same from an earlier run's figures
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from bench.pooler import pgbouncer
from bench.relay import bulk, idle, ordinary, report, vectors
from bench.relay.forwarder import forwarder
from bench.relay.results import DIRECT, PGBOUNCER, PROXY, TWO_WORKERS, Results
from bench.relay.ways import Way, proxy

PARTS = ("ordinary", "workers", "bulk", "storm", "vectors", "idle")
HOME = Path("bench-results")


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int = 5
    traffic_rounds: int = 4  # of pgbench, whose combinations are many
    seconds: int = 2  # of each run of pgbench
    connections: int = 800  # of a storm
    rows: int = 20_000
    large_rows: int = 8_000  # of 1536 dimensions
    learning_seconds: float = 150.0
    queries: int = 500  # a round
    idle: int = idle.WANTED


QUICK = Scale(2, 2, 1, 160, 6_000, 3_000, 90.0, 200, 2_000)

Step = Callable[[str, int, Callable[[Callable[[], None]], None]], None]
"""Runs a part: its title, its number of steps, and what does it, given a function to call after each."""


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a rehearsal")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--from", dest="earlier", type=Path, help="report the figures of an earlier run")
    parser.add_argument("--json", type=Path, default=HOME / "proxy.json", help="where the figures go")
    parser.add_argument("--docs", action="store_true", help="write tables and picture into docs/ as well")
    options = parser.parse_args()
    parts = options.only.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.earlier:
        results = Results.load(options.earlier)
    else:
        scale = QUICK if options.quick else Scale()
        results = Results(facts=_facts(scale))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        try:
            measure(parts, scale, results)
        finally:
            results.save(options.json)  # what there is, if something fails
    text = report.markdown(results)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    if options.docs:
        report.write(results, text, Path("docs"))
    return 0


def measure(parts: list[str], scale: Scale, results: Results) -> None:
    """Start everything, measure the parts, stop everything."""
    start = time.monotonic()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def step(title: str, steps: int, do: Callable[[Callable[[], None]], None]) -> None:
            task = progress.add_task(title, total=steps)
            do(lambda: progress.advance(task))
            progress.update(task, completed=steps)
            progress.stop_task(task)

        if "idle" in parts:
            step("idle connections", 1, lambda _: _idle(scale, results))
        if set(parts) - {"idle"}:
            settings = {
                **FAST_SETTINGS,
                "max_connections": "400",
                "shared_buffers": "512MB",
                "maintenance_work_mem": "512MB",
                "max_wal_size": "4GB",
            }
            with EmbeddedPostgres(settings=settings, listen=True) as server:
                ordinary.fill(server)
                if set(parts) - {"vectors", "idle"}:
                    _traffic(server, parts, scale, results, step)
                if "vectors" in parts:
                    _vectors(server, scale, results, step)
    results.facts["minutes"] = f"{(time.monotonic() - start) / 60:.1f}"


@contextmanager
def _hops(server: EmbeddedPostgres, directory: Path, *, two: bool) -> Iterator[list[Way]]:
    """Yield the ways to the server; the proxy's learner runs, as it would."""
    learner = f'[learner]\ndsn = "{server.uri()}"\n'
    with ExitStack() as stack:
        ways = [Way(DIRECT, server.port)]
        pooler = stack.enter_context(pgbouncer(server, directory, "session"))
        if pooler is not None:
            ways.append(Way(PGBOUNCER, pooler.port, (pooler.pid,)))
        start = [(PROXY, 1), (TWO_WORKERS, 2)] if two else [(PROXY, 1)]
        for name, workers in start:
            own = directory / f"proxy-{workers}"
            with_learner = proxy(name, "127.0.0.1", server.port, own, workers=workers, more=learner)
            ways.append(stack.enter_context(with_learner))
        yield ways


def _traffic(server: EmbeddedPostgres, parts: list[str], scale: Scale, results: Results, step: Step) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ruvector-bench-") as name,
        _hops(server, Path(name), two=True) as ways,
    ):
        rounds, seconds = scale.rounds, scale.seconds
        one = [way for way in ways if way.name != TWO_WORKERS]
        if "ordinary" in parts:
            steps = scale.traffic_rounds * len(ordinary.MODES) * len(ordinary.CLIENTS)
            step(
                ordinary.GROUP,
                steps,
                lambda advance: ordinary.run(
                    server, ways, results, rounds=scale.traffic_rounds, seconds=seconds, advance=advance
                ),
            )
        if "workers" in parts:
            step(
                ordinary.SCALING,
                rounds,
                lambda advance: ordinary.scale(
                    server, ways, results, rounds=rounds, seconds=seconds, advance=advance
                ),
            )
        if "bulk" in parts:
            bulk.fill(server)
            step(
                bulk.GROUP,
                rounds,
                lambda advance: bulk.run(server, one, results, rounds=rounds, advance=advance),
            )
        if "storm" in parts:
            step(
                bulk.STORM,
                rounds,
                lambda advance: bulk.storm(
                    server, one, results, rounds=rounds, connections=scale.connections, advance=advance
                ),
            )


def _vectors(server: EmbeddedPostgres, scale: Scale, results: Results, step: Step) -> None:
    user, rounds, count = server.user, scale.rounds, scale.queries
    queries = vectors.fill(server, scale.rows, scale.large_rows)
    learner = (
        f'[learner]\ndsn = "{server.uri()}"\nstarting_credit = {10 * scale.learning_seconds:g}\n'
        "budget = 0.5\n"
    )
    with tempfile.TemporaryDirectory(prefix="ruvector-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        ways = [Way(DIRECT, server.port)]
        pooler = stack.enter_context(pgbouncer(server, directory, "session"))
        if pooler is not None:
            ways.append(Way(PGBOUNCER, pooler.port, (pooler.pid,)))
        ways.append(stack.enter_context(forwarder(server.port)))
        plain = proxy(vectors.NOT_ADAPTED, "127.0.0.1", server.port, directory / "plain")
        ways.append(stack.enter_context(plain))
        adapting = stack.enter_context(
            proxy(PROXY, "127.0.0.1", server.port, directory / "adapting", more=learner)
        )
        learned: list[vectors.Learned] = []
        step(
            "learning",
            1,
            lambda _: learned.append(vectors.learn(adapting, user, queries, scale.learning_seconds)),
        )
        results.facts["learned for"] = f"{learned[0].seconds:.0f} s"
        held_out = learned[0].queries
        step(
            vectors.GROUP,
            4 * rounds,
            lambda advance: vectors.run(
                user, ways, adapting, held_out, results, rounds=rounds, count=count, advance=advance
            ),
        )
        step(
            vectors.LEARNER,
            rounds,
            lambda advance: vectors.with_learner(
                user, ways[0], adapting, held_out, results, rounds=rounds, count=count, advance=advance
            ),
        )


def _idle(scale: Scale, results: Results) -> None:
    size = min(scale.idle, idle.allow_files())
    if size < scale.idle:
        results.facts["idle connections"] = f"{size:,}: a process may have no more open files here"
    with (
        idle.stub() as port,
        tempfile.TemporaryDirectory(prefix="ruvector-bench-") as name,
        proxy(PROXY, "127.0.0.1", port, Path(name)) as way,
    ):
        idle.measure(way, size, results)


def _facts(scale: Scale) -> dict[str, str]:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores of {model}, Linux {platform.release()}",
        "Python": platform.python_version(),
        "rounds": f"{scale.rounds}, {scale.traffic_rounds} of pgbench",
    }


if __name__ == "__main__":
    raise SystemExit(main())
