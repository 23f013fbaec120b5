"""One template under watch: what it is compared with, and what is served while it is learned anew.  Pure.

`Watch` puts the detectors of `learning.drift` together.  It is told of every query, every audit and every
look into the catalogs, and answers with a `Change` where one is to be acted upon.  What is done then is not
its business; `hold` and `recovered` only note it.

Rules
-----
- An audit counts only if the query was served under a policy that is in force still: the ring of recent
  queries holds older ones, and what they got says nothing about today's policy.
- Nothing is expected of a template that runs as it came.
- Where no arm keeps the target, the recall that the policy expects is what the audits are compared with:
  an alarm that cannot be answered is noise.
- A moved mix of queries is no alarm.  It buys `URGENT` audits; if their mean keeps what is expected but for
  `SLACK`, the new mix is the usual one from then on.  If it is surely less, learning begins anew even where a
  CUSUM would wait: the labels are about other queries anyway.  While neither is clear, more audits are
  bought, up to `ROUNDS` times; then the mean decides.  Beginning anew is dear: everything is served by a
  safe arm until there are new labels.  Simulated with k = 10 and a target of 0.98, it happens to 6 of 100 new
  mixes with a recall of 0.985, to 82 with 0.95, to 99 with 0.92.  (By the first 30 audits alone, whatever
  they lack: 26, 88, 99.)
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import numpy as np

from learning.dialects import AS_IS
from learning.drift import Change, Cusum, Kind, MixWatch, World, compare
from learning.records import Label, TemplatePolicy, Trajectory, Trust

URGENT = 30
"""Audits that a suspicion buys at once."""
ROUNDS = 3
SLACK = 0.005
"""Recall below what was expected that is as good as kept."""
_LEAST = 10  # audits before they may decide
_SURE = 1.5  # standard errors


@dataclass(frozen=True, slots=True)
class Holding:
    """What is served until there are labels enough, and why; `began` is a monotonic time in seconds."""

    arm: str  # Arm.name
    words: str
    began: float


class Watch:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.world: World | None = None
        self.latest: World | None = None  # by the last look
        self.built: dict[str, float] = {}  # index -> rows of the table when it was built, where that was seen
        self.holding: Holding | None = None
        self.epoch = 0  # changes so far
        self.events: deque[tuple[float, str, str]] = deque(maxlen=20)  # Unix time, kind, words; for people
        self.urgent = False  # a policy that has to go out at once
        self.audits_due = 0  # bought by a suspicion
        self._suspected_at = 0.0  # when the first query of another kind may have come
        self._rounds = 0  # how often they were
        self._surplus: list[float] = []  # recall above what was expected, of those audits
        self._in_force_from = 0  # policy version
        self._cusum = Cusum()
        self._mix = MixWatch()

    def asked(self, trajectory: Trajectory) -> bool:
        """Count a query; True where it raises the suspicion that others are asked now."""
        if trajectory.vector is None:
            return False
        shifted = self._mix.add(np.frombuffer(trajectory.vector, dtype="<f4"))
        if not shifted or self.audits_due or self.holding is not None:
            return False
        self.suspect(trajectory.timestamp)
        return True

    def suspect(self, at: float) -> None:
        """Buy audits because other queries may be asked since `at` (Unix time)."""
        self.audits_due, self._rounds = URGENT, 1
        self._suspected_at = at
        self._surplus.clear()

    def looked(self, world: World, at: float) -> Change | None:
        """Compare what the catalogs say with what they said when learning began (anew)."""
        before, self.world, self.latest = self.world, self.world or world, world
        change = compare(before, world, at) if before is not None else None
        if before is not None and change is not None:
            self.world = world
            self._note_built(before, world)
        return change

    def _note_built(self, before: World, now: World) -> None:
        old = dict(before.indexes)
        built = {name: now.rows for name, file in now.indexes if old.get(name) != file}
        self.built = {name: rows for name, rows in self.built.items() if name in dict(now.indexes)} | built

    def audited(
        self, label: Label, trajectory: Trajectory, policy: TemplatePolicy | None, target: float
    ) -> Change | None:
        """Count an audit of a query that was really served."""
        suspected = self.audits_due > 0
        if suspected:
            self.audits_due -= 1
        change = self._judged(label, trajectory, policy, target, suspected=suspected)
        if suspected and not self.audits_due:
            if change is None and self._is_unclear():
                self.audits_due, self._rounds = URGENT, self._rounds + 1
            else:
                self._mix.reset()
                self._surplus.clear()
        return change

    def _judged(
        self,
        label: Label,
        trajectory: Trajectory,
        policy: TemplatePolicy | None,
        target: float,
        *,
        suspected: bool,
    ) -> Change | None:
        served = label.results.get(trajectory.arm)
        if policy is None or served is None or trajectory.policy_version < self._in_force_from:
            return None
        expected = expected_recall(policy, label.context, trajectory, target)
        if expected is None:
            return None
        alarm = self._cusum.add(served.recall, expected, trajectory.timestamp)
        if suspected:
            self._surplus.append(served.recall - expected)
            alarm = alarm or self._falls_short()
        if not alarm:
            return None
        since = self._cusum.since if self._cusum.since is not None else trajectory.timestamp
        words = f"audited recall fell below {expected:.3g}"
        if suspected:
            return Change(Kind.MIX, f"other queries are asked, and {words}", self._suspected_at)
        return Change(Kind.RECALL, words, since)

    def _falls_short(self) -> bool:
        """Tell whether the audits under suspicion are below what was expected: surely, or in the end."""
        count = len(self._surplus)
        if count < _LEAST:
            return False
        mean = statistics.fmean(self._surplus)
        if not self.audits_due and self._rounds == ROUNDS:
            return mean < -SLACK
        return mean + _SURE * statistics.stdev(self._surplus) / math.sqrt(count) < -SLACK

    def _is_unclear(self) -> bool:
        """Tell whether the audits that were bought leave it open whether recall falls short."""
        return self._rounds < ROUNDS and bool(self._surplus) and statistics.fmean(self._surplus) < -SLACK

    def published(self, version: int) -> None:
        """Other arms are in force from this version on."""
        self._in_force_from = version
        self._cusum.reset()
        self.urgent = False

    def hold(self, holding: Holding) -> None:
        """Note that learning begins anew."""
        self.holding = holding
        self.epoch += 1
        self.urgent = True
        self.audits_due = 0
        self._surplus.clear()
        self._cusum.reset()
        self._mix.reset()

    def recovered(self) -> Holding | None:
        """Note that there are labels enough again; return what was served until now."""
        before, self.holding = self.holding, None
        return before


def expected_recall(
    policy: TemplatePolicy, context: str, trajectory: Trajectory, target: float
) -> float | None:
    """Return the recall that an audited query should have had on average; None where nothing is promised."""
    if policy.trust is Trust.OBSERVE:
        return None
    found = policy.contexts.get(context)
    arm = policy.arms[found.arm if found is not None else policy.fallback]
    if trajectory.arm == AS_IS.name and arm != AS_IS:
        return None  # the client's own settings won
    return target if found is None else min(target, found.expected_recall)
