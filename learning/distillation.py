"""From labels to a policy: what the evidence supports, and no more.

`distill` is a pure function of its arguments (the clock is in the labels, randomness is seeded; only a
stopwatch, where one is given, looks at the world).  For a template it walks up the steps of trust, each taken
only on evidence:

1. OBSERVE  too few labels: queries run as they came.
2. STATIC   unfiltered: one arm per k, the cheapest whose lower-bounded recall keeps the target.
3. QUERY    unfiltered, with enough labels of one k: an arm per query vector, where that is cheaper on
held-out labels.
  CONTEXT  filtered: an arm per (k, filter values), per class of selectivity, and a cautious one for the
  rest.

"As is" (the user's own settings) is an arm like the others: it is kept wherever nothing keeps the target
for less.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, TypeVar

import msgspec
import numpy as np

from learning import calibration, density, lookup
from learning.calibration import Goal, Outcome, Queries, Stopwatch
from learning.contexts import Limits, bucket, judge, judge_filtered
from learning.curves import Caution, Evidence, Floats, costs, evidence, ladders
from learning.density import Sketch, SketchData
from learning.dialects import row_limit
from learning.reasoning_bank import EQUAL
from learning.records import (
    Arm,
    ArmResult,
    Label,
    Lowered,
    QueryPolicy,
    Template,
    TemplatePolicy,
    Trust,
    context_key,
)
from learning.repetition import Asked, vector_name
from learning.schedule import backing

_Key = TypeVar("_Key", str, int)

OptimizeFor = Literal["recall", "balanced", "latency"]

CAUTION: Mapping[OptimizeFor, Caution] = {
    "recall": Caution(deviations=1.5, misses=1.0),
    "balanced": Caution(deviations=1.645, misses=1.0, tolerance=0.25),
    "latency": Caution(deviations=0.0, misses=0.0),
}
"""How sure the target is to be kept.

``balanced``: the expected recall keeps the target (conformal risk control), and one policy in twenty exceeds
the misses that the target allows by more than a quarter.  ``recall``: the target is a floor.
``latency``: no margin, so that the truth lies as often below the target as above, by up to 0.01 with few
labels.  More labels make the margin, and its price, smaller.
"""

FILTERED_CAUTION: Mapping[OptimizeFor, Caution] = {**CAUTION, "balanced": Caution(deviations=0.5, misses=1.0)}
"""The same for filtered contexts.  Each is held by itself, with a few labels: there is no mean to rely on."""

LOWER_TARGETS = (0.6, 0.8, 0.9, 0.95)
"""Targets below a filtered template's own for which choices are made as well: a client may ask for less."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is aimed at.

    Attributes
    ----------
    target_recall
        In (0, 1].
    optimize_for
        How sure the target is to be kept: see `CAUTION`.
    learning_rate
        Share of a label's weight lost per `min_samples` newer labels; larger forgets faster.
    min_samples
        Labels of one k before an unfiltered query is touched, those of larger k that speak for it included
        (`learning.schedule.backing`).  A target close to 1 needs ``2 / (1 - target)``: with fewer, one
        unlucky query would use up half of what the target tolerates.
    max_patterns
        Bound of the ReasoningBank: the queries asked most are kept, then the newest.
    pattern_similarity
        Cosine from which two of them are one pattern.
    seed
        Of everything random.
    contract
        "mean": unfiltered traffic keeps the target on average.  "strict": its easy, middle and hard third
        each do. Filtered contexts are always held one by one.
    max_exact_ms
        Exact search is not chosen where it costs more.
    sketch
        Whether the density of the table may be looked at.
    repeat_ms, lookup_ms, sketch_ms
        What choosing per query costs in the proxy: recognising a repeated query, and more for a new one,
        without the sketch and with it.  Each must be earned back.  Used where no stopwatch measures them.
    """

    target_recall: float = 0.98
    optimize_for: OptimizeFor = "balanced"
    learning_rate: float = 0.01
    min_samples: int = 100
    max_patterns: int = 1000
    pattern_similarity: float = EQUAL
    seed: int = 0
    contract: Literal["mean", "strict"] = "mean"
    max_exact_ms: float = 100.0
    sketch: bool = True
    repeat_ms: float = 0.01
    lookup_ms: float = 0.05
    sketch_ms: float = 0.05


@dataclass(frozen=True, slots=True)
class TableFacts:
    """What the server's statistics say about the table of a template.

    Attributes
    ----------
    table
        Resolved name, "public.items".
    value_types
        Type OID by slot.
    filter_slots
        Slots whose values make the context; empty: unfiltered.
    selectivity
        Canonical filter values joined with ``"\\x1f"`` (one value: the value itself) -> share of the rows.
    rare_selectivity
        Share of a value that is not among them; 0 where it is not known.
    rows
        Estimated rows of the table.
    sketch
        Of the column's vectors; None where none was fetched (filtered templates do not use it): the one that
        the policy in use carries serves on, as after a restart.
    """

    table: str
    value_types: tuple[int, ...]
    filter_slots: tuple[int, ...]
    selectivity: Mapping[str, float] = field(default_factory=dict)
    rare_selectivity: float = 0.0
    rows: float = 0.0
    sketch: SketchData | None = None


def distill(
    template: Template,
    facts: TableFacts,
    arms: Sequence[Arm],
    labels: Sequence[Label],
    traffic: Mapping[str, int],
    options: Options,
    *,
    asked: Callable[[str], Asked] | None = None,
    previous: TemplatePolicy | None = None,
    stopwatch: Stopwatch | None = None,
) -> TemplatePolicy:
    """Return the policy that the labels support.

    Parameters
    ----------
    template, facts
        The query and its table.
    arms
        "as is" first; labels of arms that are not among them are ignored.
    labels
        Of this template, in any order.
    traffic
        Context key -> recent queries: decides which k is worth a per-query policy.  Contexts may be missing.
    options
        The aim.
    asked
        Context key -> how often each of its queries was asked lately; None: nothing is known of repetitions,
        and every query counts as new.
    previous
        The policy in use: of choices that are all but equal, its own is kept.
    stopwatch
        Measures what a lookup costs (`learning.tolls`); the one argument that may answer differently twice.

    Raises
    ------
    ValueError
        No arms were given.
    """
    if not arms:
        raise ValueError("a policy needs at least the arm 'as is'")
    if facts.filter_slots:
        return _filtered(template, facts, arms, labels, options, previous)
    return _unfiltered(template, facts, arms, labels, traffic, options, asked, previous, stopwatch)


def _filtered(
    template: Template,
    facts: TableFacts,
    arms: Sequence[Arm],
    labels: Sequence[Label],
    options: Options,
    previous: TemplatePolicy | None,
) -> TemplatePolicy:
    if not labels:
        return _observe(template, facts, arms, options, "no labels yet")
    ordered = sorted(labels, key=lambda label: label.timestamp)
    # Contexts get few labels each and are asked at different rates: ageing by position would forget the
    # rare ones.
    known = evidence(ordered, arms)
    keys = [label.context for label in ordered]
    shares = {key: _share(key, facts) for key in keys}
    caution = FILTERED_CAUTION[options.optimize_for]
    limits = Limits(options.target_recall, caution, options.max_exact_ms, filtered=True)
    judged = judge_filtered(
        known, keys, shares, arms, limits, _in_use(previous, arms), _in_use_by_class(previous, arms)
    )
    lowered = []
    for target in LOWER_TARGETS:
        if target < options.target_recall:
            less = judge_filtered(known, keys, shares, arms, replace(limits, target=target))
            lowered.append(Lowered(target, less.contexts, less.buckets))
    if not judged.contexts and not judged.buckets:
        return _observe(template, facts, arms, options, f"{len(labels)} labels, too few in any context")
    ks = [label.k for label in ordered]
    return TemplatePolicy(
        template=template.key,
        table=facts.table,
        trust=Trust.CONTEXT,
        reason=(
            f"{len(judged.contexts)} filter contexts judged by {len(labels)} labels, "
            f"{judged.reached} keep recall {options.target_recall:g}"
        ),
        target_recall=options.target_recall,
        arms=tuple(arms),
        value_types=facts.value_types,
        filter_slots=facts.filter_slots,
        fallback=judged.fallback,
        contexts=judged.contexts,
        selectivity=dict(facts.selectivity),
        rare_selectivity=facts.rare_selectivity,
        buckets=judged.buckets,
        min_k=min(ks),
        max_k=max(ks),
        lowered=tuple(lowered),
    )


def _share(context: str, facts: TableFacts) -> float | None:
    """Return the estimated share of rows that the values of a context key keep."""
    _, _, values = context.partition("\x1f")
    share = facts.selectivity.get(values, facts.rare_selectivity)
    return share if bucket(share) is not None else None


def _in_use(previous: TemplatePolicy | None, arms: Sequence[Arm]) -> dict[str, int]:
    """Return the arm (its number among `arms`) that serves each context now."""
    if previous is None:
        return {}
    return _still_there({key: context.arm for key, context in previous.contexts.items()}, previous, arms)


def _in_use_by_class(previous: TemplatePolicy | None, arms: Sequence[Arm]) -> dict[int, int]:
    """The same for each class of selectivity."""
    if previous is None:
        return {}
    return _still_there({number: context.arm for number, context in previous.buckets.items()}, previous, arms)


def _still_there(
    serving: Mapping[_Key, int], previous: TemplatePolicy, arms: Sequence[Arm]
) -> dict[_Key, int]:
    number = {arm: index for index, arm in enumerate(arms)}
    named = {key: previous.arms[arm] for key, arm in serving.items()}
    return {key: number[arm] for key, arm in named.items() if arm in number}


def _nested(labels: Sequence[Label], k: int) -> list[Label]:
    """Return what labels of larger k say about `k`; their times are about the larger one and left out."""
    return [
        msgspec.structs.replace(
            label,
            k=k,
            found=min(k, label.found),
            results={
                name: ArmResult(recall, min(k, label.results[name].rows), math.nan)
                for name, recall in label.smaller[k].items()
            },
            smaller={},
        )
        for label in labels
        if label.k > k and k in label.smaller
    ]


def _unfiltered(
    template: Template,
    facts: TableFacts,
    arms: Sequence[Arm],
    labels: Sequence[Label],
    traffic: Mapping[str, int],
    options: Options,
    asked: Callable[[str], Asked] | None,
    previous: TemplatePolicy | None,
    stopwatch: Stopwatch | None,
) -> TemplatePolicy:
    by_k: dict[int, list[Label]] = {}
    for label in labels:
        by_k.setdefault(label.k, []).append(label)
    needed = max(options.min_samples, math.ceil(2.0 / max(1.0 - options.target_recall, 1e-3) - 1e-6))
    nested = {k: _nested(labels, k) for k in by_k}
    behind = {k: backing(len(own), len(nested[k])) for k, own in by_k.items()}
    enough = {k: own for k, own in by_k.items() if behind[k] >= needed}
    if not enough:
        most = int(max(behind.values(), default=0))
        return _observe(template, facts, arms, options, f"{most} of the {needed} labels needed for one k")
    counts = Counter({k: traffic.get(str(k), len(own)) for k, own in enough.items()})
    main = max(enough, key=lambda k: (counts[k], k))
    limits = Limits(options.target_recall, CAUTION[options.optimize_for], options.max_exact_ms)
    in_use = _in_use(previous, arms)
    known = {k: _evidence(own, arms, options) for k, own in enough.items()}
    judged = {
        k: judge(
            known[k],
            arms,
            limits,
            current=in_use.get(str(k)),
            nested=_evidence(nested[k], arms, options),
        )
        for k in enough
    }
    contexts = {str(k): one.policy for k, one in judged.items()}
    static = judged[main]
    name = arms[static.policy.arm].name
    recall = static.policy.expected_recall
    reason = f"k={main}: {name} for every query, {static.cost:.2f} ms at recall {recall:.3f}"
    if not static.reached:
        reason += f"; no arm is sure to keep {options.target_recall:g}"
    told = asked(context_key(main, ())) if asked is not None else Asked()
    outcome = _per_query(template, facts, arms, enough[main], known[main], options, told, previous, stopwatch)
    if isinstance(outcome, str):
        query, fallback, why = None, static.policy.arm, outcome
    else:
        query, why = outcome.policy, outcome.reason
        fallback = outcome.safe_arm if query is not None else static.policy.arm
    return TemplatePolicy(
        template=template.key,
        table=facts.table,
        trust=Trust.STATIC if query is None else Trust.QUERY,
        reason=f"{reason}; {why}",
        target_recall=options.target_recall,
        arms=tuple(arms),
        value_types=facts.value_types,
        filter_slots=(),
        fallback=fallback,
        contexts=contexts,
        query=query,
        min_k=min(enough),
        max_k=max(enough),
    )


def _evidence(labels: Sequence[Label], arms: Sequence[Arm], options: Options) -> Evidence:
    return evidence(labels, arms, learning_rate=options.learning_rate, min_samples=options.min_samples)


def _per_query(
    template: Template,
    facts: TableFacts,
    arms: Sequence[Arm],
    labels: Sequence[Label],
    known: Evidence,
    options: Options,
    asked: Asked,
    previous: TemplatePolicy | None,
    stopwatch: Stopwatch | None,
) -> Outcome | str:
    """Return what choosing per query brings, or why it cannot be judged; `known` is what the labels say."""
    ordered = sorted(labels, key=lambda label: label.timestamp)[-calibration.MAX_TRAINING :]
    lengths = Counter(len(label.vector) for label in ordered if label.vector)
    length = lengths.most_common(1)[0][0] if lengths else 0
    seen = [label for label in ordered if label.vector and len(label.vector) == length]
    if len(seen) < max(options.min_samples, 2 * calibration.FOLDS):
        return f"only {len(seen)} labels have a vector"
    if len(seen) < len(labels):
        known = _evidence(seen, arms, options)
    cost = costs(known.ms, ladders(arms))
    cost[[i for i, arm in enumerate(arms) if arm.kind == "exact" and cost[i] > options.max_exact_ms]] = np.inf
    k = seen[0].k
    cost[[i for i, arm in enumerate(arms) if (row_limit(arm) or k) < k]] = np.inf  # too few rows
    if sum(np.isfinite(cost[i]) for i, arm in enumerate(arms) if arm.effort) < 2:
        return "too few arms to choose from"
    euclidean = density.is_euclidean(template.operator)
    queries = _distinct([label.vector or b"" for label in seen], known, asked, seen[0].k, euclidean)
    if len(queries) < 2 * calibration.FOLDS:
        return f"only {len(queries)} different queries were measured"
    in_use = previous.query if previous is not None else None
    goal = Goal(
        options.target_recall,
        CAUTION[options.optimize_for],
        strict=options.contract == "strict",
        tolls=(options.repeat_ms, options.lookup_ms, options.sketch_ms),
        stopwatch=stopwatch,
        max_patterns=options.max_patterns,
        similarity=options.pattern_similarity,
        seed=options.seed,
        level=calibration.level_of(in_use) if in_use is not None else None,
        price=in_use.price if in_use is not None else None,
    )
    sketch, index = None, None
    if options.sketch and template.operator in density.OPERATORS:
        sketch, index = _sketch(facts, in_use, queries.vectors.shape[1], euclidean)
    return calibration.learn(queries, arms, cost, goal, sketch, index)


def _distinct(vectors: Sequence[bytes], known: Evidence, asked: Asked, k: int, euclidean: bool) -> Queries:
    """Return the distinct queries among labels that are ordered by time, in the order of their newest."""
    rows: dict[bytes, list[int]] = {}
    for row, vector in enumerate(vectors):
        rows.setdefault(vector, []).append(row)
    groups = sorted(rows.values(), key=lambda group: group[-1])
    names = [vector_name(vectors[group[0]]) for group in groups]
    counts = np.array([asked.counts.get(name, 0) for name in names], dtype=np.float64)

    members = np.concatenate([np.array(group) for group in groups])
    starts = np.cumsum([0, *(len(group) for group in groups[:-1])])

    def mean(values: Floats) -> Floats:
        """Average over each group, without what was not measured."""
        certain = np.isfinite(values[members])
        sums = np.add.reduceat(np.where(certain, values[members], 0.0), starts, axis=0)
        known_in = np.add.reduceat(certain.astype(np.float64), starts, axis=0)
        means: Floats = np.where(known_in > 0, sums / np.maximum(known_in, 1), np.nan)
        return means

    return Queries(
        vectors=np.stack([np.frombuffer(vectors[group[0]], dtype="<f4") for group in groups]),
        recall=mean(known.recall),
        ms=mean(known.ms),
        weight=np.array([known.weight[group[-1]] for group in groups]),
        labels=np.array([known.weight[group].sum() for group in groups]),
        fair=np.array([known.uniform[group].any() for group in groups]) | (counts == 1),
        usage=np.maximum(counts, 1.0),
        share=asked.shares(names),
        asked=asked.total,
        k=k,
        euclidean=euclidean,
    )


def _sketch(
    facts: TableFacts, in_use: QueryPolicy | None, dimensions: int, euclidean: bool
) -> tuple[SketchData | None, Sketch | None]:
    """Return the table's sketch and its index: the one that was fetched, else the one in use."""
    try:
        sketch = facts.sketch
        if sketch is None and in_use is not None:
            sketch = lookup.sketch_of(in_use)
        if sketch is None or (sketch.frame.dimensions, sketch.frame.euclidean) != (dimensions, euclidean):
            return None, None
        return sketch, _indexed(sketch)
    except (ValueError, KeyError):  # damaged on its way, or of another version
        return None, None


@lru_cache(maxsize=4)  # 10 MB each; one is made within some 30 ms
def _indexed(data: SketchData) -> Sketch:
    return Sketch(data)


def _observe(
    template: Template, facts: TableFacts, arms: Sequence[Arm], options: Options, reason: str
) -> TemplatePolicy:
    return TemplatePolicy(
        template=template.key,
        table=facts.table,
        trust=Trust.OBSERVE,
        reason=reason,
        target_recall=options.target_recall,
        arms=tuple(arms),
        value_types=facts.value_types,
        filter_slots=facts.filter_slots,
        fallback=0,
        contexts={},
        selectivity=dict(facts.selectivity),
        rare_selectivity=facts.rare_selectivity,
    )
