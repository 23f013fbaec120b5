"""The log of slow vector queries: what each was, what it got, and why; never a value of it.

A query's own path only appends to a list; the lines are written once a second.  Of more than `MOST` in a
second the rest are only counted.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any, Final

from config.schema import Log
from proxy.session.adaptation import Adapter, BoundQuery, Outcome

log = logging.getLogger(__name__)

MOST: Final = 100
_EVERY_SECONDS: Final = 1.0


class SlowQueries:
    """Hears of slow queries from the adapter of a worker."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._noted: list[tuple[BoundQuery, Outcome]] = []
        self._left_out = 0
        adapter.slow = self._note

    def configure(self, options: Log) -> None:
        """Take another duration."""
        self._adapter.slow_from = math.inf if options.slow_query is None else options.slow_query

    def _note(self, bound: BoundQuery, outcome: Outcome) -> None:
        if len(self._noted) < MOST:
            self._noted.append((bound, outcome))
        else:
            self._left_out += 1

    async def watch(self) -> None:
        """Write what was noted until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            self.write()

    def write(self) -> None:
        """Write what was noted."""
        noted, self._noted = self._noted, []
        left_out, self._left_out = self._left_out, 0
        for bound, outcome in noted:
            fields = described(bound, outcome)
            log.warning("slow query: %s", _words(fields), extra={"fields": {"slow_query": fields}})
        if left_out:
            log.warning("%d more slow queries within a second", left_out)


def described(bound: BoundQuery, outcome: Outcome) -> dict[str, Any]:
    """Return what is said of a query; times in milliseconds."""
    template = bound.query.template
    filters = [f"{slot.column} {slot.operator}" for slot in template.slots if slot.role == "filter"]
    return {
        "ms": round(1e3 * outcome.latency, 3),
        "first_byte_ms": round(1e3 * outcome.first_byte, 3),
        "proxy_ms": round(1e3 * bound.overhead, 3),
        "rows": outcome.rows if outcome.rows >= 0 else None,
        "error": outcome.error,
        "table": bound.table,
        "database": template.database,
        "user": template.user,
        "k": bound.k,
        "offset": bound.offset,
        "filters": filters,
        "got": bound.arm.name,
        "settings": dict(bound.settings),
        "trust": bound.choice.trust.value,
        "why": bound.choice.reason,
        "policy": bound.policy_version,
        "statement": template.sql,
    }


def _words(fields: dict[str, Any]) -> str:
    ended = f"failed with {fields['error']}" if fields["error"] else f"{fields['rows']} rows"
    by = f" by {', '.join(fields['filters'])}" if fields["filters"] else ""
    return (
        f"{fields['ms']} ms (first byte {fields['first_byte_ms']} ms, the proxy {fields['proxy_ms']} ms), "
        f"{ended}, k={fields['k']}{by} on {fields['table']}; got {fields['got']} because: {fields['why']} "
        f"(trust {fields['trust']}, policy {fields['policy']}): {fields['statement']}"
    )
