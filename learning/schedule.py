"""Which query to measure next, and which arms of it.  Pure: the time is an argument, chance is seeded.

Which query.  Every second measurement is an *audit*: a query drawn uniformly from the recent traffic of all
templates.  Only audits support a claim about the traffic, so they go on for as long as there is traffic.  The
others are *targeted*: they go where knowledge is missing, by context (k and filter values), weighted by
traffic:

- the next label goes to the context with the most traffic per label it has;
- a context that has `FIRST_LABELS` does not get its `PLENTY`-th before every context with traffic has as
  many;
- a context with `ENOUGH` labels gets none; without a filter there is one context per k, and it gets many
  more, because there the patterns of single queries are learned.

Which arms.  The exact search answers every query; an arm that costs more than twice as much as another arm
with at least its recall cannot become anybody's choice.  After `JUDGED_AFTER` labels such an arm is left out,
except in every `FULL_EVERY`-th label, which notices if that has changed.  An iterative scan that visits
max_scan_tuples for nothing would otherwise eat the budget.  In a context that the arm was not tried in yet it
is left out where it usually costs more than four times what the exact search costs here.  Leaving out is
decided per context and never by what the query at hand returned, so that the labels that an arm has are no
biased sample.
"""

from __future__ import annotations

import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from learning.records import Arm, Label, Trajectory

FIRST_LABELS, PLENTY = 5, 50
ENOUGH, ENOUGH_UNFILTERED = 300, 2000
JUDGED_AFTER, FULL_EVERY = 3, 20
_TOO_DEAR = 2.0
_HOPELESS = 4.0
_CONTEXTS = 1024
_RECENT_PER_CONTEXT = 16
_HALF_LIFE = 600.0  # seconds after which a query counts half
_REMEMBERED = 25  # measurements per arm and context


class Traffic:
    """How often each context of one template was asked lately, with a few recent queries of each."""

    def __init__(self) -> None:
        self._recent: OrderedDict[str, deque[Trajectory]] = OrderedDict()
        self._counts: dict[str, float] = {}
        self._aged = 0.0

    def record(self, context: str, trajectory: Trajectory, now: float) -> None:
        """Count one query; where there are too many contexts, the one idle for longest is forgotten."""
        self._age(now)
        self._counts[context] = self._counts.get(context, 0.0) + 1.0
        self._recent.setdefault(context, deque(maxlen=_RECENT_PER_CONTEXT)).append(trajectory)
        self._recent.move_to_end(context)
        if len(self._recent) > _CONTEXTS:
            oldest, _ = self._recent.popitem(last=False)
            del self._counts[oldest]

    def _age(self, now: float) -> None:
        if now - self._aged < _HALF_LIFE / 10:
            return
        factor = 0.5 ** (min(now - self._aged, 10 * _HALF_LIFE) / _HALF_LIFE)
        self._aged = now
        self._counts = {context: count * factor for context, count in self._counts.items()}

    @property
    def counts(self) -> Mapping[str, float]:
        """Recent queries by context, older ones counting less."""
        return self._counts

    @property
    def total(self) -> float:
        """Recent queries of all contexts."""
        return sum(self._counts.values())

    def rounded(self) -> dict[str, int]:
        """The counts as whole numbers of at least 1."""
        return {context: max(1, round(count)) for context, count in self._counts.items()}

    def recent(self, context: str) -> Sequence[Trajectory]:
        """Return a few recent queries of a context, newest last."""
        return tuple(self._recent.get(context, ()))


def neediest(
    traffic: Mapping[str, float], labels: Mapping[str, int], enough: int
) -> tuple[str, float] | None:
    """Return the context that should get the next label and its need (traffic per label), or None."""
    open_ones = {c: count for c, count in traffic.items() if labels.get(c, 0) < enough}
    if any(labels.get(c, 0) < FIRST_LABELS for c in open_ones):
        open_ones = {c: count for c, count in open_ones.items() if labels.get(c, 0) < PLENTY - 1}
    if not open_ones:
        return None
    best = max(open_ones, key=lambda c: open_ones[c] / (labels.get(c, 0) + 1))
    return best, open_ones[best] / (labels.get(best, 0) + 1)


def draw(weights: Mapping[str, float], rng: np.random.Generator) -> str | None:
    """Return one key with a probability in proportion to its weight; None where all weights are 0."""
    keys = [key for key, weight in weights.items() if weight > 0]
    if not keys:
        return None
    shares = np.array([weights[key] for key in keys])
    return keys[int(rng.choice(len(keys), p=shares / shares.sum()))]


class ArmLedger:
    """What the arms of one template have cost and brought, by context: decides which are left out."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, deque[tuple[float, float]]]] = {}  # context -> arm -> (recall, ms)
        self._everywhere: dict[str, deque[float]] = {}  # arm -> ms, in all contexts
        self._labels: Counter[str] = Counter()

    def record(self, label: Label) -> None:
        """Note what the arms of one label brought."""
        if label.context not in self._seen and len(self._seen) >= _CONTEXTS:
            oldest = next(iter(self._seen))
            del self._seen[oldest], self._labels[oldest]
        arms = self._seen.setdefault(label.context, {})
        self._labels[label.context] += 1
        for name, result in label.results.items():
            arms.setdefault(name, deque(maxlen=_REMEMBERED)).append((result.recall, result.ms))
            self._everywhere.setdefault(name, deque(maxlen=4 * _REMEMBERED)).append(result.ms)

    def judge(self, context: str) -> Callable[[Arm, float], bool]:
        """Return what decides, from an arm and the exact search's milliseconds, whether to leave it out."""
        count = self._labels[context]
        if count and count % FULL_EVERY == 0:
            return lambda arm, exact_ms: False
        points = {
            name: (statistics.fmean(recall for recall, _ in seen), statistics.median(ms for _, ms in seen))
            for name, seen in self._seen.get(context, {}).items()
            if len(seen) >= JUDGED_AFTER
        }
        elsewhere = {
            n: statistics.median(ms) for n, ms in self._everywhere.items() if len(ms) >= JUDGED_AFTER
        }

        def leave_out(arm: Arm, exact_ms: float) -> bool:
            if arm.kind in ("exact", "as-is"):
                return False
            if arm.name in points:
                return _is_dominated(arm.name, points)
            return elsewhere.get(arm.name, 0.0) > _HOPELESS * exact_ms

        return leave_out


def _is_dominated(name: str, points: Mapping[str, tuple[float, float]]) -> bool:
    recall, ms = points[name]
    return any(other >= recall and ms > _TOO_DEAR * cost for other, cost in points.values())
