"""What is kept, for programs beside the learner: read from the store that the configuration names.

The learner writes within a second, and neither kind of store hinders readers; so the answer is the same
whether a proxy runs or not.
"""

from __future__ import annotations

import asyncio

from config.schema import Config
from learning.outbox import HandedIn, encode
from learning.pieces import NewerFormatError, Pieces
from learning.shared import SharedStore
from learning.shared_schema import SchemaError
from learning.sqlite_file import Kept, hand_in, read
from learning.upstream import UnavailableError

_PATIENCE = 60.0  # seconds


def place(config: Config) -> str:
    """Say where that is, without a password."""
    store = config.store
    if store.kind == "postgres":
        return f"{store.redacted_dsn} (store.dsn, schema {store.db_schema}, group {store.group})"
    return f"{store.path} (store.path)"


def read_store(config: Config) -> Kept:
    """Return what is kept.

    Raises
    ------
    FileNotFoundError
        There is no store.
    ValueError
        It is damaged, or of another version.
    OSError
        It cannot be read or reached.
    """
    if config.store.kind == "sqlite":
        return read(config.store.path)
    return asyncio.run(_with_shared(config, None))


def leave_document(config: Config, document: bytes) -> None:
    """Leave a document of patterns for the learner, or for the replica that leads.

    Raises
    ------
    OSError, ValueError, sqlite3.Error
        The store cannot be written.
    """
    if config.store.kind == "sqlite":
        hand_in(config.store.path, document)
    else:
        asyncio.run(_with_shared(config, document))


async def _with_shared(config: Config, document: bytes | None) -> Kept:
    options = config.store
    if options.dsn is None:
        raise ValueError("store.dsn is missing")
    shared = SharedStore(options.dsn.get_secret_value(), schema=options.db_schema, group=options.group)
    try:
        async with asyncio.timeout(_PATIENCE):
            await shared.connect()
            if document is not None:
                await shared.post([encode(HandedIn(document))])
                return Kept()
            kept = await shared.load()
            kept.snapshot = await shared.fetch(Pieces())
            return kept
    except UnavailableError as error:
        raise OSError(str(error)) from error
    except (SchemaError, NewerFormatError) as error:
        raise ValueError(str(error)) from error
    finally:
        await shared.close()
