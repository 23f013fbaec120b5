"""The faults.  Each is a context: within it the fault lasts, behind it is gone; what it cannot do it skips.

A fault names the process that it takes: nothing here ends a process by its name.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg

from tests.chaos.load import Address
from tests.chaos.world import MAX_CONNECTIONS, World
from tests.integration.raw import RawClient, message, query

Fault = Callable[[World, random.Random], contextlib.AbstractContextManager[None]]


_NETEM = ("qdisc", "add", "dev", "lo", "root", "netem", "delay", "10ms", "loss", "2%")


class SkipError(Exception):
    """This machine cannot do it; the message says why."""


@dataclass(frozen=True)
class Case:
    """A fault, what it is called, and how long it lasts.

    `hits_server`: direct clients feel it too.  `learner`: the learner has to be back afterwards.
    """

    name: str
    fault: Fault
    seconds: float = 2.0
    hits_server: bool = True


# -- the server ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def killed(world: World, dice: random.Random) -> Iterator[None]:
    world.server.kill()
    yield
    world.server.start(60)


@contextlib.contextmanager
def restarted(world: World, dice: random.Random) -> Iterator[None]:
    world.server.stop("fast")
    yield
    world.server.start(60)


@contextlib.contextmanager
def crashed_backend(world: World, dice: random.Random) -> Iterator[None]:
    """One backend is killed: the server ends all sessions and recovers."""
    with psycopg.connect(world.server.dsn()) as connection:
        pid = connection.info.backend_pid
        with contextlib.suppress(psycopg.Error):
            os.kill(pid, signal.SIGKILL)
            connection.execute("SELECT 1")
    yield


@contextlib.contextmanager
def frozen_server(world: World, dice: random.Random) -> Iterator[None]:
    pids = world.backends()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def out_of_connections(world: World, dice: random.Random) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            with contextlib.suppress(psycopg.OperationalError):
                stack.enter_context(contextlib.closing(psycopg.connect(world.server.dsn())))
        yield


@contextlib.contextmanager
def sessions_terminated(world: World, dice: random.Random) -> Iterator[None]:
    with psycopg.connect(world.server.dsn(), autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
    yield


# -- the network between ---------------------------------------------------------------------------------------


def network(**faults: object) -> Fault:
    @contextlib.contextmanager
    def fault(world: World, dice: random.Random) -> Iterator[None]:
        for name, value in faults.items():
            setattr(world.forwarder, name, value)
        yield
        world.forwarder.calm()

    return fault


@contextlib.contextmanager
def all_reset(world: World, dice: random.Random) -> Iterator[None]:
    world.forwarder.reset_all()
    yield


@contextlib.contextmanager
def netem(world: World, dice: random.Random) -> Iterator[None]:
    """Delay and loss in a network namespace of its own, which this kernel may not be able to do."""
    command = f"ip link set lo up && tc {' '.join(_NETEM)}"
    done = subprocess.run(["unshare", "-n", "sh", "-c", command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SkipError(f"no netem here: {done.stderr.strip() or done.returncode}")
    if not world.in_namespace:
        raise SkipError("netem works here: run it as unshare -n sh -c 'ip link set lo up; make chaos'")
    subprocess.run(["tc", *_NETEM], check=True)
    yield
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


# -- the learner and its store -----------------------------------------------------------------------------------


@contextlib.contextmanager
def learner_killed(world: World, dice: random.Random) -> Iterator[None]:
    os.kill(world.pid("learner"), signal.SIGKILL)
    yield


@contextlib.contextmanager
def learner_frozen(world: World, dice: random.Random) -> Iterator[None]:
    pid = world.pid("learner")
    os.kill(pid, signal.SIGSTOP)
    yield
    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def learner_out_of_memory(world: World, dice: random.Random) -> Iterator[None]:
    """It may not have a byte more than it has; a successor has no such limit."""
    pid = world.pid("learner")
    with open(f"/proc/{pid}/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    yield
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def store_corrupt(world: World, dice: random.Random) -> Iterator[None]:
    for file in world.state.glob("*.sqlite*"):
        data = bytearray(file.read_bytes())
        for _ in range(max(1, len(data) // 500)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        file.write_bytes(bytes(data))
    os.kill(world.pid("learner"), signal.SIGKILL)  # a successor has to open it
    yield


@contextlib.contextmanager
def store_gone(world: World, dice: random.Random) -> Iterator[None]:
    for file in world.state.iterdir():
        if file.is_file():
            file.unlink()
    yield


@contextlib.contextmanager
def store_full(world: World, dice: random.Random) -> Iterator[None]:
    if not os.path.ismount(world.state):
        raise SkipError("needs root: a small file system for the state directory")
    ballast = world.state / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


@contextlib.contextmanager
def store_read_only(world: World, dice: random.Random) -> Iterator[None]:
    if not os.path.ismount(world.state):
        raise SkipError("needs root: a file system of its own for the state directory")
    os.kill(world.pid("learner"), signal.SIGKILL)  # an open file would keep the file system writable
    for _ in range(200):
        if _remount(world, "ro"):
            break
        time.sleep(0.02)
    else:
        raise SkipError("the file system could not be made read-only")
    yield
    _remount(world, "rw")


def _remount(world: World, mode: str) -> bool:
    command = ["mount", "-o", f"remount,{mode}", str(world.state)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# -- the proxy itself --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def worker_killed(world: World, dice: random.Random) -> Iterator[None]:
    os.kill(world.pid(f"worker {dice.randint(1, 2)}"), signal.SIGKILL)
    yield


@contextlib.contextmanager
def proxy_frozen(world: World, dice: random.Random) -> Iterator[None]:
    """As if the machine had slept: every clock has gone on."""
    assert world.process is not None
    pids = [world.process.pid, *(world.pid(child) for child in ("worker 1", "worker 2", "learner"))]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def clock_jump(seconds: float) -> Fault:
    @contextlib.contextmanager
    def fault(world: World, dice: random.Random) -> Iterator[None]:
        world.clock.write_text(str(seconds))
        yield
        world.clock.write_text("0")

    return fault


# -- clients -----------------------------------------------------------------------------------------------------


def crowd(behave: Callable[[Address, random.Random], socket.socket | None], count: int) -> Fault:
    """Clients of another kind, on both roads."""

    @contextlib.contextmanager
    def fault(world: World, dice: random.Random) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                with contextlib.suppress(OSError, EOFError):
                    sock = behave(("127.0.0.1", world.port), dice)
                    if sock is not None:
                        stack.enter_context(sock)
            yield

    return fault


def says_nothing(address: Address, dice: random.Random) -> socket.socket:
    return socket.create_connection(address, 20)


def says_half(address: Address, dice: random.Random) -> socket.socket:
    sock = socket.create_connection(address, 20)
    sock.sendall(struct.pack("!IHH", 80, 3, 0)[: dice.randint(1, 8)])
    return sock


def says_garbage(address: Address, dice: random.Random) -> socket.socket:
    sock = socket.create_connection(address, 20)
    sock.sendall(dice.randbytes(dice.randint(1, 5000)))
    return sock


def says_garbage_later(address: Address, dice: random.Random) -> None:
    with RawClient(address, "postgres", "postgres") as client:
        client.send(dice.randbytes(dice.randint(1, 5000)))


def vanishes(address: Address, dice: random.Random) -> None:
    """Reset the connection in the midst of something."""
    client = RawClient(address, "postgres", "postgres")
    client.send(
        dice.choice((query("SELECT pg_sleep(0.2)"), query("BEGIN"), query("COPY copied FROM STDIN"), b"Q\0"))
    )
    if dice.random() < 0.3:
        client.send(message("d", b"1\n"))
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.socket.close()


def reads_nothing(address: Address, dice: random.Random) -> socket.socket:
    """Ask for much and never read it."""
    client = RawClient(address, "postgres", "postgres")
    client.send(query("SELECT repeat('x', 10000) FROM generate_series(1, 5000)"))
    return client.socket


CASES = (
    Case("server killed (SIGKILL), started again", killed),
    Case("server restarted", restarted),
    Case("one backend killed: the server recovers", crashed_backend),
    Case("server frozen (SIGSTOP)", frozen_server, 3.0),
    Case("server out of connections", out_of_connections),
    Case("sessions terminated by an administrator", sessions_terminated, 0.5),
    Case("slow network: 30 ms and up to 20 ms more", network(delay=0.03, jitter=0.02)),
    Case("network silent", network(is_silent=True), 3.0),
    Case("server's address refuses (resets)", network(refuses=True)),
    Case("all connections to the server reset", all_reset, 0.5),
    Case("connections reset in mid-message, at random", network(reset_chance=0.05), 3.0),
    Case("reset in the login: behind AuthenticationOk", network(cut_after=b"R\0\0\0\x08\0\0\0\0")),
    Case("reset behind ParseComplete", network(cut_after=b"1\0\0\0\4")),
    Case("reset behind BindComplete", network(cut_after=b"2\0\0\0\4")),
    Case("reset behind a RowDescription's tag", network(cut_after=b"T\0\0\0")),
    Case("reset in the midst of a row", network(cut_after=b"xxxxxxxx")),
    Case("reset in a transaction: behind BEGIN", network(cut_after=b"C\0\0\0\x0aBEGIN\0")),
    Case("reset before ReadyForQuery", network(cut_after=b"Z\0\0\0\5")),
    Case("delay and loss between network namespaces (netem)", netem),
    Case("learner killed", learner_killed, hits_server=False),
    Case("learner frozen", learner_frozen, 3.0, hits_server=False),
    Case("learner out of memory", learner_out_of_memory, 4.0, hits_server=False),
    Case("store corrupt", store_corrupt, hits_server=False),
    Case("store's files deleted", store_gone, hits_server=False),
    Case("store's disk full", store_full, 4.0, hits_server=False),
    Case("store read-only", store_read_only, 4.0, hits_server=False),
    Case("a worker killed", worker_killed, hits_server=False),
    Case("all of the proxy frozen, then on: the machine slept", proxy_frozen, 3.0, hits_server=False),
    Case("clock jumps a day ahead, and back", clock_jump(86_400.0), hits_server=False),
    Case("clock jumps an hour back, and ahead", clock_jump(-3_600.0), hits_server=False),
    Case("300 connections that say nothing", crowd(says_nothing, 300), hits_server=False),
    Case("200 connections that begin to say something", crowd(says_half, 200), hits_server=False),
    Case("200 connections that say garbage", crowd(says_garbage, 200), hits_server=False),
    Case("30 sessions that turn to garbage", crowd(says_garbage_later, 30), hits_server=False),
    Case("40 clients that vanish in mid-statement", crowd(vanishes, 40), hits_server=False),
    Case("10 clients that never read their result", crowd(reads_nothing, 10), 3.0, hits_server=False),
)
