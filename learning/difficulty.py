"""How hard one query is for the index, and its expected recall under every arm.

The model has three layers; each leans on the one before it where it knows nothing itself.

1. *Difficulty* ``z``: a ridge regression of the log of a query's mean miss rate on a dozen features: local
density
   (`learning.density`) and what the nearest labelled queries were like (`neighbourhood`).
2. *Surface*: the expected recall curve at a difficulty.  Labels are smoothed along the quantiles of ``z``
with a
   Gaussian kernel, shrunk to the global curve, and tabulated on a grid; between two grid points it is linear.
3. *Memory*: the curves of similar labelled queries correct the surface by their own deviation from it:
   ``curve(q) = surface(z) + sum w_i (curve_i - surface(z_i)) / (sum w_i + prior_weight)``, with
  ``w_i = count_i * exp(sharpness * (cos_i - 1))``.  A repeated query (cos = 1) is remembered as it was;
  one without near relatives gets the surface.

A ridge on logarithms did as well as boosted trees on 300 to 3,000 labels, and costs one dot product to
evaluate.

The batch functions here (fitting, calibration) and `learning.optimizer` (one query, hot path) compute the
same numbers; a test holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

GRID = 24
"""Points at which the surface is tabulated."""

MEMORY_FEATURES = 3
"""Columns of `neighbourhood`."""

NEIGHBOURS = 20
"""Labelled queries that are asked about a query."""

SHARPNESS = 16.0
"""A neighbour at cosine 0.95 weighs 0.45, at 0.9 0.2, at 0.5 nothing."""

PRIOR_WEIGHT = 0.25
"""What the surface weighs against one label of the very same query."""

_MISS_OFFSET = 0.01  # keeps the log finite where every arm was perfect; half of one hit in 10 over a few arms
_RIDGE = 3.0  # on standardised features
_SHRINK = 10.0  # labels that the global curve is worth at each grid point


def miss(curves: Floats) -> Floats:
    """Return the log miss rate [n] of curves [n, arms], averaged over the arms."""
    logarithms: Floats = np.log((1.0 - curves).mean(axis=1) + _MISS_OFFSET)
    return logarithms


def nearest(cosines: NDArray[np.float32]) -> tuple[NDArray[np.intp], Floats]:
    """Return each query's nearest patterns and their cosines, both [n, at most NEIGHBOURS], in no order.

    `cosines` is [n, patterns]; -inf marks a pattern that must not be asked (the query itself) and comes out
    as cosine -2, which weighs nothing.
    """
    count = min(NEIGHBOURS, cosines.shape[1])
    chosen = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
    return chosen, np.maximum(np.take_along_axis(cosines, chosen, axis=1), -2.0).astype(np.float64)


def neighbourhood(cosines: Floats, misses: Floats, counts: Floats) -> Floats:
    """Return features [n, MEMORY_FEATURES] of neighbours [n, k]: mean log miss, log of their weight,
    nearest cosine.

    The weights fall half as fast as the memory's: a mean over more neighbours says more about difficulty.
    """
    weight = counts * np.exp(0.5 * SHARPNESS * (cosines - 1.0))
    total = weight.sum(axis=1)
    return np.column_stack(((weight * misses).sum(axis=1) / total, np.log(total), cosines.max(axis=1)))


@dataclass(frozen=True, slots=True)
class Model:
    """Layers 1 and 2, fitted."""

    slope: Floats  # [features], on raw features
    intercept: float
    grid: Floats  # [GRID], increasing difficulties
    surface: Floats  # [GRID, arms], recall

    def difficulty(self, features: Floats) -> Floats:
        """Return ``z`` [n] of features [n, features]."""
        return features @ self.slope + self.intercept

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
    mean = share @ features
    scale = np.sqrt(share @ (features - mean) ** 2) + 1e-9
    standard = (features - mean) / scale
    centre = float(share @ misses)
    weighted = standard * weight[:, None]
    normal = standard.T @ weighted + _RIDGE * np.eye(features.shape[1])
    slope = np.linalg.solve(normal, weighted.T @ (misses - centre)) / scale
    intercept = centre - float(slope @ mean)
    z = features @ slope + intercept
    grid, surface = _surface(z, curves, weight)
    return Model(slope, intercept, grid, surface)


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


def remember(base: Floats, cosines: Floats, residuals: Floats, counts: Floats) -> Floats:
    """Return `base` [n, arms] corrected by neighbours: residuals [n, k, arms], cosines, counts [n, k]."""
    weight = counts * np.exp(SHARPNESS * (cosines - 1.0))
    correction = np.einsum("nk,nka->na", weight, residuals) / (weight.sum(axis=1) + PRIOR_WEIGHT)[:, None]
    corrected: Floats = base + correction
    return corrected
