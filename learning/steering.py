"""Another target than the table's, for one query: what a client has asked for.  Pure.

The policy holds what is known of every arm over all queries of the template (`TemplatePolicy.outlook`).
Among the arms whose recall is at least the wanted target, as surely as asked for, the quickest is taken;
where none is, the one of the highest recall, exact search if need be.

A *higher* target never gets an arm of less recall than the policy's own choice, which may know more about
this query (its filter value, its vector).  A *lower* one is met here for queries without filters; what a
filtered one gets is not told by the mean, and its policy holds choices for lower targets itself
(`TemplatePolicy.lowered`, `SearchOptimizer.optimize`).
"""

from __future__ import annotations

from learning.records import ArmEstimate, Choice, TemplatePolicy, Trust

_CAUTION = {"latency": 0.0, "balanced": 1.0, "recall": 2.05}  # standard errors, as in learning.distillation


def steered(policy: TemplatePolicy, choice: Choice, target: float | None, optimize_for: str | None) -> Choice:
    """Return the choice under another target, or the same."""
    if not policy.outlook or policy.trust is Trust.OBSERVE or (target is None and optimize_for is None):
        return choice
    wanted = policy.target_recall if target is None else target
    if wanted == policy.target_recall and optimize_for is None:
        return choice
    caution = _CAUTION[optimize_for or "balanced"]
    found = _best(policy.outlook, wanted, caution)
    if found is None:
        return choice
    arm = policy.arms[found]
    own = policy.arms.index(choice.arm) if choice.arm in policy.arms else -1
    higher = own < 0 or policy.outlook[found].recall > policy.outlook[own].recall
    stricter = wanted > policy.target_recall or (target is None and optimize_for == "recall")
    if own >= 0 and higher != stricter:
        return choice
    if not stricter and policy.filter_slots:
        return choice
    return Choice(
        arm=arm,
        trust=choice.trust,
        expected_recall=policy.outlook[found].recall,
        reason=f"the client asked for a recall of {wanted:g}",
    )


def _best(outlook: tuple[ArmEstimate, ...], target: float, caution: float) -> int | None:
    known = [index for index, arm in enumerate(outlook) if arm.recall >= 0.0]
    sure = [i for i in known if outlook[i].recall - caution * outlook[i].error >= target]
    if sure:
        return min(sure, key=lambda i: outlook[i].ms)
    return max(known, key=lambda i: outlook[i].recall, default=None)
