"""A learner in this process, a worker's end of its socket, and tables to learn about."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from bench.embedded import EmbeddedPostgres
from config.schema import Config
from learning.channel import Frame, FrameReader, Hello, Publish, TemplateSeen, TrajectoryBatch, encode
from learning.metrics import LearnerMetrics
from learning.records import Settings, Snapshot, Template, TemplatePolicy, Trajectory, Trust, Value
from learning.upstream import Session, Upstream
from learning.worker import run
from proxy.sql import Recogniser, Scope

Vectors = NDArray[np.float32]

DIMENSIONS = 32
UNFILTERED = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 10"
FILTERED = "SELECT id FROM items WHERE section = $2 ORDER BY embedding <-> $1 LIMIT 10"


def connected(postgres: EmbeddedPostgres, database: str, work: Callable[[Session], Awaitable[Any]]) -> Any:
    """Run `work` with a side connection to the database."""

    async def scenario() -> Any:
        upstream = Upstream(postgres.uri())
        try:
            return await work(await upstream.session(database))
        finally:
            await upstream.close()

    return asyncio.run(scenario())


def clustered(rows: int, *, seed: int = 0, dimensions: int = DIMENSIONS) -> Vectors:
    """Return vectors in overlapping clusters: hard enough that a small ef_search misses neighbours."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(rows // 50, dimensions))
    return (centres[rng.integers(len(centres), size=rows)] + rng.normal(size=(rows, dimensions))).astype(
        np.float32
    )


def text(vector: Vectors) -> str:
    return "[" + ",".join(map(str, vector.tolist())) + "]"


def create_items(dsn: str, rows: int = 4000, *, index: bool = True, analyze: bool = True) -> Vectors:
    """Create the table ``items``: sections 0 (two thirds), 1 (a third), 2 (5 %) and 3 (0.2 %)."""
    vectors = clustered(rows)
    sections = np.random.default_rng(1).choice(4, size=rows, p=(0.62, 0.328, 0.05, 0.002))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            f"CREATE TABLE items (id int PRIMARY KEY, section int NOT NULL, embedding vector({DIMENSIONS}))"
        )
        with connection.cursor().copy("COPY items FROM STDIN") as copy:
            for number, (section, vector) in enumerate(zip(sections, vectors, strict=True)):
                copy.write_row((number, int(section), text(vector)))
        connection.execute("CREATE INDEX ON items (section)")
        if index:
            connection.execute(
                "CREATE INDEX items_hnsw ON items USING hnsw (embedding vector_l2_ops) "
                "WITH (m = 6, ef_construction = 24)"
            )
        if analyze:
            connection.execute("ANALYZE items")
    return vectors


def configuration(server: EmbeddedPostgres | str, state: Path, **sections: object) -> Config:
    """Return a configuration for a learner of this server (or with this connection URI)."""
    base: dict[str, object] = {
        "learner": {"dsn": server if isinstance(server, str) else server.uri()},
        "store": {"path": str(state)},
        "learning": {"target_recall": 0.95},
    }
    base |= sections
    learning = base["learning"]
    assert isinstance(learning, dict)
    # A policy is in force at once: trials have tests of their own.
    return Config.model_validate({**base, "learning": {"canary_share": 0.0, **learning}})


def template(sql: str, database: str, *, user: str = "postgres", search_path: str | None = None) -> Template:
    """Return the template that the proxy would find in a statement."""
    statement = Recogniser().recognise(sql.encode(), Scope(database, user, search_path))
    assert statement.vector is not None, statement.reason
    return statement.vector.template


def query(
    found: Template,
    vector: Vectors,
    *values: Value,
    k: int = 10,
    arm: str = "as is",
    settings: Settings = (),
) -> Trajectory:
    """Return the trajectory of one query; `values` are those of the filter slots, in order."""
    rest = list(values)
    by_slot = tuple(rest.pop(0) if slot.role.value == "filter" else None for slot in found.slots)
    return Trajectory(
        query_id=uuid.uuid4().bytes,
        template=found.key,
        timestamp=time.time(),
        vector=np.asarray(vector, dtype="<f4").tobytes(),
        k=k,
        offset=0,
        values=by_slot,
        arm=arm,
        settings=settings,
        trust=Trust.OBSERVE,
        policy_version=0,
        rows=k,
        first_byte_ms=1.0,
        latency_ms=1.0,
    )


def sample(key: str, *, labels: dict[str, str] | None = None, registry: CollectorRegistry) -> float:
    """Return the value of a metric, 0 where it has not been set."""
    return registry.get_sample_value(key, labels or {}) or 0.0


class Worker:
    """A worker's end of the channel."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader()
        self.snapshots: list[Snapshot] = []

    @classmethod
    async def connect(cls, path: Path) -> Worker:
        for _ in range(100):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                worker = cls(*await asyncio.open_unix_connection(str(path)))
                await worker.send(Hello(1, 0))
                return worker
            await asyncio.sleep(0.1)
        raise AssertionError("the learner does not listen")

    async def send(self, *frames: Frame) -> None:
        self._writer.write(b"".join(map(encode, frames)))
        await self._writer.drain()

    async def send_bytes(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def announce(self, found: Template, queries: Sequence[Trajectory]) -> None:
        """Send a template and its queries, as a worker does."""
        await self.send(TemplateSeen(found), TrajectoryBatch(tuple(queries)))

    async def snapshot(self, timeout: float = 150.0) -> Snapshot:
        """Return the next snapshot."""
        async with asyncio.timeout(timeout):
            while True:
                data = await self._reader.read(1 << 20)
                assert data, "the learner closed the connection"
                received = [frame.snapshot for frame in self._frames.feed(data) if isinstance(frame, Publish)]
                if received:
                    self.snapshots += received
                    return received[-1]

    async def policy(
        self,
        found: Template,
        wanted: Callable[[TemplatePolicy], bool] = lambda policy: policy.trust is not Trust.OBSERVE,
        timeout: float = 150.0,
    ) -> TemplatePolicy:
        """Return the first published policy of a template that is as wanted."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    policy = (await self.snapshot(timeout)).templates.get(found.key)
                    if policy is not None and wanted(policy):
                        return policy
        except TimeoutError:
            last = self.snapshots[-1].templates.get(found.key) if self.snapshots else None
            raise AssertionError(
                f"no policy as wanted; the last: {last and (last.trust, last.reason)}"
            ) from None

    async def closed(self) -> bool:
        """Wait until the learner closes the connection."""
        async with asyncio.timeout(10):
            while await self._reader.read(1 << 16):
                pass
        return True

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def learner(
    config: Config, socket_path: Path, registry: CollectorRegistry | None = None
) -> AsyncIterator[Worker]:
    """Run a learner and connect a worker to it."""
    stop = asyncio.Event()
    metrics = LearnerMetrics(registry or CollectorRegistry())
    task = asyncio.create_task(run(config, socket_path, stop, metrics=metrics))
    worker = await Worker.connect(socket_path)
    try:
        yield worker
    finally:
        await worker.close()
        stop.set()
        async with asyncio.timeout(60):
            await task
