"""Recall curves of thousands of queries, recorded once per data set from a real PostgreSQL with pgvector.

Theory
------
A policy is judged by the recall and the time that its choices would have had.  Both are facts about the
index, not about the policy, so they are measured once, for every query and every rung of the product's own
ladder, and any policy is then replayed on them within seconds.

Rules
-----
- Recall is counted by distance: a returned row that is not farther than the k-th true neighbour is a hit.
- A query is not run at a rung above one that found everything: its recall there is known.
- Latencies come from a pass of their own: some queries at every rung, all in random order, so that whatever
  else the machine does is shared by all rungs alike, and no query finds its own pages in the caches.  Of
  `_PASSES` the quickest counts, for others' work can only add.  Only ratios mean something.
- *Moved* queries are Zipf-distributed repetitions of the families' queries, each moved in a random direction
  to a cosine of `MOVED_COSINE`: nobody ever asks the same thing twice.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from bench.dataset import DEMO_FILE, FAMILIES, Dataset, Vectors, load
from bench.demo.database import connection, prepare
from bench.demo.workload import binary_vector
from bench.embedded import EmbeddedPostgres
from learning.dialects import IndexInfo, ladder
from learning.records import Arm

K = 10
MOVED_COSINE = 0.95
ZIPF = 1.0
DISTINCT = 2_000  # queries of each family that repeat themselves
STREAMS, STREAM = 2, 4_000  # streams of moved queries, and queries in each
TIMED, TIMED_EXACT = 300, 20
VERSION = "2"

SETTINGS = {
    "shared_buffers": "512MB",
    "maintenance_work_mem": "512MB",
    "max_parallel_workers_per_gather": "0",
}
QUERY = f"SELECT id FROM items ORDER BY embedding <=> $1 LIMIT {K}"
_BLOCK = 256
_PASSES = 3
_EPSILON = 1e-6  # float32 distances computed twice
_SHARED = Path(__file__).parents[3] / "shared" / "data" / "wordnet-minilm-384.npz"
_HOME = Path(__file__).parents[2] / ".replay"

Floats = NDArray[np.float64]


def arms() -> tuple[Arm, ...]:
    """Return the product's own arms for an unfiltered HNSW query of `K` rows."""
    return ladder([IndexInfo("items_embedding", "hnsw")], filtered=False, max_k=K)


def efs() -> list[int]:
    """Return the rungs of ef_search among the arms."""
    return [arm.effort for arm in arms() if arm.kind == "hnsw"]


def source() -> Path:
    """Return the large data set where it lies beside the project, else the one that ships with it."""
    return _SHARED if _SHARED.exists() else DEMO_FILE


@dataclass(frozen=True)
class Recording:
    """What was measured of one data set.

    Attributes
    ----------
    rows
        [rows, dimensions], the table's vectors.
    queries
        Name to vectors [n, dimensions]: the families, and ``moved0`` ... of the streams of moved queries.
    recall
        Name to recall [n, rungs], complete and monotone.
    origin
        Name of a stream to the number [n] of the query that each was moved from.
    ms
        [rungs, samples], latencies of the rungs of `efs`, interleaved.
    exact_ms
        [samples], latencies of the exact search.
    """

    rows: Vectors
    queries: dict[str, Vectors]
    recall: dict[str, Floats]
    origin: dict[str, NDArray[np.intp]]
    ms: Floats
    exact_ms: Floats


def recording(path: Path | None = None, *, streams: int = STREAMS, home: Path = _HOME) -> Recording:
    """Return the recording of a data set, made first where there is none."""
    path = path or source()
    dataset = load(path)
    queries, origin = workload(dataset, streams)
    cache = home / f"{path.stem}-{dataset.fingerprint}-{VERSION}.npz"
    known: dict[str, NDArray[Any]] = {}
    if cache.exists():
        with np.load(cache) as file:
            known = dict(file)
    if not {*(f"recall_{name}" for name in queries), "ms"} <= known.keys():
        home.mkdir(exist_ok=True)
        asyncio.run(_record(dataset, queries, known, cache, home / f"postgres-{path.stem}"))
    recall = {name: known[f"recall_{name}"].astype(np.float64) / K for name in queries}
    return Recording(dataset.base, queries, recall, origin, known["ms"], known["exact_ms"])


def workload(dataset: Dataset, streams: int) -> tuple[dict[str, Vectors], dict[str, NDArray[np.intp]]]:
    """Return all queries by name, and where the moved ones came from (a number in `originals`)."""
    queries = {family: dataset.queries[family] for family in FAMILIES}
    origin = {}
    unmoved = originals(queries)
    for stream in range(streams):
        rng = np.random.default_rng([stream, 95])
        chosen = zipf(len(unmoved), STREAM, ZIPF, rng)
        origin[f"moved{stream}"] = chosen
        queries[f"moved{stream}"] = moved(unmoved[chosen], MOVED_COSINE, rng)
    return queries, origin


def originals(queries: dict[str, Vectors]) -> Vectors:
    """Return the distinct queries of repeating traffic: the first `DISTINCT` of each family."""
    return np.concatenate([queries[family][:DISTINCT] for family in FAMILIES])


def zipf(distinct: int, count: int, exponent: float, rng: np.random.Generator) -> NDArray[np.intp]:
    """Return `count` draws of the numbers below `distinct`, whose ranks are drawn as well."""
    share = 1.0 / np.arange(1, distinct + 1) ** exponent
    return rng.permutation(distinct)[rng.choice(distinct, size=count, p=share / share.sum())]


def moved(vectors: Vectors, cosine: float, rng: np.random.Generator) -> Vectors:
    """Return vectors of length 1 at this cosine from `vectors`, in random directions."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    away = rng.standard_normal(unit.shape)
    away -= np.einsum("ij,ij->i", away, unit)[:, None] * unit
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    result: Vectors = (cosine * unit + np.sqrt(1.0 - cosine**2) * away).astype(np.float32)
    return result


async def _record(
    dataset: Dataset, queries: dict[str, Vectors], known: dict[str, NDArray[Any]], cache: Path, data: Path
) -> None:
    with EmbeddedPostgres(data, settings=SETTINGS) as server, Progress() as progress:
        await prepare(server, dataset, progress)
        async with connection(server) as session:
            await session.set_type_codec("vector", encoder=binary_vector, decoder=bytes, format="binary")
            for name, vectors in queries.items():
                if f"recall_{name}" not in known:
                    known[f"recall_{name}"] = await _recalls(session, dataset, name, vectors, progress)
                    _save(cache, known)
            if "ms" not in known:
                pool = np.concatenate([queries[family] for family in FAMILIES])
                known["ms"], known["exact_ms"] = await _latencies(session, pool, progress)
                _save(cache, known)


def _save(cache: Path, known: dict[str, NDArray[Any]]) -> None:
    """Write the cache whole or not at all."""
    handle, name = tempfile.mkstemp(dir=cache.parent, suffix=".npz")
    with os.fdopen(handle, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **known)
    Path(name).replace(cache)


async def _recalls(
    session: asyncpg.Connection[Any], dataset: Dataset, name: str, vectors: Vectors, progress: Progress
) -> NDArray[np.int8]:
    """Return the hits [n, rungs] of every query at every rung."""
    unit = dataset.base / np.linalg.norm(dataset.base, axis=1, keepdims=True)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    threshold = np.empty(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        cosines = directions[start : start + _BLOCK] @ unit.T
        threshold[start : start + _BLOCK] = np.partition(cosines, -K, axis=1)[:, -K]
    hits = np.full((len(vectors), len(efs())), K, dtype=np.int8)
    open_queries = np.arange(len(vectors))
    statement = await session.prepare(QUERY)
    for rung, ef in enumerate(efs()):
        await session.execute(f"SET hnsw.ef_search = {ef}")
        task = progress.add_task(f"{name}, ef={ef}", total=len(open_queries))
        for query in open_queries.tolist():
            ids = [row[0] for row in await statement.fetch(vectors[query])]
            hits[query, rung] = int((unit[ids] @ directions[query] >= threshold[query] - _EPSILON).sum())
            progress.advance(task)
        progress.remove_task(task)
        open_queries = open_queries[hits[open_queries, rung] < K]
    return np.maximum.accumulate(hits, axis=1)


async def _latencies(
    session: asyncpg.Connection[Any], pool: Vectors, progress: Progress
) -> tuple[Floats, Floats]:
    """Return milliseconds [rungs, TIMED] of warm executions, interleaved, and of the exact search."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(pool), TIMED, replace=False)
    ms = np.full((len(efs()), TIMED), np.inf)
    statement = await session.prepare(QUERY)
    for number in range(_PASSES):
        pairs = rng.permutation(ms.size).tolist()
        for pair in progress.track(pairs, description=f"Latencies, {number + 1} of {_PASSES}"):
            rung, column = divmod(pair, TIMED)
            await session.execute(f"SET hnsw.ef_search = {efs()[rung]}")
            ms[rung, column] = min(ms[rung, column], await _timed(statement, pool[chosen[column]]))
    await session.execute("SET enable_indexscan = off; SET plan_cache_mode = force_custom_plan")
    exact = await session.prepare(QUERY + " OFFSET 0")
    passes = [
        [await _timed(exact, pool[query]) for query in chosen[:TIMED_EXACT].tolist()] for _ in range(_PASSES)
    ]
    return ms, np.min(passes, axis=0)


async def _timed(statement: Any, vector: Vectors) -> float:
    started = time.perf_counter()
    await statement.fetch(vector)
    return (time.perf_counter() - started) * 1e3
