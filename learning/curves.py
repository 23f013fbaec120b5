"""Recall curves and costs of arms, as numbers with their uncertainty.

A *curve* is the recall of one query (or of a mean of queries) under every arm.  Within one ladder (arms
that differ in effort only) more effort does not lose recall and does not get cheaper, and measurements that
say otherwise are noise: curves and costs are made monotone.

Rules
-----
- A query that got fewer rows than exist lost recall by that share, whatever the rows' distances say.
- The exact arm has recall 1 by definition: ties are hits, and label noise must not make exact search look
  lossy.
- An arm that was not measured for a query gets what a *smaller* effort gave there (a lower bound), else the
  mean of that arm, never more than a larger effort gave.  An arm that was never measured has infinite cost.
- Old labels count less: each `min_samples` newer labels take off the share `learning_rate`, so that the
  evidence is worth ``min_samples / learning_rate`` labels however long the product runs.
- A mean is believed only up to a lower bound.  Recall has a heavy tail: now and then a query finds nothing,
  and a sample without such a query flatters.  So one full miss is imagined among the labels (conformal risk
  control, arXiv 2208.02814), and standard errors are taken off, which come from the sample's variance and
  from a few pseudo-labels, because five perfect labels do not prove perfection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learning.dialects import effort_setting
from learning.records import Arm, Label

Floats = NDArray[np.float64]

RECENT = 500
"""Labels that an arm's cost is the median of: latencies age faster than recall."""

_PRIOR_DEVIATION = 0.05  # of one query's recall at a useful effort, where the sample says nothing
_PRIOR_COUNT = 5.0  # labels that this prior is worth
_GRACE = 0.05


@dataclass(frozen=True, slots=True)
class Evidence:
    """Labels as arrays; rows are labels (oldest first), columns are arms."""

    recall: Floats  # [n, arms], complete and monotone along each ladder
    ms: Floats  # [n, arms], NaN where not measured
    weight: Floats  # [n], in (0, 1]
    uniform: NDArray[np.bool_]  # [n], drawn uniformly from the traffic

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Evidence:
        """Return the chosen labels."""
        return Evidence(self.recall[chosen], self.ms[chosen], self.weight[chosen], self.uniform[chosen])


def ladders(arms: Sequence[Arm]) -> list[list[int]]:
    """Return the indexes of the arms of each ladder in order of effort; arms without effort are left out."""
    groups: dict[object, list[int]] = {}
    for index, arm in enumerate(arms):
        setting = effort_setting(arm)
        if setting is not None:
            rest = tuple(pair for pair in arm.settings if pair[0] != setting)
            groups.setdefault((arm.kind, setting, rest), []).append(index)
    return [sorted(group, key=lambda index: arms[index].effort) for group in groups.values()]


def evidence(
    labels: Sequence[Label], arms: Sequence[Arm], *, learning_rate: float = 0.0, min_samples: int = 100
) -> Evidence:
    """Return the labels as arrays, ordered by time, gaps filled as the module's rules say."""
    ordered = sorted(labels, key=lambda label: label.timestamp)
    recall, ms = _as_measured(ordered, arms)
    age = np.arange(len(ordered))[::-1] / max(1, min_samples)
    weight = (1.0 - min(learning_rate, 0.999)) ** age
    exact = [index for index, arm in enumerate(arms) if arm.kind == "exact"]
    recall[:, exact] = 1.0
    uniform = np.array([label.uniform for label in ordered], dtype=bool)
    return Evidence(_fill(recall, ladders(arms)), ms, weight, uniform)


def _as_measured(labels: Sequence[Label], arms: Sequence[Arm]) -> tuple[Floats, Floats]:
    """Return recall and milliseconds [n, arms], NaN where an arm was not run."""
    nothing = (math.nan, -1, math.nan)
    names = [arm.name for arm in arms]
    measured = np.array(
        [
            [
                (r.recall, r.rows, r.ms) if (r := label.results.get(name)) is not None else nothing
                for name in names
            ]
            for label in labels
        ],
        dtype=np.float64,
    ).reshape(len(labels), len(arms), 3)
    recall, rows, ms = measured[..., 0], measured[..., 1], measured[..., 2]
    found = np.array([label.found for label in labels], dtype=np.float64)[:, None]
    share = np.where(rows >= 0, rows / np.maximum(found, 1.0), 1.0)
    recall = np.where(
        found > 0, np.minimum(recall, np.minimum(share, 1.0)), np.where(np.isnan(recall), recall, 1.0)
    )
    return recall, ms.copy()


def _fill(recall: Floats, groups: Sequence[Sequence[int]]) -> Floats:
    """Return `recall` without gaps, monotone along each ladder."""
    filled = recall.copy()
    known = np.isfinite(recall)
    means = np.array(
        [recall[known[:, a], a].mean() if known[:, a].any() else 0.0 for a in range(recall.shape[1])]
    )
    for group in groups:
        part = np.where(known[:, group], recall[:, group], -1.0)
        below = np.maximum.accumulate(part, axis=1)  # -1: no smaller effort was measured
        above = np.where(known[:, group], recall[:, group], np.inf)
        above = np.minimum.accumulate(above[:, ::-1], axis=1)[:, ::-1]
        guess = np.minimum(means[group], above)
        filled[:, group] = np.maximum.accumulate(np.where(below < 0.0, guess, below), axis=1)
    return np.where(np.isfinite(filled), filled, means)


def costs(ms: Floats, groups: Sequence[Sequence[int]]) -> Floats:
    """Return each arm's cost: the median of its latest `RECENT` latencies, monotone along each ladder [arms].

    Infinite where the arm was never measured.
    """
    result = np.full(ms.shape[1], np.inf)
    counts = np.zeros(ms.shape[1])
    for arm in range(ms.shape[1]):
        measured = ms[np.isfinite(ms[:, arm]), arm][-RECENT:]
        counts[arm] = len(measured)
        if len(measured):
            result[arm] = np.median(measured)
    for group in groups:
        seen = [arm for arm in group if counts[arm]]
        result[seen] = isotonic(result[seen], counts[seen])
    return result


def isotonic(values: Floats, weights: Floats) -> Floats:
    """Return the non-decreasing sequence nearest to `values` in weighted squares (pool adjacent violators).

    Barlow et al., Statistical Inference under Order Restrictions, 1972.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (m1, w1, n1), (m2, w2, n2) = blocks[-2:]
            blocks[-2:] = [((m1 * w1 + m2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks]).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Caution:
    """How far below an estimate the truth is taken to lie.

    Attributes
    ----------
    deviations
        Standard errors that are taken off.
    misses
        Queries that found nothing, imagined among the labels.
    tolerance
        Share of the misses which the target allows that a single policy may exceed it by: so much of the
        standard errors is forgiven.  With 1.645 of them and 0.25, nineteen of twenty policies for a target
        of 0.98 have a true recall of 0.975, while their mean, by the imagined misses, keeps the target.
    """

    deviations: float
    misses: float
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean recall over labels, [arms] or a scalar."""

    mean: Floats
    error: Floats  # standard error
    count: float  # labels, unequal weights taken into account

    def lower(self, caution: Caution, target: float = 1.0) -> Floats:
        """Return what the mean is at least, as far as that is to be sure for a `target`."""
        doubt = caution.deviations * self.error - caution.tolerance * (1.0 - target)
        bound: Floats = self.mean * self.count / (self.count + caution.misses) - np.maximum(doubt, 0.0)
        return bound


def estimate(recall: Floats, weight: Floats) -> Estimate:
    """Return the weighted mean of recall [n, arms] or [n] over labels; no labels: mean 0 and error 1."""
    total = float(weight.sum())
    if total <= 0.0:
        shape = recall.shape[1:]
        return Estimate(np.zeros(shape), np.ones(shape), 1e-9)
    mean = np.minimum(np.tensordot(weight, recall, axes=1) / total, 1.0)  # rounding may lead above
    variance = np.tensordot(weight, (recall - mean) ** 2, axes=1) / total
    count = total**2 / float((weight**2).sum())  # Kish's effective sample size
    variance = (variance * count + _PRIOR_DEVIATION**2 * _PRIOR_COUNT) / (count + _PRIOR_COUNT)
    return Estimate(mean, np.sqrt(variance / count), count)


def cheapest(
    recall: Floats,
    cost: Floats,
    target: float,
    allowed: NDArray[np.bool_],
    *,
    tolerance: float = 0.05,
    current: int | None = None,
) -> int | None:
    """Return the cheapest allowed arm whose `recall` (a lower bound) reaches `target`, or None.

    Costs are equal if they differ by less than the share `tolerance`, or by 20 microseconds.  Of equal arms
    the `current` one stays, with a grace of a twentieth of what the target tolerates: which of two equal
    arms looks better is noise.  Otherwise the higher recall wins, and then the earlier arm, which is the one
    that changes less.
    """
    grace = np.zeros(len(recall))
    if current is not None:
        grace[current] = _GRACE * (1.0 - target)
    good = np.flatnonzero(allowed & np.isfinite(cost) & (recall + grace >= target))
    if not len(good):
        return None
    least = cost[good].min()
    near = good[cost[good] <= max((1.0 + tolerance) * least, least + 0.02)]
    return current if current is not None and current in near else int(near[np.argmax(recall[near])])
