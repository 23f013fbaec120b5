"""The per-query policy as it travels, and its evaluation for one query in the hot path.

`pack` writes a `QueryPolicy`, `QueryLookup` reads it: the two stand together because only they know what
`extra` holds.  All arrays are little endian.

=============  ===========================  ================================================================
key            shape                        meaning
=============  ===========================  ================================================================
``k``          int64 [1]                    the policy is for queries of at most this LIMIT + OFFSET
``slope``      float64 [features]           of the difficulty: density features (if any), then memory features
``intercept``  float64 [1]                  of the difficulty
``grid``       float64 [GRID]               difficulties at which the surface is tabulated
``surface``    float64 [GRID, arms]         expected recall
``z``          float64 [patterns]           difficulty of each pattern
``misses``     float64 [patterns]           log miss rate of each pattern
``codes``      int8 [rows, components]       the table's sketch; absent where there is none
``basis``      float32 [dims, components]   of the sketch
``centre``     float32 [dims]               of the sketch
``density``    float64 [4]                  scale, 1.0 if Euclidean, noise floor, greatest strangeness
=============  ===========================  ================================================================

One lookup is two searches in small HNSW graphs (patterns, sketch) and some twenty operations on arrays of
about twenty numbers; docs/learning.md has the times.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learning import density, difficulty
from learning.density import Sketch, SketchData
from learning.difficulty import Model
from learning.reasoning_bank import PatternIndex
from learning.records import QueryPolicy

Floats = NDArray[np.float64]

UNUSABLE_MS = 1e9
"""Cost of an arm that was never measured: finite, so that it survives JSON."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """A sketch, and what the labelled queries saw around them in it."""

    data: SketchData
    floor: float  # distances below this are noise (density.noise_floor)
    limit: float  # queries stranger than this are unlike every labelled one (density.strangeness)


@dataclass(frozen=True, slots=True)
class Patterns:
    """The bank's patterns as arrays."""

    centroids: NDArray[np.float32]  # [n, dimensions], normalised
    curves: Floats  # [n, arms]
    counts: Floats  # [n]
    z: Floats  # [n]
    misses: Floats  # [n]


def pack(
    patterns: Patterns,
    model: Model,
    cost: Floats,
    *,
    k: int,
    price: float,
    min_similarity: float,
    around: Surroundings | None,
) -> QueryPolicy:
    """Return the policy that `QueryLookup` evaluates; `model.surface` and `cost` cover all arms."""
    extra = {
        "k": np.array([k], dtype="<i8").tobytes(),
        "slope": model.slope.astype("<f8").tobytes(),
        "intercept": np.array([model.intercept], dtype="<f8").tobytes(),
        "grid": model.grid.astype("<f8").tobytes(),
        "surface": model.surface.astype("<f8").tobytes(),
        "z": patterns.z.astype("<f8").tobytes(),
        "misses": patterns.misses.astype("<f8").tobytes(),
    }
    if around is not None:
        data = around.data
        facts = (data.scale, float(data.euclidean), around.floor, around.limit)
        extra |= {"codes": data.codes, "basis": data.basis, "centre": data.centre}
        extra["density"] = np.array(facts, dtype="<f8").tobytes()
    total = patterns.counts.sum()
    prior = patterns.counts @ patterns.curves / total
    return QueryPolicy(
        dimensions=patterns.centroids.shape[1],
        centroids=patterns.centroids.astype("<f4").tobytes(),
        curves=patterns.curves.astype("<f4").tobytes(),
        weights=patterns.counts.astype("<f4").tobytes(),
        costs=tuple(np.where(np.isfinite(cost), cost, UNUSABLE_MS).tolist()),
        prior=tuple(prior.tolist()),
        prior_weight=difficulty.PRIOR_WEIGHT,
        sharpness=difficulty.SHARPNESS,
        neighbours=difficulty.NEIGHBOURS,
        price=price,
        min_similarity=min_similarity,
        extra=extra,
    )


class QueryLookup:
    """A `QueryPolicy` with its indexes, ready to choose arms; read-only once built.

    Parameters
    ----------
    policy
        As written by `pack`.
    sketches
        Sketch indexes built so far, by digest.  Templates of one table share a sketch, and it outlives a
        snapshot.

    Raises
    ------
    ValueError, KeyError
        The policy is malformed.
    """

    def __init__(self, policy: QueryPolicy, sketches: MutableMapping[bytes, Sketch]) -> None:
        arms = len(policy.costs)
        extra = policy.extra
        self.dimensions = policy.dimensions
        self.k = int(np.frombuffer(extra["k"], dtype="<i8")[0])
        centroids = np.frombuffer(policy.centroids, dtype="<f4").reshape(-1, policy.dimensions)
        self._patterns = PatternIndex(centroids)
        counts = np.frombuffer(policy.weights, dtype="<f4").astype(np.float64)
        misses = np.frombuffer(extra["misses"], dtype="<f8")
        self._neighbours = policy.neighbours
        self._half_sharpness = 0.5 * policy.sharpness
        self._prior_weight = policy.prior_weight
        self._min_similarity = policy.min_similarity
        grid = np.frombuffer(extra["grid"], dtype="<f8")
        surface = np.frombuffer(extra["surface"], dtype="<f8").reshape(-1, arms)
        curves = np.frombuffer(policy.curves, dtype="<f4").reshape(-1, arms).astype(np.float64)
        z = np.frombuffer(extra["z"], dtype="<f8")
        residuals = curves - difficulty.interpolate(grid, surface, z)
        # One row per pattern, so that a lookup gathers everything about its neighbours at once.
        self._table = np.column_stack((counts, misses, residuals))
        # With the price taken off beforehand, the best arm is one argmax away.
        self._toll = policy.price * np.array(policy.costs)
        self._utility = surface - self._toll
        self._grid: list[float] = grid.tolist()
        self._read_model(extra)
        self._read_sketch(extra, sketches)

    def _read_model(self, extra: dict[str, bytes]) -> None:
        slope = np.frombuffer(extra["slope"], dtype="<f8")
        self._intercept = float(np.frombuffer(extra["intercept"], dtype="<f8")[0])
        self._density_slope = slope[: -difficulty.MEMORY_FEATURES]
        self._memory_slope: list[float] = slope[-difficulty.MEMORY_FEATURES :].tolist()

    def _read_sketch(self, extra: dict[str, bytes], sketches: MutableMapping[bytes, Sketch]) -> None:
        self.sketch_name: bytes | None = None
        self._sketch: Sketch | None = None
        self._floor = self._limit = math.inf
        if "codes" not in extra:
            return
        scale, euclidean, self._floor, self._limit = np.frombuffer(extra["density"], dtype="<f8").tolist()
        data = SketchData(extra["codes"], extra["basis"], extra["centre"], scale, bool(euclidean))
        self.sketch_name = name = data.digest()
        if name not in sketches:
            sketches[name] = Sketch(data)
        self._sketch = sketches[name]

    def choose(self, vector: NDArray[np.float32]) -> tuple[int, float] | None:
        """Return one query's arm and its expected recall, or None for a query unlike all that is known."""
        numbers, cosines = self._patterns.nearest(vector, self._neighbours)
        nearest_cosine = float(cosines[0])
        if not nearest_cosine >= self._min_similarity:  # also where it is not a number
            return None
        z = self._intercept
        if self._sketch is not None:
            seen = self._sketch.look(vector[None, :])
            if not density.strangeness(seen)[0] <= self._limit:
                return None
            z += float(density.features(seen, self._floor)[0] @ self._density_slope)
        closeness = np.exp(self._half_sharpness * (cosines - 1.0))
        known = self._table.take(numbers.astype(np.intp), axis=0)
        weight = known[:, 0] * closeness
        total = float(weight.sum())
        mean_miss, log_total, nearest = self._memory_slope
        z += mean_miss * float(weight @ known[:, 1]) / total
        z += log_total * math.log(total) + nearest * nearest_cosine
        weight *= closeness
        utility = weight @ known[:, 2:]
        utility /= float(weight.sum()) + self._prior_weight
        utility += self._surface_utility(z)
        arm = int(utility.argmax())
        return arm, min(1.0, float(utility[arm] + self._toll[arm]))

    def _surface_utility(self, z: float) -> Floats:
        grid = self._grid
        left = min(max(bisect_left(grid, z) - 1, 0), len(grid) - 2)
        share = min(max((z - grid[left]) / (grid[left + 1] - grid[left]), 0.0), 1.0)
        utility: Floats = self._utility[left] * (1.0 - share) + self._utility[left + 1] * share
        return utility
