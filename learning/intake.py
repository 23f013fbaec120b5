"""What comes in: frames from the workers, and the traffic that other replicas tell of.

Rules
-----
- Whatever arrives is counted, or said to be dropped; nothing that arrives can end the learner.
- A replica that follows passes on what its workers send, and keeps what its own questions need.
- A question is answered by a task of its own, so that no frame waits for an answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from learning.answering import Answering, Problem
from learning.channel import (
    Abandon,
    Answer,
    Answered,
    Ask,
    Frame,
    Hello,
    InjectionFailed,
    Progress,
    Publish,
    Question,
    Rated,
    TemplateSeen,
    TrajectoryBatch,
)
from learning.measuring import Measuring
from learning.metrics import LearnerMetrics
from learning.outbox import size_of
from learning.records import Template, Trajectory
from learning.registry import Phase, Registry, TemplateState
from learning.server import Peer
from learning.service import Service
from learning.sharing import Sharing
from learning.sqlite_file import StoredTemplate

log = logging.getLogger(__name__)


class Intake:
    """Takes frames and traffic in.

    Parameters
    ----------
    window
        Gives the number of trajectories to keep of a template.
    sharing
        What ties this learner to the other replicas; None where there are none.
    """

    def __init__(
        self,
        registry: Registry,
        measuring: Measuring,
        service: Service,
        answering: Answering,
        metrics: LearnerMetrics,
        window: Callable[[TemplateState], int],
        sharing: Sharing | None,
    ) -> None:
        self._registry = registry
        self._measuring = measuring
        self._service = service
        self._answering = answering
        self._metrics = metrics
        self._window = window
        self._sharing = sharing
        self._answers: set[asyncio.Task[None]] = set()  # on their way

    def close(self) -> None:
        """Give up the answers that are on their way."""
        for task in tuple(self._answers):
            task.cancel()

    def receive(self, frame: Frame, peer: Peer) -> None:
        """Take a frame of a worker in."""
        follows = self._sharing is not None and not self._sharing.leading
        if follows and isinstance(frame, TemplateSeen | TrajectoryBatch | Rated | InjectionFailed):
            assert self._sharing is not None
            self._sharing.outbox.receive(frame)
        match frame:
            case TrajectoryBatch():
                self._trajectories(frame)
            case TemplateSeen(template):
                self.template_seen(template)
            case Rated():
                if not follows:
                    self._measuring.rated(frame)
            case InjectionFailed():
                self.injection_failed(frame)
            case Hello(pid, version):
                log.debug("worker %d connected with policy %d", pid, version)
            case Ask():
                self._service.receive(frame, peer)
            case Abandon():
                self._service.abandon(frame, peer)
            case Question(number, body):
                task = asyncio.create_task(self._answer(number, body, peer))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)
            case Progress() | Answer() | Answered():
                log.error("a worker sent an answer; it was ignored")
            case Publish():
                log.error("a worker sent a policy; it was ignored")

    async def _answer(self, number: int, body: bytes, peer: Peer) -> None:
        try:
            answer = await self._answering.answer(body)
        except Exception:  # whoever asks gets a sentence, and the learner goes on
            log.exception("a question could not be answered")
            answer = msgspec.json.encode(Problem("the learner failed to answer; see its log"))
        peer.send(Answered(number, answer))

    def _trajectories(self, batch: TrajectoryBatch) -> None:
        clock = time.time()
        self._metrics.trajectories.inc(len(batch.trajectories))
        if batch.dropped:
            self._metrics.dropped.labels(reason="queue full").inc(batch.dropped)
        trajectories = batch.trajectories
        if self._sharing is not None and self._sharing.leading:
            thinning = self._sharing.thinning
            thinning.count(len(trajectories), sum(size_of(trajectory) for trajectory in trajectories))
            trajectories = tuple(trajectory for trajectory in trajectories if thinning.wanted())
        self.record(trajectories)
        if batch.trajectories:
            self._metrics.lag.set(max(0.0, clock - batch.trajectories[-1].timestamp))

    def record(self, trajectories: Sequence[Trajectory]) -> None:
        """Keep what has been served, and have it count in its template's trial."""
        now = time.monotonic()
        for trajectory in trajectories:
            state = self._registry.get(trajectory.template)
            if state is None:
                self._metrics.dropped.labels(reason="unknown template").inc()
                continue
            self._registry.touch(trajectory.template)
            trial = self._measuring.canaries.get(trajectory.template)
            if trial is not None and trajectory.error is None:
                trial.served(trajectory.policy_version, trajectory.latency_ms, now)
            state.record(trajectory, self._window(state), now)
        if trajectories:
            self._measuring.wake()

    def template_seen(self, template: Template) -> None:
        """Know a template from now on, unless there are too many."""
        if self._registry.add(template, time.monotonic()) is None:
            self._metrics.templates_refused.inc()
        elif self._sharing is not None:
            self._sharing.outbox.know(template)

    def injection_failed(self, failure: InjectionFailed) -> None:
        """Leave a template alone for good whose settings the server has refused."""
        state = self._registry.get(failure.template)
        if state is None or state.phase is Phase.OFF:
            return
        reason = f"the server refused a setting ({failure.sqlstate}: {failure.message})"
        log.error(
            "%s: %s; its queries are left alone from now on: %s", state.table, reason, state.template.sql
        )
        self._metrics.injection_failures.inc()
        state.leave_alone(reason, state.table, time.monotonic(), forever=True)
        self._measuring.news.templates[state.template.key] = StoredTemplate(
            state.template, reason, state.table
        )
