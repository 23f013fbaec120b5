"""From labels to a policy: what the evidence supports, and no more.

`distill` is a pure function of its arguments (the clock is in the labels, randomness is seeded).  For a
template it walks up the steps of trust, each taken only on evidence:

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

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from learning import calibration, density
from learning.calibration import Goal, Queries
from learning.contexts import Limits, bucket, judge, judge_filtered
from learning.curves import Caution, Evidence, costs, evidence, ladders
from learning.density import Sketch, SketchData
from learning.dialects import row_limit
from learning.records import Arm, ContextPolicy, Label, QueryPolicy, Template, TemplatePolicy, Trust

OptimizeFor = Literal["recall", "balanced", "latency"]

CAUTION: Mapping[OptimizeFor, Caution] = {
    "recall": Caution(deviations=2.0, misses=1.0),
    "balanced": Caution(deviations=1.0, misses=1.0),
    "latency": Caution(deviations=0.0, misses=0.0),
}
"""How sure the target is to be kept.

``balanced``: in replays with 300 to 2,000 labels the recall was below the target now and then, never by
more than 0.005.  ``recall``: twice the margin.  ``latency``: no margin, so that the truth lies as often
below the target as above, by up to 0.01 with few labels.  More labels make the margin, and its price,
smaller.
"""

_EUCLIDEAN = "<->"
_DENSE = frozenset({"<->", "<=>", "<#>"})  # operators whose distances a sketch can compute


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
        Labels of one k before an unfiltered query is touched.  A target close to 1 needs ``2 / (1 -
        target)``: with fewer, one unlucky query would use up half of what the target tolerates.
    max_patterns
        Bound of the ReasoningBank; the newest labels are kept.
    seed
        Of everything random.
    contract
        "mean": unfiltered traffic keeps the target on average.  "strict": its easy, middle and hard third
        each do. Filtered contexts are always held one by one.
    max_exact_ms
        Exact search is not chosen where it costs more.
    lookup_ms, sketch_ms
        What choosing per query costs in the proxy, without the sketch and more with it: each must be earned
        back.  The defaults were measured with cold caches: between two lookups the server walks through
        megabytes of its own.
    """

    target_recall: float = 0.98
    optimize_for: OptimizeFor = "balanced"
    learning_rate: float = 0.01
    min_samples: int = 100
    max_patterns: int = 1000
    seed: int = 0
    contract: Literal["mean", "strict"] = "mean"
    max_exact_ms: float = 100.0
    lookup_ms: float = 0.25
    sketch_ms: float = 0.35


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
        A uniform sample of the column's vectors, float32 [n, dimensions], about 10,000 rows in any order,
        without NULLs; None where it was not fetched (filtered templates do not use it).  Pass the *same
        array* until it is fetched anew: its index is kept between calls.
    """

    table: str
    value_types: tuple[int, ...]
    filter_slots: tuple[int, ...]
    selectivity: Mapping[str, float] = field(default_factory=dict)
    rare_selectivity: float = 0.0
    rows: float = 0.0
    sketch: NDArray[np.float32] | None = None


def distill(
    template: Template,
    facts: TableFacts,
    arms: Sequence[Arm],
    labels: Sequence[Label],
    traffic: Mapping[str, int],
    options: Options,
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

    Raises
    ------
    ValueError
        No arms were given.
    """
    if not arms:
        raise ValueError("a policy needs at least the arm 'as is'")
    if facts.filter_slots:
        return _filtered(template, facts, arms, labels, options)
    return _unfiltered(template, facts, arms, labels, traffic, options)


def _filtered(
    template: Template, facts: TableFacts, arms: Sequence[Arm], labels: Sequence[Label], options: Options
) -> TemplatePolicy:
    if not labels:
        return _observe(template, facts, arms, options, "no labels yet")
    ordered = sorted(labels, key=lambda label: label.timestamp)
    # Contexts get few labels each and are asked at different rates: ageing by position would forget the
    # rare ones.
    known = evidence(ordered, arms)
    keys = [label.context for label in ordered]
    shares = {key: _share(key, facts) for key in keys}
    limits = Limits(options.target_recall, CAUTION[options.optimize_for], options.max_exact_ms, filtered=True)
    judged = judge_filtered(known, keys, shares, arms, limits)
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
    )


def _share(context: str, facts: TableFacts) -> float | None:
    """Return the estimated share of rows that the values of a context key keep."""
    _, _, values = context.partition("\x1f")
    share = facts.selectivity.get(values, facts.rare_selectivity)
    return share if bucket(share) is not None else None


def _unfiltered(
    template: Template,
    facts: TableFacts,
    arms: Sequence[Arm],
    labels: Sequence[Label],
    traffic: Mapping[str, int],
    options: Options,
) -> TemplatePolicy:
    by_k: dict[int, list[Label]] = {}
    for label in labels:
        by_k.setdefault(label.k, []).append(label)
    needed = max(options.min_samples, math.ceil(2.0 / max(1.0 - options.target_recall, 1e-3) - 1e-6))
    enough = {k: own for k, own in by_k.items() if len(own) >= needed}
    if not enough:
        most = max((len(own) for own in by_k.values()), default=0)
        return _observe(template, facts, arms, options, f"{most} of the {needed} labels needed for one k")
    counts = Counter({k: traffic.get(str(k), len(own)) for k, own in enough.items()})
    main = max(enough, key=lambda k: (counts[k], k))
    limits = Limits(options.target_recall, CAUTION[options.optimize_for], options.max_exact_ms)
    contexts: dict[str, ContextPolicy] = {}
    for k, own in enough.items():
        judged = judge(_evidence(own, arms, options), arms, limits)
        contexts[str(k)] = judged.policy
        if k == main:
            static = judged
    name = arms[static.policy.arm].name
    recall = static.policy.expected_recall
    reason = f"k={main}: {name} for every query, {static.cost:.2f} ms at recall {recall:.3f}"
    if not static.reached:
        reason += f"; no arm is sure to keep {options.target_recall:g}"
    query, safe, why = _query_policy(template, facts, arms, enough[main], options)
    return TemplatePolicy(
        template=template.key,
        table=facts.table,
        trust=Trust.STATIC if query is None else Trust.QUERY,
        reason=f"{reason}; {why}",
        target_recall=options.target_recall,
        arms=tuple(arms),
        value_types=facts.value_types,
        filter_slots=(),
        fallback=static.policy.arm if query is None else safe,
        contexts=contexts,
        query=query,
        min_k=min(enough),
        max_k=max(enough),
    )


def _evidence(labels: Sequence[Label], arms: Sequence[Arm], options: Options) -> Evidence:
    return evidence(labels, arms, learning_rate=options.learning_rate, min_samples=options.min_samples)


def _query_policy(
    template: Template, facts: TableFacts, arms: Sequence[Arm], labels: Sequence[Label], options: Options
) -> tuple[QueryPolicy | None, int, str]:
    """Return the per-query policy (or None), the safe arm, and the reason."""
    ordered = sorted(labels, key=lambda label: label.timestamp)[-calibration.MAX_TRAINING :]
    lengths = Counter(len(label.vector) for label in ordered if label.vector)
    length = lengths.most_common(1)[0][0] if lengths else 0
    seen = [label for label in ordered if label.vector and len(label.vector) == length]
    if len(seen) < max(options.min_samples, 2 * calibration.FOLDS):
        return None, 0, f"only {len(seen)} labels have a vector"
    vectors = np.frombuffer(b"".join(label.vector or b"" for label in seen), dtype="<f4").reshape(
        len(seen), -1
    )
    known = _evidence(seen, arms, options)
    cost = costs(known.ms, ladders(arms))
    cost[[i for i, arm in enumerate(arms) if arm.kind == "exact" and cost[i] > options.max_exact_ms]] = np.inf
    k = seen[0].k
    cost[[i for i, arm in enumerate(arms) if (row_limit(arm) or k) < k]] = np.inf  # too few rows
    if sum(np.isfinite(cost[i]) for i, arm in enumerate(arms) if arm.effort) < 2:
        return None, 0, "too few arms to choose from"
    euclidean = template.operator == _EUCLIDEAN
    queries = Queries(vectors, known, seen[0].k, euclidean, None)
    goal = Goal(
        options.target_recall,
        CAUTION[options.optimize_for],
        strict=options.contract == "strict",
        lookup_ms=options.lookup_ms,
        max_patterns=options.max_patterns,
        seed=options.seed,
    )
    outcome = calibration.learn(queries, arms, cost, goal, None)
    sketch, index = _sketch(template, facts, vectors.shape[1], euclidean)
    if sketch is not None:
        dearer = replace(goal, lookup_ms=goal.lookup_ms + options.sketch_ms)
        dense = calibration.learn(replace(queries, sketch=sketch), arms, cost, dearer, index)
        if dense.policy is not None and (outcome.policy is None or dense.cost < outcome.cost):
            outcome = dense
    return outcome.policy, outcome.safe_arm, outcome.reason


def _sketch(
    template: Template, facts: TableFacts, dimensions: int, euclidean: bool
) -> tuple[SketchData | None, Sketch | None]:
    rows = facts.sketch
    if rows is None or rows.ndim != 2 or rows.shape[1] != dimensions or template.operator not in _DENSE:
        return None, None
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    return _prepared(_Rows(hashlib.blake2b(rows.data, digest_size=16).digest(), rows), euclidean)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sampled rows, the same if their bytes are."""

    digest: bytes
    rows: NDArray[np.float32] = field(compare=False)


@lru_cache(maxsize=16)
def _prepared(rows: _Rows, euclidean: bool) -> tuple[SketchData | None, Sketch | None]:
    """Return a sketch and its index: building them takes a second or two, and a sketch seldom changes."""
    data = density.prepare(rows.rows, euclidean=euclidean)
    return (data, Sketch(data)) if data is not None else (None, None)


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
