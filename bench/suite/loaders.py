"""Vectors from other people's files.

fvecs, bvecs, ivecs  of the TEXMEX corpora (SIFT, GIST): each row is its length as int32, then its components
hdf5, h5             of ann-benchmarks: ``train`` are the rows, ``test`` the queries; needs h5py
parquet              of VectorDBBench, Hugging Face, ...: one column of lists of numbers; needs pyarrow
npy                  a two-dimensional array
npz                  this project's own form (bench/data/README.md)

Everything is read as it is and searched by cosine distance; exact answers are computed anew, since those that
come with a file are for all of its rows and its own distance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import dataset
from bench.dataset import Dataset, Vectors

FORMATS = "npy, fvecs, bvecs, hdf5 (ann-benchmarks), parquet, npz"
ROWS = "train"
QUERIES = "test"
_HELD_OUT, _MOST_HELD_OUT = 0.1, 6_000
_CATEGORIES = 45


class LoaderError(ValueError):
    """A file cannot be read; the message says what to do."""


def dataset_of(path: Path | None, limit: int | None = None, queries: Path | None = None) -> Dataset:
    """Return a file as a data set, or its first `limit` rows; None: the project's own, the largest there is.

    Without a file of queries, and where the file has none itself, a tenth of the rows are held out as
    queries. Categories, which other people's files have not, are pieces of the rows in the order of their
    projection on the first principal direction, so that they are correlated with the vectors.

    Raises
    ------
    LoaderError
        The file is missing, of an unknown form, or without vectors.
    """
    if path is None:
        own = dataset.LARGE_FILE if dataset.LARGE_FILE.exists() else dataset.DEMO_FILE
        return dataset.load(own, limit)
    if path.suffix == ".npz":
        return dataset.load(path, limit)
    base = _usable(read(path), path)
    found = read(queries) if queries is not None else _own_queries(path)
    if found is None:
        held_out = min(_MOST_HELD_OUT, round(_HELD_OUT * len(base)))
        found, base = base[:held_out], base[held_out:]
    base = base[:limit]
    digest = hashlib.sha256(f"{path.name} {path.stat().st_size} {limit}".encode()).hexdigest()[:16]
    return Dataset(base, _pieces(base), {"queries": _usable(found, queries or path)}, digest)


def dataset_queries(path: Path) -> Vectors:
    """Return a file's queries: those of its own where it has both rows and queries, else all its vectors.

    Raises
    ------
    LoaderError
        As for `read`.
    """
    if path.suffix == ".npz":
        return np.concatenate(list(dataset.load(path, 1).queries.values()))
    found = _own_queries(path)
    return _usable(read(path) if found is None else found, path)


def read(path: Path, name: str | None = None) -> NDArray[Any]:
    """Return the vectors of a file, [rows, dimensions]; `name` is that of an HDF5 dataset or parquet column.

    Raises
    ------
    LoaderError
        The file is missing, of an unknown form, or without vectors.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise LoaderError(f"{path}: unknown form {path.suffix!r}; known are {FORMATS}")
    if not path.exists():
        raise LoaderError(f"{path} is not there")
    try:
        found = reader(path, name)
    except (OSError, ValueError, KeyError) as error:
        raise LoaderError(f"{path} cannot be read: {error}") from error
    if found.ndim != 2 or not found.size:
        raise LoaderError(f"{path} has no table of vectors: its shape is {found.shape}")
    return found


def _usable(found: NDArray[Any], path: Path) -> Vectors:
    """Return float32 vectors without those of length 0 or with values that are no numbers."""
    vectors: Vectors = np.ascontiguousarray(found, dtype=np.float32)
    norms = np.linalg.norm(vectors, axis=1)
    good = np.isfinite(norms) & (norms > 0)
    if not good.any():
        raise LoaderError(f"{path} has no vector with a direction")
    usable: Vectors = vectors[good]
    return usable


def _own_queries(path: Path) -> NDArray[Any] | None:
    """Return the queries that belong to a file: in it, or in the file beside it that is named so."""
    if path.suffix.lower() in (".hdf5", ".h5"):
        return read(path, QUERIES)
    beside = path.with_name(path.name.replace("_base.", "_query."))
    return read(beside) if beside != path and beside.exists() else None


def _pieces(base: Vectors) -> NDArray[np.int16]:
    sample = base[:: max(1, len(base) // 5_000)]
    direction = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2][0]
    order = np.argsort(base @ direction)
    share = 1.0 / np.arange(1, _CATEGORIES + 1)
    ends = np.round(np.cumsum(share / share.sum()) * len(base)).astype(int)
    category = np.empty(len(base), dtype=np.int16)
    category[order] = np.searchsorted(ends, np.arange(len(base)), side="right").clip(max=_CATEGORIES - 1)
    return category


def _vecs(kind: str) -> Callable[[Path, str | None], NDArray[Any]]:
    def reader(path: Path, _: str | None) -> NDArray[Any]:
        raw = np.fromfile(path, dtype=np.uint8)
        if len(raw) < 4:
            raise ValueError("it is empty")
        dimensions = int(raw[:4].view("<i4")[0])
        size = np.dtype(kind).itemsize
        width = 4 + dimensions * size
        if dimensions < 1 or len(raw) % width:
            raise ValueError(f"{len(raw)} bytes are no whole number of rows of {dimensions} components")
        rows = raw.reshape(-1, width)
        if (rows[:, :4] != rows[0, :4]).any():
            raise ValueError("its rows differ in length")
        return np.ascontiguousarray(rows[:, 4:]).view(kind)

    return reader


def _npy(path: Path, _: str | None) -> NDArray[Any]:
    found: NDArray[Any] = np.load(path, allow_pickle=False)
    return found


def _hdf5(path: Path, name: str | None) -> NDArray[Any]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise LoaderError('h5py is missing; install it with: pip install "ruvector-proxy[bench]"') from error
    with h5py.File(path) as file:
        if (name or ROWS) not in file:
            raise ValueError(f"it has no dataset {name or ROWS!r}; it has {', '.join(sorted(file))}")
        found: NDArray[Any] = file[name or ROWS][:]
        return found


def _parquet(path: Path, name: str | None) -> NDArray[Any]:
    try:
        import pyarrow.parquet as parquet
        import pyarrow.types as types
    except ModuleNotFoundError as error:
        raise LoaderError(
            'pyarrow is missing; install it with: pip install "ruvector-proxy[bench]"'
        ) from error
    file = parquet.ParquetFile(path)
    lists = [
        field.name
        for field in file.schema_arrow
        if types.is_list(field.type)
        or types.is_large_list(field.type)
        or types.is_fixed_size_list(field.type)
    ]
    if name is None and len(lists) != 1:
        raise ValueError(f"one column of lists is needed; it has {', '.join(lists) or 'none'}")
    rows = file.read([name or lists[0]]).column(0).to_pylist()
    if len({len(row) for row in rows if row is not None}) > 1:
        raise ValueError("its rows differ in length")
    return np.array([row for row in rows if row is not None], dtype=np.float32)


_READERS: Mapping[str, Callable[[Path, str | None], NDArray[Any]]] = {
    ".fvecs": _vecs("<f4"),
    ".bvecs": _vecs("u1"),
    ".ivecs": _vecs("<i4"),
    ".npy": _npy,
    ".hdf5": _hdf5,
    ".h5": _hdf5,
    ".parquet": _parquet,
}
