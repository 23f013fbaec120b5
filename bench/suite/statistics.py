"""From samples to claims: systems that were not run but follow from those that were, intervals, verdicts.

Theory
------
All systems answer the same queries in the same blocks, so everything is paired.  A bootstrap draws *blocks*
with replacement, for what disturbs a machine lasts longer than one query, and recomputes the figure from all
systems of the drawn blocks: noise that hit all of them alike cancels in a ratio.

A claim passes where its whole interval keeps the limit, falls short where none of it does, and else it is too
noisy to say.  The interval speaks for the queries and for the machine's noise, not for what another learning
phase would have chosen: where two runs contradict each other (`compare`), that is what differs.

Rules
-----
- A *derived* system takes for each query one of the measured ones: the best setting of its group, or the one
  that an oracle would take.  It is paired like all others, and costs no time of the run.
- The oracle knows every query's recall under every setting.  It maximises recall - price * mean milliseconds
  of the setting, with the one price at which the mean recall is the target; single latencies, which are
  partly luck, it does not see.
- *At equal recall* means: against the cheapest static settings, interpolated, at the recall that the proxy
  reached.  So nobody wins by answering worse, or is blamed for answering better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.demo.measurement import BLOCK, Samples
from bench.suite.records import NOISY, PASS, SHORT, Claim, Interval, Line, Verdict

Floats = NDArray[np.float64]

DRAWS = 1_000
FEWEST = 10
"""Blocks, at least: with fewer queries than make so many, blocks are shorter."""
MARGIN = 0.005
"""A target counts as kept where the recall is not more than this below it: the engine's own bound."""


@dataclass(frozen=True)
class Measured:
    """What all systems gave for the same queries.

    Attributes
    ----------
    names
        Systems, in the order of the rows of what follows.
    recall, ms, missing
        [systems, queries]; `missing` are rows that exist and were not returned.
    groups
        [queries], what a person who tunes by hand would tell apart: filter value, k, table.
    """

    names: tuple[str, ...]
    recall: Floats
    ms: Floats
    missing: Floats
    groups: NDArray[np.str_]

    @classmethod
    def of(cls, samples: Mapping[str, Samples], groups: Sequence[str]) -> Measured:
        """Return what `bench.demo.measurement.measure` found, cut to what all systems answered."""
        asked = min(len(found.ms) for found in samples.values())
        if not asked:
            raise ValueError("nothing was measured in the time that there was")

        def table(of: Callable[[Samples], Sequence[float]]) -> Floats:
            return np.array([of(found)[:asked] for found in samples.values()], dtype=np.float64)

        return cls(
            tuple(samples),
            table(lambda found: found.recall),
            table(lambda found: found.ms),
            table(lambda found: found.missing),
            np.array(list(groups[:asked]), dtype=np.str_),
        )

    @property
    def queries(self) -> int:
        """Number of queries."""
        return int(self.ms.shape[1])

    def index(self, name: str) -> int:
        """Return the row of a system."""
        return self.names.index(name)

    def only(self, keep: NDArray[np.bool_]) -> Measured:
        """Return the same for some of the queries."""
        return Measured(
            self.names, self.recall[:, keep], self.ms[:, keep], self.missing[:, keep], self.groups[keep]
        )

    def joined(self, other: Measured, names: Sequence[str]) -> Measured:
        """Return the queries of both, of some systems."""

        def both(ours: Floats, theirs: Floats) -> Floats:
            rows = [self.index(name) for name in names], [other.index(name) for name in names]
            return np.hstack([ours[rows[0]], theirs[rows[1]]])

        return Measured(
            tuple(names),
            both(self.recall, other.recall),
            both(self.ms, other.ms),
            both(self.missing, other.missing),
            np.concatenate([self.groups, other.groups]),
        )

    def derive(self, name: str, choice: NDArray[np.intp]) -> Measured:
        """Return the same with one more system: for query ``i`` the samples of system ``choice[i]``."""
        place = np.arange(self.queries)

        def more(each: Floats) -> Floats:
            return np.vstack([each, each[choice, place]])

        names = (*self.names, name)
        return Measured(names, more(self.recall), more(self.ms), more(self.missing), self.groups)

    def line(self, name: str, kind: str) -> Line:
        """Return a system's figures."""
        row = self.index(name)
        means = bootstrap(self, lambda drawn: drawn.recall[row])
        return Line(
            name=name,
            kind=kind,
            queries=self.queries,
            recall=interval(float(self.recall[row].mean()), means),
            mean_ms=float(self.ms[row].mean()),
            p50_ms=float(np.quantile(self.ms[row], 0.5)),
            p99_ms=float(np.quantile(self.ms[row], 0.99)),
            short=int(np.count_nonzero(self.missing[row])),
        )


@dataclass(frozen=True)
class Drawn:
    """Means of all systems over the drawn blocks: [systems, draws]."""

    recall: Floats
    ms: Floats


def best_static(found: Measured, statics: Sequence[str], target: float) -> str:
    """Return the cheapest static system whose mean recall reaches `target`, or that of highest recall."""
    rows = [found.index(name) for name in statics]
    recall, ms = found.recall[rows].mean(axis=1), found.ms[rows].mean(axis=1)
    good = np.flatnonzero(recall >= target - 1e-9)
    place = good[ms[good].argmin()] if len(good) else int(np.lexsort((ms, -recall))[0])
    return statics[int(place)]


def best_by_group(
    tuned: Measured, statics: Sequence[str], target: float, groups: Sequence[str]
) -> dict[str, str]:
    """Return the best static system of each group; of one that `tuned` does not have, the best of all."""
    overall = best_static(tuned, statics, target)
    known = set(tuned.groups.tolist())
    return {
        group: best_static(tuned.only(tuned.groups == group), statics, target) if group in known else overall
        for group in sorted(set(groups))
    }


def cross_fitted(tuned: Measured, found: Measured, statics: Sequence[str], target: float) -> NDArray[np.intp]:
    """Return for each query the system that is best for its group on *other* queries.

    Those are the tuning queries and the other half of the group's.  The best of many systems on a group's own
    few queries would be partly lucky, and nobody could be as good.
    """
    occurrence: dict[str, int] = {}
    half = np.empty(found.queries, dtype=np.intp)
    for place, group in enumerate(found.groups.tolist()):
        occurrence[group] = turn = 1 - occurrence.get(group, 1)
        half[place] = turn
    choice = np.empty(found.queries, dtype=np.intp)
    for own in (0, 1):
        known = tuned.joined(found.only(half != own), statics)
        best = best_by_group(known, statics, target, found.groups.tolist())
        for i in np.flatnonzero(half == own).tolist():
            choice[i] = found.index(best[str(found.groups[i])])
    return choice


def oracle(found: Measured, statics: Sequence[str], target: float) -> NDArray[np.intp]:
    """Return for each query the system that one who knows all recalls would take, for a mean of `target`."""
    rows = np.array([found.index(name) for name in statics])
    recall, cost = found.recall[rows], found.ms[rows].mean(axis=1)
    low, high = 0.0, 10.0  # recall for a millisecond
    choice = recall.argmax(axis=0)
    for _ in range(60):
        price = (low + high) / 2
        tried = (recall - price * cost[:, None]).argmax(axis=0)
        if recall[tried, np.arange(found.queries)].mean() >= target:
            low, choice = price, tried
        else:
            high = price
    result: NDArray[np.intp] = rows[choice]
    return result


def draw(found: Measured, seed: int = 0) -> Drawn:
    """Return bootstrapped means, whole blocks at a time."""
    blocks = np.arange(found.queries) // max(1, min(BLOCK, found.queries // FEWEST))
    count = int(blocks[-1]) + 1
    sizes = np.bincount(blocks).astype(np.float64)
    taken = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=DRAWS)
    weight = taken @ sizes

    def means(each: Floats) -> Floats:
        sums = np.array([np.bincount(blocks, weights=row) for row in each])
        result: Floats = sums @ taken.T / weight
        return result

    return Drawn(means(found.recall), means(found.ms))


def bootstrap(found: Measured, of: Callable[[Drawn], Floats]) -> Floats:
    """Return a figure of each draw, [draws]."""
    return of(draw(found))


def interval(value: float, draws: Floats) -> Interval:
    """Return the estimate with the middle 95 % of its draws."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def ratio(found: Measured, ours: str, other: str) -> Interval:
    """Return mean latency of one system over another's."""
    a, b = found.index(ours), found.index(other)
    return interval(
        float(found.ms[a].mean() / found.ms[b].mean()),
        bootstrap(found, lambda drawn: drawn.ms[a] / drawn.ms[b]),
    )


def at_equal_recall(found: Measured, ours: str, statics: Sequence[str]) -> Interval:
    """Return mean latency over that of the static systems at the same recall; see the module's docstring."""
    a, rows = found.index(ours), [found.index(name) for name in statics]
    drawn = draw(found)
    draws = [
        drawn.ms[a, i] / equal_recall_ms(drawn.recall[rows, i], drawn.ms[rows, i], drawn.recall[a, i])
        for i in range(drawn.ms.shape[1])
    ]
    means = found.recall[rows].mean(axis=1), found.ms[rows].mean(axis=1)
    value = found.ms[a].mean() / equal_recall_ms(*means, found.recall[a].mean())
    return interval(float(value), np.array(draws))


def equal_recall_ms(recall: Floats, ms: Floats, wanted: float) -> float:
    """Return the mean latency that static systems need for a recall, interpolated between two of them.

    Only the cheapest system for each recall counts.  Beyond the ends of the curve: that of the nearest end.
    """
    order = np.lexsort((ms, recall))
    recall, ms = recall[order], ms[order]
    cheapest = np.minimum.accumulate(ms[::-1])[::-1]
    return float(np.interp(wanted, recall, cheapest))


def at_most(text: str, limit: float, found: Interval, unit: str = "") -> Claim:
    """Return a claim that the figure is at most `limit`."""
    verdict: Verdict = PASS if found.high <= limit else SHORT if found.low > limit else NOISY
    return Claim(text, f"<= {limit:g} {unit}".strip(), found, verdict)


def at_least(text: str, limit: float, found: Interval, margin: float = 0.0, unit: str = "") -> Claim:
    """Return a claim that the figure is at least `limit`, less a margin that belongs to the claim."""
    floor = limit - margin
    verdict: Verdict = PASS if found.low >= floor else SHORT if found.high < floor else NOISY
    words = f">= {limit:g} {unit}".strip()
    return Claim(text, f"{words} (margin {margin:g})" if margin else words, found, verdict)


def exactly(value: float) -> Interval:
    """Return a figure that was counted, not estimated."""
    return Interval(value, value, value)
