"""Synthetic evidence for the tests of the learning core: small, seeded, with a known truth.

Queries of the mixed world lie in an easy or in a hard half of the space; in the hard one the table is dense and an
index needs about eight times the effort.  In the even world difficulty is luck, which no vector tells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learning import density
from learning.dialects import IndexInfo, ladder
from learning.distillation import TableFacts
from learning.records import Arm, ArmResult, Label, Slot, SlotRole, Template, context_key

Vectors = NDArray[np.float32]

DIMENSIONS = 16
ARMS = ladder([IndexInfo("items_embedding_idx", "hnsw")], filtered=False, max_k=10)
FILTERED_ARMS = ladder([IndexInfo("items_embedding_idx", "hnsw")], filtered=True, max_k=10)
EXACT_MS = 30.0


def template(*, filtered: bool = False, operator: str = "<=>") -> Template:
    """Return a recognised query."""
    slots: tuple[Slot, ...] = (Slot(SlotRole.VECTOR), Slot(SlotRole.LIMIT))
    if filtered:
        slots = (Slot(SlotRole.FILTER, "category", "="), *slots)
    return Template("t", "db", "app", None, "", "", (), slots, "items", "embedding", operator)


def facts(*, sketch: Vectors | None = None) -> TableFacts:
    """Return the facts of an unfiltered template; `sketch` are rows of its table."""
    data = density.prepare(sketch, euclidean=False) if sketch is not None else None
    return TableFacts("public.items", (0, 0), (), rows=20_000.0, sketch=data)


def cost(arm: Arm) -> float:
    """Return the true milliseconds of an arm."""
    return EXACT_MS if arm.kind == "exact" else 0.3 + 0.02 * (arm.effort or 40)


def queries(count: int, seed: int, *, hard_share: float = 0.3) -> tuple[Vectors, NDArray[np.bool_]]:
    """Return query vectors [count, DIMENSIONS] and which of them lie in the hard half."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count) < hard_share
    vectors = rng.normal(size=(count, DIMENSIONS)) * np.where(hard, 0.5, 1.0)[:, None]
    vectors[:, 0] += np.where(hard, 3.0, -3.0)
    return vectors.astype(np.float32), hard


def table_rows(count: int, seed: int) -> Vectors:
    """Return rows of the table: crowded in the hard half."""
    rng = np.random.default_rng(seed)
    crowded = rng.random(count) < 0.8
    rows = rng.normal(size=(count, DIMENSIONS)) * np.where(crowded, 0.5, 1.0)[:, None]
    rows[:, 0] += np.where(crowded, 3.0, -3.0)
    return rows.astype(np.float32)


def recalls(
    hard: NDArray[np.bool_], seed: int, arms: tuple[Arm, ...] = ARMS, *, even: bool = False
) -> NDArray[np.float64]:
    """Return the true recall of every query under every arm [n, arms], in tenths, monotone in effort."""
    rng = np.random.default_rng(seed)
    needs = np.where(rng.random(len(hard)) < 0.3, 160.0, 20.0) if even else np.where(hard, 160.0, 20.0)
    needs = needs * rng.lognormal(0.0, 0.3, size=len(hard))
    effort = np.array([arm.effort or 40 for arm in arms], dtype=np.float64)
    got = np.minimum(1.0, 0.6 + 0.4 * effort / needs[:, None])
    got[:, [arm.kind == "exact" for arm in arms]] = 1.0
    return np.round(np.floor(got * 10.0 + 1e-9) / 10.0, 1)


def labels(
    vectors: Vectors,
    recall: NDArray[np.float64],
    *,
    k: int = 10,
    values: tuple[str | None, ...] = (),
    arms: tuple[Arm, ...] = ARMS,
    seed: int = 0,
    start: float = 0.0,
    uniform: bool = True,
) -> list[Label]:
    """Return one label per query; latencies are true costs with 5 % noise."""
    rng = np.random.default_rng(seed)
    made = []
    for number, (vector, curve) in enumerate(zip(vectors, recall, strict=True)):
        results = {
            arm.name: ArmResult(float(r), k, cost(arm) * float(rng.lognormal(0.0, 0.05)))
            for arm, r in zip(arms, curve, strict=True)
        }
        when = start + number
        made.append(
            Label("t", context_key(k, values), when, vector.tobytes(), k, k, results, "as is", uniform)
        )
    return made


def mixed_labels(count: int, seed: int, *, even: bool = False) -> list[Label]:
    """Return labels of the mixed world, or of the even one."""
    vectors, hard = queries(count, seed)
    return labels(vectors, recalls(hard, seed, even=even), seed=seed)
