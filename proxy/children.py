"""What a child process, a worker or the learner, does around its real work.

The supervisor starts a child with one line of JSON on standard input, a `Task`; it holds the configuration
with its secrets, which therefore appear neither in the process list nor in the environment.  Standard input
then stays open.  Its end means that the supervisor is gone, however it died, and has the same
effect as SIGTERM: the child stops accepting, drains and ends.  Where the kernel can, it also sends SIGTERM
when the parent dies.  Whatever happens, a child that was asked to stop is gone when `Task.patience` seconds
have passed.

What follows on standard input are messages, a line of JSON each: `Reload` to workers, `RelayOnly` and
`Configure` to all.

On standard output a child writes a line, ``ready``, once it is about to serve, and a worker a `Thrown` where
a client has thrown the kill switch (`proxy.relay_only`).
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from config.schema import Config
from proxy import logs
from proxy.relay_only import Follower

READY = b"ready\n"
"""What a child writes to its standard output when it is about to serve."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

logger = logging.getLogger(__name__)


class Task(msgspec.Struct, frozen=True):
    """What a child is to do."""

    name: str  # for the log: "worker 1"
    config: str  # Config.to_json: holds secrets
    sockets: tuple[int, ...] = ()  # inherited file descriptors of listening sockets
    learner_socket: str | None = None  # path of the unix socket on which the learner listens
    patience: float = 10.0  # seconds between a request to stop and the hard end
    places: str | None = None  # of a worker: file of `proxy.net.places`
    number: int = 0  # of this worker, from 0 ...
    workers: int = 1  # ... among so many


class Reload(msgspec.Struct, frozen=True, tag=True):
    """Look at certificates and keys now."""


class RelayOnly(msgspec.Struct, frozen=True, tag=True):
    """The kill switch was thrown (`on`), or thrown back."""

    on: bool


class Configure(msgspec.Struct, frozen=True, tag=True):
    """Another configuration is in force; only options that a running proxy can take differ."""

    config: str  # Config.to_json: holds secrets


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Another worker has taken over: accept no more, serve the clients that are there, at most so long."""

    seconds: float


Message = Reload | RelayOnly | Configure | Retire
"""What the supervisor may say to a child while it runs."""


class Thrown(msgspec.Struct, frozen=True):
    """A client wants the kill switch thrown, or thrown back; said by a worker."""

    on: bool
    by: str


class Orders:
    """What the supervisor has asked for.

    `stop` is set once, `reload` each time, `configs` holds configurations to take, `switch` is the kill
    switch.
    """

    def __init__(self, name: str) -> None:
        self._name = name  # of this process, in the log
        self.stop = asyncio.Event()
        self.switch = Follower(_tell_thrown)
        self.reload = asyncio.Event()
        self.configs: asyncio.Queue[Config] = asyncio.Queue()
        self.retirements: asyncio.Queue[float] = asyncio.Queue()  # seconds
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what came on standard input."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                message = msgspec.json.decode(line, type=Message)
                match message:
                    case Configure():
                        config = Config.from_json(message.config)
                        logs.set_up(config.log, self._name)
                        self.configs.put_nowait(config)
                    case RelayOnly():
                        self.switch.put(message.on)
                    case Reload():
                        self.reload.set()
                    case Retire():
                        self.retirements.put_nowait(message.seconds)
            except ValueError:  # msgspec's and pydantic's
                logger.exception("the supervisor said what this version does not understand")


def worker() -> int:
    """Run a worker process; return its exit code."""

    async def run(task: Task, config: Config, orders: Orders) -> None:
        from proxy.admin.metrics import WorkerMetrics
        from proxy.net.places import Places
        from proxy.net.worker import run as serve

        sockets = [socket.socket(fileno=fd) for fd in task.sockets]
        learner_socket = Path(task.learner_socket) if task.learner_socket else None
        metrics = WorkerMetrics()
        _announce()
        await serve(
            config,
            sockets=sockets,
            learner_socket=learner_socket,
            metrics=metrics,
            stop=orders.stop,
            reload=orders.reload,
            switch=orders.switch,
            retirements=orders.retirements,
            places=Places.shared(Path(task.places), task.number, task.workers) if task.places else None,
            configs=orders.configs,
        )

    return _main(run, uvloop.run)


def learner() -> int:
    """Run the learner process; return its exit code."""

    async def run(task: Task, config: Config, orders: Orders) -> None:
        from learning.worker import run as learn

        assert task.learner_socket is not None
        _announce()
        await learn(
            config,
            Path(task.learner_socket),
            orders.stop,
            paused=lambda: orders.switch.on,
            configs=orders.configs,
        )

    return _main(run, asyncio.run)


def _main(
    run: Callable[[Task, Config, Orders], Awaitable[None]],
    runner: Callable[[Coroutine[Any, Any, None]], None],
) -> int:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the supervisor's business
    _end_with_parent()
    with open(0, "rb", buffering=0, closefd=False) as raw:  # a buffer would swallow what follows
        line = raw.readline()
    if not line:
        print("this command is for the supervisor; use: ruvector-proxy serve", file=sys.stderr)
        return 2
    task = msgspec.json.decode(line, type=Task)
    config = Config.from_json(task.config)
    logs.set_up(config.log, task.name)
    try:
        runner(_until_stopped(task, config, run))
    except Exception:
        logger.exception("%s failed", task.name)
        return 1
    return 0


async def _until_stopped(
    task: Task, config: Config, run: Callable[[Task, Config, Orders], Awaitable[None]]
) -> None:
    """Run the work until it ends; ask it to stop on SIGTERM and when the supervisor is gone."""
    loop = asyncio.get_running_loop()
    orders = Orders(task.name)
    stop = orders.stop

    def ask_to_stop() -> None:
        if not stop.is_set():
            stop.set()
            _end_hard_after(task.patience)

    def read_stdin() -> None:
        data = os.read(0, 4096)
        if data:
            orders.feed(data)
        else:
            loop.remove_reader(0)
            ask_to_stop()

    loop.add_signal_handler(signal.SIGTERM, ask_to_stop)
    loop.add_reader(0, read_stdin)
    await run(task, config, orders)
    if not stop.is_set():
        raise RuntimeError("ended without having been asked to")


def _end_hard_after(seconds: float) -> None:
    """End the process even if the event loop hangs."""

    def end() -> None:
        logger.error("not finished %g s after the request to stop; ending", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when the supervisor dies, where it can (Linux); elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _announce() -> None:
    os.write(1, READY)


def _tell_thrown(on: bool, by: str) -> None:
    """Tell the supervisor that a client has thrown the kill switch."""
    os.write(1, msgspec.json.encode(Thrown(on, by)) + b"\n")
