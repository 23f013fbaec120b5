"""Why a query gets the settings that it gets, as one record: for the command line, SQL, a dashboard.  Pure.

`explain` asks the same `SearchOptimizer` that serves the traffic, and sets beside its choice what is known of
every arm: over all labels of this kind of query, and over the labelled queries most like this one (weighted
by cosine similarity, as the ReasoningBank does).  How sure the choice is, is the probability that its recall
is at least the target, by the standard error of those labels: a figure to compare choices by, no guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from learning.advice import Advice
from learning.curves import Evidence, Floats, costs, estimate, evidence, ladders
from learning.optimizer import SearchOptimizer
from learning.records import Arm, Label, Snapshot, Template, TemplatePolicy, context_key

NEAREST = 20
_SHARPNESS = 8.0  # weight of a labelled query = exp(sharpness * (cosine - 1))
_FEW = 5  # labels; below, nothing is said about how sure a choice is


class ArmOutlook(msgspec.Struct, frozen=True):
    """What is known of one arm for queries of this kind; None where it was not measured."""

    name: str
    settings: dict[str, str]
    recall: float | None
    nearby: float | None  # recall over the labelled queries most like this one
    ms: float | None
    chosen: bool


class Explanation(msgspec.Struct, frozen=True):
    """The answer; recalls and shares in [0, 1], times in milliseconds."""

    table: str
    template: str  # its canonical text
    context: dict[str, str]  # k, and filter values by column
    trust: str
    target_recall: float
    policy_version: int
    arm: str
    settings: dict[str, str]
    expected_recall: float | None
    sure: float | None  # probability that its recall is at least the target
    reason: str  # why this arm
    policy: str  # why the policy is what it is
    labels: int  # measured queries of this kind
    similarity: float | None  # cosine with the most similar one
    difficulty: str  # in words, from the labelled queries around
    arms: tuple[ArmOutlook, ...]
    advice: tuple[Advice, ...] = ()
    live: bool = False  # from the running learner, not from what it has kept


def explain(
    template: Template,
    policy: TemplatePolicy,
    labels: Sequence[Label],
    *,
    vector: NDArray[np.float32] | None,
    k: int,
    values: tuple[str | None, ...] = (),
    version: int = 0,
    advice: Sequence[Advice] = (),
    optimizer: SearchOptimizer | None = None,
    live: bool = False,
) -> Explanation:
    """Explain one query.

    Parameters
    ----------
    policy
        In force for the template.
    labels
        Of the template, in any order.
    k
        LIMIT + OFFSET.
    values
        Canonical filter values in the order of `TemplatePolicy.filter_slots`.
    optimizer
        One that serves `policy`; by default it is made, which takes a second where there is a sample of the
        table.
    live
        The policy is the one in force, not the one that was kept last.
    """
    if optimizer is None:
        optimizer = SearchOptimizer(Snapshot(version, 0.0, {template.key: policy}))
    choice = optimizer.optimize(template.key, vector, k, values)
    arm = choice.arm if choice is not None else policy.arms[0]
    own = _of_the_kind(labels, context_key(k, values), k)
    known = evidence(own, policy.arms)
    nearness, similarity = _nearness(own, vector)
    columns = [
        template.slots[slot].column or f"${slot + 1}"
        for slot in policy.filter_slots
        if slot < len(template.slots)
    ]
    outlooks = _outlooks(policy.arms, known, nearness, arm)
    return Explanation(
        table=policy.table,
        template=template.sql,
        context={
            "k": str(k),
            **{c: "NULL" if v is None else v for c, v in zip(columns, values, strict=False)},
        },
        trust=(choice.trust if choice is not None else policy.trust).value,
        target_recall=policy.target_recall,
        policy_version=version,
        arm=arm.name,
        settings=dict(arm.settings),
        expected_recall=choice.expected_recall if choice is not None else None,
        sure=_sure(policy, arm, known, nearness),
        reason=choice.reason if choice is not None else "it runs as it came",
        policy=policy.reason,
        labels=len(own),
        similarity=similarity,
        difficulty=_difficulty(outlooks),
        arms=outlooks,
        advice=tuple(advice),
        live=live,
    )


def _of_the_kind(labels: Sequence[Label], context: str, k: int) -> list[Label]:
    """Return the labels of the context; where there are none, those of its k; else all."""
    exactly = [label for label in labels if label.context == context]
    return exactly or [label for label in labels if label.k == k] or list(labels)


def _nearness(
    labels: Sequence[Label], vector: NDArray[np.float32] | None
) -> tuple[Floats | None, float | None]:
    """Return the weight of each label (ordered by time) by its likeness to the query, and the best cosine."""
    ordered = sorted(labels, key=lambda label: label.timestamp)
    if vector is None or not ordered:
        return None, None
    size = 4 * len(vector)
    known = [label.vector is not None and len(label.vector) == size for label in ordered]
    if not any(known):
        return None, None
    blank = bytes(size)
    rows = np.frombuffer(
        b"".join((x.vector or blank) if ok else blank for x, ok in zip(ordered, known, strict=True)),
        dtype="<f4",
    ).reshape(len(ordered), -1)
    norms = np.linalg.norm(rows, axis=1) * float(np.linalg.norm(vector))
    cosine = np.where(norms > 0.0, (rows @ vector) / np.maximum(norms, 1e-12), -1.0).astype(np.float64)
    weight = np.exp(_SHARPNESS * (cosine - 1.0)) * np.array(known)
    if len(weight) > NEAREST:
        weight[weight < np.sort(weight)[-NEAREST]] = 0.0
    return weight, float(cosine[np.array(known)].max())


def _outlooks(
    arms: Sequence[Arm], known: Evidence, nearness: Floats | None, chosen: Arm
) -> tuple[ArmOutlook, ...]:
    measured = len(known) > 0
    ms = costs(known.ms, ladders(arms)) if measured else np.full(len(arms), np.inf)
    mean = estimate(known.recall, known.weight).mean if measured else np.zeros(len(arms))
    near = estimate(known.recall, nearness).mean if nearness is not None and nearness.sum() > 0 else None
    found = []
    for index, arm in enumerate(arms):
        seen = bool(np.isfinite(ms[index]))
        found.append(
            ArmOutlook(
                name=arm.name,
                settings=dict(arm.settings),
                recall=float(mean[index]) if seen else None,
                nearby=float(near[index]) if seen and near is not None else None,
                ms=float(ms[index]) if seen else None,
                chosen=arm == chosen,
            )
        )
    return tuple(found)


def _sure(policy: TemplatePolicy, arm: Arm, known: Evidence, nearness: Floats | None) -> float | None:
    if arm.kind == "exact":
        return 1.0
    if arm not in policy.arms or len(known) < _FEW:
        return None
    by_vector = policy.query is not None and nearness is not None and nearness.sum() > 0
    found = estimate(known.recall[:, policy.arms.index(arm)], nearness if by_vector else known.weight)  # type: ignore[arg-type]
    error = max(float(found.error), 1e-9)
    return 0.5 * (1.0 + math.erf((float(found.mean) - policy.target_recall) / (error * math.sqrt(2.0))))


def _difficulty(outlooks: Sequence[ArmOutlook]) -> str:
    """Say how the labelled queries around compare with all, by their mean recall under the index arms."""
    pairs = [
        (x.nearby, x.recall)
        for x in outlooks
        if x.nearby is not None and x.recall is not None and x.name not in ("exact", "as is")
    ]
    if not pairs:
        return "not known: no labelled query to compare with"
    near = sum(1.0 - a for a, _ in pairs) / len(pairs)
    usual = sum(1.0 - b for _, b in pairs) / len(pairs)
    if usual <= 1e-6:
        return "no query of this kind is hard for the index"
    ratio = near / usual
    words = "harder than usual" if ratio > 1.25 else "easier than usual" if ratio < 0.8 else "about usual"
    return f"{words}: similar queries miss {ratio:.1f} times as much as all of this kind"
