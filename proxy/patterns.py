"""``ruvector-proxy patterns``: learned patterns out of a store, into one, and several documents into one.

Export reads what the learner keeps, whether a proxy runs or not; import hands a document in, and the learner
takes it within a second, or at its next start.  `learning.exchange` says what a document is.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from config.schema import Config
from learning.drift import World
from learning.exchange import Document, Evidence, ExchangeError, decode, encode, export, merge, moved
from learning.sqlite_file import Kept
from learning.stored import leave_document, place, read_store

STANDARD = Path("-")
"""As a file: standard input or output."""


class PatternsError(Exception):
    """It cannot be done; the message says why and what to do."""


def export_patterns(config: Config, *, tables: Collection[str], anonymize: bool) -> Document:
    """Return what is kept about some tables, or about all where none is named.

    Raises
    ------
    PatternsError
        Nothing is kept, or nothing about a table that was named.
    """
    kept = _kept(config)
    known = [_evidence(kept, stored.template.key) for stored in kept.templates]
    missing = sorted(set(tables) - {each.table for each in known})
    if missing:
        names = ", ".join(sorted({each.table for each in known if each.table})) or "none"
        raise PatternsError(f"nothing is known about {', '.join(missing)}; known tables: {names}")
    return export(known, tables=tables or None, anonymize=anonymize)


def _evidence(kept: Kept, key: str) -> Evidence:
    stored = next(stored for stored in kept.templates if stored.template.key == key)
    policy = kept.snapshot.templates.get(key) if kept.snapshot is not None else None
    note = kept.notes.get(f"world:{key}")
    rows = msgspec.msgpack.decode(note, type=World).rows if note else 0.0
    table = stored.table or (policy.table if policy is not None else "")
    return Evidence(stored.template, table, kept.labels.get(key, []), rows)


def _kept(config: Config) -> Kept:
    try:
        return read_store(config)
    except FileNotFoundError:
        raise PatternsError(
            f"nothing is kept in {place(config)}: has a proxy with a learner run with this configuration?"
        ) from None
    except (OSError, ValueError) as error:
        raise PatternsError(f"what is kept in {place(config)} cannot be read: {error}") from error


def import_patterns(config: Config, document: Document, *, database: str | None, user: str | None) -> None:
    """Hand a document in.

    Raises
    ------
    PatternsError
        The store cannot be written.
    """
    if database is not None or user is not None:
        document = moved(document, database=database, user=user)
    try:
        leave_document(config, encode(document))
    except (OSError, ValueError, sqlite3.Error) as error:
        raise PatternsError(f"cannot write to {place(config)}: {error}") from error


def read_documents(files: Sequence[Path]) -> Document:
    """Return what is in all files together.

    Raises
    ------
    PatternsError
        One of them cannot be read, or is no document.
    """
    found = []
    for file in files:
        try:
            found.append(decode(sys.stdin.buffer.read() if file == STANDARD else file.read_bytes()))
        except OSError as error:
            raise PatternsError(f"cannot read {file}: {error.strerror}") from error
        except ExchangeError as error:
            raise PatternsError(f"{file}: {error}") from error
    return merge(found)


def write_document(document: Document, file: Path) -> None:
    """Write a document, readable for its owner alone: it may hold query vectors and filter values.

    Raises
    ------
    PatternsError
        The file cannot be written.
    """
    data = encode(document) + b"\n"
    try:
        if file == STANDARD:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        beside = file.with_name(f".{file.name}.{os.getpid()}")
        with open(os.open(beside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as output:
            output.write(data)
        beside.replace(file)
    except OSError as error:
        raise PatternsError(f"cannot write {file}: {error.strerror}") from error
