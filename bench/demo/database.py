"""The demo's database: an embedded server whose loaded table and indexes are kept for the next run.

A stamp, a comment on the database, names the data and the versions that built it.  It is written last:
whatever was interrupted is dropped and built again, whatever is stamped is used as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
from rich.progress import Progress

from bench.dataset import Dataset
from bench.demo.workload import binary_vector
from bench.embedded import EmbeddedPostgres

DATABASE = "demo"
SETTINGS = {"shared_buffers": "256MB", "maintenance_work_mem": "256MB"}
"""All else is as PostgreSQL comes.  Table and index fit into the memory: disks are not what is compared."""

SCHEMA_VERSION = "1"
TABLE = (
    "CREATE TABLE items (id bigint PRIMARY KEY, category smallint NOT NULL, embedding vector({dimensions}))"
)
HNSW = (
    "CREATE INDEX items_embedding ON items USING hnsw (embedding vector_cosine_ops) "
    "WITH (m = 16, ef_construction = 64)"
)
BTREE = "CREATE INDEX items_category ON items (category)"
_BATCH = 1_000


def address(server: EmbeddedPostgres, database: str = DATABASE) -> dict[str, Any]:
    """Return asyncpg's connection arguments for the server's socket."""
    return {"host": server.host, "port": server.port, "user": server.user, "database": database}


async def prepare(server: EmbeddedPostgres, dataset: Dataset, progress: Progress) -> bool:
    """Make sure that the running server holds the data set; return whether it was there already."""
    stamp = f"ruvector-proxy demo {SCHEMA_VERSION} {dataset.fingerprint} {await _versions(server)}"
    async with connection(server, "postgres") as admin:
        found = await admin.fetchval(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", DATABASE
        )
        if found == stamp:
            return True
        await admin.execute(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {DATABASE}")
    async with connection(server) as loader:
        await loader.execute("CREATE EXTENSION vector")
        await loader.execute(TABLE.format(dimensions=dataset.dimensions))
        await _load(loader, dataset, progress)
        await _build_index(server, loader, len(dataset.base), progress)
        await loader.execute(BTREE)
        await loader.execute("VACUUM ANALYZE items")
        await loader.execute("CHECKPOINT")
        await loader.execute(f"COMMENT ON DATABASE {DATABASE} IS '{stamp}'")
    return False


@asynccontextmanager
async def connection(
    server: EmbeddedPostgres, database: str = DATABASE
) -> AsyncIterator[asyncpg.Connection[Any]]:
    """Connect to the server; the connection is dropped at once when the block is left by cancellation."""
    opened = await asyncpg.connect(**address(server, database))
    try:
        yield opened
        await opened.close()
    finally:
        opened.terminate()


async def _versions(server: EmbeddedPostgres) -> str:
    async with connection(server, "postgres") as admin:
        return str(
            await admin.fetchval(
                "SELECT current_setting('server_version_num') || ' ' || default_version "
                "FROM pg_available_extensions WHERE name = 'vector'"
            )
        )


async def _load(loader: asyncpg.Connection[Any], dataset: Dataset, progress: Progress) -> None:
    await loader.set_type_codec("vector", encoder=binary_vector, decoder=bytes, format="binary")
    task = progress.add_task("Loading the table", total=len(dataset.base))
    for start in range(0, len(dataset.base), _BATCH):
        rows = range(start, min(start + _BATCH, len(dataset.base)))
        await loader.copy_records_to_table(
            "items", records=[(i, int(dataset.category[i]), dataset.base[i]) for i in rows]
        )
        progress.advance(task, len(rows))


async def _build_index(
    server: EmbeddedPostgres, loader: asyncpg.Connection[Any], rows: int, progress: Progress
) -> None:
    task = progress.add_task("Building the HNSW index", total=rows)
    building = asyncio.create_task(loader.execute(HNSW))
    try:
        async with connection(server) as watcher:
            while not building.done():
                done = await watcher.fetchval("SELECT max(tuples_done) FROM pg_stat_progress_create_index")
                progress.update(task, completed=min(done or 0, rows))
                await asyncio.wait([building], timeout=0.2)
        await building
    finally:
        building.cancel()
    progress.update(task, completed=rows)


def data_directory(home: Path) -> Path:
    """Return where the server's data lives below the demo's directory."""
    return home / "postgres"
