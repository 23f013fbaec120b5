"""One child process, as its parent sees it: started, heard, started again, ended.

The other side, what a child does itself, is `proxy.children`.

::

    start -> "ready" -> ends unasked -> back-off (0.1 s, doubling to 10 s) -> start ...
                     -> stop: SIGTERM, grace, SIGKILL -> gone

A child that lived for 30 s begins its back-off anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import site
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import proxy
from proxy.children import READY, Configure, Message, Retire, Task
from proxy.reachability import reason
from proxy.succession import Record

logger = logging.getLogger(__name__)


class BackOff:
    """Delays between starts: `first` seconds, doubling to `last`; anew after a life of `reset` seconds."""

    def __init__(self, first: float = 0.1, last: float = 10.0, reset: float = 30.0) -> None:
        self._first, self._last, self._reset = first, last, reset
        self._next = first

    def after(self, lifetime: float) -> float:
        """Return how long to wait after a life of `lifetime` seconds, both in seconds."""
        if lifetime >= self._reset:
            self._next = self._first
        delay, self._next = self._next, min(2 * self._next, self._last)
        return delay


def own_command(kind: str) -> list[str]:
    """Return the command line with which this program starts itself as a child."""
    # -P: a folder named "proxy" or "config" in the working directory must not be taken for ours.
    return [sys.executable, "-P", "-m", "proxy.main", f"_{kind}"]


def child_environment(metrics_directory: Path) -> dict[str, str]:
    """Return the environment of the children: they import what this process did, and share its metrics."""
    root = str(Path(proxy.__file__).parent.parent)
    environment = dict(os.environ, PROMETHEUS_MULTIPROC_DIR=str(metrics_directory))
    # The matrices are small: threads of the linear algebra library would only take cores from the server.
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        environment.setdefault(name, "1")
    if root not in site.getsitepackages():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return environment


class Child:
    """One process that is kept running.  `on_exit` is called with the pid of each process that is gone."""

    def __init__(
        self, task: Task, command: list[str], environment: dict[str, str], on_exit: Callable[[int], None]
    ) -> None:
        self.name = task.name
        self.ready = False
        self.lasting: dict[type, Message] = {}  # what it is told again whenever it starts
        self.heard: Callable[[bytes], None] = lambda line: None  # called with what it says
        self._task, self._command, self._environment, self._on_exit = task, command, environment, on_exit
        self._stopping = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._running: asyncio.Task[None] | None = None

    def start(self, back_off: BackOff) -> None:
        """Start the process, and again whenever it ends, until `stop` is called."""
        self._running = asyncio.create_task(self._keep_running(back_off))

    async def stop(self) -> None:
        """Ask the process to end, kill it when its patience is over, and return when it is gone."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        if self._running:
            done, _ = await asyncio.wait({self._running}, timeout=self._task.patience + 1.0)
            if not done:
                logger.error("%s does not end; killing it", self.name)
                self._signal(signal.SIGKILL)
            await self._running

    def send(self, message: Message, *, lasting: bool = False) -> None:
        """Tell the process something, and, if it is `lasting`, its successors when they start."""
        if lasting:
            self.lasting[type(message)] = message
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            process.stdin.write(msgspec.json.encode(message) + b"\n")

    def configure(self, config: str) -> None:
        """Give the process another configuration (`Config.to_json`), and those that take its place."""
        self._task = msgspec.structs.replace(self._task, config=config)
        self.send(Configure(config))

    @property
    def number(self) -> int:
        """Number of its table, as a worker (`proxy.net.places`)."""
        return self._task.number

    @property
    def over(self) -> bool:
        """Whether it has ended and is not started again."""
        return self._running is not None and self._running.done()

    async def wait_ready(self, seconds: float) -> bool:
        """Wait until it is ready; tell whether it was so in time."""
        deadline = time.monotonic() + seconds
        while not self.ready and not self.over and time.monotonic() < deadline:  # noqa: ASYNC110  it may end
            await asyncio.sleep(0.02)
        return self.ready

    def retire(self, seconds: float) -> None:
        """Have it accept no more and serve the clients that it has, at most so long; nothing follows it."""
        self._stopping.set()
        self.send(Retire(seconds))

    def record(self) -> Record | None:
        """Return what a successor of this program needs to know of a running process."""
        process: Any = self._process
        if process is None or process.returncode is not None:
            return None
        stdin, stdout = (process._transport.get_pipe_transport(fd).get_extra_info("pipe") for fd in (0, 1))
        task = self._task
        return Record(task.name, process.pid, task.number, stdin.fileno(), stdout.fileno(), task.patience)

    def kill(self) -> None:
        """End the process at once; it is not started again."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep_running(self, back_off: BackOff) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            outcome = await self._live()
            if self._stopping.is_set():
                return
            delay = back_off.after(time.monotonic() - started)
            logger.error("%s %s; starting it again in %.1f s", self.name, outcome, delay)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stopping.wait()

    async def _live(self) -> str:
        """Run the process once; return in words how it ended."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=self._task.sockets,
                env=self._environment,
                process_group=0,  # Ctrl-C in a terminal reaches the supervisor alone
            )
        except OSError as error:
            return f"cannot be started: {reason(error)}"
        self._process = process
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)
        try:
            return await self._attend(process)
        finally:
            self.ready = False
            self._process = None
            self._on_exit(process.pid)

    async def _attend(self, process: asyncio.subprocess.Process) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):  # it ended at once: the exit code will tell
            lines = [self._task, *self.lasting.values()]
            process.stdin.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
            await process.stdin.drain()
        while said := await process.stdout.readline():
            if said == READY:
                self.ready = True
                logger.info("%s is up (pid %d)", self.name, process.pid)
            else:
                self.heard(said)
        code = await process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
