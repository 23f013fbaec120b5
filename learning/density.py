"""How dense the table is around a query: the strongest signal of how hard the query is for a graph index.

The *sketch* is a uniform sample of the table's own vectors (10,000 or more), held in an in-process HNSW
index. The distances from a query to its nearest sketch rows say how many rows crowd around it; a graph
search loses its way where many are nearly as near as the nearest.  The logarithms of a few of these
distances, and of their gaps, are the features of `learning.difficulty`.  A logarithm makes them free of the
metric's unit and makes "twice as far" the same step everywhere.

Rows are projected on their `COMPONENTS` principal directions before they are indexed.  For 384-dimensional
text embeddings that said as much about difficulty as all dimensions, in a third of the time and memory;
what the projection of a query leaves over is a feature of its own.  Vectors are normalised first, except
for Euclidean distance.

The sketch travels in a snapshot as int8 (one scale for all, error below 1 % of a component's range): 10,000
rows take 1.3 MB on the wire and about 7 MB in the index.  Learner and worker build the index from the same
bytes, with one thread and a fixed seed, and so see the same distances.

Literature: LAET (SIGMOD 2020) and Tao (arXiv 2110.00696) predict effort from distances seen inside the
search; a transparent proxy cannot look inside, so it keeps a small sibling of the graph.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import hnswlib
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]

NEIGHBOURS = 32
"""Sketch rows looked up for a query; also the search's ef.  100 is hardly better and costs twice the time."""

COMPONENTS = 128
"""Principal directions kept; 64 lose a part of the signal."""

MAX_ROWS = 20_000
"""Rows kept; more see finer density and cost lookup time and memory."""

_RANKS = (0, 1, 4, 9, 19, 31)
_PICKED = np.array((*_RANKS, 9, 31, NEIGHBOURS))  # distances by rank, two reaches, the energy left over
_GAPS = slice(len(_RANKS), len(_RANKS) + 2)  # the two reaches, from which the nearest distance is taken off
FEATURES = len(_PICKED)

_REACH_RANK = 9
_MIN_ROWS = 500  # fewer rows do not say how dense a table is
_PRINCIPAL_ROWS = 4000  # enough to find the principal directions


@dataclass(frozen=True, slots=True)
class SketchData:
    """A sketch as it is stored and sent."""

    codes: bytes  # int8 [rows, components]
    basis: bytes  # float32 [dimensions, components], orthonormal columns
    centre: bytes  # float32 [dimensions]
    scale: float  # one step of the codes
    euclidean: bool

    def digest(self) -> bytes:
        """Return a name for the sketch, so that an index built once can be used again."""
        key = f"{self.scale!r} {self.euclidean}".encode()
        return hashlib.blake2b(self.codes + self.basis + self.centre, digest_size=16, key=key).digest()


def prepare(rows: Vectors, *, euclidean: bool) -> SketchData | None:
    """Return the sketch of sampled rows [n, dimensions], or None where there are too few.

    Rows that are zero or not finite are left out, and rows beyond `MAX_ROWS`.
    """
    good = rows[np.isfinite(rows).all(axis=1)].astype(np.float32)
    good = good[np.any(good != 0.0, axis=1)][:MAX_ROWS]
    if len(good) < _MIN_ROWS:
        return None
    if not euclidean:
        good = normalise(good)
    centre = good.mean(axis=0)
    some = good[:_PRINCIPAL_ROWS] - centre
    _, directions = np.linalg.eigh(some.T @ some)  # in order of increasing variance
    basis = np.ascontiguousarray(directions[:, ::-1][:, :COMPONENTS], dtype=np.float32)
    projected = (good - centre) @ basis
    scale = max(float(np.abs(projected).max()) / 127.0, 1e-30)
    codes = np.round(projected / scale).astype(np.int8)
    return SketchData(
        codes.tobytes(), basis.astype("<f4").tobytes(), centre.astype("<f4").tobytes(), scale, euclidean
    )


def normalise(vectors: Vectors) -> Vectors:
    """Return vectors [n, dimensions] with length 1; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = (vectors / np.maximum(lengths, 1e-30)).astype(np.float32)
    return unit


class Sketch:
    """A sketch with its index; read-only once built, which takes about 0.1 ms per row.

    Raises
    ------
    ValueError
        The data does not fit together.
    """

    def __init__(self, data: SketchData) -> None:
        self._centre = np.frombuffer(data.centre, dtype="<f4")
        self._basis = np.frombuffer(data.basis, dtype="<f4").reshape(len(self._centre), -1)
        self._euclidean = data.euclidean
        self._offset = self._centre @ self._basis
        self._centre_square = float(self._centre @ self._centre)
        components = self._basis.shape[1]
        rows = np.frombuffer(data.codes, dtype=np.int8).reshape(-1, components).astype(
            np.float32
        ) * np.float32(data.scale)
        if len(rows) < NEIGHBOURS:
            raise ValueError(f"a sketch of {len(rows)} rows, at least {NEIGHBOURS} are needed")
        self._index = hnswlib.Index("l2", components)
        self._index.init_index(len(rows), M=16, ef_construction=100, random_seed=0)
        self._index.set_num_threads(1)
        self._index.add_items(rows, num_threads=1)
        self._index.set_ef(NEIGHBOURS)

    def look(self, vectors: Vectors) -> Vectors:
        """Return what is seen around vectors [n, dimensions]: float32 [n, NEIGHBOURS + 1].

        Squared distances to the nearest rows in the projection, increasing, and last the energy of what the
        projection leaves over.
        """
        # The sums of squares stand in for a centred copy of the vectors, which would cost more than the
        # search.
        squares = np.einsum("ij,ij->i", vectors, vectors)
        factor = np.ones_like(squares) if self._euclidean else 1.0 / np.sqrt(np.maximum(squares, 1e-30))
        projected = (vectors @ self._basis) * factor[:, None] - self._offset
        energy = squares * factor * factor - 2.0 * factor * (vectors @ self._centre) + self._centre_square
        seen = np.empty((len(vectors), NEIGHBOURS + 1), dtype=np.float32)
        _, seen[:, :NEIGHBOURS] = self._index.knn_query(projected, NEIGHBOURS, num_threads=1)
        seen[:, NEIGHBOURS] = energy - np.einsum("ij,ij->i", projected, projected)
        return seen


def features(seen: Vectors, floor: float) -> Floats:
    """Return the features [n, FEATURES] of what is seen; `floor` bounds the logarithms."""
    picked = seen[:, _PICKED].astype(np.float64)
    picked[:, _GAPS] -= picked[:, :1]
    logarithms: Floats = np.log(np.maximum(picked, floor, out=picked), out=picked)
    return logarithms


def noise_floor(seen: Vectors) -> float:
    """Return the distance below which differences are noise: a thousandth of the median reach."""
    return max(1e-12, 1e-3 * float(np.median(seen[:, NEIGHBOURS - 1])))


def strangeness(seen: Vectors) -> Vectors:
    """Return how far from the table's rows each query lies [n], what the projection leaves over included."""
    far: Vectors = seen[:, _REACH_RANK] + seen[:, NEIGHBOURS]
    return far
