"""The parent of all processes: holds the listening sockets, keeps the others running, answers HTTP.

It carries no traffic and loads nothing that could crash it.  Because the sockets are its own, a port in use
is found before anything is started, and a worker that crashes loses its connections but not its place: new
clients wait in the socket's queue until it is back.  Every worker has a socket of its own (SO_REUSEPORT),
among which the kernel spreads the connections; a unix socket is one that all share.

    SIGURG   replaces the workers one after the other, without downtime
    SIGQUIT  replaces the whole program, this process included, without downtime (`proxy.succession`)
    SIGHUP   makes the workers read certificates again, and the supervisor the configuration
             (`proxy.configuration.Reloader`), which it passes on to its children

At shutdown the workers drain first and the learner
ends after them, so that it gets their last trajectories; /metrics answers until the end.  A second signal
ends all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from config.conflicts import warnings
from config.schema import Config, host_port
from proxy import logs
from proxy.admin import server
from proxy.admin.asking import NoAnswerError, ask_learner
from proxy.admin.supervision import SupervisorMetrics
from proxy.child import BackOff, Child, child_environment, own_command
from proxy.children import RelayOnly, Reload, Task, Thrown
from proxy.configuration import Reloader
from proxy.net.admission import open_files, too_few_files
from proxy.net.listening import UnixListener
from proxy.net.places import Places
from proxy.reachability import UpstreamCheck, check_learner_dsn, reason
from proxy.relay_only import KillSwitch
from proxy.sockets import StartError, bind, bind_unix, close, closing
from proxy.succession import Elder, Inheritance, hand_over, inheritance, objection, shared_out
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

LEARNER_SOCKET = "learner.sock"
"""Name of the unix socket between workers and learner, in the directory of this run."""

MAX_SOCKET_PATH = 103
"""Bytes; 107 on Linux, 103 elsewhere."""

logger = logging.getLogger(__name__)


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
            closing(sockets),
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
        close(sockets)  # the workers close theirs: new clients are refused from now on
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
