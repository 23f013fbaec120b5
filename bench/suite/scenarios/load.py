"""Many connections at once, and caches that are cold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import numpy as np

from bench.suite import statistics
from bench.suite.contest import Outcome
from bench.suite.queries import Client, Question
from bench.suite.records import Interval, Panel, Result, Series
from bench.suite.stage import Stage, proxy_name
from bench.suite.statistics import at_least, at_most, interval
from bench.suite.systems import AS_IT_COMES

LEVELS = (1, 2, 4, 8, 16)
COLD, COLD_ROUNDS = 120, 3  # queries after each restart, restarts for each system
ROUNDS, SLICE = 3, 1.0  # turns of each system at each level, seconds of each


async def concurrency(stage: Stage, outcome: Outcome) -> Result:
    """Closed loops of 1 to 16 connections: queries a second, as it comes, best static, through the proxy."""
    static = statistics.best_static(outcome.tuned, outcome.statics, 0.98)
    names = (AS_IT_COMES, static, proxy_name(0.98))
    result = Result(
        "concurrency",
        "Concurrency",
        "1 to 16 connections that ask without a pause: does the proxy keep its advantage where "
        "processors are "
        "scarce? Its own processor time counts here.",
        facts=outcome.taught.facts | {"best static, tuned": static},
    )
    stage.say("concurrency: 1 to 16 connections")
    rates: dict[str, dict[int, list[float]]] = {name: {level: [] for level in LEVELS} for name in names}
    recalls: dict[str, list[float]] = {name: [] for name in names}
    async with AsyncExitStack() as stack:
        opened: dict[str, list[Client]] = {name: [] for name in names}
        for name in names:
            for _ in range(LEVELS[-1]):
                client = await _connect(stage, outcome, name)
                opened[name].append(await stack.enter_async_context(client))
                await client.ask(outcome.contest.split.test[0])
        for turn in range(ROUNDS):
            for level in LEVELS:
                for name in (*names[turn % 3 :], *names[: turn % 3]):
                    rate, answers = await _loop(
                        opened[name][:level], outcome.contest.split.test, stage.scale.seconds(SLICE)
                    )
                    rates[name][level].append(rate)
                    recalls[name] += _recall(outcome, answers)
    at = [float(level) for level in LEVELS]
    result.panels = [
        Panel(
            "throughput",
            "connections",
            "queries a second",
            [
                Series(
                    "through the proxy" if name == names[2] else name,
                    at,
                    [float(np.mean(rates[name][level])) for level in LEVELS],
                )
                for name in names
            ],
            log_x=True,
        )
    ]
    for level in LEVELS:
        pairs = np.array(rates[names[2]][level]) / np.array(rates[static][level])
        result.claims.append(
            at_least(
                f"{level} connections: queries a second, of the best static setting's", 0.95, _spread(pairs)
            )
        )
    result.notes.append(
        "Recall meanwhile: "
        + ", ".join(f"{name} {np.mean(found):.4f}" for name, found in recalls.items())
        + "."
    )
    return result


async def cold(stage: Stage, outcome: Outcome) -> Result:
    """The first queries after a restart of the server, when its buffers are empty."""
    static = statistics.best_static(outcome.tuned, outcome.statics, 0.98)
    names = (AS_IT_COMES, static, proxy_name(0.98))
    queries = outcome.contest.split.test[: stage.scale.queries(COLD)]
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    stage.say(f"cold caches: {COLD_ROUNDS * len(names)} restarts of the server")
    for turn in range(COLD_ROUNDS):
        for name in (*names[turn % 3 :], *names[: turn % 3]):
            await asyncio.to_thread(stage.restart)
            async with await _connect(stage, outcome, name) as client:
                curves[name].append([await _timed(client, query) for query in queries])
    means = {name: np.array(rounds) for name, rounds in curves.items()}
    result = Result(
        "cold",
        "Cold and warm",
        "The first queries after a restart of the server. Does the proxy read more of the index than one "
        "setting does?",
        facts={
            "queries after each restart": str(len(queries)),
            "rounds": str(COLD_ROUNDS),
            "best static": static,
        },
        notes=[
            "The server's buffers are empty then; the operating system still has the files, which nobody but "
            "root can change. What was learned is in the proxy and stays there."
        ],
    )
    ratios = means[names[2]].mean(axis=1) / means[static].mean(axis=1)
    result.claims.append(
        at_most(
            "cold: mean latency over the best static setting's, whatever the recall", 1.1, _spread(ratios)
        )
    )
    window = max(1, len(queries) // 12)
    kernel = np.ones(window) / window
    at = np.arange(window, len(queries) + 1, dtype=float).tolist()
    result.panels = [
        Panel(
            f"after a restart: mean of the last {window} queries",
            "queries since the restart",
            "mean ms",
            [
                Series(
                    "through the proxy" if name == names[2] else name,
                    at,
                    np.convolve(rounds.mean(axis=0), kernel, "valid").tolist(),
                )
                for name, rounds in means.items()
            ],
        )
    ]
    return result


async def _timed(client: Client, query: Question) -> float:
    """Return the milliseconds that a query takes."""
    started = time.perf_counter()
    await client.ask(query)
    return (time.perf_counter() - started) * 1e3


async def _connect(stage: Stage, outcome: Outcome, name: str) -> Client:
    if name in outcome.taught.proxies:
        return await Client.connect(outcome.taught.proxies[name].address)
    way = outcome.contest.ways[name]
    return await Client.connect(stage.upstream.address, way.settings)


async def _loop(
    clients: Sequence[Client], queries: Sequence[Question], seconds: float
) -> tuple[float, list[tuple[Question, list[int]]]]:
    """Return queries a second of all clients together, and some answers."""
    answers: list[tuple[Question, list[int]]] = []
    started = time.perf_counter()

    async def one(client: Client, first: int) -> int:
        done = 0
        while time.perf_counter() - started < seconds:
            query = queries[(first + done) % len(queries)]
            ids = await client.ask(query)
            if done % 8 == 0:
                answers.append((query, ids))
            done += 1
        return done

    counts = await asyncio.gather(*(one(client, 53 * i) for i, client in enumerate(clients)))
    return sum(counts) / (time.perf_counter() - started), answers


def _recall(outcome: Outcome, answers: Sequence[tuple[Question, list[int]]]) -> list[float]:
    limits = outcome.truth.limits([query for query, _ in answers])
    return [outcome.truth.recall(q, ids, limit) for (q, ids), limit in zip(answers, limits, strict=True)]


def _spread(values: np.ndarray) -> Interval:
    """Return the mean of a few rounds with the interval that a bootstrap over them gives."""
    rng = np.random.default_rng(0)
    draws = values[rng.integers(len(values), size=(statistics.DRAWS, len(values)))].mean(axis=1)
    return interval(float(values.mean()), draws)
