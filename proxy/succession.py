"""The supervisor makes way for its own successor without losing a client: a restart of the whole.

Theory
------
The process replaces itself (exec): it keeps its process id, so that systemd, a container or a shell sees no
end, and it keeps what must not close: the listening sockets, the lock of the unix socket, the pipes of the
workers.  What these are, an `Inheritance`, travels in the environment.  The new program starts workers of its
own on the same sockets, and only when they are ready does it *retire* the old ones (`proxy.net.worker`):
those accept no more and serve their clients until they leave.  At no moment is there nobody who accepts.

    check -> learner ends -> exec -> new workers and learner -> ready -> the old workers retire -> gone

Rules
-----
* Before anything is given up the new program has to accept the configuration (``check-config``).  If it
  does not, the old one goes on.
* The learner ends first: two of them must not write to one store.
* Addresses are those of the inherited sockets; a change of `listen` needs an ordinary restart.
* The directory of the run stays, and with it the workers' totals in /metrics and the learner's socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from proxy.children import Configure, Message, Retire
from proxy.net.listening import UnixListener

ENVIRONMENT: Final = "_RUVECTOR_PROXY_INHERITANCE"
CHECK_SECONDS: Final = 60.0

_POLL_SECONDS: Final = 0.2
_NOT_NOW: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG, signal.SIGQUIT)

logger = logging.getLogger(__name__)


class Record(msgspec.Struct, frozen=True):
    """A worker that goes on, and our ends of its pipes."""

    name: str
    pid: int
    number: int  # of its table (`proxy.net.places`)
    stdin: int
    stdout: int
    patience: float  # seconds between a request to stop and the hard end


class Inheritance(msgspec.Struct, frozen=True):
    """What one supervisor leaves to the next; sockets and pipes are file descriptors."""

    directory: str
    tables: int
    sockets: list[list[int]]
    local: tuple[int, int] | None  # unix socket, its lock
    workers: list[Record]

    def listening(self) -> list[list[socket.socket]]:
        """Return the sockets."""
        return [[_own(fd) for fd in each] for each in self.sockets]

    @contextlib.contextmanager
    def run_directory(self) -> Iterator[str]:
        """Yield the directory of the run, which is removed at the end as a temporary one is."""
        try:
            yield self.directory
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def unix(self, directory: Path | None, port: int) -> Iterator[UnixListener | None]:
        """Yield the unix socket, if there is one; it is gone afterwards."""
        if self.local is None or directory is None:
            yield None
            return
        listener = UnixListener.adopt(directory / f".s.PGSQL.{port}", _own(self.local[0]), self.local[1])
        try:
            yield listener
        finally:
            listener.close()


def _own(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    return socket.socket(fileno=fd)


def inheritance() -> Inheritance | None:
    """Return what the predecessor has left; None: this is an ordinary start."""
    left = os.environ.pop(ENVIRONMENT, None)
    return None if left is None else msgspec.json.decode(left, type=Inheritance)


async def objection() -> str | None:
    """Start the program anew as far as reading its configuration; return why it would not run."""
    if "serve" not in sys.orig_argv:
        return "it was not started with the command serve"
    command = [sys.executable, *("check-config" if word == "serve" else word for word in sys.orig_argv[1:])]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return f"the check of its configuration took more than {CHECK_SECONDS:g} s"
    return None if process.returncode == 0 else said.decode(errors="replace").strip()


def hand_over(left: Inheritance) -> None:
    """Become the new program; does not return.

    Raises
    ------
    OSError
        It cannot be started; nothing has changed.
    """
    pipes = [fd for record in left.workers for fd in (record.stdin, record.stdout)]
    kept = [*(fd for each in left.sockets for fd in each), *(left.local or ()), *pipes]
    before = {number: signal.getsignal(number) for number in _NOT_NOW}
    for number in _NOT_NOW:  # until it listens for them they would end it
        signal.signal(number, signal.SIG_IGN)
    for fd in kept:
        os.set_inheritable(fd, True)
    environment = {**os.environ, ENVIRONMENT: msgspec.json.encode(left).decode()}
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606
    except OSError:
        for fd in kept:
            os.set_inheritable(fd, False)
        for number, handler in before.items():
            signal.signal(number, handler)
        raise


class Elder:
    """A worker that an earlier supervisor has started; has what the supervisor needs of a child.

    `heard` is called with the lines that it says, `on_exit` with its process id when it is gone.
    """

    ready = False  # it is no longer counted on

    def __init__(
        self, record: Record, heard: Callable[[bytes], None], on_exit: Callable[[int], None]
    ) -> None:
        self.name = record.name
        self.number = record.number
        self.record = record
        self._heard, self._on_exit = heard, on_exit
        self._rest = b""
        for fd in (record.stdin, record.stdout):
            os.set_inheritable(fd, False)
        os.set_blocking(record.stdout, False)
        asyncio.get_running_loop().add_reader(record.stdout, self._read)
        self._watching = asyncio.create_task(self._watch())

    @property
    def over(self) -> bool:
        """Whether its process is gone."""
        return self._watching.done()

    def send(self, message: Message, *, lasting: bool = False) -> None:
        """Tell the process something; `lasting` or not, nothing takes its place."""
        if not self.over:
            with contextlib.suppress(OSError):
                os.write(self.record.stdin, msgspec.json.encode(message) + b"\n")

    def configure(self, config: str) -> None:
        """Give the process another configuration."""
        self.send(Configure(config))

    def retire(self, seconds: float) -> None:
        """Have it accept no more and serve the clients that it has, at most so long."""
        self.send(Retire(seconds))

    async def stop(self) -> None:
        """Ask the process to end, kill it when its patience is over, and return when it is gone."""
        self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self._watching}, timeout=self.record.patience + 1.0)
        if not done:
            self.kill()
        await self._watching

    def kill(self) -> None:
        """End the process at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if not self.over:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.record.pid, number)

    def _read(self) -> None:
        try:
            data = os.read(self.record.stdout, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self.record.stdout)
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._heard(line + b"\n")

    async def _watch(self) -> None:
        while not _is_gone(self.record.pid):  # noqa: ASYNC110  another process
            await asyncio.sleep(_POLL_SECONDS)
        asyncio.get_running_loop().remove_reader(self.record.stdout)
        for fd in (self.record.stdin, self.record.stdout):
            os.close(fd)
        logger.info("%s of before the restart is gone (pid %d)", self.name, self.record.pid)
        self._on_exit(self.record.pid)


def _is_gone(pid: int) -> bool:
    """Tell whether a child has ended, and take its exit status."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def shared_out(sets: Sequence[list[socket.socket]], workers: int) -> list[list[socket.socket]]:
    """Return the sockets of each of `workers`: all sets are served, and no worker is without one."""
    out = [[sock for each in sets[place::workers] for sock in each] for place in range(workers)]
    return [own or list(sets[place % len(sets)]) for place, own in enumerate(out)]
