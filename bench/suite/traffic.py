"""Queries of a scenario, split and drawn by a seed: all different, or repeating themselves by Zipf's law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.dataset import Dataset
from bench.replay.record import moved
from bench.suite.contest import Split
from bench.suite.queries import Question

Make = Callable[[str, NDArray[np.float32], np.random.Generator], Question]
"""Family, vector and a generator to a question."""

DISTINCT = 2_000  # queries of each family behind repeating traffic


def pool(
    data: Dataset, families: Sequence[str] | None, rng: np.random.Generator, each: int | None = None
) -> list[tuple[str, NDArray[np.float32]]]:
    """Return family and vector of all queries of some families in random order, `each` of every family."""
    found: list[tuple[str, NDArray[np.float32]]] = []
    for family in families or tuple(data.queries):
        found += [(family, vector) for vector in rng.permutation(data.queries[family])[:each]]
    return [found[i] for i in rng.permutation(len(found))]


def distinct(
    data: Dataset,
    make: Make,
    *,
    tuning: int,
    test: int,
    families: Sequence[str] | None = None,
    each: int | None = None,
    seed: int = 0,
) -> Split:
    """Return disjoint sets; the application asks the rest in random order, for ever.

    `each` bounds the queries of a family, so that families are alike in number.
    """
    rng = np.random.default_rng([seed, 1])
    found = pool(data, families, rng, each)
    if len(found) < 2 * (tuning + test):
        raise ValueError(f"{len(found)} queries are too few for {tuning} to tune and {test} to test by")
    held_out, rest = found[: tuning + test], found[tuning + test :]
    questions = [make(*one, rng) for one in held_out]

    def live() -> Iterator[Question]:
        drawn = np.random.default_rng([seed, 2])
        while True:
            yield make(*rest[drawn.integers(len(rest))], drawn)

    return Split(live(), questions[:tuning], questions[tuning:])


def repeating(
    data: Dataset,
    make: Make,
    *,
    tuning: int,
    test: int,
    exponent: float = 1.0,
    cosine: float = 1.0,
    seed: int = 0,
) -> Split:
    """Return sets drawn from one Zipf distribution over `DISTINCT` queries of every family.

    With a `cosine` below 1 each occurrence is moved in a random direction to this cosine to its original.
    """
    found = pool(data, None, np.random.default_rng([seed, 3]), DISTINCT)
    share = 1.0 / np.arange(1, len(found) + 1) ** exponent
    share /= share.sum()

    def draws(stream: int) -> Iterator[Question]:
        rng = np.random.default_rng([seed, stream])
        while True:
            for i in rng.choice(len(found), size=256, p=share):
                family, vector = found[i]
                yield make(family, vector if cosine == 1.0 else moved(vector[None], cosine, rng)[0], rng)

    asked, tuned, tested = draws(4), draws(5), draws(6)
    return Split(asked, [next(tuned) for _ in range(tuning)], [next(tested) for _ in range(test)])
