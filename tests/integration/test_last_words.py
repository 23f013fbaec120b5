"""What the server says before it closes reaches the client, also where the proxy finds out by writing."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import uvloop

from proxy.net.farewell import Farewells
from proxy.net.relay import ClientConnection
from proxy.net.upstream import Upstream
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from tests.integration.raw import message, query

pytestmark = pytest.mark.integration

GREETING = message("R", b"\0\0\0\0") + message("Z", b"I")
LAST = message("E", b"SFATAL\0VFATAL\0C57P01\0Mlast words\0\0")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_server_that_closes_with_unread_input(run: Callable[[Any], None]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []

    async def relay() -> None:
        loop = asyncio.get_running_loop()
        upstream = Upstream("127.0.0.1", listener.getsockname()[1], timeout=5.0)
        adapter = Adapter(Counters())
        connections: list[ClientConnection] = []
        farewells = Farewells()

        def accept() -> ClientConnection:
            connections.append(ClientConnection(adapter, upstream, connections.remove, farewells))
            return connections[-1]

        server = await loop.create_server(accept, "127.0.0.1", 0)
        client = socket.create_connection(server.sockets[0].getsockname())
        client.sendall(b"\0\0\0\x10\0\3\0\0user\0u\0\0")
        backend = await loop.run_in_executor(None, lambda: listener.accept()[0])
        await loop.run_in_executor(None, backend.recv, 100)
        backend.sendall(GREETING)
        await asyncio.sleep(0.1)
        client.sendall(query("SELECT 1"))
        await asyncio.sleep(0.1)
        # The loop is kept busy meanwhile, so that it finds the client's next message and the reset together.
        backend.sendall(LAST)
        backend.close()  # with a Query unread: the connection is reset
        time.sleep(0.05)  # noqa: ASYNC251
        (connection,) = connections
        assert connection.upstream is not None
        connection.upstream.transport.write(query("SELECT 2"))
        connection.upstream.transport.write(query("SELECT 3"))
        reader = threading.Thread(target=lambda: seen.append(read_all(client)))
        reader.start()
        await loop.run_in_executor(None, reader.join)
        server.close()

    run(relay())
    listener.close()
    assert seen == [GREETING + LAST]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_client_that_sends_while_its_connection_ends_reads_the_last_words(
    run: Callable[[Any], None],
) -> None:
    """Without a lingering close the client's hop is reset, and what it has not read yet is lost."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        farewells = Farewells()
        last = b"x" * 3_000_000  # more than the kernel holds: most of it is sent while the client sends too

        class Ending(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                stream = cast("asyncio.Transport", transport)  # uvloop's is one only in what it does
                stream.write(last)
                farewells.close_gently(stream)

        server = await loop.create_server(Ending, "127.0.0.1", 0)

        def converse() -> int:
            received = 0
            with socket.create_connection(server.sockets[0].getsockname()) as client:
                client.settimeout(5)
                while part := client.recv(1 << 14):
                    received += len(part)
                    client.sendall(b"y" * 100)
            return received

        assert await loop.run_in_executor(None, converse) == len(last)
        await farewells.over()
        assert len(farewells) == 0
        server.close()

    run(scenario())


@pytest.mark.parametrize(
    ("said", "code"),
    [(b"", b"57P03"), (message("R", b"\0\0\0\0"), b"57P03"), (GREETING, b"08006")],
    ids=["at once", "before it is ready", "afterwards"],
)
@pytest.mark.parametrize("rst", [False, True])
def test_a_server_that_closes_without_a_word(said: bytes, code: bytes, rst: bool) -> None:
    """Where the login was not complete the client hears what a restarting server says."""

    async def scenario() -> None:
        async def vanish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(said)
            await writer.drain()
            if rst and not said:
                writer.transport.abort()
            writer.close()

        upstream = await asyncio.start_server(vanish, "127.0.0.1", 0)
        address = upstream.sockets[0].getsockname()
        connections: list[ClientConnection] = []

        def accept() -> ClientConnection:
            at = Upstream(address[0], address[1], timeout=5.0)
            connections.append(ClientConnection(Adapter(Counters()), at, connections.remove, Farewells()))
            return connections[-1]

        server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"\0\0\0\x10\0\3\0\0user\0u\0\0")
        async with asyncio.timeout(30):
            heard = await reader.read()
        assert heard.startswith(said)
        assert b"C" + code + b"\0" in heard
        writer.close()
        server.close()
        upstream.close()

    asyncio.run(scenario())


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(5)
    data = b""
    with sock:
        while part := sock.recv(4096):
            data += part
    return data
