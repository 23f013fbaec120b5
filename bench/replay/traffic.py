"""Traffic drawn from a recording: what was asked and measured so far, and the unseen queries to come.

The past goes through the product's own tracker, and the product's own rule says which queries are measured
(every second one drawn uniformly as an audit, the others by frequency), while the traffic is still running.
Labels carry recorded recall and, for each arm, a recorded latency drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.dataset import FAMILIES, Vectors
from bench.replay.record import DISTINCT, K, Recording, arms, efs, originals, zipf
from learning.records import ArmResult, Label, Trajectory, Trust, context_key
from learning.trajectory import TrajectoryTracker, identity

Floats = NDArray[np.float64]

FUTURE = 3_000
PAST = 6_000


@dataclass(frozen=True)
class Queries:
    """Queries in the order in which they are asked: vectors [n, dimensions] and recall [n, rungs]."""

    vectors: Vectors
    recall: Floats

    def rows(self, chosen: NDArray[np.intp] | slice) -> Queries:
        """Return some of them."""
        return Queries(self.vectors[chosen], self.recall[chosen])


@dataclass(frozen=True)
class Case:
    """One replay: what the learner knows, and what it is judged by."""

    labels: list[Label]
    tracker: TrajectoryTracker
    future: Queries


Draw = Callable[[int], tuple[Queries, Queries]]
"""From a seed to the past and the future."""


def families(recording: Recording, names: Sequence[str] = FAMILIES) -> Draw:
    """Return traffic in which no query ever returns."""

    def draw(seed: int) -> tuple[Queries, Queries]:
        least = min(len(recording.queries[name]) for name in names)
        pool = Queries(
            np.concatenate([recording.queries[name][:least] for name in names]),
            np.concatenate([recording.recall[name][:least] for name in names]),
        )
        order = np.random.default_rng(seed).permutation(len(pool.vectors))
        future = min(FUTURE, len(order) // 2)
        return pool.rows(order[:-future]), pool.rows(order[-future:])

    return draw


def repeating(recording: Recording, exponent: float) -> Draw:
    """Return Zipf-distributed traffic over the distinct queries of all families."""
    vectors = originals(recording.queries)
    pool = Queries(vectors, np.concatenate([recording.recall[family][:DISTINCT] for family in FAMILIES]))

    def draw(seed: int) -> tuple[Queries, Queries]:
        asked = zipf(len(vectors), PAST + FUTURE, exponent, np.random.default_rng([seed, 1]))
        return pool.rows(asked[:PAST]), pool.rows(asked[PAST:])

    return draw


def moving(recording: Recording) -> Draw:
    """Return the recorded streams of moved queries; the seed says which, and where it begins."""

    def draw(seed: int) -> tuple[Queries, Queries]:
        name = f"moved{seed % len(recording.origin)}"
        every = Queries(recording.queries[name], recording.recall[name])
        order = np.random.default_rng([seed, 2]).permutation(len(every.vectors))
        return every.rows(order[: len(order) // 2]), every.rows(order[len(order) // 2 :])

    return draw


def case(draw: Draw, recording: Recording, count: int, seed: int) -> Case:
    """Return one replay with `count` labels."""
    past, future = draw(seed)
    rng = np.random.default_rng([seed, 3])
    tracker = TrajectoryTracker(1000, seed)
    rows: dict[bytes, int] = {}
    labels: list[Label] = []
    labelled: dict[bytes, None] = {}
    turn, pause = len(past.vectors) / (count + 1), 0.0
    for row, vector in enumerate(past.vectors):
        trajectory = asked(vector, float(row), seed)
        tracker.record(trajectory)
        rows[identity(trajectory)] = row
        pause += 1.0
        if pause >= turn and len(labels) < count:
            pause -= turn
            uniform = len(labels) % 2 == 1
            drawn = [] if uniform else tracker.sample(rng, 1, uniform=False, exclude=labelled)
            chosen = (drawn or tracker.sample(rng, 1, uniform=True))[0]
            labelled[identity(chosen)] = None
            labels.append(
                measured(recording, past.rows(np.array([rows[identity(chosen)]])), float(row), uniform, rng)
            )
    return Case(labels, tracker, future)


def asked(vector: Vectors, when: float, seed: int) -> Trajectory:
    """Return the trajectory of one query."""
    return Trajectory(
        query_id=b"", template=f"t{seed}", timestamp=when, vector=vector.tobytes(), k=K, offset=0, values=(),
        arm="as is", settings=(), trust=Trust.OBSERVE, policy_version=0, rows=K,
        first_byte_ms=1.0, latency_ms=1.0,
    )  # fmt: skip


def measured(
    recording: Recording, query: Queries, when: float, uniform: bool, rng: np.random.Generator
) -> Label:
    """Return the label of one query, as the probe would have made it."""
    ms = [float(rng.choice(samples)) for samples in recording.ms]
    results = {}
    for arm in arms():
        if arm.kind == "exact":
            results[arm.name] = ArmResult(1.0, K, float(rng.choice(recording.exact_ms)))
        else:
            rung = efs().index(arm.effort or 40)  # as is: pgvector's default
            results[arm.name] = ArmResult(float(query.recall[0, rung]), K, ms[rung])
    return Label("t", context_key(K, ()), when, query.vectors[0].tobytes(), K, K, results, "as is", uniform)
