"""What the client has set for itself: its own will comes first.

A setting that the client has set is left alone until it resets it.  PostgreSQL does not report changes of
pgvector's settings, so they are taken from the client's statements and start-up options.  Where the end of
a setting cannot be told for certain (a RESET in a transaction that may roll back, a name that is not a
literal) it is taken to last: leaving a query alone is never wrong.
"""

from __future__ import annotations

from typing import Final

from learning.records import Settings
from proxy.sql import Statement

_MAX_NAMES: Final = 1_000
_ANY: Final = "*"
_NAMES: Final = frozenset({"search_path", "role", "session_authorization", _ANY})
"""Settings that change what the names in a query mean."""


class ClientWill:
    """Settings that one client has made its own."""

    __slots__ = ("_local", "_session", "changes_names")

    def __init__(self, parameters: dict[str, str]) -> None:
        """`parameters` are those of the startup message."""
        self._session: set[str] = startup_settings(parameters)
        self._local: set[str] = set()  # until the transaction ends
        self.changes_names = not _NAMES.isdisjoint(self._session)

    def note(self, statement: Statement, *, in_transaction: bool) -> frozenset[str]:
        """Note what a statement sets and resets; return the names that are the client's own no longer.

        `in_transaction`: whether it may still be rolled back; then nothing is taken for reset.
        """
        dropped: frozenset[str] = frozenset()
        if statement.resets and not in_transaction:
            before = self._session
            self._session = set() if _ANY in statement.resets else before - statement.resets
            dropped = frozenset(before - self._session)
            self.changes_names = not _NAMES.isdisjoint(self._session)
        if statement.touches:
            self._local |= statement.touches & statement.local
            self._session |= statement.touches - statement.local
            if len(self._session) > _MAX_NAMES or len(self._local) > _MAX_NAMES:
                self._session = {_ANY}
            if not _NAMES.isdisjoint(statement.touches):
                self.changes_names = True
        return dropped

    def claim_again(self, names: frozenset[str]) -> None:
        """Take back that `names` were reset."""
        self._session |= names
        self.changes_names = self.changes_names or not _NAMES.isdisjoint(names)

    def transaction_ended(self) -> None:
        """Forget what was set for a transaction only."""
        self._local.clear()

    def claims(self, settings: Settings) -> bool:
        """Tell whether any of `settings` is the client's own."""
        if not self._session and not self._local:
            return False
        for own in (self._session, self._local):
            if _ANY in own or any(name in own for name, _ in settings):
                return True
        return False


def startup_settings(parameters: dict[str, str]) -> set[str]:
    """Names that a startup message sets: as parameters, or as ``-c name=value`` in its options."""
    names = {name.lower() for name in parameters} - {"user", "database", "options", "replication"}
    words = parameters.get("options", "").replace("\\ ", "_").split()
    for i, word in enumerate(words):
        if word == "-c":
            text = words[i + 1] if i + 1 < len(words) else ""
        elif word.startswith(("-c", "--")):
            text = word[2:]
        else:
            continue
        name = text.partition("=")[0].strip().lower().replace("-", "_")
        if name:
            names.add(name)
    return names
