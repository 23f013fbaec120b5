"""Tables and questions that several scenarios use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.suite.queries import Question, Statement
from bench.suite.stage import Stage
from bench.suite.tables import Table, filter_columns
from bench.suite.traffic import Make


async def items(stage: Stage) -> Table:
    """Return the largest table: all rows, with the data set's own category."""

    def make() -> Table:
        return Table("items", stage.data.base, {"category": stage.data.category.astype(np.int64)})

    return await stage.table("items", make)


async def small(stage: Stage, name: str = "small", **more: tuple[str, ...]) -> Table:
    """Return a table of the first rows, with all filter columns."""

    def make() -> Table:
        rows = min(stage.scale.small, len(stage.data.base))
        columns = filter_columns(stage.data)
        return Table(
            name, stage.data.base[:rows], {key: each[:rows] for key, each in columns.items()}, **more
        )

    return await stage.table(name, make)


def plain(statement: Statement, k: int = 10) -> Make:
    """Return what makes unfiltered questions."""

    def make(family: str, vector: NDArray[np.float32], rng: np.random.Generator) -> Question:
        return Question(family, vector, None, statement, k)

    return make
