"""What the dashboard shows of each table, as JSON values: recall, latency, arms, filters, patterns, hints.

Reads only; no I/O.  Everything here was measured or served: where nothing is known there is None or an empty
list, never a stand-in.  Vectors do not leave the learner, only a two-dimensional map of the patterns.
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from learning import answers
from learning.feedback import Ratings
from learning.optimizer import SearchOptimizer
from learning.records import HASHED, Label, Snapshot, TemplatePolicy, Trajectory, Trust, is_hashed
from learning.registry import TemplateState
from learning.trajectory import filter_values

if TYPE_CHECKING:
    from learning.worker import Learner

_BINS = 24  # of a time line
_RECENT = 8  # queries
_FILTERS = 60  # contexts, those with most labels
_POINTS = 400  # of the map, the heaviest patterns
_MAX_TEXT = 80  # characters of a filter value

Row = dict[str, Any]


class Overviews:
    """Answers from one learner."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._optimizer: SearchOptimizer | None = None  # what was prepared for it is taken over

    async def get(self) -> Row:
        """Return everything that the dashboard shows."""
        learner, measuring = self._learner, self._learner.measuring
        policies = {each.template.key: each.policy for each in learner.registry if each.policy is not None}
        snapshot = Snapshot(learner.version, 0.0, policies)
        self._optimizer = optimizer = await asyncio.to_thread(SearchOptimizer, snapshot, self._optimizer)
        found = []
        for table in tables(learner.registry):
            states = [state for state in learner.registry if state.table == table]
            target = measuring.target(table)
            found.append(table_overview(table, states, measuring.ratings[table], target, optimizer))
            await asyncio.sleep(0)  # let the learner's own work pass between tables
        return {
            "policy_version": learner.version,
            "leads": learner.leads,
            "spending": measuring.spending,
            "tables": found,
        }


def tables(states: Iterable[TemplateState]) -> list[str]:
    """Return the tables that templates are about; "" where the server has not been asked yet."""
    return sorted({state.table for state in states})


def table_overview(
    table: str,
    states: Sequence[TemplateState],
    ratings: Ratings,
    target: float,
    optimizer: SearchOptimizer,
) -> Row:
    """Return what is shown of one table; `target` is its declared recall, `optimizer` knows its policies."""
    hints = [row for row in answers.recommend_params(states, target) if row["kind"] == "advice"]
    return {
        "table": table,
        "target_recall": target,
        "hints": [{"code": row["name"], "text": row["reason"]} for row in hints],
        "templates": [
            {**stats, **_details(state, optimizer)}
            for state, stats in zip(states, answers.learning_stats(states, ratings, target), strict=True)
        ],
    }


def _details(state: TemplateState, optimizer: SearchOptimizer) -> Row:
    recent = state.tracker.get_recent(len(state.tracker)) if state.tracker is not None else []
    holding = state.watch.holding
    return {
        "arms": _arms(state, recent),
        "timeline": timeline(recent),
        "audits": _audits(state.labels),
        "filters": _filters(state.policy),
        "map": pattern_map(state.policy),
        "recent": [_query(state, each, optimizer) for each in recent[-_RECENT:][::-1]],
        "drifts": [{"at": at, "kind": kind, "words": words} for at, kind, words in state.watch.events],
        "holding": None if holding is None else {"arm": holding.arm, "words": holding.words},
    }


def _arms(state: TemplateState, recent: Sequence[Trajectory]) -> list[Row]:
    """Return what is known of each arm, and its share of the recent queries."""
    policy = state.policy
    if policy is None:
        return []
    outlook = (policy if policy.outlook else answers.with_outlook(policy, tuple(state.labels))).outlook
    shares = Counter(each.arm for each in recent)
    return [
        {
            "arm": arm.name,
            "settings": dict(arm.settings),
            "recall": known.recall if known is not None and known.recall >= 0.0 else None,
            "ms": known.ms if known is not None and known.recall >= 0.0 else None,
            "share": shares[arm.name] / len(recent) if recent else 0.0,
        }
        for arm, known in zip(policy.arms, outlook or (None,) * len(policy.arms), strict=True)
    ]


def timeline(recent: Sequence[Trajectory]) -> list[Row]:
    """Return the recent queries by time: how many got which arm, and their median latency in milliseconds."""
    if not recent:
        return []
    first, last = recent[0].timestamp, recent[-1].timestamp
    width = max((last - first) / _BINS, 1e-3)
    bins: list[list[Trajectory]] = [[] for _ in range(_BINS)]
    for each in recent:
        bins[max(0, min(_BINS - 1, int((each.timestamp - first) / width)))].append(each)
    return [
        {
            "at": first + number * width,
            "arms": dict(Counter(each.arm for each in found)),
            "ms": statistics.median(each.latency_ms for each in found) if found else None,
        }
        for number, found in enumerate(bins)
    ]


def _audits(labels: Iterable[Label]) -> list[Row]:
    """Return the recall of audited queries over time, in groups of equal size."""
    audited = [label for label in labels if label.uniform and label.served_arm in label.results]
    size = max(5, math.ceil(len(audited) / _BINS))
    groups = [audited[start : start + size] for start in range(0, len(audited), size)]
    return [
        {"at": group[-1].timestamp, "queries": len(group), "recall": mean, "low": low, "high": high}
        for group in groups
        for mean, low, high in [answers.interval([x.results[x.served_arm].recall for x in group])]
    ]


def _filters(policy: TemplatePolicy | None) -> list[Row]:
    """Return what filter values got, those first that were measured most."""
    if policy is None or not policy.filter_slots:
        return []
    most = sorted(policy.contexts.items(), key=lambda item: -item[1].labels)[:_FILTERS]
    rows = []
    for key, context in most:
        k, *values = (key.split(HASHED)[0] if is_hashed(key) else key).split("\x1f")
        words = [_cut("NULL" if value == "\x1e" else value) for value in values]
        rows.append(
            {
                "k": int(k),
                "values": ["(anonymous)"] if is_hashed(key) else words,
                "arm": policy.arms[context.arm].name,
                "expected_recall": context.expected_recall if context.labels else None,
                "labels": context.labels,
            }
        )
    return rows


def pattern_map(policy: TemplatePolicy | None) -> list[Row]:
    """Return the patterns on the plane of their two principal directions, with weight and difficulty.

    Difficulty is the mean recall that all arms lack on a pattern's curve: 0 easy, 1 hopeless.
    """
    query = policy.query if policy is not None else None
    if query is None or not query.weights:
        return []
    weights = np.frombuffer(query.weights, dtype="<f4")
    centroids = np.frombuffer(query.centroids, dtype="<f4").reshape(len(weights), -1)
    curves = np.frombuffer(query.curves, dtype="<f4").reshape(len(weights), -1)
    chosen = np.argsort(-weights, kind="stable")[:_POINTS]
    places = plane(centroids[chosen])
    difficulty = 1.0 - curves[chosen].mean(axis=1)
    return [
        {"x": float(x), "y": float(y), "weight": float(weight), "difficulty": float(hard)}
        for (x, y), weight, hard in zip(places, weights[chosen], difficulty, strict=True)
    ]


def plane(points: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return float64 [n, 2]: the points of [n, dimensions] along their two principal directions.

    By subspace iteration, which needs no decomposition of the size of the vectors.
    """
    centred = np.asarray(points, dtype=np.float64) - points.mean(axis=0, dtype=np.float64)
    basis = np.random.default_rng(0).normal(size=(centred.shape[1], 2))
    for _ in range(12):
        basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
    found: NDArray[np.float64] = centred @ basis
    if found.shape[1] == 1:
        found = np.hstack([found, np.zeros_like(found)])
    return found


def _query(state: TemplateState, trajectory: Trajectory, optimizer: SearchOptimizer) -> Row:
    """Return one query as it was served, and why the policy in force gives it what it gives it."""
    policy = state.policy
    row = {
        "at": trajectory.timestamp,
        "k": trajectory.k,
        "rows": trajectory.rows,
        "ms": trajectory.latency_ms,
        "arm": trajectory.arm,
        "trust": trajectory.trust.value,
        "error": trajectory.error,
        "values": [],
        "why": "nothing was decided yet",
    }
    if policy is None:
        return row
    values = filter_values(trajectory, policy.filter_slots, policy.value_types)
    row["values"] = ["NULL" if value is None else _cut(value) for value in values]
    vector = None if trajectory.vector is None else np.frombuffer(trajectory.vector, dtype="<f4")
    choice = optimizer.optimize(state.template.key, vector, trajectory.k + trajectory.offset, values)
    row["why"] = policy.reason if choice is None or choice.trust is Trust.OBSERVE else choice.reason
    return row


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
