"""Whatever a client sends, in whatever portions, it sees what it would have seen; settings touch only their query.

Random pipelines of both protocols run against a model of the server, once directly and once through a session that
adapts every vector query.  Portions are cut at random on both sides, and replies are delivered late at random.
"""

from __future__ import annotations

import random
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from learning.records import Settings
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.session.frontend import Session
from tests.integration.proxied import Dictated
from tests.integration.raw import SYNC, bind, describe, execute, parse, query
from tests.property.model_server import DEFAULT_EF, PID, ModelServer, message

VECTOR = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 3"
LITERAL = "SELECT id FROM items ORDER BY embedding <-> '[1,2]' LIMIT 3"
OTHER = "SELECT hnsw"


def greeting(pid: int) -> bytes:
    return message("R", b"\0\0\0\0") + message("K", struct.pack("!II", pid, 0)) + message("Z", b"I")


DIRECT = greeting(int(PID))
POOLED = greeting(1)
"""A pooler introduces itself with a process id that is not the server's."""


def run_extended(sql: str, *values: bytes) -> bytes:
    return parse(sql) + bind(*values) + execute()


PIECES = st.sampled_from(
    [
        run_extended(VECTOR, b"[1,2]"),
        parse(VECTOR) + bind(b"[1,2]") + describe() + execute(),
        parse(VECTOR) + describe("S"),
        run_extended(VECTOR, b"[1,2]"),
        run_extended(OTHER),
        run_extended("SELECT fail"),
        run_extended("BEGIN"),
        run_extended("COMMIT"),
        run_extended("ROLLBACK"),
        bind(b"[1,2]", name="none") + execute(),
    ]
)
SEGMENT = st.one_of(
    st.lists(PIECES, max_size=4).map(lambda pieces: b"".join(pieces) + SYNC),
    st.sampled_from(
        [
            query(LITERAL),
            query(OTHER),
            query("BEGIN"),
            query("COMMIT"),
            query("ROLLBACK"),
            query("SELECT fail"),
            query(f"{OTHER}; {LITERAL}"),
            query(f"{LITERAL}; {OTHER}"),
            query(f"BEGIN; {LITERAL}"),
            query("SELECT fail; SELECT 1"),
            query(""),
        ]
    ),
)


def make_session(arm: Settings, hello: bytes = DIRECT) -> Session:
    adapter = Adapter(Counters())
    adapter.swap(Dictated(arm), 1)
    session = Session(adapter, {"user": "u", "database": "d"})
    assert session.from_server(hello) == hello
    return session


def converse(session: Session, segments: list[bytes], chance: random.Random) -> tuple[bytes, ModelServer]:
    """Send the segments, waiting for replies now and then; return what the client saw."""
    server = ModelServer()
    seen = b""
    to_server: list[bytes] = []
    to_client: list[bytes] = []

    def deliver(everything: bool) -> bytes:
        out = b""
        while to_server or to_client:
            if to_server:
                to_client.extend(portions(server.receive(to_server.pop(0)), chance))
            while to_client:
                out += session.from_server(to_client.pop(0))
                if session.resend:
                    to_server.append(session.resend)
                    session.resend = b""
            if not everything and chance.random() < 0.3:
                break
        return out

    for segment in segments:
        for portion in portions(segment, chance):
            out = session.from_client(portion)
            if out:
                to_server.append(out)
            if chance.random() < 0.2:
                seen += deliver(everything=False)
        if chance.random() < 0.5:
            seen += deliver(everything=True)
    return seen + deliver(everything=True), server


def portions(data: bytes, chance: random.Random) -> list[bytes]:
    """Cut at random: mostly whole, sometimes into crumbs."""
    if not data:
        return []
    way = chance.random()
    if way < 0.5:
        return [data]
    size = 1 if way < 0.6 else chance.randrange(1, len(data) + 1)
    return [data[i : i + size] for i in range(0, len(data), size)]


@settings(max_examples=400, deadline=None)
@given(
    segments=st.lists(SEGMENT, max_size=8),
    seed=st.integers(0, 1 << 30),
    hello=st.sampled_from([DIRECT, POOLED]),
    accepted=st.booleans(),
)
def test_the_client_sees_what_it_would_have_seen(
    segments: list[bytes], seed: int, hello: bytes, accepted: bool
) -> None:
    direct = ModelServer()
    expected = b"".join(direct.receive(segment) for segment in segments)
    session = make_session((("hnsw.ef_search", "77"),), hello)
    if accepted:
        session.adapter.accepted.add((("hnsw.ef_search", "77"),))
    seen, server = converse(session, segments, random.Random(seed))
    assert seen == expected
    assert [sql for sql, _ in server.log] == [sql for sql, _ in direct.log]
    for sql, ef in server.log:
        assert ef == DEFAULT_EF or "<->" in sql or sql in ("COMMIT", "ROLLBACK")


@settings(max_examples=50, deadline=None)
@given(pause=st.booleans(), seed=st.integers(0, 1 << 30))
def test_settings_are_in_force_where_they_can_be(pause: bool, seed: int) -> None:
    """Queries that can be adapted safely are adapted: not a property of luck."""
    session = make_session((("hnsw.ef_search", "77"),))
    chance = random.Random(seed)
    chance.random = lambda: 0.4 if pause else 0.9  # type: ignore[method-assign]
    segments = [
        run_extended(VECTOR, b"[1,2]") + SYNC,
        query(LITERAL),
        run_extended(VECTOR, b"[1]") * 2 + SYNC,
    ]
    _, server = converse(session, segments, chance)
    assert [ef for _, ef in server.log] == ["77"] * 4


def test_garbage_never_does_worse_than_a_protocol_violation() -> None:
    from proxy.wire.errors import ProtocolViolation

    chance = random.Random(7)
    for _ in range(3000):
        session = make_session((("hnsw.ef_search", "77"),))
        data = bytes(
            chance.choice(b"QPBESDCXHFdcfp\0\0\0\0\0\5\x10azZT123n") for _ in range(chance.randrange(60))
        )
        try:
            session.from_client(data)
            session.from_server(data)
        except ProtocolViolation:
            continue
