"""A new policy on trial: part of the traffic gets it, and it has to be no worse than the one before.  Pure.

Workers draw lots for each query of a template on trial, so that both policies meet the same queries under the
same load at the same time; what a query took is counted by the policy that served it.  Recall is compared in
pairs: of a recent query it is measured what either policy gives it, so that easy and hard queries cancel out.

    new policy, the old one serves     -> trial: `share` of the queries get the new one
    its recall is worse                -> back to the old one, which nothing replaces for a while
    it is slower, for no more recall   -> likewise
    enough seen, nothing found         -> it serves all
    nobody asks, or time is up         -> likewise: a trial without traffic tells nothing

A learner with little to spend on audits takes its time: the trial waits for them as long as it may last.

Theory: two one-sided tests, Welch's of the mean logarithm of the latency (one number for "slower throughout"
and "a few queries take ages") and a paired one of the mean audited recall, each against a margin that does
not matter in practice; a policy that finds less and keeps the target all the same is what was wanted.
Looking again and again would find something by chance in the end, so there are looks only at 8, 16, 32, ...
observations, and the i-th spends ``ALPHA / 2 ** i``: over a whole trial the chance to send a policy back that
is as good as the old one stays below ``ALPHA`` for each test.

Rules
-----
- Slower is no fault where the old policy missed its target and the new one recalls more: that is its purpose.
- A first policy, one after a change of indexes or of the target, and one that drift has called for are not
  tried: there is nothing that they could be compared with.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

from learning.records import TemplatePolicy, Trust

ALPHA = 0.01
SLOWER = 1.15
"""Ratio of latencies below which slower does not matter."""
LESS_RECALL = 0.01
"""Difference of mean recall that does not matter."""

_EXCUSE = 0.05  # level at which more recall is believed, and a missed target
_FEW_AUDITS = 3
_DOUBT = 0.02  # squares believed in beforehand: eight queries that lose nothing prove little

FIRST_LOOK = 8
ENOUGH = 64
"""Queries that the new policy has to serve, ..."""
ENOUGH_AUDITS = 32
"""... and queries of which the recall under both is known, before it may serve all."""
NOBODY = 5.0
"""Seconds without a query after which a trial is over."""
FIRST_REST, LAST_REST = 300.0, 24 * 3600.0
"""Seconds in which nothing replaces the old policy after a new one was sent back; doubled each time."""


class Outcome(enum.StrEnum):
    """How a trial ends."""

    PROMOTED = "promoted"
    RECALL = "rolled back: recall"
    LATENCY = "rolled back: latency"
    OVERTAKEN = "overtaken"  # by a change that leaves nothing to compare

    @property
    def is_back(self) -> bool:
        """Whether the old policy serves again."""
        return self in (Outcome.RECALL, Outcome.LATENCY)


@dataclass(slots=True)
class Sample:
    """Count, mean and spread of numbers, one at a time (Welford)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Count one number."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    def variance(self, doubt: float) -> float:
        """Return the variance of the mean; `doubt` is a variance believed in beforehand, as one number."""
        return (self.squares + doubt) / self.count / self.count


def _errors_above(sample: Sample, bound: float) -> float:
    """Return by how many standard errors the mean of recalls lies above `bound`."""
    return (sample.mean - bound) / math.sqrt(sample.variance(_DOUBT)) if sample.count else 0.0


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf(1.0 - level)


def worse(bad: Sample, good: Sample, margin: float, level: float, doubt: float) -> bool:
    """Tell whether the mean of `bad` lies above that of `good` by more than `margin`, at this level."""
    if not bad.count or not good.count:
        return False
    spread = math.sqrt(bad.variance(doubt) + good.variance(doubt))
    return bad.mean - good.mean - margin > _quantile(level) * spread


@dataclass(slots=True)
class _Looks:
    """When to look, and at which level."""

    next_at: int = FIRST_LOOK
    taken: int = 0

    def level(self, count: int) -> float | None:
        """Return the level of the look that is due with so many observations; None: none is."""
        if count < self.next_at:
            return None
        while self.next_at <= count:
            self.next_at *= 2
        self.taken += 1
        return float(ALPHA / 2**self.taken)


@dataclass(slots=True)
class Trial:
    """One policy against the one before; times in seconds, of any one clock."""

    old: TemplatePolicy
    new: TemplatePolicy
    began: float
    old_version: int = 0  # under which each serves: Trajectory.policy_version
    new_version: int = 0
    asked: float = 0.0  # when a query was served last
    old_ms: Sample = field(default_factory=Sample)  # logarithms
    new_ms: Sample = field(default_factory=Sample)
    old_loss: Sample = field(default_factory=Sample)  # 1 - recall, of the same queries
    new_loss: Sample = field(default_factory=Sample)
    lost: Sample = field(default_factory=Sample)  # recall that a query loses by the new policy
    _ms_looks: _Looks = field(default_factory=_Looks)
    _recall_looks: _Looks = field(default_factory=_Looks)

    def __post_init__(self) -> None:
        self.asked = self.began

    def served(self, version: int, milliseconds: float, now: float) -> None:
        """Count a query without an error."""
        if milliseconds <= 0.0:
            return
        if version >= self.new_version:
            self.new_ms.add(math.log(milliseconds))
        elif version == self.old_version:
            self.old_ms.add(math.log(milliseconds))
        self.asked = now

    def compared(self, old: float, new: float) -> None:
        """Count a query whose recall under both policies was measured."""
        self.old_loss.add(1.0 - old)
        self.new_loss.add(1.0 - new)
        self.lost.add(old - new)

    @property
    def wants_audits(self) -> bool:
        """Whether there are too few audits yet."""
        return self.lost.count < ENOUGH_AUDITS

    def verdict(self, now: float, longest: float) -> Outcome | None:
        """Return how the trial ends; None: it goes on.  `longest`: seconds after which it is over."""
        waited = now - self.began
        level = self._recall_looks.level(self.lost.count)
        if level is not None and self._recalls_less(level):
            return Outcome.RECALL
        is_over = waited >= longest  # then what is known has to do
        if self._can_judge_latency or is_over:
            level = self._ms_looks.level(min(self.new_ms.count, self.old_ms.count))
            if level is not None and not self._excused and self._is_slower(level):
                return Outcome.LATENCY
        seen = min(self.new_ms.count, self.old_ms.count) >= ENOUGH and not self.wants_audits
        return Outcome.PROMOTED if seen or is_over or now - self.asked >= NOBODY else None

    def _recalls_less(self, level: float) -> bool:
        """Tell whether the new policy misses more than the old one, and more than it may."""
        return _errors_above(self.lost, LESS_RECALL) > _quantile(level) and _errors_above(
            self.new_loss, 1.0 - self.new.target_recall
        ) > _quantile(_EXCUSE)

    def _is_slower(self, level: float) -> bool:
        return worse(self.new_ms, self.old_ms, math.log(SLOWER), level, doubt=0.1)

    @property
    def _can_judge_latency(self) -> bool:
        """Whether it is known if the old policy owes recall, and where it does, what the new one recalls."""
        return self.lost.count >= _FEW_AUDITS and (not self._owed or not self.wants_audits)

    @property
    def _owed(self) -> bool:
        """Whether the old policy misses its target, by its audits."""
        return _errors_above(self.old_loss, 1.0 - self.old.target_recall) > 1.0

    @property
    def _excused(self) -> bool:
        """Whether the new policy pays for a recall that the old one owed."""
        return self._owed and -_errors_above(self.lost, 0.0) > _quantile(_EXCUSE)

    def words(self) -> str:
        """Return what was seen, for people."""
        parts = []
        for name, ms, loss in (("new", self.new_ms, self.new_loss), ("old", self.old_ms, self.old_loss)):
            recall = f"recall {1.0 - loss.mean:.3f} in {loss.count} audits" if loss.count else "no audits"
            latency = f"{math.exp(ms.mean):.2f} ms over {ms.count} queries" if ms.count else "no queries"
            parts.append(f"{name}: {latency}, {recall}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial that is over."""

    template: str
    outcome: Outcome
    trial: Trial


@dataclass(frozen=True, slots=True)
class _Rest:
    """After a policy was sent back: what serves, until when, and how long that is; in seconds."""

    policy: TemplatePolicy
    until: float
    seconds: float


class Canaries:
    """The trials of a learner; `share` of the queries get a policy on trial, 0: there are none."""

    def __init__(self, share: float, longest: float) -> None:
        self.share = share
        self.longest = longest
        self._trials: dict[str, Trial] = {}
        self._resting: dict[str, _Rest] = {}
        self._waived: dict[str, float] = {}  # template -> until when what comes is wanted by a person

    def __len__(self) -> int:
        return len(self._trials)

    def get(self, template: str) -> Trial | None:
        """Return the trial of a template."""
        return self._trials.get(template)

    @property
    def trials(self) -> Mapping[str, Trial]:
        """Those under way, by template."""
        return self._trials

    def judge(self, now: float) -> list[Ended]:
        """End the trials that are over."""
        ended = []
        for key, trial in list(self._trials.items()):
            outcome = trial.verdict(now, self.longest)
            if outcome is None:
                continue
            del self._trials[key]
            ended.append(Ended(key, outcome, trial))
            if outcome.is_back:
                before = self._resting.get(key)
                seconds = FIRST_REST if before is None else min(LAST_REST, 2 * before.seconds)
                self._resting[key] = _Rest(trial.old, now + seconds, seconds)
            else:
                self._resting.pop(key, None)
        return ended

    def waive(self, template: str, now: float) -> None:
        """A person wants the next policy of a template, and at once."""
        self._waived[template] = now + NOBODY
        self._resting.pop(template, None)

    def rests(self, template: str, now: float) -> bool:
        """Tell whether a policy of this template was sent back and nothing is to replace the old one yet."""
        rest = self._resting.get(template)
        return rest is not None and now < rest.until

    def held(
        self, template: str, candidate: TemplatePolicy, now: float, *, called_for: bool
    ) -> tuple[TemplatePolicy, Ended | None]:
        """Return what serves in a candidate's place while a trial, or the rest after one, holds it back.

        `called_for`: drift has called for the candidate; it serves at once.  The second is a trial that ends
        by this.
        """
        called_for = called_for or now < self._waived.get(template, now)
        trial = self._trials.get(template)
        if trial is not None:
            if not called_for and _comparable(trial.new, candidate):
                return trial.new, None
            del self._trials[template]
            return candidate, Ended(template, Outcome.OVERTAKEN, trial)
        rest = self._resting.get(template)
        if rest is not None and now < rest.until and not called_for and _comparable(rest.policy, candidate):
            return rest.policy, None
        return candidate, None

    def begin(
        self, template: str, old: TemplatePolicy, new: TemplatePolicy, now: float, *, called_for: bool
    ) -> bool:
        """Begin a trial where one is possible; tell whether."""
        if now < self._waived.pop(template, now) or called_for or not self.share:
            return False
        if template in self._trials or not _comparable(old, new):
            return False
        self._trials[template] = Trial(old, new, now)
        return True


def _comparable(old: TemplatePolicy, new: TemplatePolicy) -> bool:
    """Tell whether two policies serve the same purpose by the same means."""
    return (
        Trust.OBSERVE not in (old.trust, new.trust)
        and old.table == new.table
        and old.target_recall == new.target_recall
        and old.filter_slots == new.filter_slots
        and {arm.name for arm in old.arms} == {arm.name for arm in new.arms}
    )
