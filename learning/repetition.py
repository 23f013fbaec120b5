"""How far traffic repeats itself: exact counts of the queries in a window, and what they say of the future.

What was seen says more about queries that return than it does about the next one: of the queries seen once
in a window, most never come back, and those seen often were partly lucky.  So each distinct query's count is
*discounted* before it is taken for its share of the traffic to come; what is taken off is the share of
queries that nobody asked yet.  Queries seen once are worth ``2 n2 / n1`` queries each (Good and Turing: n1
were seen once, n2 twice), 0 where nothing returns.  From a larger count 1 is taken off, which is what the
same rule gives for traffic by Zipf's law; for exponents of 0.8 to 1.2 the share of the 200 most frequent
queries is then foretold to within 0.02.

No clock, no chance: a window of queries in, numbers out.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

WINDOW = 8192
"""Queries counted; each takes about 150 bytes."""

NAME = 16
"""Bytes of a `vector_name`."""

_hash = hashlib.blake2b


def vector_name(vector: bytes | memoryview) -> bytes:
    """Return 16 bytes that stand for a query vector."""
    return _hash(vector, digest_size=NAME).digest()


@dataclass(frozen=True, slots=True)
class Asked:
    """How often each distinct query of one context was asked; the counts sum to at most `total`."""

    counts: Mapping[bytes, int] = field(default_factory=dict)  # vector_name -> queries
    total: int = 0

    def discounts(self) -> tuple[float, float]:
        """Return what is taken off counts of 1, and off larger ones."""
        having = Counter(self.counts.values())
        if not having[1]:
            return 0.0, 0.0
        return max(0.0, 1.0 - 2.0 * having[2] / having[1]), 1.0

    def shares(self, names: Sequence[bytes]) -> NDArray[np.float64]:
        """Return the share of the traffic to come that each of these distinct queries will have."""
        if not self.total:
            return np.zeros(len(names))
        counts = np.array([self.counts.get(name, 0) for name in names], dtype=np.float64)
        taken = np.array((0.0, *self.discounts()))[np.minimum(counts, 2).astype(int)]
        shares: NDArray[np.float64] = np.maximum(counts - taken, 0.0) / self.total
        return shares


class Repetition:
    """Counts over the last `window` queries of a template, whatever their context.

    Parameters
    ----------
    window
        Queries counted; older ones fall out.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._window: deque[tuple[str, bytes]] = deque(maxlen=window)
        self._counts: dict[str, Counter[bytes]] = {}

    def record(self, context: str, name: bytes) -> None:
        """Count one query."""
        if len(self._window) == self._window.maxlen:
            self._forget(*self._window[0])
        self._window.append((context, name))
        self._counts.setdefault(context, Counter())[name] += 1

    def _forget(self, context: str, name: bytes) -> None:
        counts = self._counts[context]
        counts[name] -= 1
        if not counts[name]:
            del counts[name]
        if not counts:
            del self._counts[context]

    def count(self, context: str, name: bytes) -> int:
        """Return how often a query was asked in the window."""
        counts = self._counts.get(context)
        return counts[name] if counts is not None else 0

    def asked(self, context: str) -> Asked:
        """Return the counts of one context, as they are now."""
        counts = self._counts.get(context, Counter())
        return Asked(dict(counts), counts.total())
