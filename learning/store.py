"""What the learner keeps across restarts: templates, labels, some recent trajectories, the last snapshot.

One SQLite file in the state directory, in WAL mode: what was committed survives kill -9.  The learner is its
only writer; all access runs in one thread of its own, so that the event loop never waits for a disk.  Records
are stored as msgpack, as they travel on the channel; a record from another version that does not decode is
skipped.

Rules
-----
- The directory is private (0700) and the file too (0600): it holds query vectors and filter values.
- Everything is bounded: `LABELS` and `TRAJECTORIES` per template, `TEMPLATES` in all.
- A file that is not a database, or has another schema version, is renamed and never deleted; learning starts
  anew.
- A full or failing disk is reported once per change of state; learning goes on in memory.
- Anonymized, nothing on the disk holds a query vector or a filter value: see `Anonymizer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from learning.records import (
    HASHED,
    Label,
    QueryPolicy,
    Snapshot,
    Template,
    TemplatePolicy,
    Trajectory,
    Value,
    is_hashed,
)

log = logging.getLogger(__name__)

FILE = "learner.sqlite"
SCHEMA_VERSION = 1
TEMPLATES, LABELS, TRAJECTORIES = 256, 3000, 100

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE templates (key TEXT PRIMARY KEY, seen REAL NOT NULL, off TEXT, body BLOB NOT NULL);
CREATE TABLE labels (id INTEGER PRIMARY KEY, template TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX labels_template ON labels (template, id);
CREATE TABLE trajectories (id INTEGER PRIMARY KEY, template TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX trajectories_template ON trajectories (template, id);
CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, body BLOB NOT NULL);
"""

_pack = msgspec.msgpack.Encoder().encode
_Result = TypeVar("_Result")
_Record = TypeVar("_Record", Template, Label, Trajectory, Snapshot)


@dataclass(frozen=True, slots=True)
class StoredTemplate:
    """A template, and why it is switched off for good (None: it is not)."""

    template: Template
    off: str | None = None


@dataclass(slots=True)
class Kept:
    """What was read from the disk."""

    templates: list[StoredTemplate] = field(default_factory=list)
    labels: dict[str, list[Label]] = field(default_factory=dict)  # by template, oldest first
    trajectories: dict[str, list[Trajectory]] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    version: int = 0  # of the last snapshot, readable or not
    notes: dict[str, bytes] = field(default_factory=dict)  # by name, as saved


class Anonymizer:
    """Replaces vectors by nothing and filter values by salted hashes.

    The salt is random and stays in the state directory, so hashes cannot be compared between installations.
    Whoever has the file can still try out guessed values: hashing hides, it does not encrypt.
    """

    def __init__(self, salt: bytes) -> None:
        self._salt = salt

    def context(self, context: str) -> str:
        """Hash a context key; one that is hashed already, or is nothing but a k, stays as it is."""
        if "\x1f" not in context or is_hashed(context):
            return context
        k, _, values = context.partition("\x1f")
        return f"{k}{HASHED}{self._digest(values.encode())}"

    def label(self, label: Label) -> Label:
        """Return the label without its vector and with its context hashed."""
        return msgspec.structs.replace(label, vector=None, context=self.context(label.context))

    def trajectory(self, trajectory: Trajectory) -> Trajectory:
        """Return the trajectory without its vector; every value is replaced by its hash."""
        hashed = tuple(
            Value(0, self._digest(value.data).encode())
            if value is not None and value.data is not None
            else value
            for value in trajectory.values
        )
        return msgspec.structs.replace(trajectory, vector=None, values=hashed)

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot without patterns and filter values: after a restart these are learned again."""
        return msgspec.structs.replace(
            snapshot, templates={key: self._policy(policy) for key, policy in snapshot.templates.items()}
        )

    def _policy(self, policy: TemplatePolicy) -> TemplatePolicy:
        contexts = {context: arm for context, arm in policy.contexts.items() if "\x1f" not in context}
        query: QueryPolicy | None = None
        return msgspec.structs.replace(policy, contexts=contexts, selectivity={}, query=query)

    def _digest(self, data: bytes) -> str:
        return hashlib.blake2b(data, key=self._salt, digest_size=16).hexdigest()


class Store:
    """The state directory of one learner.

    Parameters
    ----------
    directory
        Created where it is missing.
    anonymize
        Hash what is written from now on; what was written before is hashed when the store is opened.
    """

    def __init__(self, directory: Path, *, anonymize: bool = False) -> None:
        self.path = directory / FILE
        self._anonymize = anonymize
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
        if self._database is None:
            return
        try:
            await self._run(lambda: self._save(templates, labels, trajectories, snapshot, notes or {}))
        except (OSError, sqlite3.Error) as error:
            self._report(error)
        else:
            self._failing = False

    async def forget(self, template: str) -> None:
        """Remove everything about a template."""
        await self._try(lambda: self._forget(template))

    async def forget_labels(self, template: str) -> None:
        """Remove the labels of a template: they are about a world that is gone."""
        await self._try(lambda: self._forget_labels(template))

    async def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            await self._try(self._database.close)
            self._database = None
        self._thread.shutdown()

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _try(self, work: Callable[[], None]) -> None:
        if self._database is not None:
            try:
                await self._run(work)
            except (OSError, sqlite3.Error) as error:
                self._report(error)

    def _report(self, error: Exception) -> None:
        if not self._failing:
            log.error("cannot keep what is learned in %s: %s; learning goes on in memory", self.path, error)
        self._failing = True

    def _open(self) -> Kept:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.exists() and (trouble := _trouble(self.path)):
            aside = set_aside(self.path)
            log.error("%s %s; it was renamed to %s, and learning starts anew", self.path, trouble, aside.name)
        fresh = not self.path.exists()
        if fresh:
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
        # Only the store's thread uses the connection, but the executor may have started it anew.
        database = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")  # with WAL: safe against kill -9
        if fresh:
            database.executescript("BEGIN;" + _SCHEMA + f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        self._database = database
        self._anonymizer = Anonymizer(_salt(database))
        kept = _load(database)
        if self._anonymize:
            self._hash_the_past(kept)
            kept = _load(database)
            kept.trajectories.clear()  # a hash cannot be measured
        return kept

    def _hash_the_past(self, kept: Kept) -> None:
        """Replace what an earlier run wrote in the clear; the file is rewritten so that no page keeps it."""
        assert self._database is not None
        clear = any(t.vector is not None for many in kept.trajectories.values() for t in many) or any(
            self._anonymizer.label(label) != label for many in kept.labels.values() for label in many
        )
        hides = kept.snapshot is not None and self._anonymizer.snapshot(kept.snapshot) != kept.snapshot
        if clear or hides:
            with _transaction(self._database):
                self._database.execute("DELETE FROM labels")
                self._database.execute("DELETE FROM trajectories")
            labels = [label for many in kept.labels.values() for label in many]
            self._save((), labels, (), kept.snapshot, {})
            self._database.execute("VACUUM")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            log.info("what was kept in %s before anonymize was switched on has been hashed", self.path)

    def _save(
        self,
        templates: Sequence[StoredTemplate],
        labels: Sequence[Label],
        trajectories: Sequence[Trajectory],
        snapshot: Snapshot | None,
        notes: Mapping[str, bytes],
    ) -> None:
        assert self._database is not None
        if self._anonymize:
            labels = [self._anonymizer.label(label) for label in labels]
            trajectories = [self._anonymizer.trajectory(trajectory) for trajectory in trajectories]
            snapshot = None if snapshot is None else self._anonymizer.snapshot(snapshot)
        now = time.time()
        with _transaction(self._database) as database:
            database.executemany(
                "INSERT INTO templates (key, seen, off, body) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE "
                "SET seen = excluded.seen, off = excluded.off, body = excluded.body",
                [(t.template.key, now, t.off, _pack(t.template)) for t in templates],
            )
            database.executemany(
                "INSERT INTO labels (template, body) VALUES (?, ?)", [(x.template, _pack(x)) for x in labels]
            )
            database.executemany(
                "INSERT INTO trajectories (template, body) VALUES (?, ?)",
                [(x.template, _pack(x)) for x in trajectories],
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

    def _trim_templates(self, database: sqlite3.Connection) -> None:
        surplus = database.execute(
            "SELECT key FROM templates ORDER BY seen DESC LIMIT -1 OFFSET ?", (TEMPLATES,)
        ).fetchall()
        for (key,) in surplus:
            _delete(database, key)

    def _forget_labels(self, template: str) -> None:
        assert self._database is not None
        self._database.execute("DELETE FROM labels WHERE template = ?", (template,))

    def _forget(self, template: str) -> None:
        assert self._database is not None
        with _transaction(self._database) as database:
            _delete(database, template)


def _load(database: sqlite3.Connection) -> Kept:
    kept = Kept()
    for body, off in database.execute("SELECT body, off FROM templates ORDER BY seen"):
        for template in _decode(body, Template):
            kept.templates.append(StoredTemplate(template, off))
    for (body,) in database.execute("SELECT body FROM labels ORDER BY id"):
        for label in _decode(body, Label):
            kept.labels.setdefault(label.template, []).append(label)
    for (body,) in database.execute("SELECT body FROM trajectories ORDER BY id"):
        for trajectory in _decode(body, Trajectory):
            kept.trajectories.setdefault(trajectory.template, []).append(trajectory)
    notes = database.execute("SELECT name, value FROM meta WHERE name LIKE 'note:%'")
    kept.notes = {name.removeprefix("note:"): bytes(value) for name, value in notes}
    for version, body in database.execute("SELECT version, body FROM snapshot"):
        kept.version = version
        for snapshot in _decode(body, Snapshot):
            kept.snapshot = snapshot
    return kept


def read(directory: Path) -> Kept:
    """Return what a learner keeps in its state directory, also while it runs; nothing is changed.

    Raises
    ------
    FileNotFoundError
        There is no store.
    ValueError
        It is damaged, or of another version.
    OSError
        It may not be read.
    """
    path = directory / FILE
    if not path.exists():
        raise FileNotFoundError(path)
    if trouble := _trouble(path):
        raise ValueError(f"{path} {trouble}")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return _load(database)
    except sqlite3.Error as error:
        raise ValueError(str(error)) from error


_TRIM_LABELS = """
DELETE FROM labels WHERE template = :template AND id <= (
    SELECT id FROM labels WHERE template = :template ORDER BY id DESC LIMIT 1 OFFSET :kept)
"""
_TRIM_TRAJECTORIES = _TRIM_LABELS.replace("labels", "trajectories")


def set_aside(path: Path) -> Path:
    """Rename a database and what belongs to it, and return its new name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.aside-{stamp}-{secrets.token_hex(2)}")
    path.rename(aside)
    for ending in ("-wal", "-shm"):
        beside = path.with_name(path.name + ending)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + ending))
    return aside


def _trouble(path: Path) -> str | None:
    """Say in words what is wrong with a database file; None: nothing."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != SCHEMA_VERSION:
                return f"has schema version {version}, and this program knows {SCHEMA_VERSION}"
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            return None if verdict == "ok" else f"is damaged ({verdict})"
    except sqlite3.DatabaseError as error:
        return f"cannot be read ({error})"


def _salt(database: sqlite3.Connection) -> bytes:
    database.execute("INSERT OR IGNORE INTO meta VALUES ('salt', ?)", (secrets.token_bytes(32),))
    (salt,) = database.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()
    return bytes(salt)


def _delete(database: sqlite3.Connection, template: str) -> None:
    database.execute("DELETE FROM templates WHERE key = ?", (template,))
    database.execute("DELETE FROM labels WHERE template = ?", (template,))
    database.execute("DELETE FROM trajectories WHERE template = ?", (template,))
    database.execute("DELETE FROM meta WHERE name LIKE 'note:%:' || ?", (template,))


def _decode(body: bytes, kind: type[_Record]) -> Iterator[_Record]:
    """Yield the record, or nothing where another version wrote it in a way that cannot be read."""
    try:
        yield msgspec.msgpack.decode(body, type=kind)
    except msgspec.DecodeError:
        log.warning("a stored %s cannot be read and is skipped", kind.__name__)


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
