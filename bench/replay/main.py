"""Replays: labels -> distillation -> snapshot -> optimizer, judged on unseen queries.

``python -m bench.replay`` runs them, `make bench-replay` too.  ``--held`` asks whether the target is held:
twenty replays of each scenario, and an exit code of 1 where the recall on the queries to come fell more than
0.005 below the target in more than one of them.  ``--published`` prints the plan's targets
(`bench.replay.published`).

Every figure goes through the product's own code.  Costs are medians of recorded latencies per rung, the time
of the lookup, measured in the same run, included.  *Best static* is the cheapest single ef_search that keeps
the target on the unseen queries themselves, which nobody can know beforehand.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bench.dataset import DEMO_FILE
from bench.replay import traffic
from bench.replay.record import Recording, arms, efs, recording
from learning import density, tolls
from learning.density import SketchData
from learning.distillation import Options, TableFacts, distill
from learning.optimizer import SearchOptimizer
from learning.records import Slot, SlotRole, Snapshot, Template, TemplatePolicy, Trust

Floats = NDArray[np.float64]

SKETCH_ROWS = 20_000
HELD_SEEDS, HELD_SLACK = 20, 0.005
TEMPLATE = Template(
    "t", "", "", None, "", "", (), (Slot(SlotRole.VECTOR), Slot(SlotRole.LIMIT)), "items", "embedding", "<=>"
)


@dataclass(frozen=True)
class Scenario:
    """One kind of traffic, a number of labels, and the recall to keep."""

    name: str
    draw: traffic.Draw
    labels: int
    target: float


@dataclass(frozen=True)
class Result:
    """One replay; costs in milliseconds per query."""

    recall: float
    cost: float
    static: float  # the best known afterwards
    own_static: float  # the product's own single arm
    lookup: float  # of `cost`
    lookup_p50: float
    distilled: float  # seconds
    trust: Trust
    reason: str


def replay(recorded: Recording, scenario: Scenario, seed: int, options: Options, sketch: int) -> Result:
    """Return one replay of a scenario."""
    case = traffic.case(scenario.draw, recorded, scenario.labels, seed)
    facts = table_facts(recorded, sketch)
    options = replace(options, target_recall=scenario.target)
    started = time.perf_counter()
    repetition = case.tracker.repetition
    policy = distill(
        TEMPLATE, facts, arms(), case.labels, {}, options, asked=repetition.asked, stopwatch=tolls.measure
    )
    distilled = time.perf_counter() - started
    chosen, took = serve(policy, case.future.vectors)
    cost = arm_costs(recorded)
    recall = recalls(case.future.recall)
    rows = np.arange(len(chosen))
    means = recall.mean(axis=0)
    enough = [cost[arm] for arm in range(len(cost)) if means[arm] >= scenario.target and arms()[arm].effort]
    static = policy.contexts.get("10")
    return Result(
        recall=float(recall[rows, chosen].mean()),
        cost=float(cost[chosen].mean() + took.mean()),
        static=min(enough, default=np.inf),
        own_static=float(cost[static.arm]) if static is not None else np.nan,
        lookup=float(took.mean()),
        lookup_p50=float(np.median(took)),
        distilled=distilled,
        trust=policy.trust,
        reason=policy.reason,
    )


def table_facts(recorded: Recording, sketch: int) -> TableFacts:
    """Return what is known of the table, with a sketch of so many of its rows; 0: without."""
    return TableFacts("public.items", (0, 0), (), rows=len(recorded.rows), sketch=_sketched(recorded, sketch))


_sketches: dict[tuple[int, int], SketchData | None] = {}


def _sketched(recorded: Recording, rows: int) -> SketchData | None:
    """Return the sketch; it is made once, as a learner makes it once for each table."""
    name = id(recorded), rows
    if name not in _sketches:
        _sketches[name] = density.prepare(recorded.rows[:rows], euclidean=False)
    return _sketches[name]


def serve(policy: TemplatePolicy, vectors: NDArray[np.float32]) -> tuple[NDArray[np.intp], Floats]:
    """Return the arm of every query, and the milliseconds of its lookup, as a worker would do it.

    Whatever else runs on the machine interrupts some lookups: each counts as the median of its kind.
    """
    wire = msgspec.msgpack.encode(Snapshot(1, 0.0, {"t": policy}))
    optimizer = SearchOptimizer(msgspec.msgpack.decode(wire, type=Snapshot))
    number = {arm.name: index for index, arm in enumerate(policy.arms)}
    chosen, took = np.empty(len(vectors), dtype=np.intp), np.empty(len(vectors))
    reasons = []
    gc.disable()
    try:
        for row, vector in enumerate(vectors):
            started = time.perf_counter()
            choice = optimizer.optimize("t", vector, 10, ())
            took[row] = time.perf_counter() - started
            chosen[row] = number[choice.arm.name] if choice is not None else 0
            reasons.append(choice.reason if choice is not None else "")
    finally:
        gc.enable()
    kinds = np.array(reasons)
    for kind in set(reasons):
        took[kinds == kind] = np.median(took[kinds == kind])
    return chosen, took * 1e3


def arm_costs(recorded: Recording) -> Floats:
    """Return the median milliseconds of every arm, monotone in effort."""
    rungs = np.maximum.accumulate(np.median(recorded.ms, axis=1))
    exact = float(np.median(recorded.exact_ms))
    return np.array(
        [exact if arm.kind == "exact" else rungs[efs().index(arm.effort or 40)] for arm in arms()]
    )


def recalls(recall: Floats) -> Floats:
    """Return the recall [n, arms] of queries with recall [n, rungs]."""
    columns = [
        np.ones(len(recall)) if arm.kind == "exact" else recall[:, efs().index(arm.effort or 40)]
        for arm in arms()
    ]
    return np.column_stack(columns)


def scenarios(recorded: Recording, labels: Sequence[int], targets: Sequence[float]) -> list[Scenario]:
    """Return the product's claims as scenarios."""
    kinds: list[tuple[str, traffic.Draw]] = [
        ("mixed families", traffic.families(recorded)),
        ("sentences", traffic.families(recorded, ("sentence",))),
        ("Zipf 1.0", traffic.repeating(recorded, 1.0)),
        ("Zipf 0.8", traffic.repeating(recorded, 0.8)),
    ]
    if recorded.origin:
        kinds.append(("Zipf 1.0, moved", traffic.moving(recorded)))
    return [Scenario(name, draw, n, t) for name, draw in kinds for n in labels for t in targets]


def report(runs: dict[Scenario, list[Result]], write: Callable[[Table], None]) -> None:
    """Print one line per scenario."""
    table = Table(title="per query against the best single ef_search known afterwards")
    for heading in (
        "traffic", "labels", "target", "recall mean (worst)", "below by > 0.005", "ms", "best static ms",
        "ratio", "own static", "lookup us (p50)", "distil s", "served per query",
    ):  # fmt: skip
        table.add_column(heading)
    for scenario, results in runs.items():
        recall = np.array([r.recall for r in results])
        cost, static = (np.mean([getattr(r, name) for r in results]) for name in ("cost", "static"))
        table.add_row(
            scenario.name,
            str(scenario.labels),
            f"{scenario.target:g}",
            f"{recall.mean():.4f} ({recall.min():.4f})",
            f"{below(scenario, results)} of {len(results)}",
            f"{cost:.2f}",
            f"{static:.2f}",
            f"{np.mean([r.cost / r.static for r in results]):.2f}",
            f"{np.mean([r.own_static for r in results]):.2f}",
            f"{1e3 * np.mean([r.lookup for r in results]):.0f}"
            f" ({1e3 * np.mean([r.lookup_p50 for r in results]):.0f})",
            f"{np.mean([r.distilled for r in results]):.1f}",
            f"{sum(r.trust is Trust.QUERY for r in results)} of {len(results)}",
        )
    write(table)


def main(
    seeds: Annotated[int, typer.Option(help="Replays of each scenario.")] = 5,
    labels: Annotated[str, typer.Option(help="Numbers of labels, separated by commas.")] = "1000",
    targets: Annotated[str, typer.Option(help="Recalls to keep, separated by commas.")] = "0.98,0.99",
    only: Annotated[str, typer.Option(help="Only traffic whose name contains this.")] = "",
    sketch: Annotated[int, typer.Option(help="Rows in the table's sketch; 0: none.")] = SKETCH_ROWS,
    demo: Annotated[bool, typer.Option(help="The data set that ships, also where the large one is.")] = False,
    reasons: Annotated[bool, typer.Option(help="Also print what each policy says of itself.")] = False,
    held: Annotated[
        bool, typer.Option(help="Twenty replays each; fail where the target is not held.")
    ] = False,
    published: Annotated[bool, typer.Option(help="The plan's published targets instead.")] = False,
) -> None:
    """Replay the product's choices on recorded recall curves; record them first where that was not done."""
    recorded = recording(DEMO_FILE, streams=0) if demo else recording()
    console = Console(width=200)
    console.print(f"{len(recorded.rows)} rows, {recorded.rows.shape[1]} dimensions")
    if published:
        from bench.replay.published import table  # it uses what is above

        console.print(table(recorded))
        return
    seeds = HELD_SEEDS if held else seeds
    wanted = scenarios(recorded, [int(n) for n in labels.split(",")], [float(t) for t in targets.split(",")])
    runs: dict[Scenario, list[Result]] = {}
    for scenario in wanted:
        if only not in scenario.name:
            continue
        runs[scenario] = [replay(recorded, scenario, seed, Options(), sketch) for seed in range(seeds)]
        if reasons:
            for result in runs[scenario]:
                console.print(f"{scenario.name}: recall {result.recall:.4f}, {result.reason}")
    report(runs, console.print)
    missed = [scenario.name for scenario, results in runs.items() if not is_held(scenario, results)]
    if held and missed:
        console.print(f"not held: {', '.join(missed)}")
        raise typer.Exit(1)


def below(scenario: Scenario, results: Sequence[Result]) -> int:
    """Return in how many replays the recall was more than `HELD_SLACK` below the target."""
    return sum(result.recall < scenario.target - HELD_SLACK for result in results)


def is_held(scenario: Scenario, results: Sequence[Result]) -> bool:
    """Tell whether at most one in twenty replays fell below the target."""
    return below(scenario, results) <= max(1, len(results) // HELD_SEEDS)
