"""How hard one query is for the index, and its expected recall under every arm.

The model has three layers; each leans on the one before it where it knows nothing itself.

1. *Difficulty* ``z``: a ridge regression of the log of a query's mean miss rate on a few features, each with
   a bend at its median: local density (`learning.density`) and what similar labelled queries were like
   (`neighbourhood`).
2. *Surface*: the expected recall curve at a difficulty.  Labels are smoothed along the quantiles of ``z``
   with a Gaussian kernel, shrunk to the global curve, and tabulated on a grid; between two grid points it is
   linear.
3. *Memory*: the curves of similar labelled queries correct the surface by their own deviation from it:
   ``curve(q) = surface(z) + sum w_i (curve_i - surface(z_i)) / (sum w_i + PRIOR_WEIGHT)``, with
   ``w_i = count_i * exp(SHARPNESS * (cos_i - 1))``.  One without near relatives gets the surface.

Similarity is that of the first `COARSE` directions of `learning.projection`: for points p and q,
``-|p - q|^2 / 2`` stands for ``cos - 1``, which it is where nothing was projected away.  All patterns
are weighed, not only the nearest: one small matrix-vector product is faster than a graph search among a few
thousand points, and exact.

A ridge on logarithms did as well as boosted trees on 300 to 3,000 labels, and costs one dot product to
evaluate.

The batch functions here (fitting, calibration) and `learning.lookup` (one query, hot path) compute the
same numbers; a test holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learning.projection import COARSE

Floats = NDArray[np.float64]

GRID = 24
"""Points at which the surface is tabulated."""

MEMORY_FEATURES = 2
"""Columns of `neighbourhood`."""

SHARPNESS = 16.0
"""A pattern at cosine 0.95 weighs 0.45, at 0.9 0.2, at 0.5 nothing."""

PRIOR_WEIGHT = 0.25
"""What the surface weighs against one label of the very same query."""

TINY = 1e-30
"""Weight below which nothing is near."""

_MISS_OFFSET = 0.01  # keeps the log finite where every arm was perfect; half of one hit in 10 over a few arms
_RIDGE = 3.0  # on standardised features
_SHRINK = 10.0  # labels that the global curve is worth at each grid point


def miss(curves: Floats) -> Floats:
    """Return the log miss rate [n] of curves [n, arms], averaged over the arms."""
    logarithms: Floats = np.log((1.0 - curves).mean(axis=1) + _MISS_OFFSET)
    return logarithms


def likeness(points: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``exp(SHARPNESS / 2 * (cos - 1))`` of points [n, components] and others [m, components]: [n, m].

    The square root of the memory's weights; they themselves are its square.
    """
    points, others = points[:, :COARSE], others[:, :COARSE]
    scaled = points @ others.T
    scaled -= 0.5 * np.einsum("ij,ij->i", points, points)[:, None]
    scaled -= 0.5 * np.einsum("ij,ij->i", others, others)
    scaled *= 0.5 * SHARPNESS
    alike: NDArray[np.float32] = np.exp(np.minimum(scaled, 0.0, out=scaled), out=scaled)
    return alike


def neighbourhood(alike: NDArray[np.float32], misses: Floats, counts: Floats) -> Floats:
    """Return features [n, MEMORY_FEATURES] of `likeness` [n, m]: mean log miss, log of all weight.

    The weights fall half as fast as the memory's: a mean over more patterns says more about difficulty.
    """
    sums = alike @ np.column_stack((counts * misses, counts)).astype(np.float32)
    total = np.maximum(sums[:, 1].astype(np.float64), TINY)
    return np.column_stack((sums[:, 0] / total, np.log(total)))


def cosine(alike: NDArray[np.float32]) -> Floats:
    """Return the cosine that each `likeness` stands for."""
    found: Floats = 1.0 + np.log(np.maximum(alike, TINY)) / (0.5 * SHARPNESS)
    return found


@dataclass(frozen=True, slots=True)
class Model:
    """Layers 1 and 2, fitted."""

    slope: Floats  # [features], on raw features
    bend: Floats  # [features], by which the slope is steeper above `knot`
    knot: Floats  # [features]
    intercept: float
    grid: Floats  # [GRID], increasing difficulties
    surface: Floats  # [GRID, arms], recall

    def difficulty(self, features: Floats) -> Floats:
        """Return ``z`` [n] of features [n, features]."""
        return features @ self.slope + np.maximum(features - self.knot, 0.0) @ self.bend + self.intercept

    def curves(self, z: Floats) -> Floats:
        """Return surface curves [n, arms] at difficulties [n]; outside the grid, the nearest end."""
        return interpolate(self.grid, self.surface, z)


def interpolate(grid: Floats, surface: Floats, z: Floats) -> Floats:
    """Return `surface` [GRID, arms] at difficulties `z` [n], linear in between, clamped: [n, arms]."""
    left = np.clip(np.searchsorted(grid, z) - 1, 0, len(grid) - 2)
    share = np.clip((z - grid[left]) / (grid[left + 1] - grid[left]), 0.0, 1.0)[:, None]
    interpolated: Floats = surface[left] * (1.0 - share) + surface[left + 1] * share
    return interpolated


def fit(features: Floats, curves: Floats, misses: Floats, weight: Floats) -> Model:
    """Return the model of labelled queries.

    Parameters
    ----------
    features
        [n, features]; any features, all finite.
    curves
        [n, arms], recall.
    misses
        [n], from `miss`.
    weight
        [n], positive.
    """
    share = weight / weight.sum()
    knot = np.median(features, axis=0)
    terms = np.column_stack((features, np.maximum(features - knot, 0.0)))
    mean = share @ terms
    scale = np.sqrt(share @ (terms - mean) ** 2) + 1e-9
    standard = (terms - mean) / scale
    centre = float(share @ misses)
    weighted = standard * weight[:, None]
    normal = standard.T @ weighted + _RIDGE * np.eye(terms.shape[1])
    slope = np.linalg.solve(normal, weighted.T @ (misses - centre)) / scale
    intercept = centre - float(slope @ mean)
    grid, surface = _surface(terms @ slope + intercept, curves, weight)
    straight, bend = np.split(slope, 2)
    return Model(straight, bend, knot, intercept, grid, surface)


def _surface(z: Floats, curves: Floats, weight: Floats) -> tuple[Floats, Floats]:
    quantile = (np.arange(GRID) + 0.5) / GRID
    order = np.argsort(z, kind="stable")
    rank = np.empty(len(z))
    rank[order] = (np.cumsum(weight[order]) - 0.5 * weight[order]) / weight.sum()
    # Fewer labels are smoothed over a wider range of ranks: about 20 labels in a kernel's reach, 6 % at
    # least.
    width = max(0.06, min(0.25, 0.06 * np.sqrt(1000.0 / len(z))))
    kernel = np.exp(-0.5 * ((quantile[:, None] - rank) / width) ** 2) * weight
    overall = (weight @ curves) / weight.sum()
    surface = (kernel @ curves + _SHRINK * overall) / (kernel.sum(axis=1, keepdims=True) + _SHRINK)
    grid = np.interp(quantile, rank[order], z[order])
    grid += (
        np.arange(GRID) * 1e-9 * (1.0 + np.abs(grid).max())
    )  # strictly increasing, also where all z are equal
    return grid, surface


def remember(base: Floats, alike: NDArray[np.float32], residuals: Floats, counts: Floats) -> Floats:
    """Return `base` [n, arms] corrected by patterns: likeness [n, m], residuals [m, arms], counts [m]."""
    weight = alike * alike
    sums = weight @ np.column_stack((counts, counts[:, None] * residuals)).astype(np.float32)
    corrected: Floats = base + sums[:, 1:] / (sums[:, :1] + PRIOR_WEIGHT).astype(np.float64)
    return corrected
