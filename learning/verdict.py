"""Was a search successful?  A verdict on one trajectory from whatever signals there are.

Signals, each in [0, 1]:

recall        measured by a probe of this very query, else the trajectory's own estimate.
completeness  rows returned of the rows asked for; an index scan that filters afterwards falls short silently.
diversity     share of the returned rows with a distance of their own, from the probe.
latency       1 up to the expected latency, beyond it falling with the ratio (twice as slow: half as good).
feedback      share of the rated results that were relevant, where a user said so; a relevant row that the
              search should have returned and did not counts against it.

What diversity can and cannot say: the proxy keeps no result vectors, but a probe returns the distances of
the served arm's rows.  Copies of one document have equal distances, different ones practically never do, so
the score finds a result list that is full of duplicates.  It cannot tell near-duplicates from variety.

Signals that are missing do not count: the score is the mean of those present, and the confidence says how
much they are worth together.  Recall was measured, feedback was said, completeness is a fact: they weigh
more than a latency, which also depends on what else the server did at that moment.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from learning.records import Label, Trajectory


class Recommendation(enum.StrEnum):
    """What would help this query, in words that a person and a metric can use.

    What a template or table as a whole suggests is in `learning.advice`.
    """

    RAISE_EFFORT = "raise effort"
    SCAN_FURTHER = "iterative or exact search: the filter leaves too few rows"
    CHECK_INDEX = "check the index: recall is low even at the highest effort measured"
    FASTER_ARM = "an arm that keeps the recall is faster"
    DUPLICATES = "many results are copies of one another: remove duplicate rows or group by document"
    MISSED = "rows that a user calls relevant were missed by the index: more recall is needed"


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is known of the queries around this one; None where nothing is."""

    target_recall: float = 0.98
    latency_ms: float | None = None  # usual latency of its template and arm
    matching_rows: float | None = None  # rows that pass the filter


@dataclass(frozen=True, slots=True)
class Feedback:
    """Results that a user rated."""

    relevant: int
    irrelevant: int
    missed: int = 0  # relevant, near enough to be among the k, and not returned


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement; `scores` holds the signals that were there, by name."""

    success: bool
    confidence: float  # in [0, 1]
    score: float  # mean of the scores, 0 without any
    scores: dict[str, float]
    recommendations: tuple[Recommendation, ...]


_WEIGHT = {"recall": 0.5, "feedback": 0.4, "completeness": 0.2, "diversity": 0.1, "latency": 0.1}
"""How much each signal adds to the confidence, which is 1 at most."""

_DUPLICATED = 0.5  # diversity below which duplicates are worth a word
_GOOD_SHARE = 0.8  # of the served latency: an arm must beat it clearly to be recommended


class VerdictEngine:
    """Judges trajectories.

    Parameters
    ----------
    success_threshold
        Mean score above which a search counts as successful, in [0, 1].
    """

    def __init__(self, success_threshold: float = 0.8) -> None:
        if not 0.0 <= success_threshold <= 1.0:
            raise ValueError(f"success_threshold must lie in [0, 1], not {success_threshold}")
        self._threshold = success_threshold

    def judge(
        self,
        trajectory: Trajectory,
        label: Label | None = None,
        expectation: Expectation | None = None,
        feedback: Feedback | None = None,
    ) -> Verdict:
        """Return the verdict on one query.

        Parameters
        ----------
        trajectory
            The query as it was served.
        label
            Its probe, if it was probed.
        expectation
            What its template and table lead to expect.
        feedback
            What a user said.
        """
        known = expectation if expectation is not None else Expectation()
        if trajectory.error is not None:
            return Verdict(False, 1.0, 0.0, {}, ())
        scores: dict[str, float] = {}
        recall = _recall(trajectory, label)
        if recall is not None:
            scores["recall"] = recall
        complete = _completeness(trajectory, label, known)
        if complete is not None:
            scores["completeness"] = complete
        if known.latency_ms is not None and known.latency_ms > 0.0:
            scores["latency"] = min(1.0, known.latency_ms / max(trajectory.latency_ms, 1e-9))
        if feedback is not None and feedback.relevant + feedback.irrelevant > 0:
            good = max(0, feedback.relevant - feedback.missed)
            scores["feedback"] = good / (feedback.relevant + feedback.irrelevant)
        diversity = _diversity(trajectory, label)
        if diversity is not None:
            scores["diversity"] = diversity
        score = sum(scores.values()) / len(scores) if scores else 0.0
        return Verdict(
            success=bool(scores) and score > self._threshold,
            confidence=min(1.0, sum(_WEIGHT[name] for name in scores)),
            score=score,
            scores=scores,
            recommendations=tuple(_recommend(trajectory, label, known, scores, feedback)),
        )


def _recall(trajectory: Trajectory, label: Label | None) -> float | None:
    if label is not None and trajectory.arm in label.results:
        return label.results[trajectory.arm].recall
    return trajectory.recall_estimate


def _diversity(trajectory: Trajectory, label: Label | None) -> float | None:
    served = label.results.get(trajectory.arm) if label is not None else None
    if served is None or served.distinct < 0 or served.rows < 2:
        return None
    return (served.distinct - 1) / (served.rows - 1)


def _completeness(trajectory: Trajectory, label: Label | None, known: Expectation) -> float | None:
    """Return the share of rows returned of those that exist, or None where that cannot be told."""
    if trajectory.rows < 0:
        return None
    asked = trajectory.k
    if label is not None:
        asked = min(asked, max(0, label.found - trajectory.offset))
    elif known.matching_rows is not None:
        asked = min(asked, max(0, round(known.matching_rows) - trajectory.offset))
    elif trajectory.rows < asked:
        return None  # perhaps there are no more rows
    return min(1.0, trajectory.rows / asked) if asked > 0 else 1.0


def _recommend(
    trajectory: Trajectory,
    label: Label | None,
    known: Expectation,
    scores: dict[str, float],
    feedback: Feedback | None,
) -> Collection[Recommendation]:
    found: list[Recommendation] = []
    if feedback is not None and feedback.missed:
        found.append(Recommendation.MISSED)
    if scores.get("diversity", 1.0) < _DUPLICATED:
        found.append(Recommendation.DUPLICATES)
    if scores.get("completeness", 1.0) < 1.0:
        found.append(Recommendation.SCAN_FURTHER)
    recall = scores.get("recall")
    if recall is None:
        return found
    others = {} if label is None else label.results
    best = max((r.recall for name, r in others.items() if name != "exact"), default=None)
    if recall < known.target_recall:
        hopeless = best is not None and best < known.target_recall
        found.append(Recommendation.CHECK_INDEX if hopeless else Recommendation.RAISE_EFFORT)
    served = others.get(trajectory.arm)
    if served is not None and recall >= known.target_recall:
        good = [r.ms for r in others.values() if r.recall >= known.target_recall]
        if min(good) < _GOOD_SHARE * served.ms:
            found.append(Recommendation.FASTER_ARM)
    return found
