"""Vectors of 768 and 1536 dimensions: the real ones, turned into a larger space (`tables.widened`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from msgspec.structs import replace as replaced
from numpy.typing import NDArray

from bench.suite import contest, traffic
from bench.suite.contest import Contest, run
from bench.suite.queries import Question, Statement
from bench.suite.records import Panel, Result, Series
from bench.suite.stage import Stage, proxy_name
from bench.suite.systems import AS_IT_COMES, PLAIN
from bench.suite.tables import Table, widened

DIMENSIONS = (768, 1536)


async def dimensions(stage: Stage) -> list[Result]:
    """The same search problem with longer vectors: only what they cost differs."""
    parts = [await _one(stage, each) for each in DIMENSIONS]
    result = Result(
        "dimensions",
        "768 and 1536 dimensions",
        "The real vectors, turned by an orthonormal map into more dimensions: the same neighbours and recall "
        "curves, dearer to send, decode and compare.",
    )
    for part, width in zip(parts, DIMENSIONS, strict=True):
        result.facts |= {f"{name}, {width}": value for name, value in part.facts.items()}
        result.claims += [replaced(claim, text=f"{width} dimensions: {claim.text}") for claim in part.claims]
        result.ratios += part.ratios
        result.lines += [replaced(line, name=f"{width}: {line.name}") for line in part.lines]
    result.noise = max(part.noise or 0.0 for part in parts)
    result.panels = [
        Panel(
            f"{width} dimensions: recall against mean latency",
            "mean ms",
            "recall",
            part.panels[0].series,
            log_x=True,
            target=0.98,
        )
        for part, width in zip(parts, DIMENSIONS, strict=True)
    ]
    means = {
        name: [next(line.mean_ms for line in part.lines if line.name == name) for part in parts]
        for name in (AS_IT_COMES, contest.TUNED, proxy_name(0.98))
    }
    at = [float(width) for width in DIMENSIONS]
    result.panels.append(
        Panel("mean latency", "dimensions", "mean ms", [Series(name, at, ms) for name, ms in means.items()])
    )
    return [result]


async def _one(stage: Stage, width: int) -> Result:
    name = f"wide_{width}"

    def make_table() -> Table:
        return Table(name, widened(stage.data.base[: stage.scale.wide], width), {})

    table = await stage.table(name, make_table)
    data = replace(stage.data, queries={f: widened(each, width) for f, each in stage.data.queries.items()})
    statement = Statement(name)

    def make(family: str, vector: NDArray[np.float32], rng: np.random.Generator) -> Question:
        return Question(family, vector, None, statement)

    split = traffic.distinct(
        data, make, tuning=stage.scale.queries(120), test=stage.scale.queries(420), seed=8
    )
    wanted = Contest(
        name,
        f"{width} dimensions",
        "",
        {name: table},
        split,
        PLAIN,
        learning=28.0,
        credit=20.0,
        tuning=6.0,
        measuring=20.0,
    )
    return contest.judge(await run(stage, wanted))
