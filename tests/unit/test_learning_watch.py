"""A template under watch: which audits count, what a suspicion buys, what is held until there are labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from learning.dialects import IndexInfo, ladder
from learning.drift import RECENT, Kind, World
from learning.policy import Publication, held
from learning.records import ArmResult, ContextPolicy, Label, TemplatePolicy, Trajectory, Trust
from learning.watch import ROUNDS, URGENT, Holding, Watch, expected_recall

ARMS = ladder([IndexInfo("i", "hnsw")], filtered=False, max_k=10)
SERVED = next(arm for arm in ARMS if arm.name == "ef=40")
POLICY = TemplatePolicy(
    template="t",
    table="public.items",
    trust=Trust.STATIC,
    reason="measured",
    target_recall=0.98,
    arms=ARMS,
    value_types=(),
    filter_slots=(),
    fallback=ARMS.index(SERVED),
    contexts={"10": ContextPolicy(ARMS.index(SERVED), 0.985, 200)},
)
OBSERVING = msgspec.structs.replace(POLICY, trust=Trust.OBSERVE, contexts={}, fallback=0, reason="too few")


def asked(at: float = 1.0, version: int = 1, arm: str = "ef=40", vector: Any = None) -> Trajectory:
    data = None if vector is None else np.asarray(vector, dtype="<f4").tobytes()
    settings = () if arm == "as is" else SERVED.settings
    return Trajectory(b"0" * 16, "t", at, data, 10, 0, (), arm, settings, Trust.STATIC, version, 10, 1.0, 1.0)


def label(recall: float, arm: str = "ef=40") -> Label:
    return Label("t", "10", 0.0, None, 10, 10, {arm: ArmResult(recall, 10, 1.0)}, arm, True)


def alarm(watch: Watch, policy: TemplatePolicy = POLICY, **query: Any) -> bool:
    found = [watch.audited(label(0.5), asked(**query), policy, 0.98) for _ in range(20)]
    return any(found)


def test_fallen_recall_is_a_change_and_says_since_when() -> None:
    watch = Watch()
    watch.published(1)
    assert watch.audited(label(1.0), asked(at=1.0), POLICY, 0.98) is None
    changes = [watch.audited(label(0.5), asked(at=float(at)), POLICY, 0.98) for at in range(2, 10)]
    change = next(change for change in changes if change is not None)
    assert (change.kind, change.since) == (Kind.RECALL, 2.0)


def test_only_what_the_policy_in_force_served_is_held_against_it() -> None:
    watch = Watch()
    watch.published(5)
    assert not alarm(watch, version=4)
    assert alarm(watch, version=5)
    assert not alarm(Watch(), OBSERVING)
    assert not alarm(Watch(), arm="as is")  # the client's own settings


def test_where_nothing_keeps_the_target_the_expected_recall_is_what_counts() -> None:
    poor = msgspec.structs.replace(POLICY, contexts={"10": ContextPolicy(3, 0.5, 200)})
    assert expected_recall(poor, "10", asked(), 0.98) == 0.5
    assert not alarm(Watch(), poor)


def test_suspicion_buys_audits_and_lapses_when_they_find_nothing() -> None:
    watch = Watch()
    rng = np.random.default_rng(0)
    for _ in range(5 * RECENT):
        assert not watch.asked(asked(vector=rng.normal(size=16) + 2.0))
    suspected = [watch.asked(asked(vector=rng.normal(size=16) - 2.0)) for _ in range(2 * RECENT)]
    assert sum(suspected) == 1
    assert watch.audits_due == URGENT
    for _ in range(URGENT):
        assert watch.audited(label(1.0), asked(), POLICY, 0.98) is None
    assert watch.audits_due == 0
    later = [watch.asked(asked(vector=rng.normal(size=16) - 2.0)) for _ in range(5 * RECENT)]
    assert not any(later)  # it is the usual mix now


def suspected(recalls: Iterable[float]) -> tuple[list[Kind], int]:
    """Audit queries under suspicion; return the changes, and how many audits it took."""
    watch, count = Watch(), 0
    watch.suspect(0.0)
    for recall in recalls:
        if not watch.audits_due:
            break
        count += 1
        change = watch.audited(label(recall), asked(), POLICY, 0.98)
        if change is not None:
            return [change.kind], count
    return [], count


def test_alarm_under_suspicion_is_a_changed_mix() -> None:
    assert suspected([0.5] * 9) == ([Kind.MIX], 6)


def test_recall_a_little_below_is_enough_where_other_queries_are_asked() -> None:
    kinds, count = suspected([1.0, 1.0, 0.9] * 40)  # 0.967: a CUSUM alone would take a hundred audits
    assert kinds == [Kind.MIX]
    assert count <= ROUNDS * URGENT


def test_recall_that_is_kept_but_for_a_little_ends_a_suspicion_with_the_first_audits() -> None:
    assert suspected([1.0, 1.0, 1.0, 1.0, 0.9] * 40) == ([], URGENT)


def test_unlucky_audits_under_suspicion_are_followed_by_more() -> None:
    """One query of thirty that found next to nothing is no proof that learning has to begin anew."""
    unlucky = [1.0] * 20 + [0.2] + [1.0] * 9
    assert suspected(unlucky + [1.0] * 60) == ([], 2 * URGENT)


def test_audits_of_an_older_policy_do_not_prolong_a_suspicion_for_ever() -> None:
    watch = Watch()
    watch.suspect(0.0)
    watch.published(7)
    for _ in range(ROUNDS * URGENT):
        watch.audited(label(0.0), asked(version=6), POLICY, 0.98)
    assert watch.audits_due == 0


def test_catalogs_are_compared_with_what_they_said_when_learning_began() -> None:
    watch = Watch()
    assert watch.looked(World((), 1000.0), 1.0) is None
    for rows in (1200.0, 1450.0):  # slowly
        assert watch.looked(World((), rows), 1.0) is None
    assert watch.looked(World((), 1550.0), 1.0) is not None
    assert watch.looked(World((), 1600.0), 1.0) is None


def test_safe_arm_is_held_only_while_there_are_too_few_labels() -> None:
    holding = Holding("ef=160", "index i rebuilt", 0.0)
    assert held(POLICY, holding) is POLICY
    assert held(OBSERVING, None) is OBSERVING
    safe = held(OBSERVING, holding)
    assert safe.trust is Trust.STATIC
    assert safe.arms[safe.fallback].name == "ef=160"
    assert "until it is measured anew" in safe.reason
    gone = held(OBSERVING, Holding("probes=3", "index gone", 0.0))
    assert gone.arms[gone.fallback].name == "ef=1000"


def test_urgent_change_of_arms_does_not_wait() -> None:
    publication = Publication()
    assert publication.next({"t": POLICY}, 100.0) is not None
    other = msgspec.structs.replace(POLICY, fallback=9)
    assert publication.next({"t": other}, 100.1) is None
    assert publication.next({"t": other}, 100.1, urgent=True) is not None
    assert publication.next({"t": other}, 100.2, urgent=True) is None
