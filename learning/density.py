"""How dense the table is around a query: the strongest signal of how hard the query is for a graph index.

The *sketch* is a uniform sample of the table's own vectors (10,000 or more), projected and held in an
in-process HNSW index.  The distances from a query to its nearest sketch rows say how many rows crowd around
it; a graph search loses its way where many are nearly as near as the nearest.  The logarithms of a few of
these distances, and of their gaps, are the features of `learning.difficulty`.  A logarithm makes them free of
the metric's unit and makes "twice as far" the same step everywhere.

The larger the share of the table in the sketch, the finer the density that it sees; it pays in memory: a row
takes about 700 bytes in every worker.  It travels in a snapshot as int8 (one scale for all, error below 1 %
of a component's range), 128 bytes a row.  Learner and worker build the index from the same bytes, with one
thread and a fixed seed, and so see the same distances.

Literature: LAET (SIGMOD 2020) and Tao (arXiv 2110.00696) predict effort from distances seen inside the
search; a transparent proxy cannot look inside, so it keeps a small sibling of the graph.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import hnswlib
import numpy as np
from numpy.typing import NDArray

from learning import projection
from learning.projection import Frame, Projection, Vectors

Floats = NDArray[np.float64]

NEIGHBOURS = 32
"""Sketch rows looked up for a query; also the search's ef.  100 is hardly better and costs twice the time."""

MAX_ROWS = 200_000
"""Rows kept at most."""

_RANKS = (0, 1, 4, 9, 19, 31)
_PICKED = np.array((*_RANKS, 9, 31, NEIGHBOURS))  # distances by rank, two reaches, the energy left over
_GAPS = slice(len(_RANKS), len(_RANKS) + 2)  # the two reaches, from which the nearest distance is taken off
FEATURES = len(_PICKED)

_REACH_RANK = 9
_MIN_ROWS = 500  # fewer rows do not say how dense a table is


@dataclass(frozen=True, slots=True)
class SketchData:
    """A sketch as it is stored and sent."""

    codes: bytes  # int8 [rows, components]
    scale: float  # one step of the codes
    frame: Frame

    def digest(self) -> bytes:
        """Return a name for the sketch, so that an index built once can be used again."""
        key = f"{self.scale!r} {self.frame.unit!r} {self.frame.euclidean}".encode()[:64]
        parts = self.codes + self.frame.basis + self.frame.centre
        return hashlib.blake2b(parts, digest_size=16, key=key).digest()


def prepare(rows: Vectors, *, euclidean: bool) -> SketchData | None:
    """Return the sketch of sampled rows [n, dimensions], or None where there are too few.

    Rows that are zero or not finite are left out, and rows beyond `MAX_ROWS`.
    """
    good = rows[np.isfinite(rows).all(axis=1)].astype(np.float32)
    good = good[np.any(good != 0.0, axis=1)][:MAX_ROWS]
    if len(good) < _MIN_ROWS:
        return None
    if not euclidean:
        good = projection.normalise(good)
    frame = projection.fit(good, euclidean=euclidean)
    points, _ = Projection(frame).many(good)
    scale = max(float(np.abs(points).max()) / 127.0, 1e-30)
    codes = np.round(points / scale).astype(np.int8)
    return SketchData(codes.tobytes(), scale, frame)


class Sketch:
    """A sketch with its index; read-only once built, which takes about 0.1 ms per row.

    Raises
    ------
    ValueError
        The data does not fit together.
    """

    def __init__(self, data: SketchData) -> None:
        self.projection = Projection(data.frame)
        components = self.projection.components
        codes = np.frombuffer(data.codes, dtype=np.int8).reshape(-1, components)
        rows = codes.astype(np.float32) * np.float32(data.scale)
        if len(rows) < NEIGHBOURS:
            raise ValueError(f"a sketch of {len(rows)} rows, at least {NEIGHBOURS} are needed")
        self._index = hnswlib.Index("l2", components)
        self._index.init_index(len(rows), M=16, ef_construction=100, random_seed=0)
        self._index.set_num_threads(1)
        self._index.add_items(rows, num_threads=1)
        self._index.set_ef(NEIGHBOURS)

    def look(self, point: Vectors, residue: float) -> Vectors:
        """Return what is seen around a projected query: float32 [NEIGHBOURS + 1].

        Squared distances to the nearest rows in the projection, increasing, and last the query's residue.
        """
        seen = np.empty(NEIGHBOURS + 1, dtype=np.float32)
        seen[:NEIGHBOURS] = self._index.knn_query(point, NEIGHBOURS, num_threads=1)[1][0]
        seen[NEIGHBOURS] = residue
        return seen

    def look_around(self, points: Vectors, residues: Floats) -> Vectors:
        """Return what is seen around projected queries [n, components]: float32 [n, NEIGHBOURS + 1]."""
        _, distances = self._index.knn_query(points, NEIGHBOURS, num_threads=1)
        return np.column_stack((distances, residues.astype(np.float32)))


def features(seen: Vectors, floor: float) -> Floats:
    """Return the features [..., FEATURES] of what is seen; `floor` bounds the logarithms."""
    picked = seen.take(_PICKED, axis=-1).astype(np.float64)
    picked[..., _GAPS] -= picked[..., :1]
    logarithms: Floats = np.log(np.maximum(picked, floor, out=picked), out=picked)
    return logarithms


def noise_floor(seen: Vectors) -> float:
    """Return the distance below which differences are noise: a thousandth of the median reach."""
    return max(1e-12, 1e-3 * float(np.median(seen[:, NEIGHBOURS - 1])))


def strangeness(seen: Vectors) -> Vectors:
    """Return how far from the table's rows each query lies [...], its residue included."""
    far: Vectors = seen[..., _REACH_RANK] + seen[..., NEIGHBOURS]
    return far
