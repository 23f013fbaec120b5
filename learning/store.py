"""What the learner keeps across restarts: templates, labels, some recent trajectories, the last snapshot.

One SQLite file in the state directory (`learning.sqlite_file`), in WAL mode: what was committed survives
kill -9.  The learner is its only writer, but for documents handed in by ``patterns import``; all access runs
in one thread of its own, so that the event loop never waits for a disk.  Records are stored as msgpack, as
they travel on the channel; a record from another version that does not decode is skipped.

With a shared store (`learning.sharing`) this file is the replica's own copy and its journal: a label is
written here first, and marked once the shared store has it.

Rules
-----
- The directory is private (0700) and the file too (0600): it holds query vectors and filter values.
- Everything is bounded: `LABELS` and `TRAJECTORIES` per template, `TEMPLATES` in all, and by age and size as
  configured, the oldest going first.
- A full or failing disk is reported once per change of state; learning goes on in memory.
- Anonymized, nothing on the disk holds a query vector or a filter value: see `learning.anonymizer`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from learning.anonymizer import Anonymizer
from learning.exchange import label_id
from learning.records import Label, Snapshot, Trajectory
from learning.sqlite_file import FILE, Kept, StoredTemplate, decode, load, open_file, open_memory, transaction

log = logging.getLogger(__name__)

TEMPLATES, LABELS, TRAJECTORIES = 256, 3000, 100
_RETAIN_EVERY = 600.0  # seconds between looks at age and size
_pack = msgspec.msgpack.Encoder().encode
_Result = TypeVar("_Result")


class Store:
    """The state directory of one learner.

    Parameters
    ----------
    directory
        Created where it is missing.
    anonymize
        Hash what is written from now on; what was written before is hashed when the store is opened.
    max_age
        Seconds after which labels and trajectories are deleted.
    max_size
        Bytes of the file; above, the oldest are deleted.
    """

    def __init__(
        self,
        directory: Path,
        *,
        anonymize: bool = False,
        max_age: float = float("inf"),
        max_size: float = float("inf"),
    ) -> None:
        self.path = directory / FILE
        self._anonymize = anonymize
        self._max_age, self._max_size = max_age, max_size
        self._retained = 0.0
        self._anonymizer = Anonymizer(b"")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._database: sqlite3.Connection | None = None
        self._failing = False

    @property
    def anonymizer(self) -> Anonymizer | None:
        """The hashing in force, or None."""
        return self._anonymizer if self._anonymize else None

    async def open(self) -> Kept:
        """Open or create the file and return what it holds; nothing where the directory cannot be used."""
        try:
            return await self._run(self._open)
        except (OSError, sqlite3.Error) as error:
            self._report(error)
            self._database = await self._run(open_memory)
            return Kept()

    async def save(
        self,
        *,
        templates: Sequence[StoredTemplate] = (),
        labels: Sequence[Label] = (),
        trajectories: Sequence[Trajectory] = (),
        snapshot: Snapshot | None = None,
        notes: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write everything given in one transaction; a failure is logged, not raised.

        `notes` are small records by name, each replacing the one before; a template's are named
        ``kind:key`` and are forgotten with it.
        """
        await self._try(lambda: self._save(templates, labels, trajectories, snapshot, notes or {}))

    async def forget(self, template: str) -> None:
        """Remove everything about a template, from the write-ahead log too."""
        await self._try(lambda: self._forget(template))

    async def forget_labels(self, template: str) -> None:
        """Remove the labels of a template: they are about a world that is gone."""
        await self._try(lambda: self._forget_labels(template))

    async def unsent(self, limit: int) -> list[tuple[int, Label]]:
        """Return the oldest labels that no shared store is known to have, with their numbers."""
        found: list[tuple[int, Label]] = []

        def look() -> None:
            query = "SELECT id, body FROM labels WHERE sent = 0 ORDER BY id LIMIT ?"
            for number, body in self._connection.execute(query, (limit,)):
                found.extend((number, label) for label in decode(body, Label))

        await self._try(look)
        return found

    async def sent(self, numbers: Sequence[int]) -> None:
        """Note that the shared store has these labels."""
        await self._try(
            lambda: self._connection.executemany(
                "UPDATE labels SET sent = 1 WHERE id = ?", [(number,) for number in numbers]
            )
        )

    async def handed_in(self) -> list[bytes]:
        """Return the documents handed in since the last call, and remove them."""
        found: list[bytes] = []

        def take() -> None:
            rows = self._connection.execute("SELECT id, body FROM inbox ORDER BY id").fetchall()
            found.extend(bytes(body) for _, body in rows)
            self._connection.executemany("DELETE FROM inbox WHERE id = ?", [(number,) for number, _ in rows])

        await self._try(take)
        return found

    async def use_salt(self, salt: bytes) -> None:
        """Hash with a salt that is shared with others, from now on and after the next start."""
        self._anonymizer = Anonymizer(salt)
        statement = "INSERT OR REPLACE INTO meta VALUES ('salt', ?)"
        await self._try(lambda: self._connection.execute(statement, (salt,)))

    async def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            await self._try(self._database.close)
            self._database = None
        self._thread.shutdown()

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._database is not None
        return self._database

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _try(self, work: Callable[[], object]) -> None:
        if self._database is None:
            return
        try:
            await self._run(work)
        except (OSError, sqlite3.Error) as error:
            self._report(error)
        else:
            self._failing = False

    def _report(self, error: Exception) -> None:
        if not self._failing:
            log.error("cannot keep what is learned in %s: %s; learning goes on in memory", self.path, error)
        self._failing = True

    def _open(self) -> Kept:
        self._database = open_file(self.path)
        self._anonymizer = Anonymizer(_salt(self._database))
        self._retain(time.time())
        kept = load(self._database)
        if self._anonymize:
            self._hash_the_past(kept)
            kept = load(self._database)
            kept.trajectories.clear()  # a hash cannot be measured
        return kept

    def _hash_the_past(self, kept: Kept) -> None:
        """Replace what an earlier run wrote in the clear; the file is rewritten so that no page keeps it."""
        clear = any(t.vector is not None for many in kept.trajectories.values() for t in many) or any(
            self._anonymizer.label(label) != label for many in kept.labels.values() for label in many
        )
        hides = kept.snapshot is not None and self._anonymizer.snapshot(kept.snapshot) != kept.snapshot
        if clear or hides:
            with transaction(self._connection) as database:
                database.execute("DELETE FROM labels")
                database.execute("DELETE FROM trajectories")
            labels = [label for many in kept.labels.values() for label in many]
            self._save((), labels, (), kept.snapshot, {})
            self._connection.execute("VACUUM")
            self._empty_log()
            log.info("what was kept in %s before anonymize was switched on has been hashed", self.path)

    def _save(
        self,
        templates: Sequence[StoredTemplate],
        labels: Sequence[Label],
        trajectories: Sequence[Trajectory],
        snapshot: Snapshot | None,
        notes: Mapping[str, bytes],
    ) -> None:
        if self._anonymize:
            labels = [self._anonymizer.label(label) for label in labels]
            trajectories = [self._anonymizer.trajectory(trajectory) for trajectory in trajectories]
            snapshot = None if snapshot is None else self._anonymizer.snapshot(snapshot)
        now = time.time()
        with transaction(self._connection) as database:
            database.executemany(
                "INSERT INTO templates (key, seen, off, relation, body) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET seen = excluded.seen, off = excluded.off, "
                "relation = excluded.relation, body = excluded.body",
                [(t.template.key, now, t.off, t.table, _pack(t.template)) for t in templates],
            )
            database.executemany(
                "INSERT OR IGNORE INTO labels (template, uid, at, body) VALUES (?, ?, ?, ?)",
                [(x.template, label_id(x), x.timestamp, _pack(x)) for x in labels],
            )
            database.executemany(
                "INSERT INTO trajectories (template, at, body) VALUES (?, ?, ?)",
                [(x.template, x.timestamp, _pack(x)) for x in trajectories],
            )
            database.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [(f"note:{name}", value) for name, value in notes.items()],
            )
            if snapshot is not None:
                database.execute(
                    "INSERT OR REPLACE INTO snapshot VALUES (1, ?, ?)", (snapshot.version, _pack(snapshot))
                )
            for key in {x.template for x in labels} | {x.template for x in trajectories}:
                database.execute(_TRIM_LABELS, {"template": key, "kept": LABELS})
                database.execute(_TRIM_TRAJECTORIES, {"template": key, "kept": TRAJECTORIES})
            if templates:
                self._trim_templates(database)
        if now - self._retained > _RETAIN_EVERY:
            self._retain(now)

    def _trim_templates(self, database: sqlite3.Connection) -> None:
        surplus = database.execute(
            "SELECT key FROM templates ORDER BY seen DESC LIMIT -1 OFFSET ?", (TEMPLATES,)
        ).fetchall()
        for (key,) in surplus:
            _delete(database, key)

    def _retain(self, now: float) -> None:
        """Delete what is too old, then the oldest until the file is small enough."""
        self._retained = now
        database = self._connection
        with transaction(database):
            for table in ("labels", "trajectories"):
                database.execute(f"DELETE FROM {table} WHERE at < ?", (now - self._max_age,))  # noqa: S608
        while self._size() > self._max_size:
            with transaction(database):
                removed = sum(database.execute(statement).rowcount for statement in _REMOVE_OLDEST)
            if not removed:
                break
        database.executescript("PRAGMA incremental_vacuum")  # `execute` would free one page only

    def _size(self) -> int:
        pages, free, size = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def _forget_labels(self, template: str) -> None:
        self._connection.execute("DELETE FROM labels WHERE template = ?", (template,))

    def _forget(self, template: str) -> None:
        with transaction(self._connection) as database:
            _delete(database, template)
        self._empty_log()

    def _empty_log(self) -> None:
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


_TRIM_LABELS = """
DELETE FROM labels WHERE template = :template AND id <= (
    SELECT id FROM labels WHERE template = :template ORDER BY id DESC LIMIT 1 OFFSET :kept)
"""
_TRIM_TRAJECTORIES = _TRIM_LABELS.replace("labels", "trajectories")
_REMOVE_OLDEST = (
    "DELETE FROM trajectories WHERE id IN (SELECT id FROM trajectories ORDER BY at LIMIT 200)",
    "DELETE FROM labels WHERE id IN (SELECT id FROM labels ORDER BY at LIMIT 200)",
)


def _salt(database: sqlite3.Connection) -> bytes:
    database.execute("INSERT OR IGNORE INTO meta VALUES ('salt', ?)", (secrets.token_bytes(32),))
    (salt,) = database.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()
    return bytes(salt)


def _delete(database: sqlite3.Connection, template: str) -> None:
    database.execute("DELETE FROM templates WHERE key = ?", (template,))
    database.execute("DELETE FROM labels WHERE template = ?", (template,))
    database.execute("DELETE FROM trajectories WHERE template = ?", (template,))
    database.execute("DELETE FROM meta WHERE name LIKE 'note:%:' || ?", (template,))
