"""Per-query choices: how dear recall may be, and whether choosing per query pays at all.

Given the expected curve of a query, the arm that serves it maximises ``recall(arm) - price * cost(arm)`` (a
Lagrangian; *price* is the recall that one millisecond is worth).  One price for all queries spends the
milliseconds where they buy most recall, which "the smallest effort that reaches the target" does not.

Rules
-----
- *Cross-fitting*: every labelled query is predicted by a model that has not seen it, nor a repetition of it
  (`FOLDS` folds).  The
  price is the highest at which the mean recall of the arms so chosen keeps the target, less a margin of
  `certainty` standard errors (see `learning.curves`).  Where enough labels are a uniform sample of the
  traffic, only they calibrate.
- *Gate*: the best static arm is found on the same labels by the same rule.  Choices are made per query only
  where they are cheaper on the held-out labels, the time of the lookup itself included.
- Contract ``strict``: not only the mean over the traffic but the mean of its easy, middle and hard third
  each.
- A query unlike every labelled one gets the *safe* arm, which keeps the target on the hardest quarter of
  the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from learning import density, difficulty, lookup
from learning.curves import Caution, Evidence, Floats, cheapest, estimate
from learning.density import Sketch, SketchData, normalise
from learning.reasoning_bank import LearnedPattern, ReasoningBank
from learning.records import Arm, QueryPolicy

FOLDS = 10

MAX_TRAINING = 4000
"""Labels used for fitting, the newest: similarities between all of them are held in memory at once."""

_PRICES = 160
_MIN_UNIFORM = 500  # uniform labels that calibrate by themselves; fewer leave too wide a margin
_WORTHWHILE = 0.97  # share of the static cost at which choosing per query begins to pay


@dataclass(frozen=True, slots=True)
class Goal:
    """What a policy has to reach."""

    target: float
    caution: Caution
    strict: bool = False
    lookup_ms: float = 0.0  # what one lookup costs in the proxy
    max_patterns: int = 1000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Queries:
    """Labelled queries of one k with their vectors, and the table's sketch."""

    vectors: NDArray[np.float32]  # [n, dimensions], as they came
    evidence: Evidence
    k: int
    euclidean: bool
    sketch: SketchData | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result: `policy` is None where the gate stayed closed."""

    policy: QueryPolicy | None
    recall: float  # held-out mean of the per-query choices
    cost: float  # held-out mean, milliseconds, the lookup included
    static_cost: float
    safe_arm: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the features are made from, for every label."""

    unit: NDArray[np.float32]  # [n, dimensions], length 1
    cosines: NDArray[np.float32]  # [n, n], -inf on the diagonal: no query is its own neighbour
    density: Floats  # [n, FEATURES] or [n, 0]
    misses: Floats  # [n]
    recall: Floats  # [n, usable arms]
    efforts: NDArray[np.intp]  # the arms (of all) whose misses make a query difficult
    weight: Floats  # [n]
    kept: NDArray[np.bool_]  # [n], part of the bank


def learn(
    queries: Queries, arms: Sequence[Arm], cost: Floats, goal: Goal, sketch_index: Sketch | None
) -> Outcome:
    """Return the per-query policy of one template, or why there is none.

    Parameters
    ----------
    queries
        At least 2 * FOLDS labelled queries.
    arms, cost
        All arms of the template and their costs in milliseconds; infinite: never chosen.
    sketch_index
        The index of ``queries.sketch``; None where there is no sketch.
    """
    usable = np.flatnonzero(np.isfinite(cost))
    efforts = np.array([arm for arm in usable.tolist() if arms[arm].effort], dtype=np.intp)
    inputs, seen = _inputs(queries, usable, efforts, goal, sketch_index)
    calibrating = _calibrating(queries.evidence)
    held_out, z = _cross_fit(inputs, goal.seed)
    price, chosen = _calibrate(held_out, z, inputs, cost[usable], calibrating, goal)
    safe = _safe_arm(inputs, z, cost[usable], goal)
    static = _static_cost(inputs, z, cost[usable], calibrating, goal)
    rows = np.arange(len(chosen))[calibrating]
    weight = inputs.weight[calibrating]
    recall = float(np.average(inputs.recall[rows, chosen[calibrating]], weights=weight))
    mean_cost = float(np.average(cost[usable][chosen[calibrating]], weights=weight)) + goal.lookup_ms
    pays = price is not None and mean_cost < _WORTHWHILE * static
    reason = (
        f"held-out over {len(rows)} labels: per query {mean_cost:.2f} ms at recall {recall:.3f}, "
        f"one arm for all {static:.2f} ms"
    )
    policy = _policy(queries, inputs, seen, arms, cost, usable, price, goal) if price and pays else None
    return Outcome(policy, recall, mean_cost, static, int(usable[safe]), reason)


def _inputs(
    queries: Queries,
    usable: NDArray[np.intp],
    efforts: NDArray[np.intp],
    goal: Goal,
    sketch_index: Sketch | None,
) -> tuple[_Inputs, NDArray[np.float32] | None]:
    """Return the inputs, and what the queries see of the sketch, if there is one."""
    recall = queries.evidence.recall[:, usable]
    unit = normalise(queries.vectors)
    seen = sketch_index.look(queries.vectors) if sketch_index is not None else None
    around = np.zeros((len(unit), 0)) if seen is None else density.features(seen, density.noise_floor(seen))
    kept = np.zeros(len(unit), dtype=bool)
    kept[-goal.max_patterns :] = True
    misses = difficulty.miss(queries.evidence.recall[:, efforts])
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return _Inputs(unit, cosines, around, misses, recall, efforts, queries.evidence.weight, kept), seen


def _calibrating(evidence: Evidence) -> NDArray[np.bool_]:
    """Return which labels calibrate: the uniform ones where they are enough, else all."""
    return evidence.uniform if evidence.uniform.sum() >= _MIN_UNIFORM else np.ones(len(evidence), dtype=bool)


def _features(
    inputs: _Inputs, rows: NDArray[np.intp], pool: NDArray[np.intp]
) -> tuple[Floats, NDArray[np.intp], Floats]:
    """Return the features of `rows`, judged by the labels `pool` without themselves.

    With the features come each row's neighbours, as indexes into all labels, and their cosines.
    """
    nearest, cosines = difficulty.nearest(inputs.cosines[np.ix_(rows, pool)])
    chosen = pool[nearest]
    memory = difficulty.neighbourhood(cosines, inputs.misses[chosen], inputs.weight[chosen])
    return np.column_stack((inputs.density[rows], memory)), chosen, cosines


def _cross_fit(inputs: _Inputs, seed: int) -> tuple[Floats, Floats]:
    """Return every label's curve [n, arms] and difficulty [n] as predicted without it."""
    count = len(inputs.unit)
    fold = _folds(inputs.unit, seed)
    curves, z = np.empty_like(inputs.recall), np.empty(count)
    for held in range(FOLDS):
        train, test = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        pool = train[inputs.kept[train]]
        features, _, _ = _features(inputs, train, pool)
        model = difficulty.fit(features, inputs.recall[train], inputs.misses[train], inputs.weight[train])
        residual = np.zeros_like(inputs.recall)
        residual[train] = inputs.recall[train] - model.curves(model.difficulty(features))
        features, near, cosines = _features(inputs, test, pool)
        z[test] = model.difficulty(features)
        base = model.curves(z[test])
        curves[test] = difficulty.remember(base, cosines, residual[near], inputs.weight[near])
    return curves, z


def _folds(unit: NDArray[np.float32], seed: int) -> NDArray[np.intp]:
    """Return the fold [n] of every label.

    Repetitions of one query share a fold: the target is to be kept for queries never seen, too.  Where there
    are hardly any different queries, nothing else can be predicted, and repetitions are told apart.
    """
    _, same = np.unique(unit, axis=0, return_inverse=True)
    different = int(same.max()) + 1
    if different < 2 * FOLDS:
        same, different = np.arange(len(unit)), len(unit)
    fold: NDArray[np.intp] = (np.random.default_rng(seed).permutation(different) % FOLDS)[same.reshape(-1)]
    return fold


def choose(curves: Floats, cost: Floats, price: float) -> NDArray[np.intp]:
    """Return the arm [n] that maximises recall - price * cost for each curve [n, arms]."""
    chosen: NDArray[np.intp] = (curves - price * cost).argmax(axis=1)
    return chosen


def _lower_bound(recall: Floats, z: Floats, weight: Floats, goal: Goal) -> float:
    """Return what the mean recall [n] is at least, with the goal's caution and contract."""
    if not goal.strict:
        groups = [np.ones(len(z), dtype=bool)]
    else:
        third = np.searchsorted(np.quantile(z, (1 / 3, 2 / 3)), z)
        groups = [third == i for i in range(3)]
    return min(float(estimate(recall[group], weight[group]).lower(goal.caution)) for group in groups)


def _calibrate(
    held_out: Floats, z: Floats, inputs: _Inputs, cost: Floats, calibrating: NDArray[np.bool_], goal: Goal
) -> tuple[float | None, NDArray[np.intp]]:
    """Return the highest price that keeps the target, and the arms it chooses; (None, arms of price 0) if
    none does.

    Walks up from price 0 and stops at the first price that fails: the estimate is noisy, and one lucky
    price beyond is not evidence.
    """
    scale = float(cost[cost > 0].min()) if (cost > 0).any() else 1.0
    rows = np.flatnonzero(calibrating)
    best, chosen = None, choose(held_out, cost, 0.0)
    for price in np.geomspace(1e-6, 1.0, _PRICES) / scale:
        arm = choose(held_out, cost, price)
        got = inputs.recall[rows, arm[rows]]
        if _lower_bound(got, z[rows], inputs.weight[rows], goal) < goal.target:
            break
        best, chosen = float(price), arm
    return best, chosen


def _static_cost(
    inputs: _Inputs, z: Floats, cost: Floats, calibrating: NDArray[np.bool_], goal: Goal
) -> float:
    bounds = np.array(
        [
            _lower_bound(inputs.recall[calibrating, arm], z[calibrating], inputs.weight[calibrating], goal)
            for arm in range(len(cost))
        ]
    )
    arm = cheapest(bounds, cost, goal.target, np.ones(len(cost), dtype=bool))
    return float(cost[arm]) if arm is not None else float("inf")


def _safe_arm(inputs: _Inputs, z: Floats, cost: Floats, goal: Goal) -> int:
    hard = z >= np.quantile(z, 0.75)
    mean = estimate(inputs.recall[hard], inputs.weight[hard]).mean
    arm = cheapest(mean, cost, goal.target, np.ones(len(cost), dtype=bool))
    return int(np.argmax(mean - 1e-6 * cost)) if arm is None else arm


def _policy(
    queries: Queries,
    inputs: _Inputs,
    seen: NDArray[np.float32] | None,
    arms: Sequence[Arm],
    cost: Floats,
    usable: NDArray[np.intp],
    price: float,
    goal: Goal,
) -> QueryPolicy:
    """Return the policy fitted to all labels, ready for lookup."""
    features, _, cosines = _features(inputs, np.arange(len(inputs.unit)), np.flatnonzero(inputs.kept))
    narrow = difficulty.fit(features, inputs.recall, inputs.misses, inputs.weight)
    surface = np.zeros((difficulty.GRID, len(arms)))
    surface[:, usable] = narrow.surface
    model = replace(narrow, surface=surface)
    patterns = _patterns(queries.evidence, inputs, model.difficulty(features), goal.seed)
    around = None
    if queries.sketch is not None and seen is not None:
        limit = 1.1 * float(density.strangeness(seen).max())
        around = lookup.Surroundings(queries.sketch, density.noise_floor(seen), limit)
    return lookup.pack(
        patterns,
        model,
        cost,
        k=queries.k,
        price=price,
        min_similarity=float(np.quantile(cosines.max(axis=1), 0.005)) - 0.05,
        around=around,
    )


def _patterns(evidence: Evidence, inputs: _Inputs, z: Floats, seed: int) -> lookup.Patterns:
    """Return the kept labels as patterns, equal queries merged."""
    bank = ReasoningBank(inputs.unit.shape[1], seed)
    for row in np.flatnonzero(inputs.kept):
        bank.store(
            LearnedPattern.of(
                inputs.unit[row],
                evidence.recall[row],
                evidence.ms[row],
                weight=float(inputs.weight[row]),
                difficulty=float(z[row]),
            )
        )
    bank.consolidate()
    curves = bank.curves()
    misses = difficulty.miss(curves[:, inputs.efforts])
    return lookup.Patterns(bank.centroids(), curves, bank.counts(), bank.difficulties(), misses)
