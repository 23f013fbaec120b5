"""Noticing that the world has changed, and what to serve until it is known again.  Pure: no I/O, no clock.

What can change                  how it is noticed                                     kind
--------------------------------------------------------------------------------------------------------
an index is built, rebuilt,      its name or file on disk (`World`), by    ``index``
dropped, invalid                 a catalog query every second of traffic
the table grows or shrinks       the server's count of live rows, by half              ``rows``
the queries become others        the mean query vector moves (`MixWatch`): a           (suspicion)
                                 suspicion, which buys audits at once
the recall falls, whatever       audited recall against the target: a one-sided        ``recall``, ``mix``
the reason                       CUSUM (`Cusum`)

What follows, for one template: the labels from before the change are dropped, credit is granted to measure
anew, and until there are labels enough the `safe_arm` serves everything: an arm that had recall to spare
before the change.  If the recall falls short with that one too, the strongest arm takes its place.

CUSUM: E. S. Page, Continuous Inspection Schemes, Biometrika 41 (1954).  Its last zero estimates when the
change began, so that the audits since then are evidence already.  Recall has a heavy tail, so that one query
that found nothing must not raise an alarm alone: what one audit adds is bounded.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learning.curves import costs, estimate, evidence, ladders
from learning.records import Arm, Label

ALLOWANCE = 0.01  # of recall below the target that is not worth an alarm
THRESHOLD = 0.7
"""Recall lost, summed over audits.  Simulated with k = 10: noticed after 12 audits at a recall of 0.90, after
33 at 0.95 (medians); no false alarm in 120,000 audits at 0.985, one in 10,000 at 0.98 itself."""

MOST = 0.15  # that one audit may add

ROWS_CHANGED = 1.5  # times as many rows, or as few
RECENT = 100  # queries whose mean is compared with that of those before
_SHIFTED = 3.0  # expected squares: without a change the statistic is about 1

_SPARE = 4.0  # a safe arm missed at most a fourth of what the target allows to miss
_STEP_UP = 2.0  # and gets that many times the effort


class Kind(enum.StrEnum):
    """What has changed."""

    INDEX = "index"
    ROWS = "rows"
    MIX = "mix"
    RECALL = "recall"


@dataclass(frozen=True, slots=True)
class Change:
    """A change, in words, and since when (Unix time, seconds)."""

    kind: Kind
    words: str
    since: float


@dataclass(frozen=True, slots=True)
class World:
    """What the catalogs say of a table: valid indexes as (name, file), and live rows.

    An index that is being built, as by REINDEX CONCURRENTLY, serves nobody yet and is not among them.
    """

    indexes: tuple[tuple[str, int], ...]
    rows: float


def compare(before: World, now: World, at: float) -> Change | None:
    """Return what has changed enough to matter, or None."""
    if before.indexes != now.indexes:
        old, new = dict(before.indexes), dict(now.indexes)
        gone = sorted(old.keys() - new.keys())
        added = sorted(new.keys() - old.keys())
        rebuilt = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
        parts = [
            f"{', '.join(names)} {words}"
            for names, words in ((gone, "gone"), (added, "new"), (rebuilt, "rebuilt"))
            if names
        ]
        return Change(Kind.INDEX, "index " + "; ".join(parts), at)
    few, many = sorted((max(before.rows, 1.0), max(now.rows, 1.0)))
    if many > ROWS_CHANGED * few and many > 100:
        return Change(Kind.ROWS, f"the table had {before.rows:,.0f} rows and has {now.rows:,.0f}", at)
    return None


class Cusum:
    """One-sided CUSUM of audited recall below what is expected of it."""

    def __init__(self, allowance: float = ALLOWANCE, threshold: float = THRESHOLD) -> None:
        self._allowance = allowance
        self._threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.sum = 0.0
        self.since: float | None = None  # the first audit after the last zero

    def add(self, recall: float, expected: float, at: float) -> bool:
        """Count one audit, in order of time; True is an alarm.  `at` is when the query was asked."""
        lost = min(MOST, expected - recall) - self._allowance
        if self.sum == 0.0 and lost > 0.0:
            self.since = at
        self.sum = max(0.0, self.sum + lost)
        return self.sum > self._threshold


class MixWatch:
    """Compares the mean of the latest query vectors with that of those before.

    With independent queries the squared distance of two sample means is, in expectation, the sum of the
    variances of the coordinates times (1/n + 1/m).  Their ratio is near 1 as long as the queries come from
    one population, whatever its shape, and grows with every query that does not.
    """

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None
        self._squares = 0.0
        self._count = 0
        self._recent: list[NDArray[np.float32]] = []

    def reset(self) -> None:
        """Begin anew: what comes now is how it is."""
        self.__init__()  # type: ignore[misc]

    def add(self, vector: NDArray[np.float32]) -> bool:
        """Count one query; True where the latest `RECENT` are unlike those before."""
        if self._sum is not None and vector.shape != self._sum.shape:
            return False  # of another column type; the recall will tell
        length = float(np.linalg.norm(vector))
        self._recent.append(vector / length if length > 0.0 else vector)
        if len(self._recent) < RECENT:
            return False
        latest, self._recent = np.stack(self._recent).astype(np.float64), []
        shifted = self._statistic(latest) > _SHIFTED
        if not shifted:
            self._absorb(latest)
        return shifted

    def _statistic(self, latest: NDArray[np.float64]) -> float:
        if self._sum is None or self._count < RECENT:
            return 0.0
        mean = self._sum / self._count
        variance = max(self._squares / self._count - float(mean @ mean), 1e-12)
        moved = latest.mean(axis=0) - mean
        return float(moved @ moved) / (variance * (1.0 / len(latest) + 1.0 / self._count))

    def _absorb(self, latest: NDArray[np.float64]) -> None:
        if self._sum is None:
            self._sum = np.zeros(latest.shape[1])
        self._sum += latest.sum(axis=0)
        self._squares += float((latest**2).sum())
        self._count += len(latest)
        if self._count > 50 * RECENT:  # the past fades
            self._sum, self._squares, self._count = self._sum / 2, self._squares / 2, self._count // 2


def safe_arm(
    arms: Sequence[Arm],
    labels: Sequence[Label],
    *,
    target: float,
    max_exact_ms: float,
    filtered: bool,
    strongest: bool = False,
) -> int:
    """Return the index of the arm that serves until there are new labels.

    With a filter: exact search where it was quick.  Otherwise the cheapest arm of a ladder that missed at
    most a fourth of what the target allows, with twice its effort, or, where `strongest` or nothing had so
    much recall, whatever had most.

    Parameters
    ----------
    arms
        Those that are in force now.
    labels
        From before the change; may be about other arms.
    """
    known = evidence(labels, arms)
    cost = costs(known.ms, ladders(arms))
    mean = estimate(known.recall, known.weight).mean
    exact = next((i for i, arm in enumerate(arms) if arm.kind == "exact"), None)
    quick = exact is not None and cost[exact] <= max_exact_ms
    if exact is not None and quick and (filtered or strongest):
        return exact
    strict = [i for i, arm in enumerate(arms) if arm.name.startswith("strict")]
    if filtered and strict:
        return max(strict, key=lambda i: arms[i].effort)
    groups = ladders(arms)
    spare = 1.0 - (1.0 - target) / _SPARE
    good = [i for group in groups for i in group if np.isfinite(cost[i]) and mean[i] >= spare]
    chosen: int | None = None
    if good and not strongest:
        chosen = _stepped_up(min(good, key=lambda i: (cost[i], i)), arms, groups)
    elif groups:
        tops = [group[-1] for group in groups]
        chosen = max(tops, key=lambda i: (mean[i], arms[i].effort))
    if exact is not None and quick and (chosen is None or cost[exact] <= 1.5 * cost[chosen]):
        return exact
    return 0 if chosen is None else chosen


def _stepped_up(arm: int, arms: Sequence[Arm], groups: Sequence[Sequence[int]]) -> int:
    group = next(group for group in groups if arm in group)
    wanted = _STEP_UP * arms[arm].effort
    return next((i for i in group if arms[i].effort >= wanted), group[-1])
