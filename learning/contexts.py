"""The arm for each context: (k, filter values) with evidence of its own, classes of selectivity, and the
rest.

How many rows pass a filter decides which arm is right, by orders of magnitude: few rows are searched
exactly in less time than an index needs, and an index scan that filters afterwards finds too little.  So
each frequent filter value is judged by its own labels, a rarer one by its class (values of about equal
selectivity), an unknown one by caution.

Rules
-----
- Within a context an arm counts only with the lower bound of its recall, shrunk to what the context's class
  (else all contexts) showed.  The exact arm has recall 1 by definition, so a few labels suffice to trust
  it, and its cost is measured with them.
- The cheapest arm that keeps the target in the context serves it: a promise for every context, not for a
  mean.
- "As is" never serves a filtered template: without a custom plan the server may replace the plan that was
  measured by a generic one.
- Costs within 15 % are equal, and then the arm in use stays, else the surer one serves: which of two equal
  arms looks faster is noise, and a policy that follows noise is never at rest.
- Where exact search would cost more than `Limits.exact_ms`, it is not chosen: a slow answer beats a wrong
  one, but a stalled server helps nobody.  Then the arm with the highest recall serves, and the context's
  expected recall says so.
- Latencies are skewed: an arm's cost in a context is a median, pulled to the class's by two pseudo-labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learning.curves import Caution, Evidence, Floats, cheapest, costs, estimate, ladders
from learning.records import Arm, ContextPolicy

MIN_LABELS = 3
"""Labels with which a context is judged by itself: a median of three has met one outlier and survived."""

_PRIOR_COUNT = 5.0  # labels that the class's curve is worth in a context
_COST_PRIOR = 2.0
_TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Limits:
    """What a context's arm has to keep."""

    target: float
    caution: Caution
    exact_ms: float
    filtered: bool = False


@dataclass(frozen=True, slots=True)
class Judged:
    """A choice with what spoke for it."""

    policy: ContextPolicy
    cost: float  # milliseconds, expected
    reached: bool  # the lower bound of its recall keeps the target


def bucket(share: float) -> int | None:
    """Return floor(log2(selectivity)), the class of a filter value that keeps this share of the rows."""
    return math.floor(math.log2(share)) if 0.0 < share <= 1.0 else None


def judge(
    labels: Evidence,
    arms: Sequence[Arm],
    limits: Limits,
    wider: Evidence | None = None,
    *,
    alike: bool = False,
    current: int | None = None,
    nested: Evidence | None = None,
) -> Judged:
    """Return the arm for the context that `labels` were measured in.

    `nested` is evidence about this k from queries with a larger one (`Label.smaller`): see `_with_nested`.

    `wider` is evidence of other contexts too, to which the recall is shrunk.  `alike`: they are of about
    the same selectivity, so that the costs are comparable as well.  `current` is the arm in use.
    """
    groups = ladders(arms)
    cost = costs(labels.ms, groups)
    own = estimate(labels.recall, labels.weight)
    mean, lower = own.mean, own.lower(limits.caution, limits.target)
    if wider is not None and len(wider) > len(labels):
        # The imagined miss is among all the labels that speak, not among the few of this context.
        wide = estimate(wider.recall, wider.weight)
        known = wide.lower(Caution(0.0, limits.caution.misses))
        share = own.count / (own.count + _PRIOR_COUNT)
        mean = share * own.mean + (1.0 - share) * wide.mean
        lower = share * own.mean + (1.0 - share) * known - limits.caution.deviations * own.error
        if alike:
            cost = _shrunk_cost(cost, costs(wider.ms, groups), len(labels))
    if nested is not None and len(nested):
        lower = _with_nested(labels, nested, arms, limits)
    exact = np.array([arm.kind == "exact" for arm in arms])
    lower = np.where(exact, 1.0, lower)
    allowed = ~exact | (cost <= limits.exact_ms)
    if limits.filtered:
        allowed &= np.array([arm.kind != "as-is" for arm in arms])
    tolerance = _TOLERANCE if limits.filtered else 0.05
    arm = cheapest(lower, cost, limits.target, allowed, tolerance=tolerance, current=current)
    reached = arm is not None
    if arm is None:
        arm = _best_effort(mean, cost, allowed)
    expected = 1.0 if exact[arm] else float(mean[arm])
    return Judged(ContextPolicy(arm, expected, len(labels)), float(cost[arm]), reached)


def _with_nested(own: Evidence, nested: Evidence, arms: Sequence[Arm], limits: Limits) -> Floats:
    """Return lower bounds of recall [arms] from both, never above what the own labels showed on average.

    The first ten of the five hundred rows that an arm returns are what it would have returned for LIMIT 10,
    so a query with a larger k is a label for the smaller one too.  But other queries may be asked with that
    k, so more labels make a claim surer and never bolder.  Of the user's own settings the plan is not known
    to be the same for every k; for them only the own labels speak.
    """
    alone = estimate(own.recall, own.weight)
    together = estimate(
        np.concatenate((own.recall, nested.recall)), np.concatenate((own.weight, nested.weight))
    )
    lower = alone.lower(limits.caution, limits.target)
    surer = np.maximum(lower, np.minimum(together.lower(limits.caution, limits.target), alone.mean))
    as_is = np.array([arm.kind == "as-is" for arm in arms])
    return np.where(as_is, lower, surer)


def _shrunk_cost(own: Floats, wide: Floats, count: int) -> Floats:
    """Return `own` costs pulled to `wide` ones, on a logarithmic scale; where one is unknown, the other."""
    own, wide = np.where(np.isfinite(own), own, wide), np.where(np.isfinite(wide), wide, own)
    known = np.isfinite(own) & (own > 0.0) & (wide > 0.0)
    share = count / (count + _COST_PRIOR)
    result = own.copy()
    result[known] = np.exp(share * np.log(own[known]) + (1.0 - share) * np.log(wide[known]))
    return result


def _best_effort(mean: Floats, cost: Floats, allowed: NDArray[np.bool_]) -> int:
    """Return the allowed arm with the highest recall; among those within 0.002 of it, the cheapest."""
    possible = np.flatnonzero(allowed & np.isfinite(cost))
    if not len(possible):
        return 0  # nothing was measured: leave the query as it came
    near = possible[mean[possible] >= mean[possible].max() - 0.002]
    return int(near[np.argmin(cost[near])])


@dataclass(frozen=True, slots=True)
class FilterPolicies:
    """The choices of a filtered template."""

    contexts: dict[str, ContextPolicy]
    buckets: dict[int, ContextPolicy]
    fallback: int
    reached: int  # contexts whose target is kept


def judge_filtered(
    labels: Evidence,
    keys: Sequence[str],
    shares: Mapping[str, float | None],
    arms: Sequence[Arm],
    limits: Limits,
    in_use: Mapping[str, int] | None = None,
    in_use_by_class: Mapping[int, int] | None = None,
) -> FilterPolicies:
    """Return the choices for every context with `MIN_LABELS`, every class of selectivity seen, and the rest.

    Parameters
    ----------
    labels, keys
        All labels of the template, and the context key of each.
    shares
        Context key -> estimated share of the rows that pass the filter; None where it is not known.
    in_use, in_use_by_class
        Context key, and class -> the arm that serves it now.
    """
    key = np.array(keys)
    classes = {name: bucket(share) if share is not None else None for name, share in shares.items()}
    class_of = np.array([-(10**6) if classes.get(name) is None else classes[name] for name in keys])
    contexts: dict[str, ContextPolicy] = {}
    buckets: dict[int, ContextPolicy] = {}
    reached = 0
    by_class = {number: labels.rows(class_of == number) for number in set(class_of.tolist())}
    for name in dict.fromkeys(keys):
        own = labels.rows(key == name)
        if len(own) < MIN_LABELS:
            continue
        number = classes.get(name)
        same = by_class[number] if number is not None else own
        alike = len(same) > len(own)
        judged = judge(
            own, arms, limits, same if alike else labels, alike=alike, current=(in_use or {}).get(name)
        )
        contexts[name] = judged.policy
        reached += judged.reached
    for number, evidence in by_class.items():
        if number > -(10**6) and len(evidence) >= MIN_LABELS:
            current = (in_use_by_class or {}).get(number)
            buckets[number] = judge(evidence, arms, limits, labels, current=current).policy
    return FilterPolicies(contexts, buckets, _fallback(labels, class_of, arms, limits), reached)


def _fallback(labels: Evidence, class_of: NDArray[np.intp], arms: Sequence[Arm], limits: Limits) -> int:
    """Return the arm for a filter value that nothing is known of: it may match no row or every row.

    Exact search, if even over the whole table it would keep within the limit (its cost grows at most in
    proportion to the rows that pass); else the strict iterative scan with the highest effort; else the best
    over all contexts.
    """
    exact = [index for index, arm in enumerate(arms) if arm.kind == "exact"]
    for index in exact:
        if _whole_table_ms(labels.ms[:, index], class_of) <= limits.exact_ms:
            return index
    cost = costs(labels.ms, ladders(arms))
    strict = [i for i, arm in enumerate(arms) if arm.name.startswith("strict") and np.isfinite(cost[i])]
    if strict:
        return max(strict, key=lambda index: arms[index].effort)
    return judge(labels, arms, limits).policy.arm


def _whole_table_ms(ms: Floats, class_of: NDArray[np.intp]) -> float:
    """Return an upper estimate of the exact arm's cost without any filter, from its cost in each class."""
    estimates = []
    for number in set(class_of[np.isfinite(ms)].tolist()):
        here = ms[(class_of == number) & np.isfinite(ms)]
        if len(here) >= MIN_LABELS:
            estimates.append((number, float(np.median(here)) * 2.0 ** -max(number, -60)))
    # The largest class is the surest: in small ones the fixed cost of a query would be scaled up with the
    # rows.
    known = [pair for pair in estimates if pair[0] > -(10**6)]
    return max(known)[1] if known else math.inf
