"""How dense the table is around a query: the strongest signal of how hard the query is for a graph index.

The *sketch* is a uniform sample of the table's own vectors (10,000 or more), projected and divided into cells
by k-means (an inverted file).  The distances from a query to the nearest rows in the `PROBES` cells around it
say how many rows crowd there; a graph search loses its way where many are nearly as near as the nearest.  The
logarithms of a few of these distances, and of their gaps, are the features of `learning.difficulty`.  A
logarithm makes them free of the metric's unit and makes "twice as far" the same step everywhere.

Some of the nearest rows lie in other cells and are missed, alike while learning and while serving: what the
features say of difficulty is the same to within 1 % as with exact neighbours.  A graph over the same rows
finds more of them in three to four times the time, for it leaps from row to row through memory that the
server's own work has just pushed out of the caches; a cell is read from its first row to its last.

The larger the share of the table in the sketch, the finer the density that it sees; it pays in memory: a row
takes about 500 bytes in every worker.  It travels in a snapshot as int8 (one scale for all, error below 1 %
of a component's range), 128 bytes a row, ordered by cell.

Literature: LAET (SIGMOD 2020) and Tao (arXiv 2110.00696) predict effort from distances seen inside the
search; a transparent proxy cannot look inside, so it keeps a small sibling of the graph.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from learning import projection
from learning.projection import COARSE, Frame, Projection, Vectors

Floats = NDArray[np.float64]

NEIGHBOURS = 32
"""Distances looked at; up to the 100th is hardly better."""

PROBES = 6
"""Cells that are searched for a query.  Four save 1 % less, eight the same."""

_CELL_ROWS = 80  # of the average cell
_TRAINING_ROWS = 32  # by which the means of each cell are found
_ROUNDS = 8  # of k-means

MAX_ROWS = 200_000
"""Rows kept at most."""

OPERATORS = frozenset({"<->", "<=>", "<#>"})
"""Those whose distances a sketch can compute."""

_RANKS = (0, 1, 4, 9, 19, 31)
_PICKED = np.array((*_RANKS, 9, 31, NEIGHBOURS))  # distances by rank, two reaches, the energy left over
_GAPS = slice(len(_RANKS), len(_RANKS) + 2)  # the two reaches, from which the nearest distance is taken off
_PICKED_RANKS: list[int] = _PICKED.tolist()
_GAP_RANKS = range(_GAPS.start, _GAPS.stop)
FEATURES = len(_PICKED)

_REACH_RANK = 9
_MIN_ROWS = 500  # fewer rows do not say how dense a table is


@dataclass(frozen=True, slots=True)
class SketchData:
    """A sketch as it is stored and sent."""

    codes: bytes  # int8 [rows, components], ordered by cell
    cells: bytes  # int32 [cells], rows of each
    scale: float  # one step of the codes
    frame: Frame

    def digest(self) -> bytes:
        """Return a name for the sketch, so that an index built once can be used again."""
        key = f"{self.scale!r} {self.frame.unit!r} {self.frame.euclidean}".encode()[:64]
        parts = self.codes + self.cells + self.frame.basis + self.frame.centre
        return hashlib.blake2b(parts, digest_size=16, key=key).digest()


def is_euclidean(operator: str) -> bool:
    """Tell whether lengths of vectors count under an operator; for all others they are normalised."""
    return operator == "<->"


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
    cell = _divided(points)
    order = np.argsort(cell, kind="stable")
    counts = np.bincount(cell).astype("<i4")
    return SketchData(codes[order].tobytes(), counts[counts > 0].tobytes(), scale, frame)


def _divided(points: Vectors) -> NDArray[np.intp]:
    """Return the cell [n] of every point [n, components]."""
    # Lloyd's algorithm on a part of the rows; better cells would not be worth the time.
    cells = max(1, len(points) // _CELL_ROWS)
    some = points[: cells * _TRAINING_ROWS]
    means = some[np.random.default_rng(0).choice(len(some), cells, replace=False)]
    for _ in range(_ROUNDS):
        cell = _nearest_cell(some, means)
        counts = np.bincount(cell, minlength=cells)
        sums = np.zeros_like(means)
        np.add.at(sums, cell, some)
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], means)
    return _nearest_cell(points, means.astype(np.float32))


def _nearest_cell(points: Vectors, means: Vectors) -> NDArray[np.intp]:
    half_squares = 0.5 * np.einsum("ij,ij->i", means, means)
    blocks = range(0, len(points), 4096)
    return np.concatenate([(points[i : i + 4096] @ means.T - half_squares).argmax(axis=1) for i in blocks])


class Sketch:
    """A sketch ready for use; read-only.

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
        counts = np.frombuffer(data.cells, dtype="<i4")
        if len(rows) < NEIGHBOURS:
            raise ValueError(f"a sketch of {len(rows)} rows, at least {NEIGHBOURS} are needed")
        if counts.min(initial=1) < 1 or counts.sum() != len(rows):
            raise ValueError(f"cells of {counts.sum()} rows in a sketch of {len(rows)}")
        starts = np.concatenate(([0], np.cumsum(counts)))
        means = (np.add.reduceat(rows, starts[:-1], axis=0) / counts[:, None]).astype(np.float32)
        all_rows = _for_distances(rows)
        self._cells = [all_rows[start:end] for start, end in pairwise(starts.tolist())]
        self._means = _for_distances(means[:, :COARSE])
        self._probes = min(PROBES, len(counts))

    def look(self, place: Vectors, residue: float) -> Vectors:
        """Return what is seen around a query: float32 [NEIGHBOURS + 1].

        Squared distances to the nearest rows in the cells around, increasing, and last the query's residue.

        Parameters
        ----------
        place, residue
            What `Projection.locate` says of the query.
        """
        cells, probes = self._cells, self._probes
        near = self._means.dot(place[: 1 + COARSE]).argpartition(probes - 1)[:probes].tolist()
        found = np.concatenate([cells[cell].dot(place) for cell in near])
        if len(found) <= NEIGHBOURS:  # the cells around are all small: as if their last row were repeated
            found = np.pad(found, (0, NEIGHBOURS + 1 - len(found)), mode="maximum")
        found.partition(NEIGHBOURS)
        seen: Vectors = found[: NEIGHBOURS + 1]
        seen.sort()
        point = place[1:]
        seen += point.dot(point)
        seen[NEIGHBOURS] = residue
        return seen

    def look_around(self, points: Vectors, residues: Floats) -> Vectors:
        """Return what is seen around projected queries [n, components]: float32 [n, NEIGHBOURS + 1]."""
        places = np.column_stack((np.ones(len(points), dtype=np.float32), points))
        return np.stack([self.look(place, residue) for place, residue in zip(places, residues, strict=True)])


def _for_distances(rows: Vectors) -> Vectors:
    """Return `rows` such that their product with (1, point) is |row - point|^2 - |point|^2."""
    return np.ascontiguousarray(
        np.column_stack((np.einsum("ij,ij->i", rows, rows), -2.0 * rows)), dtype=np.float32
    )


def features(seen: Vectors, floor: float) -> Floats:
    """Return the features [..., FEATURES] of what is seen; `floor` bounds the logarithms."""
    picked = seen.take(_PICKED, axis=-1).astype(np.float64)
    picked[..., _GAPS] -= picked[..., :1]
    logarithms: Floats = np.log(np.maximum(picked, floor, out=picked), out=picked)
    return logarithms


def feature_list(seen: list[float], floor: float) -> list[float]:
    """Return `features` of one query: without arrays, which take longer where there are so few numbers."""
    values = [seen[rank] for rank in _PICKED_RANKS]
    for gap in _GAP_RANKS:
        values[gap] -= seen[0]
    return [math.log(value) if value > floor else math.log(floor) for value in values]


def noise_floor(seen: Vectors) -> float:
    """Return the distance below which differences are noise: a thousandth of the median reach."""
    return max(1e-12, 1e-3 * float(np.median(seen[:, NEIGHBOURS - 1])))


def strangeness(seen: Vectors) -> Vectors:
    """Return how far from the table's rows each query lies [...], its residue included."""
    far: Vectors = seen[..., _REACH_RANK] + seen[..., NEIGHBOURS]
    return far
