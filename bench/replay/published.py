"""The plan's published targets, measured: recall, tail latency, memory, learning time, lookup time.

``python -m bench.replay --published`` prints them.  Vectors of 1536 dimensions are the recorded ones, turned
by an orthonormal map into more dimensions: distances, and so recall curves, stay what they were.

A lookup is timed twice: right after another one, and after a millisecond of other work on 8 MB of memory.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bench.dataset import Vectors
from bench.replay import traffic
from bench.replay.main import SKETCH_ROWS, TEMPLATE, arm_costs, recalls, serve, table_facts
from bench.replay.record import Recording, arms, efs
from learning import tolls
from learning.distillation import Options, distill
from learning.optimizer import SearchOptimizer
from learning.records import Snapshot, TemplatePolicy

LABELS = 1000
TARGET = 0.98
DEFAULT_EF = 40
_TIMED = 1500
_OTHER = np.zeros(1_000_000)


@dataclass(frozen=True)
class _Learned:
    policy: TemplatePolicy
    future: traffic.Queries
    seconds: float  # CPU, the second time: sketch and imports are there
    megabytes: float  # of a worker, for everything the policy needs


def table(recorded: Recording) -> Table:
    """Return the table of targets and what was measured."""
    shown = Table(title=f"published targets; mixed families, {LABELS} labels, target {TARGET:g}")
    for heading in ("figure", "before", "wanted", "measured"):
        shown.add_column(heading)
    plain = _learned(recorded)
    wide = _learned(_turned(recorded, 1536))
    _add_recall(shown, recorded, plain)
    for learned, dimensions in ((plain, 384), (wide, 1536)):
        shown.add_row(f"memory for patterns, {dimensions}", "", "< 100 MB", f"{learned.megabytes:.0f} MB")
    for learned, dimensions in ((plain, 384), (wide, 1536)):
        shown.add_row(f"distilling 1,000 labels, {dimensions}", "", "< 1 s", f"{learned.seconds:.2f} s CPU")
    for learned, dimensions, wanted in ((plain, 384, 60), (wide, 1536, 150)):
        warm, cold = (_lookup_us(learned, pause) for pause in (0.0, 1e-3))
        name = f"lookup of a new query p50, {dimensions}: warm / after 1 ms of other work"
        shown.add_row(name, "", f"< {wanted} us", f"{warm:.0f} / {cold:.0f} us")
    return shown


def _learned(recorded: Recording) -> _Learned:
    case = traffic.case(traffic.families(recorded), recorded, LABELS, 0)
    facts = table_facts(recorded, SKETCH_ROWS)
    options = replace(Options(), target_recall=TARGET)
    asked = case.tracker.repetition.asked
    for _ in range(2):
        started = time.process_time()
        policy = distill(
            TEMPLATE, facts, arms(), case.labels, {}, options, asked=asked, stopwatch=tolls.measure
        )
        seconds = time.process_time() - started
    wire = msgspec.msgpack.encode(Snapshot(1, 0.0, {"t": policy}))
    gc.collect()
    tracemalloc.start()
    kept = SearchOptimizer(msgspec.msgpack.decode(wire, type=Snapshot))
    gc.collect()
    megabytes = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    assert kept.version == 1
    return _Learned(policy, case.future, seconds, megabytes)


def _turned(recorded: Recording, dimensions: int) -> Recording:
    """Return the recording with its vectors turned into a space of more dimensions."""
    rng = np.random.default_rng(0)
    random = rng.standard_normal((dimensions, recorded.rows.shape[1]))
    onto: Vectors = np.linalg.qr(random)[0].T.astype(np.float32)
    queries = {name: np.asarray(vectors @ onto) for name, vectors in recorded.queries.items()}
    return replace(recorded, rows=recorded.rows[:SKETCH_ROWS] @ onto, queries=queries)


def _add_recall(shown: Table, recorded: Recording, learned: _Learned) -> None:
    chosen, _ = serve(learned.policy, learned.future.vectors)
    recall, cost = recalls(learned.future.recall), arm_costs(recorded)
    rows = np.arange(len(chosen))
    as_is = next(i for i, arm in enumerate(arms()) if arm.effort == DEFAULT_EF)
    means = recall.mean(axis=0)
    after = float(recall[rows, chosen].mean())
    enough = [a for a, arm in enumerate(arms()) if arm.effort and means[a] >= TARGET]
    static = min(enough, key=lambda arm: cost[arm])
    shown.add_row("recall@10", f"{means[as_is]:.4f}", f"{TARGET:g}", f"{after:.4f}")
    rng = np.random.default_rng(0)
    before_ms = _latencies(recorded, np.full(len(chosen), static), rng)
    after_ms = _latencies(recorded, chosen, rng)
    for name, of in (("mean", np.mean), ("p99", lambda ms: np.quantile(ms, 0.99))):
        old, new = float(of(before_ms)), float(of(after_ms))
        wanted = "0.78" if name == "mean" else "0.6"
        shown.add_row(
            f"{name} latency, ms (before: the best single ef_search)",
            f"{old:.2f}",
            f"{wanted} of before",
            f"{new:.2f} ({new / old:.2f})",
        )


def _latencies(
    recorded: Recording, chosen: NDArray[np.intp], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return a recorded latency of each chosen arm, in milliseconds, drawn at random."""
    exact = [arm.kind == "exact" for arm in arms()]
    rung = [0 if arm.kind == "exact" else efs().index(arm.effort or DEFAULT_EF) for arm in arms()]
    return np.array(
        [rng.choice(recorded.exact_ms if exact[arm] else recorded.ms[rung[arm]]) for arm in chosen.tolist()]
    )


def _lookup_us(learned: _Learned, pause: float) -> float:
    """Return the median microseconds of a lookup, `pause` seconds of other work before each."""
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": learned.policy}))
    took = []
    gc.disable()
    try:
        for vector in [one.copy() for one in learned.future.vectors[:_TIMED]]:
            begun = time.perf_counter()
            while time.perf_counter() - begun < pause:
                _OTHER.sum()
            started = time.perf_counter()
            optimizer.optimize("t", vector, 10, ())
            took.append(time.perf_counter() - started)
    finally:
        gc.enable()
    return 1e6 * float(np.median(took))
