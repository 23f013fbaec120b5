"""The shared store's connection: whatever is cut short, what is written afterwards is in the database."""

from __future__ import annotations

import asyncio
import contextlib

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from learning.pieces import Pieces
from learning.records import Snapshot
from learning.shared import SharedStore

pytestmark = pytest.mark.integration

_TURNS = 60  # of the event loop; a pulse is over after fewer


async def _cancelled_after(turns: int, store: SharedStore, term: int) -> bool:
    """Cancel a pulse after so many turns of the event loop; tell whether it was over before."""
    pulse = asyncio.create_task(store.pulse(term, 60.0))
    for _ in range(turns):
        await asyncio.sleep(0.0002)
    over = pulse.done()
    pulse.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pulse
    return over


def test_what_is_published_after_a_pulse_was_cancelled_anywhere_is_committed(
    postgres: EmbeddedPostgres, store: str
) -> None:
    def published() -> int:
        with psycopg.connect(store, autocommit=True) as connection:
            row = connection.execute("SELECT version FROM ruvector_proxy.groups").fetchone()
        assert row is not None
        return int(row[0])

    async def scenario() -> int:
        shared = SharedStore(store)
        await shared.connect()
        term = await shared.acquire(60.0)
        assert term is not None
        cut = 0
        for turns in range(_TURNS):
            if not await _cancelled_after(turns, shared, term):
                cut += 1
            await shared.connect()
            await shared.publish(term, Snapshot(turns + 1, 0.0, {}), Pieces())
            assert await asyncio.to_thread(published) == turns + 1
        await shared.close()
        return cut

    assert asyncio.run(scenario()) > 1
