"""Traffic that repeats itself by Zipf's law: the very same queries, and nearly the same ones."""

from __future__ import annotations

from bench.suite import contest, traffic
from bench.suite.contest import Contest, run
from bench.suite.queries import Statement
from bench.suite.records import Result
from bench.suite.scenarios.shared import items, plain
from bench.suite.stage import Stage
from bench.suite.systems import PLAIN


async def exact(stage: Stage) -> list[Result]:
    """Every occurrence is the original."""
    return await _repeating(
        stage,
        "zipf",
        "Zipf traffic, exact repetitions",
        "Queries drawn by Zipf's law (exponent 1.0) from 6,000: what is frequent was measured before.",
        1.0,
        {0.98: 0.50, 0.99: 0.35},
    )


async def near(stage: Stage) -> list[Result]:
    """Every occurrence is moved."""
    return await _repeating(
        stage,
        "near",
        "Zipf traffic, near repetitions",
        "The same, with every occurrence moved in a random direction to cosine 0.95 of its original: "
        "nothing is "
        "ever asked twice.",
        0.95,
        {0.98: 0.65, 0.99: 0.55},
    )


async def _repeating(
    stage: Stage, name: str, title: str, question: str, cosine: float, targets: dict[float, float | None]
) -> list[Result]:
    table = await items(stage)
    split = traffic.repeating(
        stage.data,
        plain(Statement("items")),
        tuning=stage.scale.queries(150),
        test=stage.scale.queries(600),
        cosine=cosine,
        seed=2,
    )
    wanted = Contest(
        name,
        title,
        question,
        {"items": table},
        split,
        PLAIN,
        targets=targets,
        learning=90.0,
        credit=72.0,
        tuning=8.0,
        measuring=38.0,
    )
    return [contest.judge(await run(stage, wanted))]
