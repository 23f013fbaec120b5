"""Vector queries: what a hop adds to them, with the very same work for the server on every way.

Two tables of real embeddings, one of 384 dimensions and one of 1536 (each row of the first four times, turned
differently: the same neighbourhoods in more numbers).  A real proxy learns from live traffic until its policy
is there; then, for each query that it was never asked,

1. the query goes through the proxy, unmeasured, and returns the settings that it was given;
2. the connections that do not adapt get the same settings with SET;
3. all ways answer it in random order, and each is timed, caches warm for all alike.

So a difference is the hop's own, not that of another ``ef_search``.  "Not adapted" is a proxy that has no
learner.  Whether the learner is at work is decided with signals: SIGSTOP holds it, SIGCONT lets it go on.
"""

from __future__ import annotations

import gc
import os
import signal
import struct
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from bench import dataset
from bench.embedded import EmbeddedPostgres
from bench.relay.raw import RawClient, bound, first_row
from bench.relay.results import PROXY, Results
from bench.relay.ways import Way, cpu_seconds

GROUP = "vector queries"
LEARNER = "the learner at work and at rest"
NOT_ADAPTED = "proxy, not adapted"
DATABASE = "postgres"

Vectors = NDArray[np.float32]

_TURNS = 4
_FEWEST = 20  # adapted queries in a round
_SETTINGS = ("hnsw.ef_search", "hnsw.iterative_scan", "enable_indexscan", "plan_cache_mode")
_SAVED = "current_setting('ruvector_proxy.saved_0', true)"
_STATEMENT = "ask"
_COLUMNS = ", ".join(f"current_setting('{name}')" for name in _SETTINGS)


def fill(server: EmbeddedPostgres, rows: int, large_rows: int) -> dict[int, Vectors]:
    """Make both tables with their indexes; return queries [n, dimensions] by dimensions."""
    data = dataset.load()
    queries = np.concatenate(list(data.queries.values()))
    queries = np.random.default_rng(1).permutation(queries)
    by_dimensions = {384: (data.base[:rows], queries)}
    by_dimensions[1536] = (_widened(data.base[:large_rows]), _widened(queries))
    with RawClient(server.port, server.user, DATABASE) as client:
        client.query("CREATE EXTENSION IF NOT EXISTS vector")
        for dimensions, (base, _) in by_dimensions.items():
            table = f"items{dimensions}"
            client.query(f"CREATE TABLE {table} (id bigint PRIMARY KEY, embedding vector({dimensions}))")
            client.copy_in(f"COPY {table} FROM STDIN", _copy_rows(base))
            client.query(f"CREATE INDEX ON {table} USING hnsw (embedding vector_cosine_ops)")
            client.query(f"VACUUM ANALYZE {table}")
    return {dimensions: vectors for dimensions, (_, vectors) in by_dimensions.items()}


def _widened(vectors: Vectors) -> Vectors:
    """Return vectors [n, 384] as [n, 1536]: four copies, each turned by another random rotation."""
    rng = np.random.default_rng(0)
    size = vectors.shape[1]
    turns = [np.linalg.qr(rng.standard_normal((size, size)))[0].astype(np.float32) for _ in range(_TURNS)]
    return np.ascontiguousarray(np.concatenate([vectors @ turn for turn in turns], axis=1) / 2, np.float32)


def _copy_rows(base: Vectors) -> Iterator[bytes]:
    for number, row in enumerate(base):
        line = f"{number}\t".encode() + as_text(row) + b"\n"
        yield b"d" + struct.pack("!I", 4 + len(line)) + line


def as_text(vector: Vectors) -> bytes:
    """Return a vector as drivers send it in text."""
    return ("[" + ",".join(map(repr, vector.astype(float).round(8).tolist())) + "]").encode()


def as_binary(vector: Vectors) -> bytes:
    """Return a vector in pgvector's binary format."""
    return struct.pack("!hh", len(vector), 0) + vector.astype(">f4").tobytes()


class Asker:
    """One connection that asks a table; `settings` are in force on it from `use` on."""

    def __init__(self, way: Way, user: str, dimensions: int) -> None:
        self.way = way
        self.client = RawClient(way.port, user, DATABASE)
        self.client.query("SELECT '[1]'::vector")  # loads the library, which makes its settings known
        self.client.prepare(
            _STATEMENT,
            f"SELECT id, {_SAVED}, {_COLUMNS} FROM items{dimensions} ORDER BY embedding <=> $1 LIMIT 10",
        )
        self._in_force: list[bytes | None] = []

    def use(self, settings: list[bytes | None]) -> None:
        """Put settings in force, not measured."""
        if settings != self._in_force:
            values = zip(_SETTINGS, settings, strict=True)
            self.client.query(";".join(f"SET {name} = '{(value or b'').decode()}'" for name, value in values))
            self._in_force = settings


class Learned:
    """What `learn` has left: how long it took, and which queries were never asked."""

    def __init__(self, queries: dict[int, Vectors], seconds: float) -> None:
        self.queries = queries
        self.seconds = seconds


def learn(way: Way, user: str, queries: dict[int, Vectors], seconds: float) -> Learned:
    """Ask both tables through the proxy until its policies are in force, for at most `seconds`."""
    start = time.monotonic()
    asked = {dimensions: vectors[: len(vectors) // 2] for dimensions, vectors in queries.items()}
    with ExitStack() as stack:
        askers = {dimensions: Asker(way, user, dimensions) for dimensions in queries}
        for asker in askers.values():
            stack.enter_context(asker.client)
        number = 0
        while time.monotonic() - start < seconds:
            for dimensions, asker in askers.items():
                vectors = asked[dimensions]
                vector = vectors[number % len(vectors)]
                asker.client.ask(bound(_STATEMENT, as_binary(vector), binary=True))
            number += 1
            time.sleep(0.006)
            if number % 100 == 0 and _settled(way):
                break
    held_out = {dimensions: vectors[len(vectors) // 2 :] for dimensions, vectors in queries.items()}
    return Learned(held_out, time.monotonic() - start)


def _settled(way: Way) -> bool:
    """Tell whether both templates have a policy for single queries."""
    with urllib.request.urlopen(f"http://127.0.0.1:{way.admin_port}/metrics", timeout=30) as response:
        text = response.read().decode()
    trusts: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "ruvector_templates":
                trusts[sample.labels["trust"]] = trusts.get(sample.labels["trust"], 0) + sample.value
    return trusts.get("query", 0) >= 2


@contextmanager
def held(way: Way) -> Iterator[None]:
    """Hold the learner while the block runs."""
    assert way.learner is not None
    os.kill(way.learner, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(way.learner, signal.SIGCONT)


def run(
    user: str,
    ways: Sequence[Way],
    adapting: Way,
    queries: dict[int, Vectors],
    results: Results,
    *,
    rounds: int,
    count: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Measure `count` queries a round on every way, the learner at rest."""
    with held(adapting):
        for dimensions, vectors in queries.items():
            for form in ("binary", "text"):
                case = f"{dimensions} dimensions, {form}"
                with _opened([*ways, adapting], user, dimensions) as askers:
                    everything: dict[str, list[float]] = {}
                    for number in range(rounds):
                        chosen = vectors[np.arange(number * count, (number + 1) * count) % len(vectors)]
                        found = _round(askers, chosen, binary=form == "binary")
                        _note(results, GROUP, case, found)
                        for name, times in found.items():
                            everything.setdefault(name, []).extend(times)
                        advance()
                    for name, times in everything.items():
                        if len(times) < _FEWEST:
                            break
                        results.add(GROUP, case, name, **{"p99.9": float(np.percentile(times, 99.9))})


def with_learner(
    user: str,
    direct: Way,
    adapting: Way,
    queries: dict[int, Vectors],
    results: Results,
    *,
    rounds: int,
    count: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Measure the same with the learner at work and at rest, in turns."""
    assert adapting.learner is not None
    vectors = queries[384]
    with _opened([direct, adapting], user, 384) as askers:
        for number in range(rounds):
            chosen = vectors[np.arange(number * count, (number + 1) * count) % len(vectors)]
            for case in ("at rest", "at work"):
                if case == "at rest":
                    with held(adapting):
                        _note(results, LEARNER, case, _round(askers, chosen, binary=True))
                else:
                    time.sleep(0.3)  # what waited for it meanwhile is dealt with
                    spent, start = cpu_seconds(adapting.learner), perf_counter()
                    _note(results, LEARNER, case, _round(askers, chosen, binary=True))
                    busy = (cpu_seconds(adapting.learner) - spent) / (perf_counter() - start)
                    results.add(LEARNER, case, PROXY, **{"learner's share of a core": busy})
            advance()


@contextmanager
def _opened(ways: Sequence[Way], user: str, dimensions: int) -> Iterator[list[Asker]]:
    """Yield a connection on every way; the adapting one is the last."""
    with ExitStack() as stack:
        askers = [Asker(way, user, dimensions) for way in ways]
        for asker in askers:
            stack.enter_context(asker.client)
        yield askers


def _round(askers: Sequence[Asker], vectors: Vectors, *, binary: bool) -> dict[str, list[float]]:
    """Return microseconds by way; only queries that were adapted count."""
    adapting, others = askers[-1], askers[:-1]
    times: dict[str, list[float]] = {asker.way.name: [] for asker in askers}
    rng = np.random.default_rng(len(vectors))
    gc.collect()
    gc.disable()
    try:
        for vector in vectors:
            value = as_binary(vector) if binary else as_text(vector)
            message = bound(_STATEMENT, value, binary=binary)
            _, saved, *settings = first_row(adapting.client.ask(message))
            if not saved:
                continue
            for asker in others:
                asker.use(settings)
            for place in rng.permutation(len(askers)):
                asker = askers[place]
                start = perf_counter()
                asker.client.ask(message)
                times[asker.way.name].append((perf_counter() - start) * 1e6)
    finally:
        gc.enable()
    return times


def _note(results: Results, group: str, case: str, found: dict[str, list[float]]) -> None:
    for name, times in found.items():
        if len(times) < _FEWEST:
            results.facts[f"{group}, {case}"] = "not measured: the learner has no policy in force"
            return
        p50, p99 = np.percentile(times, [50, 99])
        results.add(group, case, name, p50=p50, p99=p99)
