"""From labels to a published snapshot: when to derive a policy, and whether it is worth sending.

Deriving takes CPU and runs in a thread.  A snapshot is sent when a policy changed *materially*, that is, when
some query would get another arm; changes of figures alone wait for `REFRESH` seconds.  Versions only grow,
across restarts too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping

import msgspec

from config.schema import Config
from learning.calibration import level_of
from learning.canary import Canaries
from learning.dialects import AS_IS
from learning.distillation import Options, distill
from learning.drift import safe_arm
from learning.feedback import Ratings, attainable
from learning.floors import enough, floors
from learning.inventory import Confirmed
from learning.records import Arm, ContextPolicy, Snapshot, TemplatePolicy, Trust
from learning.registry import TemplateState
from learning.repetition import Asked, Repetition
from learning.watch import Holding

REFRESH = 30.0  # seconds between snapshots that change figures only
SETTLE = 1.0  # seconds between snapshots that change arms; a change of trust goes out at once
SETTLE_PATTERNS = (
    10.0  # the same where patterns are among them: megabytes, and an index to be built in every worker
)
ENOUGH_NEW = 25  # labels after which a policy is derived at once
NOT_ADAPTIVE = "adaptive search is switched off for this table in the configuration"
NO_LEARNING = "learning is switched off for this table in the configuration"


def derivation(
    state: TemplateState, config: Config, ratings: Ratings | None = None
) -> Callable[[], TemplatePolicy]:
    """Return the computation of a confirmed template's policy, on copies of what is known, for a thread.

    `ratings`: what users said about the table's results.
    """
    assert state.confirmed is not None
    facts = state.confirmed.facts
    table = config.table(facts.table)
    target = table.target_recall
    if ratings is not None:
        labels_of_one_k = max(Counter(label.k for label in state.labels).values(), default=0)
        target = attainable(ratings.target(target), target, labels_of_one_k)
    options = Options(
        target_recall=target,
        optimize_for=table.optimize_for,
        learning_rate=table.learning_rate,
        min_samples=table.min_samples,
        max_patterns=table.max_patterns,
        pattern_similarity=table.pattern_similarity,
        sketch=config.learning.sketch_rows > 0,
    )
    arms, labels, traffic = state.confirmed.arms, tuple(state.labels), state.traffic.rounded()
    contexts = {label.context for label in labels} if not facts.filter_slots else set()
    repetition = state.tracker.repetition if state.tracker is not None else Repetition()
    counted = {context: repetition.asked(context) for context in contexts}
    known = state.shelved if state.shelved is not None else state.policy
    previous = known if known is not None and known.trust is not Trust.OBSERVE else None

    def asked(context: str) -> Asked:
        return counted.get(context, Asked())

    holding = state.watch.holding
    least = _least(state.confirmed)
    serving = previous.query if previous is not None else None
    stopwatch = state.lived.stopwatch(level_of(serving) if serving is not None else None)

    def derive() -> TemplatePolicy:
        policy = distill(
            state.template,
            facts,
            arms,
            labels,
            traffic,
            options,
            asked=asked,
            previous=previous,
            stopwatch=stopwatch,
        )
        return held(msgspec.structs.replace(policy, floors=least), holding)

    return derive


def _least(confirmed: Confirmed) -> tuple[tuple[int, int], ...]:
    used = confirmed.used.get(confirmed.arms[0].name, ())
    return floors(confirmed.arms, confirmed.indexes, confirmed.usual, used, confirmed.facts.rows)


def wants_rows(state: TemplateState) -> bool:
    """Tell whether an unmeasured template's queries ask for more rows than their index returns."""
    if state.confirmed is None or (state.policy is not None and state.policy.trust is not Trust.OBSERVE):
        return False
    return enough(_least(state.confirmed), max(state.ks, default=1)) is not None


def held(policy: TemplatePolicy, holding: Holding | None) -> TemplatePolicy:
    """Return the policy, or, where it has too few labels since a change, one that serves the safe arm."""
    if holding is None or policy.trust is not Trust.OBSERVE:
        return policy
    arm = next((index for index, arm in enumerate(policy.arms) if arm.name == holding.arm), None)
    if arm is None:  # its index is gone
        arm = safe_arm(
            policy.arms,
            (),
            target=policy.target_recall,
            max_exact_ms=Options().max_exact_ms,
            filtered=bool(policy.filter_slots),
        )
    return msgspec.structs.replace(
        policy,
        trust=Trust.CONTEXT if policy.filter_slots else Trust.STATIC,
        reason=f"{holding.words}: {policy.arms[arm].name} for every query until it is measured anew; "
        + policy.reason,
        fallback=arm,
    )


def material(old: TemplatePolicy | None, new: TemplatePolicy) -> bool:
    """Tell whether some query could get another arm under the new policy."""
    if old is None or old.trust is not new.trust:
        return True
    if new.trust is Trust.OBSERVE:
        if _floors(old) != _floors(new):
            return True
        return left_alone(new) and old.reason != new.reason  # otherwise it still collects labels
    return _outline(old) != _outline(new) or _patterns_changed(old, new)


def _outline(policy: TemplatePolicy) -> tuple[object, ...]:
    return (
        policy.table,
        policy.trust,
        policy.target_recall,
        policy.arms,
        policy.value_types,
        policy.filter_slots,
        policy.fallback,
        _choices(policy.contexts),
        _choices(policy.buckets),
        policy.min_k,
        policy.max_k,
        _floors(policy),
    )


def _floors(policy: TemplatePolicy) -> list[tuple[int, Arm]]:
    return [(rows, policy.arms[number]) for rows, number in policy.floors]


def _choices(contexts: Mapping[str, ContextPolicy] | Mapping[int, ContextPolicy]) -> dict[object, int]:
    return {context: choice.arm for context, choice in contexts.items()}


def _patterns_changed(old: TemplatePolicy, new: TemplatePolicy) -> bool:
    if old.query is None or new.query is None:
        return old.query is not new.query
    before, after = len(old.query.weights), len(new.query.weights)
    grown = abs(after - before) > 0.1 * before
    moved = abs(new.query.price - old.query.price) > 0.2 * abs(old.query.price)
    return grown or moved or set(old.query.extra) != set(new.query.extra)


def permitted(snapshot: Snapshot, config: Config) -> Snapshot:
    """Return a stored snapshot with the tables left alone that the configuration now says to leave alone."""
    templates = {key: allowed(policy, config) for key, policy in snapshot.templates.items()}
    return Snapshot(snapshot.version, snapshot.created_at, templates, snapshot.format)


def allowed(policy: TemplatePolicy, config: Config) -> TemplatePolicy:
    """Return a policy, or the one that leaves its queries as they came where the configuration wants that."""
    options = config.table(policy.table)
    if options.adaptive_search or left_alone(policy):
        return policy
    return TemplatePolicy(
        template=policy.template,
        table=policy.table,
        trust=Trust.OBSERVE,
        reason=NOT_ADAPTIVE if options.learning else NO_LEARNING,
        target_recall=policy.target_recall,
        arms=(AS_IS,),
        value_types=(),
        filter_slots=(),
        fallback=0,
        contexts={},
    )


def left_alone(policy: TemplatePolicy) -> bool:
    """Tell whether a policy leaves its queries as they came, whatever is measured."""
    return policy.trust is Trust.OBSERVE and len(policy.arms) == 1


def summary(snapshot: Snapshot) -> str:
    """Say in a few words what a snapshot holds: templates by table and trust."""
    counts = Counter((policy.table, policy.trust.value) for policy in snapshot.templates.values())
    return ", ".join(
        f"{table} {trust}" + (f" x{n}" if n > 1 else "") for (table, trust), n in sorted(counts.items())
    )


def settled(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot with what served before in place of what is on trial: a trial is not for keeping."""
    if not snapshot.baselines:
        return snapshot
    templates = {**snapshot.templates, **snapshot.baselines}
    return msgspec.structs.replace(
        snapshot, templates=templates, baselines={}, baseline_versions={}, canary_share=0.0
    )


class Publication:
    """The policies in force, as the next snapshot."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self._published: dict[str, TemplatePolicy] = {}
        self._published_at = 0.0
        self._on_trial: frozenset[str] = frozenset()

    @property
    def policies(self) -> Mapping[str, TemplatePolicy]:
        """What was published last, by template."""
        return self._published

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a stored snapshot."""
        self.version = max(self.version, snapshot.version)
        self._published = dict(snapshot.templates)

    def next(
        self,
        policies: Mapping[str, TemplatePolicy],
        now: float,
        *,
        urgent: bool = False,
        canaries: Canaries | None = None,
        trying: Callable[[str, TemplatePolicy, TemplatePolicy], bool] = lambda key, old, new: False,
    ) -> Snapshot | None:
        """Return the snapshot to publish, or None where nothing has changed that matters yet.

        `urgent`: any material change goes out at once.  `canaries`: the trials under way; `trying` begins one
        for a template with its policies before and after, where that is possible.
        """
        trials = canaries.trials if canaries is not None else {}
        over = self._on_trial - trials.keys()
        if not over and not self._is_due(policies, math.inf if urgent else now - self._published_at):
            return None
        self.version += 1
        for key, policy in policies.items():
            before = self._published.get(key)
            changed = before is not None and key not in over and material(before, policy)
            if before is not None and changed and trying(key, before, policy):
                trials[key].old_version, trials[key].new_version = self.version - 1, self.version
        self._on_trial = frozenset(trials)
        self._published = dict(policies)
        self._published_at = now
        return Snapshot(
            self.version,
            now,
            dict(policies),
            baselines={key: trial.old for key, trial in trials.items()},
            baseline_versions={key: trial.old_version for key, trial in trials.items()},
            canary_share=canaries.share if canaries is not None else 0.0,
        )

    def _is_due(self, policies: Mapping[str, TemplatePolicy], age: float) -> bool:
        old = self._published
        if policies.keys() != old.keys():
            return True
        changed = [(old[key], policy) for key, policy in policies.items() if policy is not old[key]]
        if any(before.trust is not after.trust for before, after in changed):
            return True
        settle = SETTLE_PATTERNS if any(policy.query is not None for policy in policies.values()) else SETTLE
        if age >= settle and any(material(before, after) for before, after in changed):
            return True
        return bool(changed) and age >= REFRESH
