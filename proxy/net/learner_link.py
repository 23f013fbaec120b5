"""The worker's end of the channel to the learner: trajectories out, policies in.

Nothing in the data path ever waits for it.  Trajectories go into a bounded queue; when it is full the new
one is dropped and counted.  A link that breaks (learner killed, restarted, wedged) is made again with
back-off, and traffic goes on with the policy that was last received.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from config.schema import Config
from learning import channel
from learning.optimizer import SearchOptimizer
from learning.records import Snapshot, Trajectory
from proxy.interface.questions import Question
from proxy.interface.records import RefusalError
from proxy.session.adaptation import Adapter, Answered, Execution, Told

log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 0.1
_MAX_BATCH: Final = 100  # executions turned into trajectories in one go: a few milliseconds of the event loop
_FIRST_LINK_SECONDS: Final = 3.0  # that a call waits for the learner while the proxy starts
_BACKOFF: Final = (0.1, 5.0)  # first and longest wait, seconds
_MAX_TEMPLATES: Final = 10_000  # announced per link; an application with more is not learned from any further


class Links:
    """The link, while there is to be one; `path` is None where there never is a learner."""

    def __init__(self, path: Path | None, adapter: Adapter) -> None:
        self._path = path
        self._adapter = adapter
        self._running: asyncio.Task[None] | None = None

    def configure(self, config: Config) -> None:
        """Make the link, or end it."""
        if self._path is None or config.learning.enabled == (self._running is not None):
            return
        if config.learning.enabled:
            link = LearnerLink(self._path, self._adapter, buffer_size=config.learning.trajectory_buffer_size)
            self._running = asyncio.create_task(link.run())
        else:
            self.close()
            self._adapter.forget_learner()

    def close(self) -> None:
        """End the link."""
        if self._running is not None:
            self._running.cancel()
            self._running = None


class LearnerLink:
    """Sends what was seen to the learner and puts its policies in force."""

    def __init__(self, path: Path, adapter: Adapter, *, buffer_size: int) -> None:
        self._path = path
        self._adapter = adapter
        self._buffer_size = buffer_size
        self._queue: deque[Execution] = deque()
        self._failures: deque[channel.InjectionFailed] = deque(maxlen=100)
        self._rated: deque[channel.Rated] = deque(maxlen=1000)
        self._announced: set[str] = set()
        self._dropped = 0
        self._optimizer: SearchOptimizer | None = None
        self._writer: asyncio.StreamWriter | None = None  # while the link is up
        self._waiting: dict[int, tuple[Told, Answered]] = {}  # questions under way
        self._number = 0
        self._up = asyncio.Event()
        self._was_up = False
        adapter.consult = self.consult
        adapter.record = self.record
        adapter.injection_failed = self.injection_failed

    # -- called on the hot path --------------------------------------------------------------------

    def record(self, execution: Execution) -> None:
        """Queue one execution; never waits."""
        if len(self._queue) < self._buffer_size:
            self._queue.append(execution)
        else:
            self._drop()

    def _drop(self) -> None:
        self._dropped += 1
        self._adapter.counters.trajectories_dropped += 1

    def injection_failed(self, template: str, sqlstate: str, message: str) -> None:
        """Queue the news that the server refused settings."""
        log.error("the server refused the settings of template %s: %s %s", template, sqlstate, message)
        self._failures.append(channel.InjectionFailed(template, sqlstate, message))

    def rated(self, query_id: bytes, relevant: tuple[str, ...], irrelevant: tuple[str, ...]) -> None:
        """Queue what a user said about the results of a query."""
        self._rated.append(channel.Rated(query_id, relevant, irrelevant))

    # -- questions of clients ------------------------------------------------------------------------

    def consult(self, question: Question, told: Told, answered: Answered) -> Callable[[], None]:
        """Ask the learner; return what gives the question up."""
        writer = self._writer
        if writer is None:
            return self._consult_later(question, told, answered)
        self._number += 1
        number = self._number
        self._waiting[number] = (told, answered)
        writer.write(
            channel.encode(
                channel.Ask(
                    number=number,
                    function=question.function,
                    arguments=json.dumps(question.arguments).encode(),
                    database=question.database,
                    username=question.username,
                    table=question.table,
                    relation=question.relation,
                    index=question.index,
                )
            )
        )

        def give_up() -> None:
            if self._waiting.pop(number, None) is not None and self._writer is writer:
                writer.write(channel.encode(channel.Abandon(number)))

        return give_up

    def _consult_later(self, question: Question, told: Told, answered: Answered) -> Callable[[], None]:
        """Ask once the link is up for the first time, which takes a moment; refuse if it was up before."""
        wait = 0.0 if self._was_up else _FIRST_LINK_SECONDS

        async def ask() -> None:
            try:
                async with asyncio.timeout(wait):
                    await self._up.wait()
            except TimeoutError:
                answered(_away(question.function))
            else:
                withdraw.append(self.consult(question, told, answered))

        def give_up() -> None:
            task.cancel()
            for one in withdraw:
                one()

        withdraw: list[Callable[[], None]] = []
        task = asyncio.get_running_loop().create_task(ask())
        return give_up

    def _told(self, frame: channel.Progress | channel.Answer) -> None:
        """The learner has said something about a question."""
        if isinstance(frame, channel.Progress):
            waiting = self._waiting.get(frame.number)
            if waiting is not None:
                waiting[0](frame.text)
            return
        waiting = self._waiting.pop(frame.number, None)
        if waiting is None:
            return
        problem = frame.problem
        if problem is None:
            waiting[1](json.loads(frame.answer))
        else:
            waiting[1](
                RefusalError(problem.sqlstate, problem.message, hint=problem.hint, detail=problem.detail)
            )

    def _lost(self) -> None:
        """The link is down: nothing that was asked will be answered."""
        self._writer = None
        self._up.clear()
        waiting, self._waiting = self._waiting, {}
        for _, answered in waiting.values():
            answered(_away("the function"))

    # -- the link ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the link up until cancelled."""
        wait = _BACKOFF[0]
        connected_before = False
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path))
            except OSError as error:
                log.debug("learner not reachable: %s", error)
                await asyncio.sleep(wait)
                wait = min(wait * 2, _BACKOFF[1])
                continue
            wait = _BACKOFF[0]
            log.info("learner %sconnected", "re" if connected_before else "")
            connected_before = True
            self._adapter.counters.learner_connected = 1
            try:
                await self._converse(reader, writer)
            except (OSError, channel.ChannelError, asyncio.IncompleteReadError) as error:
                log.warning(
                    "link to the learner lost: %s; traffic goes on with policy %d", error, self._version()
                )
            finally:
                self._adapter.counters.learner_connected = 0
                writer.close()
            await asyncio.sleep(wait)

    def _version(self) -> int:
        return self._adapter.version

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._announced.clear()
        self._writer = writer
        self._was_up = True
        self._up.set()
        writer.write(channel.encode(channel.Hello(pid=os.getpid(), policy_version=self._version())))
        both = [asyncio.create_task(self._send(writer)), asyncio.create_task(self._receive(reader))]
        try:
            # Not a TaskGroup: it would wrap the error that ends the link.
            ended, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            self._lost()
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        while True:
            while self._queue or self._failures or self._rated:
                self._write_batch(writer)
                await writer.drain()
                await asyncio.sleep(0)  # let traffic pass between batches
            await asyncio.sleep(_FLUSH_SECONDS)

    def _write_batch(self, writer: asyncio.StreamWriter) -> None:
        while self._failures:
            writer.write(channel.encode(self._failures.popleft()))
        batch: list[Trajectory] = []
        for _ in range(min(len(self._queue), _MAX_BATCH)):
            execution = self._queue.popleft()
            template = execution.bound.query.template
            if template.key not in self._announced:
                if len(self._announced) >= _MAX_TEMPLATES:
                    self._drop()
                    continue
                writer.write(channel.encode(channel.TemplateSeen(template)))
                self._announced.add(template.key)
            batch.append(execution.trajectory())
        dropped, self._dropped = self._dropped, 0
        if batch or dropped:
            writer.write(channel.encode(channel.TrajectoryBatch(tuple(batch), dropped)))
            self._adapter.counters.trajectories_sent += len(batch)
        if not self._queue:  # a rating goes after the query that it is about
            while self._rated:
                writer.write(channel.encode(self._rated.popleft()))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        frames = channel.FrameReader()
        while data := await reader.read(1 << 18):
            for frame in frames.feed(data):
                if isinstance(frame, channel.Publish):
                    await self._adopt(frame.snapshot)
                elif isinstance(frame, channel.Progress | channel.Answer):
                    self._told(frame)
        raise ConnectionResetError("the learner closed the link")

    async def _adopt(self, snapshot: Snapshot) -> None:
        """Put a policy in force; its indexes are built in a thread, the swap is one reference."""
        try:
            optimizer = await asyncio.to_thread(SearchOptimizer, snapshot, self._optimizer)
        except Exception:
            # A policy that cannot be used must not take the last good one away.
            log.exception("policy %d cannot be used; policy %d stays", snapshot.version, self._version())
            return
        self._optimizer = optimizer
        self._adapter.swap(optimizer, snapshot.version)
        log.debug("policy %d in force: %d templates", snapshot.version, len(snapshot.templates))


def _away(function: str) -> RefusalError:
    return RefusalError(
        "57P03",
        f"{function} cannot be answered now: the proxy's learner is not reachable",
        hint="Queries are served meanwhile. Try again in some seconds; the proxy's log says why it is away.",
    )
