"""The TLS layer without sockets: two ends, and a wire that cuts what passes into any pieces."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from proxy.net.tls import TLSTransport

CA = trustme.CA()


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    CA.configure_trust(client)
    return server, client


SERVER, CLIENT = contexts()


class Raw(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.out = b""
        self.eof = False
        self.closed = False
        self.paused = False
        self.protocol: Any = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        self.out += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True


class Sink(asyncio.Protocol):
    """What came out, in the calls in which it came."""

    def __init__(self, keep_open: bool = True) -> None:
        self.received: list[bytes] = []
        self.eof = 0
        self.lost = 0
        self._keep_open = keep_open

    def data_received(self, data: bytes) -> None:
        assert not self.eof
        self.received.append(data)

    def eof_received(self) -> bool:
        self.eof += 1
        return self._keep_open

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost += 1


class End:
    def __init__(self, context: ssl.SSLContext, *, server_side: bool, keep_open: bool = True) -> None:
        self.raw, self.sink = Raw(), Sink(keep_open)
        self.done: list[Exception | None] = []
        self.tls = TLSTransport(
            self.raw,
            context,
            server_side=server_side,
            server_hostname=None if server_side else "localhost",
            on_done=self.done.append,
        )
        self.tls.set_protocol(self.sink)

    def take(self, other: End, sizes: Iterator[int]) -> None:
        """Receive what `other` has written, in pieces."""
        data, other.raw.out = other.raw.out, b""
        while data:
            size = next(sizes)
            self.tls.data_received(data[:size])
            data = data[size:]


def pair(sizes: Iterator[int], keep_open: bool = True) -> tuple[End, End]:
    """Return a client's and a server's end, with the handshake over."""
    client = End(CLIENT, server_side=False)
    server = End(SERVER, server_side=True, keep_open=keep_open)
    client.tls.start()
    first, client.raw.out = client.raw.out, b""
    server.tls.start(first)
    for _ in range(3):
        client.take(server, sizes)
        server.take(client, sizes)
    assert client.done == server.done == [None]
    return client, server


def always(size: int) -> Iterator[int]:
    while True:
        yield size


PIECES = st.lists(st.integers(1, 20_000), min_size=1, max_size=8)


def cycle(sizes: list[int]) -> Iterator[int]:
    while True:
        yield from sizes


@given(
    PIECES, st.lists(st.binary(max_size=200) | st.integers(1, 200_000).map(lambda n: b"x" * n), max_size=5)
)
def test_any_pieces_give_the_same_bytes(pieces: list[int], messages: list[bytes]) -> None:
    sizes = cycle(pieces)
    client, server = pair(sizes)
    for message in messages:
        client.tls.write(message)
        server.tls.write(message[::-1])
        server.take(client, sizes)
        client.take(server, sizes)
    assert b"".join(server.sink.received) == b"".join(messages)
    assert b"".join(client.sink.received) == b"".join(message[::-1] for message in messages)


def test_what_arrives_at_once_is_delivered_at_once() -> None:
    client, server = pair(always(100_000))
    client.tls.write(b"a" * 300_000)
    server.take(client, always(1 << 20))
    assert server.sink.received == [b"a" * 300_000]


@given(PIECES)
def test_one_direction_can_end_before_the_other(pieces: list[int]) -> None:
    sizes = cycle(pieces)
    client, server = pair(sizes)
    client.tls.write(b"last words")
    client.tls.write_eof()
    client.tls.write(b"nothing any more")
    server.take(client, sizes)
    assert server.sink.received[-1].endswith(b"words")
    assert b"".join(server.sink.received) == b"last words"
    assert server.sink.eof == 1
    assert client.raw.eof
    assert not server.raw.closed
    assert server.tls.eof_received() is True  # the FIN behind it
    assert server.sink.eof == 1
    server.tls.write(b"answer" * 10_000)
    server.tls.close()
    client.take(server, sizes)
    assert b"".join(client.sink.received) == b"answer" * 10_000
    assert client.sink.eof == 1


def test_an_end_of_stream_closes_where_nothing_is_left_to_say() -> None:
    client, server = pair(always(1000), keep_open=False)
    client.tls.close()
    server.take(client, always(1000))
    assert server.sink.eof == 1
    assert server.raw.closed


@pytest.mark.parametrize("position", [6, 20, -1])
def test_a_byte_that_was_changed_ends_the_connection(position: int) -> None:
    client, server = pair(always(1000))
    client.tls.write(b"before")
    server.take(client, always(1000))
    client.tls.write(b"pay me 10")
    broken = bytearray(client.raw.out)
    broken[position] ^= 1
    server.tls.data_received(bytes(broken))
    assert server.sink.received == [b"before"]
    assert server.raw.closed
    server.tls.connection_lost(None)
    assert server.sink.lost == 1


def test_a_handshake_that_is_none() -> None:
    server = End(SERVER, server_side=True)
    server.tls.start(b"GET / HTTP/1.1\r\n\r\n")
    assert isinstance(server.done[0], ssl.SSLError)
    assert server.raw.closed
    server.tls.write(b"nobody could read this")
    assert b"nobody" not in server.raw.out


def test_a_connection_that_is_lost_during_the_handshake() -> None:
    server = End(SERVER, server_side=True)
    server.tls.start(b"\x16\x03\x01")
    server.tls.connection_lost(None)
    assert isinstance(server.done[0], ConnectionResetError)
    assert len(server.done) == 1
