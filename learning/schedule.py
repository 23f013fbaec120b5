"""Which query to measure next, and which arms of it.  Pure: the time is an argument, chance is seeded.

Which query.  Every second measurement is an *audit*: a query drawn uniformly from the recent traffic of all
templates.  Only audits support a claim about the traffic, so they go on for as long as there is traffic.  The
others are *targeted*: they go where knowledge is missing, by context (k and filter values), weighted by
traffic:

- the next label goes to the context with the most traffic for what it has of the labels that it needs, and
  for the seconds that one takes;
- a context that has `FIRST_LABELS` does not get its `PLENTY`-th before every context with traffic has as
  many;
- a context with `ENOUGH` labels gets none; without a filter there is one context per k, and it gets many
  more, because there the patterns of single queries are learned;
- what is measured for a large k counts for every smaller one too (`backing`), so that of several LIMITs in
  one template the largest is measured first.

Which arms.  Measuring every arm for every query would spend the budget on what nobody will choose:

- An arm that costs more than twice as much as an arm of another ladder with at least its recall is left out
  after `JUDGED_AFTER` labels of its context; likewise one that costs more than the exact search, whose recall
  is 1.  An iterative scan that visits max_scan_tuples for nothing is such an arm.
- Where the arm was not tried in the context yet, what it usually costs elsewhere is compared with this
  query's exact search.
- Once a rung of a ladder has found everything, the higher rungs would too, and are not run: their recall is
  known without.

Every `FULL_EVERY`-th label of a context is thorough: all arms are run, which notices if something has
changed. Leaving out depends on the context, or implies the result, and so leaves no biased sample behind.
"""

from __future__ import annotations

import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from learning.curves import ladders
from learning.dialects import AS_IS
from learning.records import Arm, Label, Trajectory

FIRST_LABELS, PLENTY = 5, 50
ENOUGH, ENOUGH_UNFILTERED = 300, 2000
JUDGED_AFTER, FULL_EVERY = 3, 20
_TOO_DEAR, _DEARER_THAN_EXACT, _HOPELESS = 2.0, 1.2, 1.5
_CONTEXTS = 1024
_RECENT_PER_CONTEXT = 16
_NESTED = 4.0
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A context that could get a label."""

    template: str
    context: str
    traffic: float  # recent queries
    labels: float
    enough: int  # labels after which it gets no more
    seconds: float  # that a label of this template takes


def backing(own: float, nested: float) -> float:
    """Return the labels behind a k: its own, and those of larger k, which speak for it as well.

    Other queries may be asked with a larger k, so each label of its own lends weight to `_NESTED` others.
    """
    return own + min(nested, _NESTED * own)


def neediest(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the context with most traffic per share of its labels and second; None: none needs a label."""
    wanting = [c for c in candidates if c.labels < c.enough]
    if any(c.labels < FIRST_LABELS for c in wanting):
        wanting = [c for c in wanting if c.labels < PLENTY - 1]
    return max(wanting, key=_worth, default=None)


def _worth(candidate: Candidate) -> float:
    """Return what a label for this context is worth, per second that it takes."""
    share = (candidate.labels + 1) / candidate.enough
    return candidate.traffic / share / max(candidate.seconds, 1e-3)


def draw(weights: Mapping[str, float], rng: np.random.Generator) -> str | None:
    """Return one key with a probability in proportion to its weight; None where all weights are 0."""
    keys = [key for key, weight in weights.items() if weight > 0]
    if not keys:
        return None
    shares = np.array([weights[key] for key in keys])
    return keys[int(rng.choice(len(keys), p=shares / shares.sum()))]


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """How to make one label."""

    thorough: bool = True  # run every arm, and higher rungs even where a lower one found everything
    warm: bool = True  # time a quick exact search twice: its data may have been cold
    leave_out: Callable[[Arm, float], bool] = lambda arm, exact_ms: (
        False
    )  # given the exact search's milliseconds


class ArmLedger:
    """What the arms of one template have cost and brought, by context: decides which are left out."""

    def __init__(self, arms: Sequence[Arm] = ()) -> None:
        self._ladders = [[arms[i].name for i in group] for group in ladders(arms)]
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
        for name in self._implied(label):
            if seen := arms.get(name):  # it was not run because a lower rung found everything
                seen.append((1.0, statistics.median(ms for _, ms in seen)))

    def _implied(self, label: Label) -> Iterator[str]:
        """Yield the rungs that were not run and lie above one with a recall of 1."""
        for ladder in self._ladders:
            perfect = False
            for name in ladder:
                result = label.results.get(name)
                if perfect and result is None:
                    yield name
                perfect = perfect or (result is not None and result.recall >= 1.0)

    def plan(self, context: str) -> LabelPlan:
        """Return how to make the next label of a context."""
        count = self._labels[context]
        warm = count < FIRST_LABELS
        if count % FULL_EVERY == FULL_EVERY - 1:
            return LabelPlan(thorough=True, warm=warm)
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
                return self._is_dominated(arm.name, points)
            return elsewhere.get(arm.name, 0.0) > _HOPELESS * exact_ms

        return LabelPlan(thorough=False, warm=warm, leave_out=leave_out)

    def _is_dominated(self, name: str, points: Mapping[str, tuple[float, float]]) -> bool:
        recall, ms = points[name]
        exact = points.get("exact")
        if exact is not None and ms > _DEARER_THAN_EXACT * exact[1]:
            return True
        # Within a ladder more effort is never worse; that a few labels say otherwise is noise.
        own = next((ladder for ladder in self._ladders if name in ladder), ())
        return any(
            other >= recall and ms > _TOO_DEAR * cost
            for rival, (other, cost) in points.items()
            if rival not in own and rival != AS_IS.name
        )
