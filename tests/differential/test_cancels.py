"""Cancels at random moments: what the client sees is what it would have seen, up to one error 57014 a cancel.

When a cancel lands is chance, so nothing can be compared byte by byte.  Legal is, for each segment in
autocommit: its own replies, or the beginning of them and then the error; never more errors than cancels; and
nothing at all once the last CancelRequest has been closed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest

from bench.embedded import EmbeddedPostgres
from tests.differential.comparison import WAYS
from tests.differential.conversation import Message, send_cancel
from tests.differential.generator import NEAREST, V
from tests.differential.world import Server, World, world
from tests.integration.raw import SYNC, RawClient, bind, describe, execute, parse, query

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SEARCH = f"SELECT id FROM items ORDER BY embedding <-> {V} LIMIT 3"
SEGMENTS = (
    query(SEARCH),
    query("SELECT pg_sleep(0.004)"),
    query(f"SELECT 1; {SEARCH}; SELECT pg_sleep(0.003)"),
    query(f"SELECT id, pg_sleep(0.001) FROM ({SEARCH}) s"),
    parse(NEAREST) + bind(b"[0.1,0.2,0.3]") + describe() + execute() + SYNC,
    parse("SELECT generate_series(1, 2000)") + bind() + execute() + SYNC,
    parse(NEAREST)
    + bind(b"[0.1,0.2,0.3]")
    + execute()
    + parse("SELECT pg_sleep(0.003)")
    + bind()
    + execute()
    + SYNC,
)
ROUNDS = 25


@pytest.fixture(scope="module")
def there(postgres: EmbeddedPostgres) -> Iterator[World]:
    with world(Server(postgres.host, postgres.port, postgres.user), "cancels") as there:
        yield there


def is_cut_short(replies: list[Message], whole: list[Message]) -> bool:
    """Tell whether these are the first of `whole`, and then the error of a cancelled statement."""
    *first, error, ready = replies
    cancelled = error[0] == "E" and b"\0C57014\0" in error[1]
    return cancelled and ready == ("Z", b"I") and first == whole[: len(first)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", WAYS)
def test_a_cancel_is_one_error_or_nothing(there: World, way: str) -> None:
    chance = random.Random(5)
    errors = 0
    with RawClient(there.address("direct"), there.database, there.server.user) as direct:
        whole = [direct.run(segment) for segment in SEGMENTS]
    for _ in range(ROUNDS):
        picked = [chance.randrange(len(SEGMENTS)) for _ in range(6)]
        delays = [chance.random() * 0.02 for _ in range(3)]
        with RawClient(there.address(way), there.database, there.server.user) as client:
            key = next(body for tag, body in client.greeting if tag == "K")
            canceller = threading.Thread(target=cancel_after, args=(there.address(way), key, delays))
            canceller.start()
            seen = 0
            if chance.random() < 0.5:  # all at once
                client.send(*(SEGMENTS[i] for i in picked))
                answers = [client.until_ready() for _ in picked]
            else:
                answers = [client.run(SEGMENTS[i]) for i in picked]
            for i, replies in zip(picked, answers, strict=True):
                if replies != whole[i]:
                    assert is_cut_short(replies, whole[i]), (SEGMENTS[i], replies)
                    seen += 1
            canceller.join()
            assert seen <= len(delays)
            errors += seen
            for segment, expected in zip(SEGMENTS, whole, strict=True):  # nothing hits a later statement
                assert client.run(segment) == expected
            assert client.silent()
    assert errors > ROUNDS / 5  # else the cancels came too early or too late


def cancel_after(address: tuple[str, int], key: bytes, delays: list[float]) -> None:
    for delay in delays:
        time.sleep(delay)
        send_cancel(address, key)
