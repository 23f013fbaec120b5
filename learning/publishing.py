"""Which policies are served, and since when: what has changed goes out, at first on trial.

A derived policy is not yet one that serves.  `Publication` (learning.policy) says when a change is worth a
new snapshot; a material change of a template with traffic serves a share of its queries first, beside the
policy before it (learning.canary), and all of them when it has stood the trial.

Rules
-----
- Snapshots go out one after the other, with increasing versions.
- What has to go out at once (an index is gone, recall has fallen) waits for nothing and is not tried first.
- What another replica or an earlier process published for templates that were not met here serves on
  (*orphans*).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from learning.canary import NOBODY, Ended
from learning.measuring import Measuring
from learning.metrics import LearnerMetrics
from learning.policy import Publication, material, summary
from learning.records import Snapshot, TemplatePolicy
from learning.registry import Registry

log = logging.getLogger(__name__)


class Publisher:
    """See the module's docstring.

    Parameters
    ----------
    put_out
        Brings a snapshot to everybody who serves it, and keeps it.

    Attributes
    ----------
    orphans
        Template key -> policy, published before, of templates that were not met here.
    """

    def __init__(
        self,
        registry: Registry,
        measuring: Measuring,
        metrics: LearnerMetrics,
        put_out: Callable[[Snapshot], Awaitable[None]],
    ) -> None:
        self.orphans: dict[str, TemplatePolicy] = {}
        self._registry, self._measuring, self._metrics = registry, measuring, metrics
        self._put_out = put_out
        self._publication = Publication()
        self._lock = asyncio.Lock()

    @property
    def version(self) -> int:
        """The version of the last snapshot; the next one has a greater one."""
        return self._publication.version

    @version.setter
    def version(self, version: int) -> None:
        self._publication.version = version

    @property
    def policies(self) -> Mapping[str, TemplatePolicy]:
        """What was published last, by template."""
        return self._publication.policies

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot that was published before, or elsewhere."""
        self._publication.restore(snapshot)

    async def publish(self) -> None:
        """Put out what has changed and is due, if anything is; trials that are over end."""
        async with self._lock:  # an older snapshot must not overtake a newer one
            await self._publish_what_changed()

    async def _publish_what_changed(self) -> None:
        policies = {state.template.key: state.policy for state in self._registry if state.policy is not None}
        policies = {**self.orphans, **policies}
        policies = self._tried(policies)
        before = self._publication.policies
        urgent = any(state.watch.urgent for state in self._registry)
        snapshot = self._publication.next(
            policies,
            time.time(),
            urgent=urgent,
            canaries=self._measuring.canaries,
            trying=self._begin_trial,
        )
        if snapshot is None:
            return
        for state in self._registry:
            key = state.template.key
            if key in policies and material(before.get(key), policies[key]):
                state.watch.published(snapshot.version)
            state.watch.urgent = False  # what was urgent is out
        await self._put_out(snapshot)
        self._metrics.published.inc()
        log.info("policy %d published: %s", snapshot.version, summary(snapshot))

    # --- trials ---

    def _tried(self, policies: dict[str, TemplatePolicy]) -> dict[str, TemplatePolicy]:
        """End the trials that are over; return what is to serve, which trials and their outcome hold back."""
        now = time.monotonic()
        canaries = self._measuring.canaries
        for ended in canaries.judge(now):
            self._trial_ended(ended)
            policies[ended.template] = ended.trial.old if ended.outcome.is_back else ended.trial.new
        held = {}
        for key, candidate in policies.items():
            state = self._registry.get(key)
            called_for = state is None or state.watch.urgent or state.watch.holding is not None
            held[key], overtaken = canaries.held(key, candidate, now, called_for=called_for)
            if overtaken is not None:
                self._trial_ended(overtaken)
            if state is not None and held[key] is not candidate and canaries.rests(key, now):
                state.policy = held[key]
        return held

    def _begin_trial(self, key: str, old: TemplatePolicy, new: TemplatePolicy) -> bool:
        state, now = self._registry.get(key), time.monotonic()
        if state is None or now - state.seen > NOBODY:
            return False
        called_for = state.watch.urgent or state.watch.holding is not None
        began = self._measuring.canaries.begin(key, old, new, now, called_for=called_for)
        if began:
            log.info(
                "%s: a new policy is on trial with %.0f %% of its queries",
                state.table,
                100 * self._measuring.canaries.share,
            )
            self._measuring.wake()
        return began

    def _trial_ended(self, ended: Ended) -> None:
        table, words = ended.trial.new.table, ended.trial.words()
        self._metrics.trials.labels(table=table, outcome=ended.outcome.value).inc()
        state = self._registry.get(ended.template)
        if ended.outcome.is_back:
            log.warning(
                "%s: the new policy is worse, %s; the old one serves (%s)", table, ended.outcome, words
            )
            if state is not None:
                state.policy = ended.trial.old
                state.watch.events.append((time.time(), ended.outcome.value, words))
        else:
            log.info("%s: the trial of its new policy is over: %s (%s)", table, ended.outcome, words)
