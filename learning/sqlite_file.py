"""The SQLite file of a store: its schema and the steps from older ones, damage, and what it holds.

Rules
-----
- `PRAGMA user_version` is the schema's version.  A file of an older version is brought up step by step, each
  step in one transaction with the new number; killed in between, it is at one of the two versions.
- A file that is damaged, or of a newer version, is renamed with what belongs to it and never deleted.
- What is deleted is overwritten (`secure_delete`), not only unlinked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from learning.exchange import label_id
from learning.records import Label, Snapshot, Template, Trajectory

log = logging.getLogger(__name__)

FILE = "learner.sqlite"
SCHEMA_VERSION = 2

_FIRST = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE templates (key TEXT PRIMARY KEY, seen REAL NOT NULL, off TEXT, body BLOB NOT NULL);
CREATE TABLE labels (id INTEGER PRIMARY KEY, template TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX labels_template ON labels (template, id);
CREATE TABLE trajectories (id INTEGER PRIMARY KEY, template TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX trajectories_template ON trajectories (template, id);
CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, body BLOB NOT NULL);
"""

_SECOND = """
ALTER TABLE templates ADD COLUMN relation TEXT NOT NULL DEFAULT '';
ALTER TABLE labels ADD COLUMN uid BLOB;
ALTER TABLE labels ADD COLUMN at REAL NOT NULL DEFAULT 0;
ALTER TABLE labels ADD COLUMN sent INTEGER NOT NULL DEFAULT 0;
ALTER TABLE trajectories ADD COLUMN at REAL NOT NULL DEFAULT 0;
CREATE TABLE inbox (id INTEGER PRIMARY KEY, body BLOB NOT NULL);
"""

_Record = TypeVar("_Record", Template, Label, Trajectory, Snapshot)


@dataclass(frozen=True, slots=True)
class StoredTemplate:
    """A template, why it is switched off for good (None: it is not), and its resolved table ("": unknown)."""

    template: Template
    off: str | None = None
    table: str = ""


@dataclass(slots=True)
class Kept:
    """What a store holds."""

    templates: list[StoredTemplate] = field(default_factory=list)
    labels: dict[str, list[Label]] = field(default_factory=dict)  # by template, oldest first
    trajectories: dict[str, list[Trajectory]] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    version: int = 0  # of the last snapshot, readable or not
    notes: dict[str, bytes] = field(default_factory=dict)  # by name, as saved


def open_file(path: Path) -> sqlite3.Connection:
    """Open a store's file for writing, and create it, bring it up to date or set it aside where necessary.

    Raises
    ------
    OSError, sqlite3.Error
        The directory or the file cannot be used.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and (trouble := trouble_with(path)):
        aside = set_aside(path)
        log.error("%s %s; it was renamed to %s, and learning starts anew", path, trouble, aside.name)
    if path.exists():
        path.chmod(0o600)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    # Only the store's thread uses the connection, but the executor may have started it anew.
    database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        _prepare(database)
    except BaseException:
        database.close()
        raise
    return database


def open_memory() -> sqlite3.Connection:
    """Return an empty store that lasts as long as the process."""
    database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    _prepare(database)
    return database


def _prepare(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA busy_timeout = 5000")  # milliseconds; `patterns import` writes as well
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # before the first table
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")  # with WAL: safe against kill -9
    database.execute("PRAGMA secure_delete = ON")
    for number, step in list(enumerate(_STEPS, start=1))[version:]:
        with transaction(database):
            step(database)
            database.execute(f"PRAGMA user_version = {number}")
    if 0 < version < SCHEMA_VERSION:
        log.info("the store was brought from schema version %d to %d", version, SCHEMA_VERSION)
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("VACUUM")  # which puts it into effect


def _run(database: sqlite3.Connection, script: str) -> None:
    for statement in filter(None, map(str.strip, script.split(";"))):
        database.execute(statement)  # executescript would commit


def _create(database: sqlite3.Connection) -> None:
    _run(database, _FIRST)


def _add_times(database: sqlite3.Connection) -> None:
    """Labels get a name and a time of their own, trajectories and templates what retention needs."""
    _run(database, _SECOND)
    for number, body in database.execute("SELECT id, body FROM labels").fetchall():
        for label in decode(body, Label):
            database.execute(
                "UPDATE labels SET uid = ?, at = ? WHERE id = ?", (label_id(label), label.timestamp, number)
            )
    for number, body in database.execute("SELECT id, body FROM trajectories").fetchall():
        for trajectory in decode(body, Trajectory):
            database.execute("UPDATE trajectories SET at = ? WHERE id = ?", (trajectory.timestamp, number))
    database.execute(
        "DELETE FROM labels WHERE uid IS NOT NULL AND id NOT IN (SELECT max(id) FROM labels GROUP BY uid)"
    )
    database.execute("CREATE UNIQUE INDEX labels_uid ON labels (uid)")


_STEPS: Sequence[Callable[[sqlite3.Connection], None]] = (_create, _add_times)
assert len(_STEPS) == SCHEMA_VERSION


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


def trouble_with(path: Path) -> str | None:
    """Say in words what is wrong with a database file; None: nothing."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                return f"has schema version {version}, and this program knows up to {SCHEMA_VERSION}"
            (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if version == 0 and tables:
                return "is a database of something else"
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            return None if verdict == "ok" else f"is damaged ({verdict})"
    except sqlite3.DatabaseError as error:
        return f"cannot be read ({error})"


def load(database: sqlite3.Connection) -> Kept:
    """Return everything that a store holds."""
    kept = Kept()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    relation = "relation" if version > 1 else "''"
    query = f"SELECT body, off, {relation} FROM templates ORDER BY seen"  # noqa: S608
    for body, off, table in database.execute(query):
        kept.templates += [StoredTemplate(template, off, table) for template in decode(body, Template)]
    for (body,) in database.execute("SELECT body FROM labels ORDER BY id"):
        for label in decode(body, Label):
            kept.labels.setdefault(label.template, []).append(label)
    for (body,) in database.execute("SELECT body FROM trajectories ORDER BY id"):
        for trajectory in decode(body, Trajectory):
            kept.trajectories.setdefault(trajectory.template, []).append(trajectory)
    notes = database.execute("SELECT name, value FROM meta WHERE name LIKE 'note:%'")
    kept.notes = {name.removeprefix("note:"): bytes(value) for name, value in notes}
    for version, body in database.execute("SELECT version, body FROM snapshot"):
        kept.version = version
        for snapshot in decode(body, Snapshot):
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
    if trouble := trouble_with(path):
        raise ValueError(f"{path} {trouble}")
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            return load(database) if version else Kept()
    except sqlite3.Error as error:
        raise ValueError(str(error)) from error


def hand_in(directory: Path, document: bytes) -> None:
    """Leave a document of patterns for the learner: it looks every second, or at its next start.

    Raises
    ------
    OSError, sqlite3.Error
        The file cannot be written.
    """
    with contextlib.closing(open_file(directory / FILE)) as database:
        database.execute("INSERT INTO inbox (body) VALUES (?)", (document,))


def decode(body: bytes, kind: type[_Record]) -> Iterator[_Record]:
    """Yield the record, or nothing where another version wrote it in a way that cannot be read."""
    try:
        yield msgspec.msgpack.decode(body, type=kind)
    except msgspec.DecodeError:
        log.warning("a stored %s cannot be read and is skipped", kind.__name__)


@contextlib.contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit at the end, or nothing at all."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield database
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")
