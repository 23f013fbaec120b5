"""The application while the proxy learns: three connections, two drivers, an even stream of queries.

The traffic is paced, not driven as fast as it goes: an application that leaves something of its machine is
the usual case, and the learner gives way to a busy server.  Every answer is kept, so that the report can show
how recall rose while the proxy learned.  Whether learning has settled, the proxy's published figures say.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, MutableSequence, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from bench.demo.proxy import Figures, Proxy
from bench.demo.workload import AsyncpgClient, PsycopgClient, Query

_SPENT_CREDIT = 0.5  # seconds; the bucket is refilled slowly, and then spent at once


Asked = TypeVar("Asked", bound=Query, contravariant=True)


class Client(Protocol[Asked]):
    """A connection that the application asks through."""

    driver: str

    async def ask(self, query: Asked) -> list[int]:
        """Run the query; return the ids."""


Connect = Callable[[Proxy], Awaitable[AbstractAsyncContextManager[Client[Asked]]]]
"""Opens one connection to a proxy."""


@dataclass(frozen=True)
class Answer:
    """One answered query: seconds since the start, the driver that asked, and what came back."""

    at: float
    driver: str
    query: Query
    ids: list[int]
    ms: float


def settled(figures: Figures) -> bool:
    """Tell from a scrape of /metrics whether the proxy has learned what it was given time to learn.

    It has when every known kind of query has a measured policy, a worker has it in force, and the starting
    credit for measuring is spent: from then on the learner only keeps watch, within its small budget.
    """
    trust = figures.by("ruvector_templates", "trust")
    return (
        sum(trust.values()) > 0
        and trust.get("observe", 0) == 0
        and figures.total("ruvector_policy_version") > 0
        and figures.total("ruvector_probe_credit_seconds") < _SPENT_CREDIT
    )


@dataclass
class Learned:
    """What the learning phase gave: all answers, the last scrape, its length, and why it ended."""

    answers: list[Answer] = field(default_factory=list)
    figures: Figures = field(default_factory=lambda: Figures({}))
    seconds: float = 0.0
    reason: str = ""


CONNECTIONS: Sequence[Connect[Query]] = (
    lambda proxy: AsyncpgClient.connect(proxy.address),
    lambda proxy: AsyncpgClient.connect(proxy.address),
    lambda proxy: PsycopgClient.connect(proxy.address),
)
"""Those of the demo's application."""


async def learn(
    proxy: Proxy,
    queries: Iterator[Asked],
    *,
    rate: float,
    limit: float,
    show: Callable[[float, Figures], None] = lambda seconds, figures: None,
    connections: Sequence[Connect[Asked]] = CONNECTIONS,
) -> Learned:
    """Send `queries` through the proxy until its policy has settled, or for `limit` seconds.

    `rate` is in queries a second and connection.  `show` is called once a second with the time and a scrape.
    An error of any query ends the phase with that error: an application must never get one from the proxy.
    """
    learned, start = Learned(), time.monotonic()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(await connect(proxy)) for connect in connections]
        senders = [
            asyncio.create_task(_send(client, queries, 1.0 / rate, start, learned.answers))
            for client in clients
        ]
        try:
            await _watch(proxy, senders, learned, start, limit, show)
        finally:
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)
    learned.seconds = time.monotonic() - start
    return learned


async def go_on(proxy: Proxy, queries: Iterator[Query], *, rate: float) -> None:
    """Send `queries` through the proxy, so many a second, until cancelled; an error ends it."""
    async with await AsyncpgClient.connect(proxy.address) as client:
        await _send(client, queries, 1.0 / rate, time.monotonic(), deque(maxlen=0))


async def _send(
    client: Client[Asked],
    queries: Iterator[Asked],
    interval: float,
    start: float,
    answers: MutableSequence[Answer],
) -> None:
    due = time.monotonic()
    while True:
        query = next(queries)
        began = time.perf_counter()
        ids = await client.ask(query)
        ms = (time.perf_counter() - began) * 1e3
        answers.append(Answer(time.monotonic() - start, client.driver, query, ids, ms))
        due = max(
            due + interval, time.monotonic() - 10 * interval
        )  # a stall is caught up with for a moment only
        await asyncio.sleep(due - time.monotonic())


async def _watch(
    proxy: Proxy,
    senders: list[asyncio.Task[None]],
    learned: Learned,
    start: float,
    limit: float,
    show: Callable[[float, Figures], None],
) -> None:
    while True:
        done, _ = await asyncio.wait(senders, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        for sender in done:
            sender.result()  # raises the error that ended it
        now = time.monotonic() - start
        learned.figures = await proxy.figures()
        show(now, learned.figures)
        if settled(learned.figures):
            learned.reason = "the starting credit for measuring is spent"
            return
        if now >= limit:
            learned.reason = f"the time limit of {limit:.0f} s was reached"
            return
