"""The demo's data set: 30,000 dictionary glosses with their embeddings, a category each, and 6,000 queries.

The file holds int8 vectors and one scale; the data set *is* the dequantised float32 vectors, and all exact
neighbours are computed on those.  See data/README.md for where it comes from and its licences.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEMO_FILE = Path(__file__).parent / "data" / "wordnet-demo.npz"
LARGE_FILE = Path(__file__).parents[2] / "shared" / "data" / "wordnet-minilm-384.npz"
"""The whole of it, 117,659 rows, where it lies beside the project."""

FAMILIES = ("sentence", "lemma", "gloss")
"""Query families: example sentences, single words, first halves of definitions."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Dataset:
    """Rows and queries in memory; do not write to the arrays.

    Attributes
    ----------
    base
        [rows, dimensions], the row with id ``i`` at index ``i``.
    category
        [rows], small non-negative integers.
    queries
        Family to [queries, dimensions].
    fingerprint
        Hash of the source file and the row limit: names this data set in stamps.
    """

    base: Vectors
    category: NDArray[np.int16]
    queries: dict[str, Vectors]
    fingerprint: str

    @property
    def dimensions(self) -> int:
        """Length of every vector."""
        return int(self.base.shape[1])


def load(path: Path = DEMO_FILE, rows: int | None = None) -> Dataset:
    """Read a data set, or its first `rows` rows (a random sample: the file is in random order).

    Raises
    ------
    FileNotFoundError
        The file is not there.
    """
    digest = hashlib.sha256(path.read_bytes())
    digest.update(str(rows).encode())
    with np.load(path) as file:
        scale = np.float32(file["scale"])

        def dequantised(name: str, limit: int | None = None) -> Vectors:
            vectors: NDArray[Any] = file[name][:limit]
            return vectors.astype(np.float32) * scale

        return Dataset(
            base=dequantised("base", rows),
            category=file["category"][:rows].astype(np.int16),
            queries={family: dequantised(f"q_{family}") for family in FAMILIES},
            fingerprint=digest.hexdigest()[:16],
        )
