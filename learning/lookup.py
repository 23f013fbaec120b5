"""The per-query policy as it travels, and its evaluation for one query in the hot path.

`pack` writes a `QueryPolicy`, `QueryLookup` reads it: the two stand together because only they know what
`extra` holds.  All arrays are little endian.

================  =======================  =================================================================
key               shape                    meaning
================  =======================  =================================================================
``k``             int64 [1]                the policy is for queries of at most this LIMIT + OFFSET
``names``         bytes [queries, 16]      the labelled queries themselves (`vector_name`)
``name_arms``     int16 [queries]          the arm of each
``name_recalls``  float32 [queries]        its expected recall
``default``       float64 [2]              arm and expected recall of every other query, if there is no model
``slope``         float64 [features]       of the difficulty: density features (if any), memory features
``bend``          float64 [features]       more of it above a feature's knot
``knot``          float64 [features]
``intercept``     float64 [1]              of the difficulty
``grid``          float64 [GRID]           difficulties at which the surface is tabulated
``surface``       float64 [GRID, arms]     expected recall
``z``             float64 [patterns]       difficulty of each pattern
``misses``        float64 [patterns]       log miss rate of each pattern
``points``        float32 [patterns, m]    the patterns' projections, their first components
``basis``         float32 [dimensions, c]  of the projection, shared by patterns and sketch
``centre``        float32 [dimensions]     of the projection
``frame``         float64 [2]              unit of length, 1.0 if Euclidean
``codes``         int8 [rows, c]           the table's sketch; absent where there is none
``cells``         int32 [cells]            rows in each cell of the sketch
``density``       float64 [3]              of the sketch: scale, noise floor, greatest strangeness
================  =======================  =================================================================

Three steps, each only where the one before it has no answer:

1. the very same vector was measured: one hash and one dictionary access;
2. the model (`learning.difficulty`): one projection, one product with all patterns, one with the
   rows of a few cells of the sketch, and some twenty operations on short arrays;
3. a query unlike everything that is known: None.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from learning import density, difficulty
from learning.density import Sketch, SketchData
from learning.difficulty import Model
from learning.projection import COARSE, Frame, Projection, Vectors
from learning.records import QueryPolicy
from learning.repetition import NAME, vector_name

Floats = NDArray[np.float64]

LINES = ("slope", "bend", "knot")
"""Keys of what the difficulty is computed from, one number for each feature."""

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
    points: NDArray[np.float32]  # [n, components]
    curves: Floats  # [n, arms]
    counts: Floats  # [n]
    z: Floats  # [n]
    misses: Floats  # [n]


@dataclass(frozen=True, slots=True)
class Remembered:
    """Labelled queries with their arms."""

    names: Sequence[bytes]  # `vector_name`
    arms: NDArray[np.intp]
    recalls: Floats


@dataclass(frozen=True, slots=True)
class Fitted:
    """What serves queries that were not measured themselves."""

    model: Model
    frame: Frame
    around: Surroundings | None
    min_similarity: float


def pack(
    patterns: Patterns,
    remembered: Remembered,
    fitted: Fitted | None,
    cost: Floats,
    *,
    k: int,
    price: float,
    default: tuple[int, float],
) -> QueryPolicy:
    """Return the policy that `QueryLookup` evaluates; `model.surface` and `cost` cover all arms."""
    extra = {
        "k": np.array([k], dtype="<i8").tobytes(),
        "names": b"".join(remembered.names),
        "name_arms": remembered.arms.astype("<i2").tobytes(),
        "name_recalls": remembered.recalls.astype("<f4").tobytes(),
        "default": np.array(default, dtype="<f8").tobytes(),
    }
    if fitted is not None:
        extra |= _packed(patterns, fitted)
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
        neighbours=0,
        price=price,
        min_similarity=fitted.min_similarity if fitted is not None else -1.0,
        extra=extra,
    )


def _packed(patterns: Patterns, fitted: Fitted) -> dict[str, bytes]:
    model, frame, around = fitted.model, fitted.frame, fitted.around
    extra = {
        "slope": model.slope.astype("<f8").tobytes(),
        "bend": model.bend.astype("<f8").tobytes(),
        "knot": model.knot.astype("<f8").tobytes(),
        "intercept": np.array([model.intercept], dtype="<f8").tobytes(),
        "grid": model.grid.astype("<f8").tobytes(),
        "surface": model.surface.astype("<f8").tobytes(),
        "z": patterns.z.astype("<f8").tobytes(),
        "misses": patterns.misses.astype("<f8").tobytes(),
        "points": patterns.points[:, :COARSE].astype("<f4").tobytes(),
        "basis": frame.basis,
        "centre": frame.centre,
        "frame": np.array([frame.unit, float(frame.euclidean)], dtype="<f8").tobytes(),
    }
    if around is not None:
        facts = (around.data.scale, around.floor, around.limit)
        extra |= {"codes": around.data.codes, "cells": around.data.cells}
        extra |= {"density": np.array(facts, dtype="<f8").tobytes()}
    return extra


def sketch_of(policy: QueryPolicy) -> SketchData | None:
    """Return the sketch that a policy carries, or None where there is none."""
    extra = policy.extra
    if "codes" not in extra:
        return None
    scale = float(np.frombuffer(extra["density"], dtype="<f8")[0])
    return SketchData(extra["codes"], extra["cells"], scale, _frame(extra))


def _frame(extra: Mapping[str, bytes]) -> Frame:
    unit, euclidean = np.frombuffer(extra["frame"], dtype="<f8").tolist()
    return Frame(extra["basis"], extra["centre"], unit, bool(euclidean))


class Found(NamedTuple):
    """What a lookup found: an arm, its expected recall, and whether this very query was measured."""

    arm: int
    recall: float
    repeated: bool


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
        extra = policy.extra
        self.dimensions = policy.dimensions
        self.k = int(np.frombuffer(extra["k"], dtype="<i8")[0])
        self.sketch_name: bytes | None = None
        self._model: _ModelLookup | None = None
        if "slope" in extra:
            self._model = _ModelLookup(policy, sketches)
            self.sketch_name = self._model.sketch_name
        arm, recall = np.frombuffer(extra["default"], dtype="<f8").tolist()
        self._default = Found(int(arm), recall, repeated=False)
        arms = np.frombuffer(extra["name_arms"], dtype="<i2").tolist()
        recalls = np.frombuffer(extra["name_recalls"], dtype="<f4").tolist()
        names = extra["names"]
        self._repeated = {
            names[i * NAME : (i + 1) * NAME]: Found(arm, recall, repeated=True)
            for i, (arm, recall) in enumerate(zip(arms, recalls, strict=True))
        }

    def choose(self, vector: Vectors) -> Found | None:
        """Return one query's arm and its expected recall, or None for a query unlike all that is known."""
        if self._repeated:
            found = self._repeated.get(vector_name(vector.data))
            if found is not None:
                return found
        return self._default if self._model is None else self._model.choose(vector)


class _ModelLookup:
    """The model's part of a policy."""

    def __init__(self, policy: QueryPolicy, sketches: MutableMapping[bytes, Sketch]) -> None:
        arms = len(policy.costs)
        extra = policy.extra
        frame = _frame(extra)
        if frame.dimensions != policy.dimensions:
            raise ValueError(f"a projection of {frame.dimensions} dimensions for {policy.dimensions}")
        self._read_sketch(policy, frame, sketches)
        grid = np.frombuffer(extra["grid"], dtype="<f8")
        surface = np.frombuffer(extra["surface"], dtype="<f8").reshape(-1, arms)
        self._read_patterns(policy, grid, surface)
        # With the price taken off beforehand, the best arm is one argmax away.
        self._toll: list[float] = [policy.price * cost for cost in policy.costs]
        self._utility = (surface - self._toll).astype(np.float32)
        self._grid: list[float] = grid.tolist()
        self._prior_weight = policy.prior_weight
        # The least likeness that still counts as near.
        self._least = max(difficulty.TINY, math.exp(0.5 * policy.sharpness * (policy.min_similarity - 1.0)))
        self._intercept = float(np.frombuffer(extra["intercept"], dtype="<f8")[0])
        slope, bend, knot = (np.frombuffer(extra[key], dtype="<f8").tolist() for key in LINES)
        self._lines = list(zip(slope, bend, knot, strict=True))

    def _read_sketch(
        self, policy: QueryPolicy, frame: Frame, sketches: MutableMapping[bytes, Sketch]
    ) -> None:
        self.sketch_name: bytes | None = None
        self._sketch: Sketch | None = None
        self._floor = self._limit = math.inf
        data = sketch_of(policy)
        if data is None:  # nothing but patterns to compare with: half of the directions are enough
            self._projection = Projection(frame.first(COARSE))
            return
        _, self._floor, self._limit = np.frombuffer(policy.extra["density"], dtype="<f8").tolist()
        self.sketch_name = name = data.digest()
        if name not in sketches:
            sketches[name] = Sketch(data)
        self._sketch = sketches[name]
        self._projection = self._sketch.projection

    def _read_patterns(self, policy: QueryPolicy, grid: Floats, surface: Floats) -> None:
        extra, arms = policy.extra, len(policy.costs)
        counts = np.frombuffer(policy.weights, dtype="<f4").astype(np.float64)
        points = np.frombuffer(extra["points"], dtype="<f4").reshape(len(counts), -1)
        curves = np.frombuffer(policy.curves, dtype="<f4").reshape(len(counts), arms).astype(np.float64)
        z, misses = (np.frombuffer(extra[key], dtype="<f8") for key in ("z", "misses"))
        residuals = curves - difficulty.interpolate(grid, surface, z)
        half = 0.5 * policy.sharpness
        squares = np.einsum("ij,ij->i", points, points)
        # The product with (1, point) is the logarithm of likeness, but for the length of the query's point.
        self._points = np.ascontiguousarray(half * np.column_stack((-0.5 * squares, points)), np.float32)
        self._half_square = 0.5 * half
        self._near = np.ascontiguousarray(np.column_stack((counts * misses, counts)), np.float32)
        self._memory = np.ascontiguousarray(
            counts[:, None] * np.column_stack((np.ones(len(counts)), residuals)), np.float32
        )

    def choose(self, vector: Vectors) -> Found | None:
        """Return one query's arm and its expected recall, or None for a query unlike all that is known."""
        place, residue = self._projection.locate(vector)
        points = self._points
        part = place[: points.shape[1]]
        alike = points.dot(part)
        alike -= self._half_square * (float(part.dot(part)) - 1.0)
        np.exp(alike, out=alike)
        near: list[float] = alike.dot(self._near).tolist()
        total = near[1]
        if not alike.item(alike.argmax()) >= self._least:  # also where it is not a number
            return None
        z = self._intercept
        features: list[float] = []
        if self._sketch is not None:
            seen = self._sketch.look(place, residue)
            if not density.strangeness(seen) <= self._limit:
                return None
            features = density.feature_list(seen.tolist(), self._floor)
        features += (near[0] / total, math.log(total))
        for feature, (slope, bend, knot) in zip(features, self._lines, strict=True):
            z += slope * feature
            if feature > knot:
                z += bend * (feature - knot)
        alike *= alike
        memory: list[float] = alike.dot(self._memory).tolist()
        arm, utility = self._best(memory, z)
        return Found(arm, min(1.0, max(0.0, utility + self._toll[arm])), repeated=False)

    def _best(self, memory: list[float], z: float) -> tuple[int, float]:
        """Return the arm of the greatest utility, and that.

        Twenty numbers: Python's own arithmetic takes less than arrays do, whose operations have to be fetched
        from memory first, each of them.
        """
        grid = self._grid
        left = min(max(bisect_left(grid, z) - 1, 0), len(grid) - 2)
        share = min(max((z - grid[left]) / (grid[left + 1] - grid[left]), 0.0), 1.0)
        rest = 1.0 - share
        below, above = self._utility[left : left + 2].tolist()
        factor = 1.0 / (memory[0] + self._prior_weight)
        utilities = [
            factor * more + rest * low + share * high
            for more, low, high in zip(memory[1:], below, above, strict=True)
        ]
        best = max(utilities)
        return utilities.index(best), best
