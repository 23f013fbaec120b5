"""What choosing per query costs in the proxy: measured before a policy is published, and while it serves.

The *toll* of a level (`learning.calibration.LEVELS`) is the time of its lookup.  It depends on the machine,
the dimensions and how much was learned, so it is not guessed: a few lookups are run and their median counts.

Between two lookups of a live worker other work passes through the caches, and a lookup right after another
one is up to twice as fast as a client will ever see; so memory of the size of a second-level cache is read in
between.

That is still a guess at how cold the caches are: behind a search of 30,000 rows lookups took 1.4 to 1.9
times as long (one learner, four derivations).  Once a policy serves, its lookups are timed where they happen
(`Trajectory.lookup_ms`), and what they take over what the stopwatch says of the same level scales all tolls
from then on (`Lived`), also those of levels that do not serve.  So a level whose lookups eat what they save
does not stay.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from learning.calibration import LEVELS, Stopwatch, Tolls, level_of
from learning.density import Sketch
from learning.difficulty import MEMORY_FEATURES
from learning.lookup import LINES, QueryLookup
from learning.records import QueryPolicy

_LOOKUPS = 40
_BETWEEN = np.zeros(1 << 18)  # 2 MB

_SKETCH_KEYS = frozenset({"codes", "cells", "density"})
_DOUBLE = 8  # bytes
_WINDOW = 200  # lookups whose median counts
_ENOUGH = 50
_MOST = 10.0  # the largest scale that is believed


class Lived:
    """What lookups take in live workers, of one template.

    Attributes
    ----------
    scale
        What a lookup takes there over what the stopwatch says, at least 1; kept while no level serves.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self._ms: deque[float] = deque(maxlen=_WINDOW)
        self._level: str | None = None

    def record(self, milliseconds: float) -> None:
        """Take note of one lookup."""
        self._ms.append(milliseconds)

    def stopwatch(self, level: str | None) -> Stopwatch:
        """Return `measure`, its tolls scaled; `level` is the one that serves, None where none does.

        What was recorded is looked at now, so that the stopwatch may be used in another thread.
        """
        if level != self._level:
            self._level = level
            self._ms.clear()
        chooses = level is not None and level != LEVELS[0]
        lived_ms = float(np.median(self._ms)) if chooses and len(self._ms) >= _ENOUGH else None

        def measured(
            policy: QueryPolicy, vectors: NDArray[np.float32], sketches: Mapping[bytes, Sketch]
        ) -> Tolls:
            tolls = measure(policy, vectors, sketches)
            if lived_ms is not None and level is not None and _includes(policy, level):
                expected = sum(tolls[: LEVELS.index(level) + 1])
                self.scale = min(_MOST, max(1.0, lived_ms / max(expected, 1e-3)))
            repeated, memory, sketch = (self.scale * toll for toll in tolls)
            return repeated, memory, sketch

        return measured


def measure(policy: QueryPolicy, vectors: NDArray[np.float32], sketches: Mapping[bytes, Sketch]) -> Tolls:
    """Return the tolls of the levels up to the policy's own; those it does not have are 0.

    Parameters
    ----------
    vectors
        Some that it was made from [n, dimensions], at least one.
    sketches
        Indexes that exist already, by digest.
    """
    some = [vectors[i % len(vectors)] for i in range(_LOOKUPS)]
    new = [vector * np.float32(0.999) for vector in some]  # other bytes, hardly another place
    repeated = _median_ms(policy, some, sketches)
    if "slope" not in policy.extra:
        return repeated, 0.0, 0.0
    everything = _median_ms(policy, new, sketches)
    if "codes" not in policy.extra:
        return repeated, max(0.0, everything - repeated), 0.0
    memory = max(repeated, _median_ms(_without_sketch(policy), new, {}))
    return repeated, memory - repeated, max(0.0, everything - memory)


def _includes(policy: QueryPolicy, level: str) -> bool:
    """Tell whether a policy has the evidence of a level, so that its lookups can be timed."""
    return LEVELS.index(level) <= LEVELS.index(level_of(policy))


def _median_ms(
    policy: QueryPolicy, vectors: Sequence[NDArray[np.float32]], sketches: Mapping[bytes, Sketch]
) -> float:
    lookup = QueryLookup(policy, dict(sketches))
    seconds = []
    for vector in vectors:
        _BETWEEN.sum()
        started = time.perf_counter()
        lookup.choose(vector)
        seconds.append(time.perf_counter() - started)
    return 1e3 * float(np.median(seconds))


def _without_sketch(policy: QueryPolicy) -> QueryPolicy:
    """Return the policy as if no sketch had been there: what it chooses means nothing."""
    extra = {key: data for key, data in policy.extra.items() if key not in _SKETCH_KEYS}
    extra |= {key: extra[key][-MEMORY_FEATURES * _DOUBLE :] for key in LINES}
    return msgspec.structs.replace(policy, extra=extra)
