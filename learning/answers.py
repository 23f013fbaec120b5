"""What the learner knows of a table, as rows for SQL.  Reads only; no I/O.

Column names and types are declared in the proxy (proxy/interface/signatures.py); a test compares both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from learning.advice import TableView, for_rejected, for_table
from learning.curves import costs, estimate, evidence, ladders
from learning.dialects import AS_IS
from learning.explain import explain
from learning.feedback import Ratings
from learning.records import ArmEstimate, Label, TemplatePolicy, Trust
from learning.registry import TemplateState

_AUDITS = 200  # latest audited queries that the recall is about
_Z = 1.96  # of an interval of 95 %

Row = dict[str, Any]


def learning_stats(states: Iterable[TemplateState], ratings: Ratings, target: float) -> list[Row]:
    """Return a row for each template of a table."""
    return [_stats(state, ratings, target) for state in states]


def _stats(state: TemplateState, ratings: Ratings, target: float) -> Row:
    policy = state.policy
    audited = audits(state.labels)
    mean, low, high = interval(audited)
    arm = policy.arms[policy.fallback] if policy is not None else AS_IS
    return {
        "template": state.template.sql,
        "database": state.template.database,
        "username": state.template.user,
        "phase": state.phase.value,
        "trust": policy.trust.value if policy is not None else "observe",
        "reason": policy.reason if policy is not None else "nothing was decided yet",
        "trajectories": len(state.tracker) if state.tracker is not None else 0,
        "labels": len(state.labels),
        "audited_queries": len(audited),
        "recall": mean,
        "recall_low": low,
        "recall_high": high,
        "target_recall": policy.target_recall if policy is not None and policy.target_recall else target,
        "arm": arm.name,
        "settings": dict(arm.settings),
        "latency_before_ms": _median_ms(state.labels, lambda label: AS_IS.name),
        "latency_after_ms": _median_ms(state.labels, lambda label: label.served_arm),
        "patterns": pattern_count(policy),
        "feedback": ratings.queries,
        "feedback_missed": ratings.missed,
        "memory_bytes": memory(state),
    }


def audits(labels: Iterable[Label]) -> list[float]:
    """Return the recall that the latest queries drawn uniformly were really served with."""
    found = [
        label.results[label.served_arm].recall
        for label in labels
        if label.uniform and label.served_arm in label.results
    ]
    return found[-_AUDITS:]


def interval(recalls: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the mean and a 95 % interval by its standard error, within [0, 1]; None where unknown."""
    if not recalls:
        return None, None, None
    mean = statistics.fmean(recalls)
    if len(recalls) < 2:
        return mean, None, None
    half = _Z * statistics.stdev(recalls) / math.sqrt(len(recalls))
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def _median_ms(labels: Iterable[Label], arm: Any) -> float | None:
    found = [label.results[arm(label)].ms for label in labels if arm(label) in label.results]
    return statistics.median(found[-_AUDITS:]) if found else None


def pattern_count(policy: TemplatePolicy | None) -> int:
    """Return the number of patterns behind a policy: centres of queries, or contexts."""
    if policy is None:
        return 0
    return len(policy.query.weights) // 4 if policy.query is not None else len(policy.contexts)


def memory(state: TemplateState) -> int:
    """Estimate the bytes that the learner keeps of a template."""
    labels = sum(len(label.vector or b"") + 64 * len(label.results) + 200 for label in state.labels)
    recent = state.tracker.get_recent(len(state.tracker)) if state.tracker is not None else []
    window = sum(len(trajectory.vector or b"") + 500 for trajectory in recent)
    query = state.policy.query if state.policy is not None else None
    patterns = len(query.centroids) + len(query.curves) if query is not None else 0
    return labels + window + patterns


def tuned(state: TemplateState, measured: int) -> list[Row]:
    """Return a row for each arm that was measured."""
    policy = state.policy
    if policy is None:
        return []
    chosen = policy.arms[policy.fallback]
    return [
        {
            "template": state.template.sql,
            "k": state.max_k,
            "arm": arm.name,
            "settings": dict(arm.settings),
            "recall": outlook.recall,
            "latency_ms": outlook.ms,
            "measured": measured,
            "target_recall": policy.target_recall,
            "chosen": arm == chosen and policy.trust is not Trust.OBSERVE,
        }
        for arm, outlook in zip(policy.arms, policy.outlook, strict=False)
        if outlook.recall >= 0.0
    ]


def with_outlook(policy: TemplatePolicy, labels: Sequence[Label]) -> TemplatePolicy:
    """Return a policy that also tells what is known of every arm over all labels."""
    known = evidence(labels, policy.arms)
    if not len(known):
        return policy
    ms, recall = costs(known.ms, ladders(policy.arms)), estimate(known.recall, known.weight)
    outlook = tuple(
        ArmEstimate(float(mean), float(error), float(cost))
        if np.isfinite(cost) and np.isfinite(mean)
        else ArmEstimate(-1.0, 0.0, 0.0)
        for mean, error, cost in zip(recall.mean, recall.error, ms, strict=True)
    )
    return msgspec.structs.replace(policy, outlook=outlook)


def recommend_params(states: Iterable[TemplateState], target: float) -> list[Row]:
    """Return settings, index parameters and advice, each with what speaks for it."""
    rows: list[Row] = []
    for state in states:
        policy = state.policy
        if policy is None:
            continue
        labels = tuple(state.labels)
        if len(policy.arms) > 1:
            arm = policy.arms[policy.fallback]
            rows += [
                _row("setting", name, value, f"{policy.reason}; arm {arm.name} of {state.template.sql}")
                for name, value in arm.settings
            ]
        if state.confirmed is None:
            found = for_rejected(policy.reason, policy.table, state.template.column, state.template.operator)
        else:
            facts, indexes = state.confirmed.facts, state.confirmed.indexes
            rows += [
                row for index in indexes for row in _index_rows(index, facts.rows, policy, labels, target)
            ]
            view = TableView(policy.table, state.template.column, facts.rows, indexes)
            found = for_table(view, policy.arms, labels, policy.target_recall)
        rows += [_row("advice", advice.code, None, advice.text) for advice in found]
    unique = {(row["kind"], row["name"], row["value"]): row for row in rows}
    return list(unique.values())


def _row(kind: str, name: str, value: str | None, reason: str) -> Row:
    return {"kind": kind, "name": name, "value": value, "reason": reason}


def _index_rows(
    index: Any, rows: float, policy: TemplatePolicy, labels: Sequence[Label], target: float
) -> list[Row]:
    """Return build parameters for an index, by pgvector's rules of thumb and by what was measured."""
    if index.method == "ivfflat":
        lists = max(10, round(rows / 1000) if rows <= 1e6 else round(math.sqrt(rows)))
        why = f"{rows:.0f} rows: rows / 1000 up to a million, their square root above (pgvector's advice)"
        return [_row("index", f"{index.name}.lists", str(lists), f"{why}; it was built with {index.lists}")]
    if index.method != "hnsw":
        return []
    m, ef = index.m or 16, index.ef_construction or 64
    reached = _least_effort(policy, labels, target)
    if labels and reached is None:
        m, ef, why = min(100, 2 * m), min(1000, max(128, 2 * ef)), f"no ef_search reaches {target:g}"
    elif reached is not None and reached >= 200:
        m, ef, why = min(100, 2 * m), min(1000, max(128, 2 * ef)), f"{target:g} needs ef_search {reached}"
    else:
        why = "what there is reaches the target" if labels else "nothing was measured yet"
    return [
        _row("index", f"{index.name}.m", str(m), f"{why}; it was built with {index.m or 16}"),
        _row(
            "index",
            f"{index.name}.ef_construction",
            str(ef),
            f"{why}; it was built with {index.ef_construction or 64}",
        ),
    ]


def _least_effort(policy: TemplatePolicy, labels: Sequence[Label], target: float) -> int | None:
    """Return the smallest measured effort whose mean recall is at least the target."""
    for arm in sorted((arm for arm in policy.arms if arm.effort), key=lambda arm: arm.effort):
        recalls = [label.results[arm.name].recall for label in labels if arm.name in label.results]
        if recalls and statistics.fmean(recalls) >= target:
            return arm.effort
    return None


def search_params(
    states: Iterable[TemplateState], vector: np.ndarray[Any, Any], k: int | None, version: int
) -> list[Row]:
    """Return what a query with this vector would get from each template, and why."""
    rows = []
    for state in states:
        if state.policy is None:
            continue
        wanted = k if k is not None else (state.ks.most_common(1)[0][0] if state.ks else state.policy.min_k)
        found = explain(
            state.template, state.policy, tuple(state.labels), vector=vector, k=wanted, version=version
        )
        settings = found.settings
        rows.append(
            {
                "template": found.template,
                "k": wanted,
                "arm": found.arm,
                "settings": settings,
                "ef_search": _integer(settings.get("hnsw.ef_search")),
                "probes": _integer(settings.get("ivfflat.probes")),
                "expected_recall": found.expected_recall,
                "target_recall": found.target_recall or None,
                "trust": found.trust,
                "reason": found.reason if found.trust != "observe" else found.policy,
            }
        )
    return rows


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
