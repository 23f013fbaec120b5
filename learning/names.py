"""What names mean on a side connection: the learner's own SQL and the application's are kept apart.

A function, operator, type or table is found by the search_path.  Whoever may create objects in a schema of
that path can make a name mean something else, and it would run with the learner's rights (CVE-2018-1058).
An application's query, on the other hand, has to mean here what it means to the application.

Rules
-----
- A side connection's search_path is `OWN_PATH`, which only the server's superusers can add to (temporary
  objects are this session's own, and functions and operators are never looked up among them).
- A query of the application's runs in a transaction with its own search_path (`learning.probe.snapshot`),
  which ends with it.  There, SQL of the learner's runs within `own`, or names the schema of everything.
- asyncpg asks the server about types by itself, in the midst of preparing a statement, with names that bear
  no schema: `NamesConnection` has that within `own` as well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

OWN_PATH = "pg_catalog, pg_temp"

# Plain statements without parameters: asyncpg allows no others while it prepares one.
_OWN = f"SAVEPOINT ruvector_names; SET LOCAL search_path = {OWN_PATH}"
_BACK = "ROLLBACK TO SAVEPOINT ruvector_names; RELEASE SAVEPOINT ruvector_names"


class NamesConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection that knows whose search_path is in force."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.is_applications = False
        """Whether the application's search_path is in force, until the end of this transaction."""

    @asynccontextmanager
    async def own(self) -> AsyncIterator[None]:
        """Let names mean what the server's own catalogs say, for a moment; for reading: nothing stays."""
        if not self.is_applications:
            yield
            return
        await self.execute(_OWN)
        self.is_applications = False
        try:
            yield
        except Exception:
            if not self.is_closed():
                await self._back()
            raise
        await self._back()

    async def _back(self) -> None:
        await self.execute(_BACK)
        self.is_applications = True

    async def _introspect_types(self, typeoids: Any, timeout: Any) -> Any:
        async with self.own():
            return await super()._introspect_types(typeoids, timeout)

    async def _introspect_type(self, typename: Any, schema: Any) -> Any:
        async with self.own():
            return await super()._introspect_type(typename, schema)
