"""The parent of all processes: holds the listening sockets, keeps the others running, answers HTTP.

It carries no traffic and loads nothing that could crash it.  Because the sockets are its own, a port in use
is found before anything is started, and a worker that crashes loses its connections but not its place: new
clients wait in the socket's queue until it is back.  Every worker has a socket of its own (SO_REUSEPORT),
among which the kernel spreads the connections; a unix socket is one that all share.

    SIGURG   replaces the workers one after the other, without downtime
    SIGQUIT  replaces the whole program, this process included, without downtime (`proxy.succession`)
    SIGHUP   makes the workers read certificates again, and the supervisor the configuration
             (`proxy.configuration.Reloader`), which it passes on to its children

Life of a child::

    start -> "ready" -> ends unasked -> back-off (0.1 s, doubling to 10 s) -> start ...
                     -> stop: SIGTERM, grace, SIGKILL -> gone

A child that lived for 30 s begins its back-off anew.  At shutdown the workers drain first and the learner
ends after them, so that it gets their last trajectories; /metrics answers until the end.  A second signal
ends all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import signal
import site
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

import proxy
from config.conflicts import warnings
from config.schema import Config, Listen, host_port
from proxy import logs
from proxy.admin import server
from proxy.admin.asking import NoAnswerError, ask_learner
from proxy.admin.supervision import SupervisorMetrics
from proxy.children import READY, Configure, Message, RelayOnly, Reload, Retire, Task, Thrown
from proxy.configuration import Reloader
from proxy.net.admission import open_files, too_few_files
from proxy.net.listening import UnixListener
from proxy.net.places import Places
from proxy.reachability import UpstreamCheck, check_learner_dsn, reason
from proxy.relay_only import KillSwitch
from proxy.succession import Elder, Inheritance, Record, hand_over, inheritance, objection, shared_out
from proxy.version import version

Command = Callable[[str], list[str]]
"""Returns the command line of a child: "worker" or "learner"."""

GRACE = 5.0
"""Seconds beyond the drain timeout before a child is killed."""

LEARNER_PATIENCE = 10.0
"""Seconds that the learner gets for ending."""

CHECK_TIMEOUT = 2.0
"""Seconds in which the upstream has to answer a readiness check, unless limits.connect_timeout is shorter."""

START_SECONDS = 60.0
"""Seconds in which a worker that is to replace another has to be ready."""

TABLES = 8
"""Tables of `proxy.net.places` for each worker: so many may serve, the replaced ones included."""

BACKLOG = 4096

LEARNER_SOCKET = "learner.sock"
"""Name of the unix socket between workers and learner, in the directory of this run."""

MAX_SOCKET_PATH = 103
"""Bytes; 107 on Linux, 103 elsewhere."""

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine does not have the address

logger = logging.getLogger(__name__)


class StartError(Exception):
    """The proxy cannot start; the message says why, and what to do."""


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


def bind(host: str, port: int, count: int) -> list[list[socket.socket]]:
    """Return `count` sets of listening sockets, in each one socket for each address of `host`.

    Port 0 takes any free one, the same for all.

    Raises
    ------
    StartError
        The name is unknown, or an address is taken.
    """
    sets: list[list[socket.socket]] = [[] for _ in range(count)]
    missing: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                # SO_REUSEPORT would let a second proxy in unnoticed, so try without it first.
                with _bound(family, address, port, shared=False) as probe:
                    port = probe.getsockname()[1]
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error  # as "localhost" with IPv6 switched off; its other address will do
                continue
            for sockets in sets:
                sockets.append(_bound(family, address, port, shared=True))
                sockets[-1].listen(BACKLOG)
        if missing and not sets[0]:
            raise missing
    except OSError as error:
        _close(sets)
        where = host_port(host, port)
        raise StartError(f"cannot listen on {where}: {reason(error)} (listen.host, listen.port)") from error
    return sets


@contextlib.contextmanager
def bind_unix(listen: Listen, port: int) -> Iterator[UnixListener | None]:
    """Listen on the unix socket of the configuration, if there is one; it is gone afterwards.

    All workers share this one socket: a path has one owner only.

    Raises
    ------
    StartError
        It is in use, or cannot be made.
    """
    if listen.unix_socket is None:
        yield None
        return
    path = listen.unix_socket / f".s.PGSQL.{port}"
    try:
        listener = UnixListener(path, int(listen.unix_socket_mode, 8), BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        raise StartError(f"cannot listen on {path}: {why} (listen.unix_socket)") from error
    try:
        yield listener
    finally:
        listener.close()


def _bound(family: int, address: tuple[object, ...], port: int, *, shared: bool) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            both = address[0] == "::"  # "everywhere" includes IPv4
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
        bound.bind((address[0], port, *address[2:]))
    except OSError:
        bound.close()
        raise
    return bound


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


class Supervisor:
    """The processes of one proxy.

    Parameters
    ----------
    config
        What holds at the start.
    path, read
        Its file, and what reads it again; without a file it is read on SIGHUP only.
    command
        Gives the command line of a child, for tests.
    """

    def __init__(
        self,
        config: Config,
        command: Command = own_command,
        *,
        path: Path | None = None,
        read: Callable[[], Config] | None = None,
    ) -> None:
        self._config = config
        self._command = command
        self._reloader = Reloader(config, path, read or (lambda: config), self._configure)
        self._background: set[asyncio.Task[None]] = set()
        self._changing_learner = asyncio.Lock()
        self._stop = asyncio.Event()
        self._workers: list[Child] = []
        self._retired: list[Child | Elder] = []  # they serve the clients that they have
        self._sockets: list[list[socket.socket]] = []
        self._local: UnixListener | None = None
        self._tables = 0
        self._renewing = asyncio.Lock()
        self._learner: Child | None = None
        self._directory = Path()  # of this run
        self._upstream = UpstreamCheck(config.upstream, min(CHECK_TIMEOUT, config.limits.connect_timeout))
        self._switch = KillSwitch(
            config.store.path, configured=config.learning.relay_only, told=self._tell_switched
        )
        self._registry = CollectorRegistry()
        self._metrics = SupervisorMetrics(
            self._registry,
            workers_up=lambda: sum(worker.ready for worker in self._workers),
            upstream_up=lambda: self._upstream.answered,
            learner=lambda: self._learning,
            config_in_force=lambda: not self._reloader.refused,
            relay_only=lambda: self._switch.on,
        )

    @property
    def _learning(self) -> bool:
        """Whether there is to be a learner."""
        return self._config.learner.dsn is not None and self._config.learning.enabled

    async def run(self) -> None:
        """Serve until a signal or `stop` comes; return when every process has ended.

        Raises
        ------
        StartError
            An address cannot be listened on, or the temporary directory not be used; nothing has been
            started.
        """
        listen = self._config.listen
        allow_many_files()
        shortage = too_few_files(self._config.limits, open_files())
        if shortage:
            logger.warning("%s", shortage)
        left = inheritance()
        sockets = left.listening() if left else bind(listen.host, listen.port, self._config.workers.resolved)
        port = sockets[0][0].getsockname()[1]
        with (
            left.run_directory() if left else tempfile.TemporaryDirectory(prefix="ruvector-proxy-") as name,
            _closing(sockets),
            left.unix(listen.unix_socket, port) if left else bind_unix(listen, port) as local,
        ):
            self._sockets, self._local = sockets, local
            self._directory = directory = Path(name)
            if len(os.fsencode(directory / LEARNER_SOCKET)) > MAX_SOCKET_PATH:
                raise StartError(
                    f"the path of a unix socket in {name} is too long; set TMPDIR to a shorter one"
                )
            (directory / "metrics").mkdir(exist_ok=True)
            MultiProcessCollector(self._registry, str(directory / "metrics"))  # type: ignore[no-untyped-call]
            admin = await self._start_admin()
            self._handle_signals()
            self._start_children(left)
            self._log_start(sockets[0], local, admin)
            checks = [asyncio.create_task(check) for check in (*self._checks(), self._reloader.watch())]
            await self._stop.wait()
            for check in (*checks, *self._background):
                check.cancel()
            await self._end(sockets, local)
            await admin.close()
        logger.info("stopped")

    def stop(self) -> None:
        """Begin to stop; called again, end at once."""
        if self._stop.is_set():
            for child in self._children():
                child.kill()
        self._stop.set()

    def _tell_switched(self, on: bool) -> None:
        for child in self._children():
            child.send(RelayOnly(on), lasting=True)

    def _heard(self, line: bytes) -> None:
        """A worker has said something: a client has thrown the kill switch."""
        try:
            thrown = msgspec.json.decode(line, type=Thrown)
        except msgspec.MsgspecError:
            logger.error("a worker said what this version does not understand")
            return
        self._switch.throw(thrown.on, thrown.by)
        self._tell_switched(self._switch.on)  # the worker may have to be told that it is held

    def reload(self) -> None:
        """Read the configuration, certificates and keys now."""
        logger.info("reading the configuration and certificates again")
        for worker in self._workers:
            worker.send(Reload())
        self._in_background(self._reloader.reload(asked=True))

    def _configure(self, config: Config) -> None:
        """Put another configuration in force; the learner begins or ends with `learning.enabled`."""
        self._config = config
        logs.set_up(config.log, "supervisor")
        for child in self._children():
            child.configure(config.to_json())
        self._switch.configure(config.learning.relay_only)
        self._in_background(self._start_or_stop_learner())

    async def _start_or_stop_learner(self) -> None:
        async with self._changing_learner:
            if self._learning and self._learner is None:
                self._start_learner()
            elif not self._learning and self._learner is not None:
                await self._learner.stop()
                self._learner = None

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def problems(self) -> list[str]:
        """Return the reasons for which clients cannot be served; none: ready."""
        if self._stop.is_set():
            return ["the proxy is stopping"]
        found = [] if any(worker.ready for worker in self._workers) else ["no worker is up"]
        upstream = await self._upstream.problem()
        return [*found, upstream] if upstream else found

    async def ask(self, question: bytes) -> bytes:
        """Carry a question to the learner; raises NoAnswerError."""
        if self._learner is None:
            raise NoAnswerError("there is no learner: see learner.dsn and learning.enabled")
        return await ask_learner(self._directory / LEARNER_SOCKET, question)

    def _children(self) -> list[Child | Elder]:
        self._retired = [worker for worker in self._retired if not worker.over]
        return [*self._workers, *self._retired, *([self._learner] if self._learner else [])]

    async def _start_admin(self) -> server.AdminServer:
        options = self._config.admin
        try:
            return await server.start(
                options,
                self._registry,
                self.problems,
                self.ask,
                self._switch,
                lambda: self._reloader.refused,
            )
        except OSError as error:
            where = host_port(options.host, options.port)
            raise StartError(
                f"cannot answer HTTP on {where}: {reason(error)} (admin.host, admin.port)"
            ) from error

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        loop.add_signal_handler(signal.SIGURG, self.renew)
        loop.add_signal_handler(signal.SIGQUIT, self.restart)
        loop.add_signal_handler(signal.SIGUSR1, self._switch.throw, True, "SIGUSR1")
        loop.add_signal_handler(signal.SIGUSR2, self._switch.throw, False, "SIGUSR2")

    def _start_children(self, left: Inheritance | None) -> None:
        if self._learning:
            self._start_learner()
        count = self._config.workers.resolved
        self._tables = left.tables if left else TABLES * count
        places = self._directory / "places"
        if left is None:
            Places.prepare(places, self._tables)
        for record in left.workers if left else ():
            self._retired.append(Elder(record, self._heard, self._on_exit("worker", record.number)))
        self._workers = [self._start_worker(place, count) for place in range(count)]
        if left is not None:
            self._in_background(self._take_over(list(self._retired)))

    def _start_worker(self, place: int, count: int) -> Child:
        """Start one of `count` workers.

        Raises
        ------
        LookupError
            There is no table left for it: too many that were replaced still serve clients.
        """
        taken = {child.number for child in self._children() if child is not self._learner}
        number = next((each for each in range(self._tables) if each not in taken), None)
        if number is None:
            raise LookupError(f"{len(self._retired)} workers that were replaced still serve clients")
        shared = [self._local.socket] if self._local else []
        sockets = [*shared_out(self._sockets, count)[place], *shared]
        task = Task(
            f"worker {place + 1}",
            self._config.to_json(),
            tuple(each.fileno() for each in sockets),
            self._learner_socket,
            self._config.limits.drain_timeout + GRACE,
            places=str(self._directory / "places"),
            number=number,
            workers=self._tables,
        )
        worker = self._start("worker", task)
        self._workers = [*self._workers, worker]
        return worker

    def _start_learner(self) -> None:
        task = Task("learner", self._config.to_json(), (), self._learner_socket, LEARNER_PATIENCE)
        self._learner = self._start("learner", task)

    @property
    def _learner_socket(self) -> str | None:
        """Where workers reach the learner; None where there never is one."""
        return str(self._directory / LEARNER_SOCKET) if self._config.learner.dsn is not None else None

    def _start(self, kind: str, task: Task) -> Child:
        environment = child_environment(self._directory / "metrics")
        child = Child(task, self._command(kind), environment, self._on_exit(kind, task.number))
        child.lasting[RelayOnly] = RelayOnly(self._switch.on)
        child.heard = self._heard
        child.start(BackOff())
        return child

    def _on_exit(self, kind: str, number: int) -> Callable[[int], None]:
        """Return what is to be called with the process id of a child that is gone."""

        def tidy(pid: int) -> None:
            if kind == "worker":
                Places.shared(self._directory / "places", number, self._tables)  # clears its table
            self._metrics.exits.labels(kind).inc()
            mark_process_dead(pid, str(self._directory / "metrics"))  # type: ignore[no-untyped-call]

        return tidy

    # -- restarts without downtime -------------------------------------------------------------------------

    def renew(self) -> None:
        """Replace the workers, one after the other; nobody loses a connection."""
        self._in_background(self._renew())

    def restart(self) -> None:
        """Replace the whole program, this process included; nobody loses a connection."""
        self._in_background(self._restart())

    async def _renew(self) -> None:
        async with self._renewing:
            for place in range(len(self._workers)):
                if not await self._replace(place):
                    return
            logger.info("every worker has been replaced")

    async def _replace(self, place: int) -> bool:
        """Replace one worker; tell whether there is a new one."""
        workers = list(self._workers)
        old = workers[place]
        try:
            fresh = self._start_worker(place, len(workers))
        except LookupError as error:
            logger.error("%s is not replaced: %s", old.name, error)
            return False
        if not await fresh.wait_ready(START_SECONDS):
            logger.error("%s is not replaced: the new one did not get ready in %g s", old.name, START_SECONDS)
            self._workers = workers
            await fresh.stop()
            return False
        workers[place] = fresh
        self._workers = workers
        self._retired.append(old)
        old.retire(self._config.limits.handover_timeout)
        return True

    async def _restart(self) -> None:
        async with self._renewing, self._changing_learner:
            logger.info("making way for a new start of the whole program")
            problem = await objection()
            if problem is not None:
                logger.error("no restart, everything goes on as it is: %s", problem)
                return
            if self._learner is not None:
                await self._learner.stop()
                self._learner = None
            records = [
                worker.record if isinstance(worker, Elder) else worker.record()
                for worker in (*self._workers, *self._retired)
                if not worker.over
            ]
            numbers = [[each.fileno() for each in sockets] for sockets in self._sockets]
            local = self._local.descriptors() if self._local else None
            running = [record for record in records if record is not None]
            try:
                hand_over(Inheritance(str(self._directory), self._tables, numbers, local, running))
            except OSError as error:
                logger.error("no restart, everything goes on as it is: %s", reason(error))
                if self._learning:
                    self._start_learner()

    async def _take_over(self, elders: list[Child | Elder]) -> None:
        """Retire the workers of before the restart once ours are ready."""
        for worker in self._workers:
            if not await worker.wait_ready(START_SECONDS):
                logger.error("%s did not get ready; those of before the restart go on accepting", worker.name)
                return
        for elder in elders:
            elder.retire(self._config.limits.handover_timeout)
        logger.info(
            "the restart is complete; %d workers of before serve the clients that they have", len(elders)
        )

    def _log_start(
        self, sockets: list[socket.socket], local: UnixListener | None, admin: server.AdminServer
    ) -> None:
        config = self._config
        places = [host_port(*each.getsockname()[:2]) for each in sockets]
        addresses = " and ".join([*places, str(local.path)] if local else places)
        if self._learner:
            learner = f"on ({config.learner.redacted_dsn})"
        else:
            learner = "off (learning.enabled = false)" if config.learner.dsn else "off (no learner.dsn)"
        logger.info(
            "ruvector-proxy %s listens on %s for %s; workers: %d; learner: %s; dashboard: http://%s/",
            *(
                version(),
                addresses,
                config.upstream.address,
                len(self._workers),
                learner,
                host_port(*admin.address),
            ),
        )

        for warning in warnings(config):
            logger.warning("%s", warning)

    def _checks(self) -> list[Coroutine[None, None, None]]:
        """Return what is to be said about the servers once the proxy runs."""
        learner = self._config.learner
        checks = [self._upstream.watch_start()]
        if self._learner:
            checks.append(check_learner_dsn(learner, self._config.limits.connect_timeout))
        return checks

    async def _end(self, sockets: list[list[socket.socket]], local: UnixListener | None) -> None:
        """Let the workers drain, then end the learner, which so gets their last trajectories."""
        logger.info("stopping; open transactions have %g s to end", self._config.limits.drain_timeout)
        _close(sockets)  # the workers close theirs: new clients are refused from now on
        if local:
            local.close()
        await asyncio.gather(*(worker.stop() for worker in (*self._workers, *self._retired)))
        if self._learner:
            await self._learner.stop()


def allow_many_files() -> None:
    """Raise the limit of open files as far as allowed; children inherit it.  A client takes two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems report more than they grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _close(sets: list[list[socket.socket]]) -> None:
    for sockets in sets:
        for each in sockets:
            each.close()


@contextlib.contextmanager
def _closing(sets: list[list[socket.socket]]) -> Iterator[None]:
    try:
        yield
    finally:
        _close(sets)
