"""The supervisor, with tiny children that answer every client with their process id."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from config.schema import Admin, Config, Learner, Limits, Listen, Upstream, Workers
from proxy.child import BackOff, child_environment
from proxy.sockets import StartError, bind
from proxy.supervisor import Command, Supervisor

pytestmark = pytest.mark.slow  # processes are started

CHILD = """
import json, os, signal, socket, sys, threading
task = json.loads(sys.stdin.buffer.readline())
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def serve(listening):
    while True:
        client, _ = listening.accept()
        client.sendall(str(os.getpid()).encode())
        client.close()
for fd in task["sockets"]:
    threading.Thread(target=serve, args=[socket.socket(fileno=fd)], daemon=True).start()
os.write(1, b"ready\\n")
while os.read(0, 100) or "stubborn" in sys.argv:
    pass
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def a_config(upstream: int = 1, workers: int = 1, learner: bool = False, drain: float = 5.0) -> Config:
    dsn = SecretStr("postgresql://me:hunter2@127.0.0.1:1/db") if learner else None
    return Config(
        listen=Listen(port=free_port()),
        admin=Admin(port=free_port()),
        upstream=Upstream(port=upstream),
        workers=Workers(count=workers),
        learner=Learner(dsn=dsn),
        limits=Limits(drain_timeout=drain),
    )


@pytest.fixture
def command(tmp_path: Path) -> Command:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return lambda kind: [sys.executable, "-IS", str(script), kind]


@contextlib.asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(supervisor.run())
    try:
        yield task
    finally:
        supervisor.stop()
        async with asyncio.timeout(20):
            await task


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


async def pid_of_worker(config: Config) -> int:
    """Connect as a client does until a worker answers; it tells its process id.

    A worker that is being killed may still accept, and then says nothing.
    """
    async with asyncio.timeout(10):
        while True:
            try:
                reader, writer = await asyncio.open_connection(config.listen.host, config.listen.port)
                answer = await reader.read()
                writer.close()
                await writer.wait_closed()
            except ConnectionError:
                answer = b""
            if answer:
                return int(answer)
            await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def get(config: Config, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{config.admin.port}{path}"
        async with session.get(url) as response:
            return response.status, await response.text()


def test_the_back_off_doubles_to_its_limit_and_begins_anew_after_a_long_life() -> None:
    back_off = BackOff()
    assert [round(back_off.after(1.0), 1) for _ in range(9)] == [
        0.1,
        0.2,
        0.4,
        0.8,
        1.6,
        3.2,
        6.4,
        10.0,
        10.0,
    ]
    assert back_off.after(30.0) == 0.1
    assert back_off.after(29.9) == 0.2


def test_every_worker_gets_a_socket_of_its_own_on_the_same_port() -> None:
    sets = bind("127.0.0.1", 0, 3)
    sockets = [each for listening in sets for each in listening]
    try:
        assert len(sets) == len(sockets) == 3
        assert len({each.getsockname() for each in sockets}) == 1
        assert len({each.fileno() for each in sockets}) == 3
    finally:
        for each in sockets:
            each.close()


def test_everywhere_includes_ipv4() -> None:
    ((listening,),) = bind("::", 0, 1)
    with listening, socket.create_connection(("127.0.0.1", listening.getsockname()[1])):
        pass


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_in_use_is_a_clear_error_even_if_its_user_would_share_it(reuse: bool) -> None:
    with socket.socket() as other:
        if reuse:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=rf"127\.0\.0\.1:{port}: Address already in use \(listen\.host"):
            bind("127.0.0.1", port, 2)


def test_an_unknown_host_is_a_clear_error() -> None:
    with pytest.raises(StartError, match=r"cannot listen on no\.such\.host\.invalid:0: .+ \(listen\.host"):
        bind("no.such.host.invalid", 0, 1)


def test_an_address_of_another_machine_is_a_clear_error() -> None:
    with pytest.raises(StartError, match=r"192\.0\.2\.1:0: Cannot assign requested address \(listen\.host"):
        bind("192.0.2.1", 0, 1)


def test_an_address_that_is_not_here_does_not_matter_if_another_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_addresses(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, 0, 0, "", (host, 0)) for host in ("192.0.2.1", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", two_addresses)
    ((listening,),) = bind("name", 0, 1)
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_an_admin_port_in_use_is_a_clear_error_and_frees_the_other_port(command: Command) -> None:
    config = a_config()
    with socket.socket() as other:
        other.bind(("127.0.0.1", config.admin.port))
        other.listen()
        with pytest.raises(
            StartError, match=rf"HTTP on 127\.0\.0\.1:{config.admin.port}: Address already in use"
        ):
            asyncio.run(Supervisor(config, command).run())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", config.listen.port))


def test_a_temporary_directory_with_a_long_name_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()
    with pytest.raises(StartError, match="too long; set TMPDIR to a shorter one"):
        asyncio.run(Supervisor(a_config()).run())


def test_a_killed_worker_is_replaced_and_waiting_clients_get_its_successor(
    command: Command,
) -> None:
    async def scenario() -> None:
        config = a_config()
        async with running(Supervisor(config, command)):
            first = await pid_of_worker(config)
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: not is_alive(first))
            second = await pid_of_worker(config)  # connects at once, while nobody accepts
            assert second != first
            _, metrics = await get(config, "/metrics")
        assert 'ruvector_child_exits_total{process="worker"} 1.0' in metrics
        await eventually(lambda: not is_alive(second))

    asyncio.run(scenario())


def test_a_killed_learner_is_replaced_and_the_worker_does_not_notice(
    command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def learners() -> list[int]:
        return [int(pid) for pid in re.findall(r"learner is up \(pid (\d+)\)", caplog.text)]

    async def scenario() -> None:
        config = a_config(learner=True)
        async with running(Supervisor(config, command)):
            worker = await pid_of_worker(config)
            await eventually(lambda: len(learners()) == 1)
            os.kill(learners()[0], signal.SIGKILL)
            await eventually(lambda: len(learners()) == 2)
            assert await pid_of_worker(config) == worker
            await eventually(lambda: "the learner cannot connect to" in caplog.text)

    asyncio.run(scenario())
    assert "learner was killed by SIGKILL; starting it again in 0.1 s" in caplog.text
    assert "postgresql://me:***@127.0.0.1:1/db: Connection refused; queries run as they came" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_child_that_cannot_be_started_is_tried_again_and_said(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        supervisor = Supervisor(a_config(), lambda kind: ["/no/such/program"])
        async with running(supervisor):
            await eventually(lambda: caplog.text.count("worker 1 cannot be started: No such file") >= 2)
            assert "no worker is up" in await supervisor.problems()

    asyncio.run(scenario())


def test_a_second_request_to_stop_ends_children_that_do_not_listen(tmp_path: Path, command: Command) -> None:
    async def scenario() -> None:
        config = a_config(drain=60.0)
        supervisor = Supervisor(config, lambda kind: [*command(kind), "stubborn"])
        async with running(supervisor) as task:
            worker = await pid_of_worker(config)
            supervisor.stop()
            await asyncio.sleep(0.2)
            assert is_alive(worker)
            assert (await get(config, "/metrics"))[0] == 200  # also while draining
            assert "the proxy is stopping" in (await get(config, "/readyz"))[1]
            supervisor.stop()
            async with asyncio.timeout(5):
                await task
            assert not is_alive(worker)

    asyncio.run(scenario())


def test_readiness_follows_the_workers_and_the_upstream(command: Command) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(b"N")
        writer.close()
        await writer.wait_closed()

    async def ready(config: Config) -> tuple[int, str]:
        await asyncio.sleep(1.1)  # an answer of the upstream holds for a second
        return await get(config, "/readyz")

    async def scenario() -> None:
        upstream = free_port()
        config = a_config(upstream=upstream)
        async with running(Supervisor(config, command)):
            await pid_of_worker(config)
            status, text = await ready(config)
            assert (status, "Connection refused" in text, "no worker" in text) == (503, True, False)
            database = await asyncio.start_server(hang_up, "127.0.0.1", upstream)
            assert await ready(config) == (200, '{"ready": true, "reasons": []}')
            assert await get(config, "/healthz") == (200, "ok\n")
            database.close()
            await database.wait_closed()
            assert (await ready(config))[0] == 503

    asyncio.run(scenario())


def test_the_start_line_says_what_is_served_to_whom(
    command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(config: Config) -> None:
        async with running(Supervisor(config, command)):
            await pid_of_worker(config)
            (build,) = [
                family
                for family in text_string_to_metric_families((await get(config, "/metrics"))[1])
                if family.name == "ruvector_build_info"
            ]
            assert build.samples[0].value == 1.0

    caplog.set_level("INFO")
    config = a_config(workers=2, learner=True)
    asyncio.run(scenario(config))
    assert (
        f"listens on 127.0.0.1:{config.listen.port} for 127.0.0.1:1; workers: 2; "
        f"learner: on (postgresql://me:***@127.0.0.1:1/db); dashboard: http://127.0.0.1:{config.admin.port}/"
    ) in caplog.text
    assert "upstream 127.0.0.1:1 is unreachable: Connection refused" in caplog.text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_however_the_supervisor_ends_no_process_is_left(
    number: signal.Signals, code: int, tmp_path: Path, command: Command
) -> None:
    config = a_config(workers=2, learner=True)
    script = tmp_path / "supervisor.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, logging
        from config.schema import Config
        from proxy.supervisor import Supervisor
        logging.basicConfig(level="INFO")
        command = {command("x")[:-1]!r}
        asyncio.run(Supervisor(Config.from_json({config.to_json()!r}), lambda kind: [*command, kind]).run())
        """)
    )
    with (
        tempfile.TemporaryDirectory(prefix="rv-") as short,  # what a SIGKILL leaves there goes with it
        subprocess.Popen(
            [sys.executable, "-P", script],
            env={**child_environment(tmp_path), "TMPDIR": short},
            stderr=subprocess.PIPE,
            text=True,
        ) as supervisor,
    ):
        assert supervisor.stderr is not None
        children: list[int] = []
        for line in supervisor.stderr:
            children += [int(pid) for pid in re.findall(r"is up \(pid (\d+)\)", line)]
            if len(children) == 3:
                break
        assert all(map(is_alive, children))
        supervisor.send_signal(number)
        supervisor.stderr.read()  # until nobody holds it
        assert supervisor.wait(10) == code
    deadline = time.monotonic() + 30
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
