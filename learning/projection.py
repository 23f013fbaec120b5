"""The space in which queries and rows are compared: a few principal directions instead of all dimensions.

Patterns and the table's sketch share one projection, so that a lookup reads the query vector once, in one
matrix-vector product; everything after it works on `COMPONENTS` numbers.  What the projection leaves over
(*residue*) is kept as a number of its own: it tells a query that lies off the beaten track.

Vectors are normalised first, except for Euclidean distance; there lengths are measured in units of the rows'
spread, so that "near" means the same for every table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

COMPONENTS = 128
"""Principal directions kept.  64 lose a tenth of what density saves, and a search is hardly faster."""

COARSE = 64
"""The first of them, in which queries are compared with each other and with cells of rows: all 128 would save
another 0.5 % there, for twice the time."""

_ROWS = 4000  # enough to find the principal directions


@dataclass(frozen=True, slots=True)
class Frame:
    """A projection as it is stored and sent."""

    basis: bytes  # float32 [dimensions, components], orthonormal columns
    centre: bytes  # float32 [dimensions]
    unit: float  # length that counts as 1
    euclidean: bool

    @property
    def dimensions(self) -> int:
        """Length of the vectors that can be projected."""
        return len(self.centre) // 4

    def first(self, components: int) -> Frame:
        """Return the frame of the first `components` directions, or of all if there are fewer."""
        basis = np.frombuffer(self.basis, dtype="<f4").reshape(self.dimensions, -1)
        return replace(self, basis=np.ascontiguousarray(basis[:, :components]).tobytes())


def fit(vectors: Vectors, *, euclidean: bool) -> Frame:
    """Return the frame of vectors [n, dimensions], all finite; for cosine of length 1."""
    centre = vectors.mean(axis=0)
    some = vectors[:_ROWS] - centre
    _, directions = np.linalg.eigh(some.T @ some)  # in order of increasing variance
    basis = np.ascontiguousarray(directions[:, ::-1][:, :COMPONENTS], dtype="<f4")
    spread = float(np.sqrt(np.einsum("ij,ij->i", some, some).mean()))
    unit = max(spread, 1e-30) if euclidean else 1.0
    return Frame(basis.tobytes(), centre.astype("<f4").tobytes(), unit, euclidean)


def normalise(vectors: Vectors) -> Vectors:
    """Return vectors [n, dimensions] with length 1; zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = (vectors / np.maximum(lengths, 1e-30)).astype(np.float32)
    return unit


class Projection:
    """A frame ready for use; read-only.

    Raises
    ------
    ValueError
        The frame does not fit together.
    """

    def __init__(self, frame: Frame) -> None:
        centre = np.frombuffer(frame.centre, dtype="<f4")
        basis = np.frombuffer(frame.basis, dtype="<f4").reshape(len(centre), -1)
        # The centre is one more direction: its product with the query gives the residue, and its place in
        # the result then holds the 1 that later products need, both without a copy.
        self._rows = np.ascontiguousarray(np.column_stack((centre, basis)).T)
        self._offset = np.concatenate((np.zeros(1, dtype=np.float32), centre @ basis))
        self._centre_square = float(centre @ centre)
        self._scale = 1.0 / frame.unit
        self._euclidean = frame.euclidean
        self.components = basis.shape[1]

    def locate(self, vector: Vectors) -> tuple[Vectors, float]:
        """Return (1, point) [1 + components] of a vector [dimensions], and its squared residue."""
        place = self._rows.dot(vector)
        square = float(vector.dot(vector))
        # A zero vector has no direction: what is computed from it is not a number.
        factor = 1.0 if self._euclidean else square**-0.5 if square > 0.0 else math.nan
        along = factor * float(place[0])
        place *= factor
        place -= self._offset
        point = place[1:]
        residue = square * factor * factor - 2.0 * along + self._centre_square - float(point.dot(point))
        if self._scale != 1.0:
            place *= self._scale
        place[0] = 1.0
        return place, residue * self._scale * self._scale

    def many(self, vectors: Vectors) -> tuple[Vectors, NDArray[np.float64]]:
        """Return the points [n, components] of vectors [n, dimensions] and their squared residues [n]."""
        points = np.empty((len(vectors), self.components), dtype=np.float32)
        residues = np.empty(len(vectors))
        for row, vector in enumerate(np.ascontiguousarray(vectors, dtype=np.float32)):
            place, residues[row] = self.locate(vector)
            points[row] = place[1:]
        return points, residues
