"""Answers to the functions that clients call: one task per question, bounded, cancellable.

A worker sends an `Ask`; it gets any number of `Progress` frames and one `Answer`.  Questions that only look
at what the learner knows are answered at once.  Those that measure (`LONG`) take minutes: at most `limit` of
them run at the same time, the next ones are told to try again, since a queue would hold transactions open.

Whoever no longer waits says so (`Abandon`), and a worker that is gone waits for nothing: then the work is
cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg

from learning.channel import ASK_VERSION, Abandon, Answer, Ask, Frame, Problem, Progress
from learning.server import Peer
from learning.upstream import UnavailableError

log = logging.getLogger(__name__)

LONG = frozenset(
    {
        "ruvector_auto_tune",
        "ruvector_benchmark_recall",
        "ruvector_benchmark_latency",
        "ruvector_ground_truth",
    }
)


class ProblemError(Exception):
    """A question cannot be answered; the client gets this as PostgreSQL's errors are."""

    def __init__(self, sqlstate: str, message: str, *, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(sqlstate, message, hint, detail)


Report = Callable[[str], None]
"""Tells the client how far the work has got."""

Handler = Callable[[Ask, dict[str, Any], Report], Awaitable[Any]]


class _Nobody:
    """Takes answers that nobody waits for."""

    def send(self, frame: Frame) -> None:
        if isinstance(frame, Answer) and frame.problem is not None:
            log.warning("what a client of another replica called for failed: %s", frame.problem.message)


class Service:
    """Runs the handlers.

    Parameters
    ----------
    handlers
        By function.
    limit
        Of `LONG` questions at the same time.
    """

    def __init__(self, handlers: dict[str, Handler], limit: int) -> None:
        self._handlers = handlers
        self._limit = limit
        self._long = 0
        self._tasks: dict[tuple[Peer | _Nobody, int], asyncio.Task[None]] = {}

    def receive(self, ask: Ask, peer: Peer | _Nobody) -> None:
        """Begin to work on a question."""
        task = asyncio.create_task(self._work(ask, peer))
        key = (peer, ask.number)
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def carry_out(self, ask: Ask) -> None:
        """Do what a client of another replica has called for; nobody waits for the answer."""
        self.receive(ask, _Nobody())

    def abandon(self, frame: Abandon, peer: Peer) -> None:
        """Nobody waits for the answer any more."""
        task = self._tasks.get((peer, frame.number))
        if task is not None:
            _cancel(task)

    def gone(self, peer: Peer) -> None:
        """A worker is gone."""
        for (owner, _), task in list(self._tasks.items()):
            if owner is peer:
                _cancel(task)

    async def close(self) -> None:
        """Cancel everything."""
        tasks = list(self._tasks.values())
        for task in tasks:
            _cancel(task)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, ask: Ask, peer: Peer | _Nobody) -> None:
        try:
            answer = await self._answer(ask, lambda text: peer.send(Progress(ask.number, text)))
        except ProblemError as problem:
            peer.send(Answer(ask.number, problem=problem.problem))
        except UnavailableError as error:
            peer.send(
                Answer(ask.number, problem=Problem("57P03", f"the learner cannot reach the server: {error}"))
            )
        except asyncpg.PostgresError as error:
            peer.send(
                Answer(
                    ask.number,
                    problem=Problem(
                        error.sqlstate or "XX000",
                        str(error),
                        detail="The learner's own connection (learner.dsn) met this error.",
                        hint="It does not see what is not committed, and needs SELECT on the tables.",
                    ),
                )
            )
        except Exception as error:  # the learner goes on whatever one question leads to
            log.exception("%s of %s failed", ask.function, ask.table)
            words = f"{ask.function} failed in the learner: {type(error).__name__}; its log says more"
            peer.send(Answer(ask.number, problem=Problem("XX000", words)))
        else:
            peer.send(Answer(ask.number, json.dumps(_finite(answer)).encode()))

    async def _answer(self, ask: Ask, report: Report) -> Any:
        if ask.version != ASK_VERSION:
            raise ProblemError("0A000", "the proxy's worker and its learner are of different versions")
        handler = self._handlers.get(ask.function)
        if handler is None:
            raise ProblemError("0A000", f"the learner does not know {ask.function}")
        arguments = json.loads(ask.arguments)
        if ask.function not in LONG:
            return await handler(ask, arguments, report)
        if self._long >= self._limit:
            raise ProblemError(
                "53400",
                f"{self._long} measurements that somebody asked for are under way already",
                hint="Wait for their end, or raise sql.max_measurements.",
            )
        self._long += 1
        try:
            return await handler(ask, arguments, report)
        finally:
            self._long -= 1


def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task once: a second time would disturb it while it puts a connection in order."""
    if not task.cancelling():
        task.cancel()


def _finite(value: Any) -> Any:
    """Return JSON values with NULL for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
