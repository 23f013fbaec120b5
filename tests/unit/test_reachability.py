"""Whether the server answers is told truly: a port that merely accepts is no server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from config.schema import Upstream
from proxy.reachability import SSL_REQUEST, UpstreamCheck

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert await reader.readexactly(8) == SSL_REQUEST
    writer.write(b"N")
    await reader.read()
    writer.close()


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(8)
    writer.close()


async def ask(handler: Handler, path: Path) -> str | None:
    """Return what the check finds at a server that does what `handler` does."""
    server = await asyncio.start_unix_server(handler, path)
    async with server:
        check = UpstreamCheck(Upstream(host=str(path.parent), port=5432), timeout=0.2)
        problem = await check.problem()
        await asyncio.sleep(0.02)  # the handlers end
        return problem


@pytest.mark.parametrize(
    ("handler", "reason"),
    [(answer, None), (hang, "no answer in time"), (hang_up, "it closed the connection without an answer")],
)
def test_only_a_server_that_answers_is_reachable(
    handler: Handler, reason: str | None, tmp_path: Path
) -> None:
    path = tmp_path / ".s.PGSQL.5432"
    expected = reason and f"upstream {path} is unreachable: {reason}"
    assert asyncio.run(ask(handler, path)) == expected


def test_a_missing_socket_is_said_by_name(tmp_path: Path) -> None:
    check = UpstreamCheck(Upstream(host=str(tmp_path)), timeout=0.2)
    problem = asyncio.run(check.problem())
    assert problem == f"upstream {tmp_path}/.s.PGSQL.5432 is unreachable: No such file or directory"


def test_an_unknown_host_is_said_in_words() -> None:
    problem = asyncio.run(UpstreamCheck(Upstream(host="no.such.host.invalid"), timeout=5.0).problem())
    assert problem is not None
    assert problem.startswith("upstream no.such.host.invalid:5432 is unreachable: ")
    assert "Errno" not in problem


def test_a_name_with_several_addresses_gives_one_reason() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # without listening: nobody else gets the port
        port = unused.getsockname()[1]
        problem = asyncio.run(UpstreamCheck(Upstream(host="localhost", port=port), timeout=5.0).problem())
    assert problem == f"upstream localhost:{port} is unreachable: Connection refused"


def test_changes_are_logged_once_each_and_answers_are_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await answer(reader, writer)

    async def scenario() -> None:
        upstream = Upstream(host=str(tmp_path))
        check = UpstreamCheck(upstream, timeout=1.0, max_age=0.0)
        for _ in range(3):
            await check.problem()
        waiting = asyncio.create_task(check.watch_start(interval=0.01))
        async with await asyncio.start_unix_server(count, upstream.socket_path):
            async with asyncio.timeout(5):
                await waiting
            remembering = UpstreamCheck(upstream, timeout=1.0, max_age=60.0)
            before = asked
            assert await asyncio.gather(*(remembering.problem() for _ in range(5))) == [None] * 5
            await asyncio.sleep(0.02)
            assert asked == before + 1

    asyncio.run(scenario())
    messages = [record.getMessage() for record in caplog.records]
    assert [("unreachable" in each, "again" in each) for each in messages] == [(True, False), (False, True)]
