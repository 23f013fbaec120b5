"""What holds for each table: the configuration file, and over it what clients have set from SQL.

Each layer says something of some keys.  A key that SQL has set keeps its value whatever the file says, until
it is set otherwise; every other key follows the file, also when that is read again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from config.schema import Config, Table

log = logging.getLogger(__name__)

_KIND = "sql"  # of the notes in the store


class Layers:
    """The layers; `config` is what they come to."""

    def __init__(self, config: Config) -> None:
        self.config = self._file = config
        self._set: dict[str, dict[str, Any]] = {}  # by table, from SQL

    def override(self, table: str, changes: Mapping[str, object]) -> tuple[str, bytes]:
        """Set keys of a table from SQL; return the note to keep, its name first.

        Raises
        ------
        ValueError
            A value is out of its range.
        """
        known = {**self._set.get(table, {}), **changes}
        Table.model_validate(known)
        self._set[table] = known
        self._combine()
        return f"{_KIND}:{table}", msgspec.msgpack.encode(known)

    def restore(self, notes: Mapping[str, bytes]) -> None:
        """Take over what was set before, here or at another replica; other notes are passed over."""
        for name, note in notes.items():
            kind, _, table = name.partition(":")
            if kind != _KIND or not note:
                continue
            try:
                known = msgspec.msgpack.decode(note, type=dict[str, Any])
                Table.model_validate(known)
            except ValueError as error:
                log.warning("options of %s set from SQL cannot be read and are gone: %s", table, error)
            else:
                self._set[table] = known
        self._combine()

    def configure(self, config: Config) -> None:
        """Put another file in force."""
        before, self._file = self._file, config
        self._combine()
        for table, known in self._set.items():
            old, new = before.tables.get(table, Table()), config.tables.get(table, Table())
            for key, value in known.items():
                if getattr(old, key) != getattr(new, key) != value:
                    log.warning(
                        'tables."%s".%s has no effect: %s was set from SQL, which wins',
                        table,
                        key,
                        value,
                    )

    def _combine(self) -> None:
        tables = dict(self._file.tables)
        for table, known in self._set.items():
            tables[table] = Table.model_validate({**tables.get(table, Table()).model_dump(), **known})
        self.config = self._file.model_copy(update={"tables": tables})
