"""Trials of new policies with simulated evidence: who is sent back, how seldom by mistake, and what follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest

from learning.canary import (
    ALPHA,
    ENOUGH,
    ENOUGH_AUDITS,
    FIRST_REST,
    NOBODY,
    Canaries,
    Outcome,
    Trial,
)
from learning.optimizer import SearchOptimizer
from learning.policy import Publication, settled
from learning.records import Arm, ContextPolicy, Snapshot, TemplatePolicy, Trust
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.sql import Scope

ARMS = (
    Arm("as is", (), "as-is"),
    Arm("ef=40", (("hnsw.ef_search", "40"),), "hnsw", 40),
    Arm("ef=80", (("hnsw.ef_search", "80"),), "hnsw", 80),
)


def policy(arm: int, *, target: float = 0.98, trust: Trust = Trust.STATIC, key: str = "k") -> TemplatePolicy:
    return TemplatePolicy(
        template=key,
        table="public.items",
        trust=trust,
        reason="made by a test",
        target_recall=target,
        arms=ARMS,
        value_types=(),
        filter_slots=(),
        fallback=arm,
        contexts={"10": ContextPolicy(arm, 0.99, 100)},
    )


OLD, NEW = policy(1), policy(2)


@dataclass(frozen=True)
class Behaviour:
    """How a policy really is: median milliseconds, share of queries that take fifty times as long, recall."""

    ms: float = 2.0
    slow: float = 0.0
    recall: float = 0.985


def run(old: Behaviour, new: Behaviour, seed: int, *, seconds: float = 60.0) -> Outcome:
    """Simulate a trial: 20 queries a second, a fifth to the new policy, four audits a second."""
    rng = np.random.default_rng(seed)
    trial = Trial(OLD, NEW, 0.0, old_version=6, new_version=7)
    for tick in range(int(20 * seconds) + 1):
        now = tick / 20
        is_new = rng.random() < 0.2
        how = new if is_new else old
        ms = how.ms * math.exp(0.5 * rng.standard_normal()) * (50 if rng.random() < how.slow else 1)
        trial.served(7 if is_new else 6, ms, now)
        if tick % 5 == 0:
            trial.compared(rng.binomial(10, old.recall) / 10, rng.binomial(10, new.recall) / 10)
        outcome = trial.verdict(now, seconds)
        if outcome is not None:
            return outcome
    raise AssertionError("a trial without end")


def shares(old: Behaviour, new: Behaviour, runs: int = 200) -> dict[Outcome, float]:
    outcomes = [run(old, new, seed) for seed in range(runs)]
    return {outcome: outcomes.count(outcome) / runs for outcome in Outcome}


def test_a_policy_that_is_as_good_is_hardly_ever_sent_back() -> None:
    found = shares(Behaviour(), Behaviour(), 600)
    back = found[Outcome.RECALL] + found[Outcome.LATENCY]
    assert back <= 2 * ALPHA + 3 * math.sqrt(2 * ALPHA / 600)
    assert found[Outcome.PROMOTED] == pytest.approx(1 - back)


@pytest.mark.parametrize(
    ("new", "outcome", "at_least"),
    [
        (Behaviour(ms=5.0), Outcome.LATENCY, 0.95),
        (Behaviour(ms=40.0), Outcome.LATENCY, 0.99),
        (Behaviour(slow=0.5), Outcome.LATENCY, 0.95),
        (Behaviour(recall=0.6), Outcome.RECALL, 0.95),
        (Behaviour(recall=0.3), Outcome.RECALL, 0.99),
        (Behaviour(ms=0.5, recall=0.4), Outcome.RECALL, 0.99),  # faster is no excuse
    ],
)
def test_a_policy_that_is_worse_is_sent_back(new: Behaviour, outcome: Outcome, at_least: float) -> None:
    assert shares(Behaviour(), new, 100)[outcome] >= at_least


def test_slower_is_no_fault_where_the_old_one_owed_recall() -> None:
    owing = Behaviour(recall=0.7)
    assert shares(owing, Behaviour(ms=4.0, recall=0.99), 100)[Outcome.PROMOTED] >= 0.9
    assert shares(owing, Behaviour(ms=40.0, recall=0.7), 100)[Outcome.LATENCY] >= 0.9


def test_a_policy_below_the_old_one_but_above_the_target_is_what_is_wanted() -> None:
    """The old one found everything, dearly; the new one keeps the target for less."""
    found = shares(Behaviour(ms=8.0, recall=1.0), Behaviour(ms=2.0, recall=0.982), 200)
    assert found[Outcome.PROMOTED] >= 1 - 2 * ALPHA - 0.03


def test_a_trial_ends_without_traffic_and_when_time_is_up() -> None:
    trial = Trial(OLD, NEW, 100.0, old_version=6, new_version=7)
    assert trial.verdict(100.0 + NOBODY - 0.1, 60.0) is None
    assert trial.verdict(100.0 + NOBODY, 60.0) is Outcome.PROMOTED
    trial.served(7, 1.0, 159.0)
    assert trial.verdict(159.9, 60.0) is None
    assert trial.verdict(160.0, 60.0) is Outcome.PROMOTED


def test_audits_are_waited_for_until_time_is_up() -> None:
    trial = Trial(OLD, NEW, 0.0, old_version=6, new_version=7)
    for second in range(60):
        for number in range(2 * ENOUGH):
            trial.served(6 + number % 2, 1.0, float(second))
        assert trial.verdict(second + 0.5, 60.0) is None
    assert trial.verdict(60.0, 60.0) is Outcome.PROMOTED


def test_the_last_audit_ends_the_waiting() -> None:
    trial = Trial(OLD, NEW, 0.0, old_version=6, new_version=7)
    for number in range(2 * ENOUGH):
        trial.served(6 + number % 2, 1.0, 30.0)
    for _ in range(ENOUGH_AUDITS - 1):
        trial.compared(1.0, 1.0)
    assert trial.verdict(31.0, 60.0) is None
    trial.compared(1.0, 1.0)
    assert trial.verdict(31.0, 60.0) is Outcome.PROMOTED


def test_a_policy_that_loses_rows_is_found_by_audits_that_come_late() -> None:
    """A small budget: one audit every three seconds.  It would have been promoted after twenty."""
    trial = Trial(OLD, NEW, 0.0, old_version=6, new_version=7)
    ends = []
    for second in range(120):
        for number in range(10):
            trial.served(6 + number % 2, 1.0, float(second))
        if second % 3 == 0:
            trial.compared(1.0, 0.5)
        ends.append(trial.verdict(second + 0.5, 120.0))
    assert next(end for end in ends if end) is Outcome.RECALL


def test_a_slow_policy_without_any_audit_is_sent_back_when_time_is_up() -> None:
    trial = Trial(OLD, NEW, 0.0, old_version=6, new_version=7)
    for number in range(2 * ENOUGH):
        trial.served(6 + number % 2, 1.0 + 9.0 * (number % 2), 59.0)
    assert trial.verdict(59.5, 60.0) is None
    assert trial.verdict(60.0, 60.0) is Outcome.LATENCY


def test_queries_of_other_versions_do_not_count() -> None:
    trial = Trial(OLD, NEW, 0.0, old_version=6, new_version=7)
    for version in (1, 5):
        trial.served(version, 1.0, 0.0)
    assert (trial.old_ms.count, trial.new_ms.count) == (0, 0)
    trial.served(9, 1.0, 0.0)  # another template was published meanwhile
    assert trial.new_ms.count == 1


class Learner:
    """What the learner does with trials and publication."""

    def __init__(self, share: float = 0.2) -> None:
        self.canaries = Canaries(share, 60.0)
        self.publication = Publication()
        self.now = 1000.0
        self.published: Snapshot | None = None

    def publish(self, candidate: TemplatePolicy, *, called_for: bool = False) -> Snapshot | None:
        policies = {"k": candidate}
        for ended in self.canaries.judge(self.now):
            policies[ended.template] = ended.trial.old if ended.outcome.is_back else ended.trial.new
        held, _ = self.canaries.held("k", policies["k"], self.now, called_for=called_for)

        def trying(key: str, old: TemplatePolicy, new: TemplatePolicy) -> bool:
            return self.canaries.begin(key, old, new, self.now, called_for=called_for)

        found = self.publication.next({"k": held}, self.now, canaries=self.canaries, trying=trying)
        self.published = found or self.published
        self.now += 1.5
        return found

    def feed(self, ms: float, recall: float, count: int = 200) -> None:
        """Let both policies serve; the new one like this, the old one 1 ms and 0.99."""
        trial = self.canaries.get("k")
        assert trial is not None
        rng = np.random.default_rng(5)
        for _ in range(count):
            trial.served(trial.old_version, math.exp(0.2 * rng.standard_normal()), self.now)
            trial.served(trial.new_version, ms * math.exp(0.2 * rng.standard_normal()), self.now)
        for _ in range(32):
            trial.compared(0.99, recall)


def test_a_first_policy_serves_at_once_and_a_second_is_tried() -> None:
    learner = Learner()
    first = learner.publish(policy(0, trust=Trust.OBSERVE))
    second = learner.publish(OLD)
    assert first is not None
    assert second is not None
    assert not first.baselines
    assert not second.baselines
    third = learner.publish(NEW)
    assert third is not None
    assert (third.templates["k"], third.baselines["k"]) == (NEW, OLD)
    assert third.baseline_versions == {"k": third.version - 1}
    assert settled(third).templates == {"k": OLD}
    assert not settled(third).baselines


def test_a_good_one_serves_all_after_its_trial_and_news_wait_for_it() -> None:
    learner = Learner()
    learner.publish(OLD)
    learner.publish(NEW)
    learner.now += 60
    learner.feed(1.0, 0.99)
    newer = msgspec.structs.replace(NEW, fallback=0)
    after = learner.publish(newer)
    assert after is not None
    assert (after.templates["k"], after.baselines) == (NEW, {})
    then = learner.publish(newer)
    assert then is not None
    assert (then.templates["k"], then.baselines["k"]) == (newer, NEW)


def test_a_bad_one_is_sent_back_and_rests_for_longer_each_time() -> None:
    learner = Learner()
    learner.publish(OLD)
    for rest in (FIRST_REST, 2 * FIRST_REST):
        assert learner.publish(NEW) is not None
        learner.feed(1.0, 0.3)
        back = learner.publish(NEW)
        assert back is not None
        assert (back.templates["k"], back.baselines) == (OLD, {})
        learner.now += rest - 10
        assert learner.publish(NEW) is None
        assert learner.canaries.rests("k", learner.now)
        learner.now += 10
    assert learner.publish(NEW) is not None  # is tried again


def test_what_drift_or_a_person_calls_for_serves_at_once() -> None:
    learner = Learner()
    learner.publish(OLD)
    learner.publish(NEW)
    assert len(learner.canaries) == 1
    found = learner.publish(policy(0), called_for=True)
    assert found is not None
    assert (found.templates["k"], found.baselines) == (policy(0), {})
    learner.canaries.waive("k", learner.now)
    found = learner.publish(OLD)
    assert found is not None
    assert not found.baselines
    found = learner.publish(NEW)  # once
    assert found is not None
    assert found.baselines


def test_another_target_leaves_nothing_to_compare() -> None:
    learner = Learner()
    learner.publish(OLD)
    learner.publish(NEW)
    found = learner.publish(policy(2, target=0.9))
    assert found is not None
    assert not found.baselines


def test_without_a_share_there_are_no_trials() -> None:
    learner = Learner(share=0.0)
    learner.publish(OLD)
    found = learner.publish(NEW)
    assert found is not None
    assert not found.baselines


def test_workers_draw_lots_and_say_which_policy_served() -> None:
    adapter = Adapter(Counters())
    sql = b"SELECT id FROM items ORDER BY embedding <-> '[1,2,3]' LIMIT 10"
    query = adapter.recognise(sql, Scope("d", "u", None)).vector
    assert query is not None
    key = query.template.key
    old, new = policy(1, key=key), policy(2, key=key)
    snapshot = Snapshot(
        7, 0.0, {key: new}, baselines={key: old}, baseline_versions={key: 6}, canary_share=0.2
    )
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=Snapshot)
    adapter.swap(SearchOptimizer(wire), 7)
    adapter._lots.seed(3)
    bound = [adapter.bind(query, ()) for _ in range(2000)]
    assert {(each.choice.arm.name, each.policy_version) for each in bound} == {("ef=40", 6), ("ef=80", 7)}
    assert 0.16 < sum(each.policy_version == 7 for each in bound) / 2000 < 0.24
    adapter.swap(SearchOptimizer(Snapshot(8, 0.0, {key: new}), SearchOptimizer(wire)), 8)
    assert {adapter.bind(query, ()).policy_version for _ in range(50)} == {8}
