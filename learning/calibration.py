"""Per-query choices: how dear recall may be, and whether choosing per query pays at all.

Given the expected curve of a query, the arm that serves it maximises ``recall(arm) - price * cost(arm)`` (a
Lagrangian; *price* is the recall that one millisecond is worth).  One price for all queries spends the
milliseconds where they buy most recall, which "the smallest effort that reaches the target" does not.

Two kinds of query are told apart, because they are known in different ways:

- *repeated*: a labelled query that is asked again.  Its recall under every arm was measured; there is nothing
  to estimate but how often it will come, which the counts of the traffic say (`learning.repetition`).
- *new*: every other query.  Its curve is predicted, and the prediction is judged by *cross-fitting*: each
  distinct labelled query is predicted by a model that has not seen it (`FOLDS` folds).

Rules
-----
- The price is the highest at which the mean recall over both kinds, each with its share of the traffic to
  come, keeps the target, less a margin for what is only estimated (see `learning.curves`).  Where there are
  enough, only labels that were not chosen for being frequent speak for new queries.
- *Gate*: four levels are compared, one arm for all, arms for repeated queries, predictions from similar
  queries, predictions from similar queries and density; each is charged with the time of its own lookup.
  The cheapest serves.  A level that is in use is left only for one that is clearly better.
- Contract ``strict``: not only the mean keeps the target but repeated queries, and the easy, middle and hard
  third of new ones, each for itself.
- A query unlike every labelled one gets the *safe* arm, which keeps the target on the hardest quarter of
  the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from learning import density, difficulty, lookup, projection
from learning.curves import Caution, Floats, cheapest, estimate
from learning.density import Sketch, SketchData
from learning.difficulty import Model
from learning.projection import Frame, Projection
from learning.reasoning_bank import EQUAL, LearnedPattern, ReasoningBank, components
from learning.records import Arm, QueryPolicy
from learning.repetition import vector_name

FOLDS = 10

MAX_TRAINING = 4000
"""Labels used for fitting, the newest: similarities between all of them are held in memory at once."""

_PRICES = 160
_MIN_FAIR = 500  # fair labels that calibrate by themselves; fewer leave too wide a margin
_WORTHWHILE = 0.97  # share of the cost so far at which another level begins to pay
_SAME_PRICE = 1.02  # a price in use is kept while it costs at most this much more than the best
_MEASURED = 40  # of the newest labelled queries, with which lookups are timed
_REPEATS = 0.02  # share of repeated queries from which their own level is worth a comparison

LEVELS = ("repeated", "memory", "density")
"""Ways to choose per query, each with the evidence of those before it."""


Tolls = tuple[float, float, float]
"""Milliseconds: recognising a repeated query; more for a new one; more for its surroundings in the sketch."""

Stopwatch = Callable[[QueryPolicy, NDArray[np.float32], Mapping[bytes, Sketch]], Tolls]
"""From a policy, vectors that it was made from, and indexes at hand to its tolls: see `learning.tolls`."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a policy has to reach.

    Attributes
    ----------
    target, caution, strict
        The recall to keep, how surely, and whether in every part of the traffic.
    tolls
        What a lookup costs in the proxy at each of `LEVELS`, more than at the one before; a repeated query
        pays the first only.
    stopwatch
        Measures them on a policy instead.
    max_patterns, similarity
        How many queries become patterns, and from which cosine on two of them are one.
    level, price
        Those in use; None where there are none.
    """

    target: float
    caution: Caution
    strict: bool = False
    tolls: Tolls = (0.0, 0.0, 0.0)
    stopwatch: Stopwatch | None = None
    max_patterns: int = 1000
    similarity: float = EQUAL
    seed: int = 0
    level: str | None = None
    price: float | None = None


@dataclass(frozen=True, slots=True)
class Queries:
    """Distinct labelled queries of one k, the oldest first.

    Attributes
    ----------
    vectors
        [n, dimensions], as they came.
    recall
        [n, arms], means over the labels of each.
    ms
        [n, arms], likewise; NaN where not measured.
    weight
        [n], of the newest label of each, in (0, 1].
    labels
        [n], the labels of each, by weight.
    fair
        [n], whether it stands for new queries: drawn uniformly from the traffic, or not for being frequent.
    usage
        [n], how often each was asked lately.
    share
        [n], of each in the traffic to come; the sum is at most 1.
    asked
        Queries that usage and share were counted in.
    """

    vectors: NDArray[np.float32]
    recall: Floats
    ms: Floats
    weight: Floats
    labels: Floats
    fair: NDArray[np.bool_]
    usage: Floats
    share: Floats
    asked: int
    k: int
    euclidean: bool

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result: `policy` is None where the gate stayed closed."""

    policy: QueryPolicy | None
    static_arm: int | None  # the best arm for all over the same traffic; None: none keeps the target
    static_recall: float
    safe_arm: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the features are made from, for every query; arms are the usable ones."""

    points: NDArray[np.float32]  # [n, components]
    residues: Floats  # [n]
    alike: NDArray[np.float32]  # [n, n], 0 on the diagonal: no query is its own neighbour
    misses: Floats  # [n]
    recall: Floats  # [n, usable]
    cost: Floats  # [usable]
    kept: NDArray[np.bool_]  # [n], part of the bank
    new: NDArray[np.bool_]  # [n], speaks for new queries


@dataclass(frozen=True, slots=True)
class _Predicted:
    """What a level predicts for each query without having seen it, and its choice of price."""

    level: str
    curves: Floats  # [n, usable]
    z: Floats  # [n]
    seen: NDArray[np.float32] | None  # around the queries in the sketch
    price: float | None = None  # for new queries
    own_price: float | None = None  # for repeated ones
    recall: float = 0.0
    cost: float = np.inf


def learn(
    queries: Queries,
    arms: Sequence[Arm],
    cost: Floats,
    goal: Goal,
    sketch: SketchData | None = None,
    index: Sketch | None = None,
) -> Outcome:
    """Return the per-query policy of one template, or why there is none.

    Parameters
    ----------
    queries
        At least 2 * FOLDS of them.
    arms, cost
        All arms of the template and their costs in milliseconds; infinite: never chosen.
    sketch, index
        The table's sketch and its index, where there is one.
    """
    usable = np.flatnonzero(np.isfinite(cost))
    efforts = np.array([arm for arm in usable.tolist() if arms[arm].effort], dtype=np.intp)
    frame = sketch.frame if sketch is not None else _own_frame(queries)
    inputs = _inputs(queries, usable, efforts, cost, frame, goal)
    levels = list(_levels(queries, inputs, goal, index))
    priced = [_price(level, queries, inputs, goal) for level in levels]

    def policy_of(level: _Predicted) -> QueryPolicy:
        return _policy(queries, inputs, level, sketch, frame, arms, cost, usable, efforts, goal)

    possible = [level for level in priced if level.price is not None]
    policies: dict[str, QueryPolicy] = {}
    if possible:
        tolls = goal.tolls
        if goal.stopwatch is not None:
            policies[possible[-1].level] = policy_of(
                possible[-1]
            )  # the one with all that there is to measure
            at_hand = {sketch.digest(): index} if sketch is not None and index is not None else {}
            tolls = goal.stopwatch(policies[possible[-1].level], queries.vectors[-_MEASURED:], at_hand)
        priced = [_charged(level, queries, tolls) for level in priced]
    z = levels[-1].z
    static, static_recall, static_cost = _static(queries, inputs, z, goal)
    best = _best(priced, goal, static_cost)
    shown = best or min(priced, key=lambda level: level.cost)
    reason = (
        f"held-out over {int(inputs.new.sum())} labels: "
        f"per query ({shown.level}) {shown.cost:.2f} ms at recall {shown.recall:.3f}, "
        f"one arm for all {static_cost:.2f} ms"
    )
    if queries.share.sum() >= _REPEATS:
        reason += f"; {queries.share.sum():.0%} of the traffic repeats what was measured"
    policy = (policies.get(best.level) or policy_of(best)) if best else None
    static_arm = int(usable[static]) if static is not None else None
    return Outcome(policy, static_arm, static_recall, int(usable[_safe_arm(inputs, z, goal)]), reason)


def level_of(policy: QueryPolicy) -> str:
    """Return the level that a policy was made at."""
    if "slope" not in policy.extra:
        return "repeated"
    return "density" if "codes" in policy.extra else "memory"


def _own_frame(queries: Queries) -> Frame:
    vectors = queries.vectors if queries.euclidean else projection.normalise(queries.vectors)
    return projection.fit(vectors, euclidean=queries.euclidean)


def _inputs(
    queries: Queries,
    usable: NDArray[np.intp],
    efforts: NDArray[np.intp],
    cost: Floats,
    frame: Frame,
    goal: Goal,
) -> _Inputs:
    points, residues = Projection(frame).many(queries.vectors)
    alike = difficulty.likeness(points, points)
    np.fill_diagonal(alike, 0.0)
    return _Inputs(
        points,
        residues,
        alike,
        difficulty.miss(queries.recall[:, efforts]),
        queries.recall[:, usable],
        cost[usable],
        _kept(queries, goal.max_patterns),
        queries.fair if queries.fair.sum() >= _MIN_FAIR else np.ones(len(queries), dtype=bool),
    )


def _kept(queries: Queries, limit: int) -> NDArray[np.bool_]:
    """Return which queries become patterns: those asked most, among equals the newest."""
    order = np.lexsort((np.arange(len(queries)), queries.usage))
    kept = np.zeros(len(queries), dtype=bool)
    kept[order[-limit:]] = True
    return kept


def _levels(queries: Queries, inputs: _Inputs, goal: Goal, index: Sketch | None) -> list[_Predicted]:
    """Return what each level predicts, without a price yet."""
    levels = []
    fold = np.random.default_rng(goal.seed).permutation(len(queries)) % FOLDS
    if queries.share.sum() >= _REPEATS:
        curves = np.empty_like(inputs.recall)
        for held in range(FOLDS):
            train = fold != held
            curves[~train] = estimate(inputs.recall[train], queries.weight[train]).mean
        levels.append(_Predicted("repeated", curves, np.zeros(len(queries)), None))
    nothing = np.zeros((len(queries), 0))
    levels.append(_Predicted("memory", *_cross_fit(queries, inputs, nothing, fold), None))
    if index is not None:
        seen = index.look_around(inputs.points, inputs.residues)
        around = density.features(seen, density.noise_floor(seen))
        levels.append(_Predicted("density", *_cross_fit(queries, inputs, around, fold), seen))
    return levels


def _features(queries: Queries, inputs: _Inputs, around: Floats, pool: NDArray[np.bool_]) -> Floats:
    """Return the features of every query, judged by the queries `pool` without itself."""
    counts = np.where(pool, queries.labels, 0.0)
    return np.column_stack((around, difficulty.neighbourhood(inputs.alike, inputs.misses, counts)))


def _cross_fit(
    queries: Queries, inputs: _Inputs, around: Floats, fold: NDArray[np.intp]
) -> tuple[Floats, Floats]:
    """Return every query's curve [n, usable] and difficulty [n] as predicted without it."""
    curves, z = np.empty_like(inputs.recall), np.empty(len(queries))
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        pool = train & inputs.kept
        features = _features(queries, inputs, around, pool)
        model = difficulty.fit(
            features[train], inputs.recall[train], inputs.misses[train], queries.weight[train]
        )
        z[test] = model.difficulty(features[test])
        residuals = inputs.recall[pool] - model.curves(model.difficulty(features[pool]))
        alike = inputs.alike[np.ix_(test, pool)]
        curves[test] = difficulty.remember(model.curves(z[test]), alike, residuals, queries.labels[pool])
    return curves, z


def choose(curves: Floats, cost: Floats, price: float) -> NDArray[np.intp]:
    """Return the arm [n] that maximises recall - price * cost for each curve [n, arms]."""
    chosen: NDArray[np.intp] = (curves - price * cost).argmax(axis=1)
    return chosen


def _new_bound(chosen: NDArray[np.intp], queries: Queries, inputs: _Inputs, z: Floats, goal: Goal) -> float:
    """Return what the recall of new queries is at least, were they served these arms [n]."""
    rows = np.flatnonzero(inputs.new)
    got, weight = inputs.recall[rows, chosen[rows]], queries.weight[rows]
    groups = [np.ones(len(rows), dtype=bool)]
    if goal.strict:
        third = np.searchsorted(np.quantile(z[rows], (1 / 3, 2 / 3)), z[rows])
        groups = [third == i for i in range(3)]
    return min(
        float(estimate(got[group], weight[group]).lower(goal.caution, goal.target)) for group in groups
    )


def _repeated_bound(chosen: NDArray[np.intp], queries: Queries, inputs: _Inputs, goal: Goal) -> float:
    """Return what the recall of repeated queries is at least, were they served these arms [n].

    It was measured; only how often each will come is not known.
    """
    share = queries.share / queries.share.sum()
    known = inputs.recall[np.arange(len(queries)), chosen]
    mean = float(share @ known)
    error = math.sqrt(share @ (known - mean) ** 2 / max(1.0, queries.asked * queries.share.sum()))
    doubt = goal.caution.deviations * error - goal.caution.tolerance * (1.0 - goal.target)
    return mean - max(0.0, doubt)


def _price(level: _Predicted, queries: Queries, inputs: _Inputs, goal: Goal) -> _Predicted:
    """Return the level with the highest prices that keep the target, and what they bring; None: none does."""

    def new(price: float) -> float:
        return _new_bound(choose(level.curves, inputs.cost, price), queries, inputs, level.z, goal)

    def repeated(price: float) -> float:
        return _repeated_bound(choose(inputs.recall, inputs.cost, price), queries, inputs, goal)

    scale = float(inputs.cost[inputs.cost > 0].min()) if (inputs.cost > 0).any() else 1.0
    prices = np.geomspace(1e-6, 1.0, _PRICES) / scale
    price = _highest(prices, new, goal.target)
    if price is None:
        return level
    own = _highest(prices, repeated, goal.target) if queries.share.sum() >= _REPEATS else price
    if own is None:
        return level
    best = _at(level, price, own, queries, inputs, goal)
    if goal.price is not None and goal.level == level.level and new(goal.price) >= goal.target:
        same = _at(level, goal.price, own, queries, inputs, goal)
        if same.cost <= _SAME_PRICE * best.cost:
            return same
    return best


def _highest(prices: Floats, bound: Callable[[float], float], target: float) -> float | None:
    """Return the highest price up to which every one keeps the target.

    A price beyond the first that fails is no evidence where it succeeds: the estimate is noisy.
    """
    best = None
    for price in prices.tolist():
        if bound(price) < target:
            break
        best = price
    return best


def _at(
    level: _Predicted, price: float, own: float, queries: Queries, inputs: _Inputs, goal: Goal
) -> _Predicted:
    """Return what the level brings with a price for new queries, and one for repeated ones."""
    new = choose(level.curves, inputs.cost, price)
    repeated = choose(inputs.recall, inputs.cost, own)
    rows, every = np.flatnonzero(inputs.new), np.arange(len(queries))
    weight, share = queries.weight[rows], queries.share
    rest = 1.0 - float(share.sum())
    recall = share @ inputs.recall[every, repeated] + rest * np.average(
        inputs.recall[rows, new[rows]], weights=weight
    )
    cost = share @ inputs.cost[repeated] + rest * np.average(inputs.cost[new[rows]], weights=weight)
    return replace(level, price=price, own_price=own, recall=float(recall), cost=float(cost))


def _charged(level: _Predicted, queries: Queries, tolls: Tolls) -> _Predicted:
    """Return the level with the time of its lookups in its cost."""
    own, *more = tolls[: LEVELS.index(level.level) + 1]
    return replace(level, cost=level.cost + own + (1.0 - float(queries.share.sum())) * sum(more))


def _static(queries: Queries, inputs: _Inputs, z: Floats, goal: Goal) -> tuple[int | None, float, float]:
    """Return the best single arm (of the usable) over the same traffic, its recall, and its cost."""
    bounds = np.empty(len(inputs.cost))
    for arm in range(len(bounds)):
        chosen = np.full(len(queries), arm)
        bounds[arm] = _new_bound(chosen, queries, inputs, z, goal)
        if queries.share.sum() >= _REPEATS:
            bounds[arm] = min(bounds[arm], _repeated_bound(chosen, queries, inputs, goal))
    best = cheapest(bounds, inputs.cost, goal.target, np.ones(len(bounds), dtype=bool))
    if best is None:
        return None, 0.0, float("inf")
    new = np.average(inputs.recall[inputs.new, best], weights=queries.weight[inputs.new])
    recall = queries.share @ inputs.recall[:, best] + (1.0 - queries.share.sum()) * new
    return best, min(1.0, float(recall)), float(inputs.cost[best])


def _best(levels: Sequence[_Predicted], goal: Goal, static_cost: float) -> _Predicted | None:
    """Return the level to serve; None: one arm for all.  What is in use is kept until another is worth it."""
    cost: dict[str | None, float] = {None: static_cost} | {
        level.level: level.cost for level in levels if level.price is not None
    }
    current = goal.level if goal.level in cost else None
    challenger = min(cost, key=lambda name: (cost[name], name is not None))
    serving = challenger if cost[challenger] < _WORTHWHILE * cost[current] else current
    return next((level for level in levels if level.level == serving), None)


def _safe_arm(inputs: _Inputs, z: Floats, goal: Goal) -> int:
    hard = z >= np.quantile(z, 0.75)
    mean = inputs.recall[hard].mean(axis=0)
    arm = cheapest(mean, inputs.cost, goal.target, np.ones(len(mean), dtype=bool))
    return int(np.argmax(mean - 1e-6 * inputs.cost)) if arm is None else arm


def _policy(
    queries: Queries,
    inputs: _Inputs,
    level: _Predicted,
    sketch: SketchData | None,
    frame: Frame,
    arms: Sequence[Arm],
    cost: Floats,
    usable: NDArray[np.intp],
    efforts: NDArray[np.intp],
    goal: Goal,
) -> QueryPolicy:
    """Return the policy of a level, fitted to all queries and ready for lookup."""
    assert level.price is not None
    assert level.own_price is not None
    repeated = choose(inputs.recall, inputs.cost, level.own_price)
    every = np.arange(len(queries))
    remembered = lookup.Remembered(
        [vector_name(vector.tobytes()) for vector in queries.vectors],
        usable[repeated],
        inputs.recall[every, repeated],
    )
    overall = estimate(inputs.recall, queries.weight).mean
    default = int(choose(overall[None, :], inputs.cost, level.price)[0])
    z, fitted = np.zeros(len(queries)), None
    if level.level != "repeated":
        z, fitted = _fitted(queries, inputs, level, sketch, frame, arms, usable)
    return lookup.pack(
        _patterns(queries, inputs, z, frame, efforts, goal),
        remembered,
        fitted,
        cost,
        k=queries.k,
        price=level.price,
        default=(int(usable[default]), float(overall[default])),
    )


def _fitted(
    queries: Queries,
    inputs: _Inputs,
    level: _Predicted,
    sketch: SketchData | None,
    frame: Frame,
    arms: Sequence[Arm],
    usable: NDArray[np.intp],
) -> tuple[Floats, lookup.Fitted]:
    """Return the difficulty of every query, and the model behind it."""
    around, surroundings = np.zeros((len(queries), 0)), None
    if level.seen is not None and sketch is not None:
        floor = density.noise_floor(level.seen)
        around = density.features(level.seen, floor)
        limit = 1.1 * float(density.strangeness(level.seen).max())
        surroundings = lookup.Surroundings(sketch, floor, limit)
    features = _features(queries, inputs, around, inputs.kept)
    narrow = difficulty.fit(features, inputs.recall, inputs.misses, queries.weight)
    surface = np.zeros((difficulty.GRID, len(arms)))
    surface[:, usable] = narrow.surface
    model: Model = replace(narrow, surface=surface)
    nearest = difficulty.cosine(inputs.alike[:, inputs.kept].max(axis=1))
    least = float(np.quantile(nearest, 0.005)) - 0.05
    return model.difficulty(features), lookup.Fitted(model, frame, surroundings, least)


def _patterns(
    queries: Queries, inputs: _Inputs, z: Floats, frame: Frame, efforts: NDArray[np.intp], goal: Goal
) -> lookup.Patterns:
    """Return the kept queries as patterns, those merged that are similar enough."""
    bank = ReasoningBank(queries.vectors.shape[1], goal.seed)
    unit = projection.normalise(queries.vectors)
    for row in np.flatnonzero(inputs.kept):
        bank.store(
            LearnedPattern.of(
                unit[row],
                queries.recall[row],
                queries.ms[row],
                weight=float(queries.labels[row]),
                usage=float(queries.usage[row]),
                difficulty=float(z[row]),
            )
        )
    points = inputs.points[inputs.kept]
    if not queries.euclidean:  # there, equal directions are not equal queries
        bank.consolidate(goal.similarity)
        points, _ = Projection(frame).many(bank.centroids())
    elif goal.similarity < EQUAL:
        alike = inputs.alike[np.ix_(inputs.kept, inputs.kept)]
        groups = components(len(points), [(0, difficulty.cosine(alike) >= goal.similarity)])
        bank.merge(groups)
        labels = queries.labels[inputs.kept]
        points = np.stack([np.average(points[group], axis=0, weights=labels[group]) for group in groups])
        points = points.astype(np.float32)
    curves = bank.curves()
    misses = difficulty.miss(curves[:, efforts])
    return lookup.Patterns(bank.centroids(), points, curves, bank.counts(), bank.difficulties(), misses)
