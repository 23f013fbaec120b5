"""One worker: accepts clients on sockets that the supervisor has bound, and relays them.

Drain, at shutdown: accepting stops, idle sessions are ended at once with 57P01, busy ones as soon as they
are idle, and what is left after `limits.drain_timeout` is cut off.

Retirement, when another worker has taken over: accepting stops, and the clients that are there are served
until they leave by themselves.  Nobody is asked to go before the time for it is over; then it is a drain.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from config.schema import Config
from proxy.auth.lookup import lasting_secret
from proxy.interface.options import Interface
from proxy.net import certificates
from proxy.net.admission import Gate
from proxy.net.authentication import Authenticator
from proxy.net.client_tls import ClientTLS
from proxy.net.farewell import Farewells
from proxy.net.learner_link import Links
from proxy.net.places import Places
from proxy.net.relay import ClientConnection
from proxy.net.slow_queries import SlowQueries
from proxy.net.upstream import Upstream
from proxy.relay_only import Follower
from proxy.session.adaptation import Adapter

if TYPE_CHECKING:
    from proxy.admin.metrics import WorkerMetrics

log = logging.getLogger(__name__)

_METRICS_SECONDS: Final = 1.0
_SWITCH_SECONDS: Final = 0.0005  # how often a thread that builds indexes lets go of the interpreter
_DRAIN_STEP_SECONDS: Final = 0.05
_RETIRE_STEP_SECONDS: Final = 0.2


async def run(
    config: Config,
    *,
    sockets: list[socket.socket],
    learner_socket: Path | None,
    metrics: WorkerMetrics,
    stop: asyncio.Event,
    reload: asyncio.Event | None = None,
    switch: Follower | None = None,
    retirements: asyncio.Queue[float] | None = None,
    places: Places | None = None,
    configs: asyncio.Queue[Config] | None = None,
) -> None:
    """Serve until `stop` is set, then drain.

    Certificates are looked at when `reload` is set, each time; what comes in `configs` is put in force.
    In `retirements` its longest time comes, in seconds, when another worker has taken over.
    `places`: where the limits on connections are counted; None: this is the only worker.
    """
    _calm_garbage_collector()
    sys.setswitchinterval(_SWITCH_SECONDS)
    adapter = Adapter(metrics.counters, enabled=config.learning.enabled, interface=_interface(config))
    adapter.observe = metrics.observe
    adapter.defers = True
    adapter.longest_message = int(config.limits.max_message * 1e6)
    if switch is not None:
        adapter.relay_only, adapter.throw = switch.on, switch.tell
        switch.told = adapter.switch
    upstream = Upstream.create(config.upstream, config.limits.connect_timeout)
    for_clients = certificates.for_clients(config.listen)
    keepers = [keeper for keeper in (for_clients, upstream.keeper) if keeper is not None]
    client_tls = ClientTLS(config.listen, for_clients)
    connections: set[ClientConnection] = set()
    farewells = Farewells()
    gate = Gate(config.limits, metrics.counters, places)
    slow = SlowQueries(adapter)
    slow.configure(config.log)
    tasks = [asyncio.create_task(_flush(metrics, gate)), asyncio.create_task(slow.watch())]
    if keepers:
        tasks.append(asyncio.create_task(certificates.watch(keepers, reload or asyncio.Event())))
    links = Links(learner_socket, adapter)
    links.configure(config)
    if configs is not None:
        tasks.append(asyncio.create_task(_follow(configs, adapter, links, slow)))

    authenticator = await _authenticator(config)
    if authenticator is not None:
        tasks.append(asyncio.create_task(authenticator.watch()))

    def accept() -> ClientConnection:
        connection = ClientConnection(
            adapter,
            upstream,
            connections.discard,
            farewells,
            client_tls=client_tls,
            authenticator=authenticator,
            gate=gate,
        )
        connections.add(connection)
        return connection

    loop = asyncio.get_running_loop()
    servers = [
        await (loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server)(
            accept, sock=sock, backlog=1024
        )
        for sock in sockets
    ]
    try:
        seconds = await _asked_to_end(stop, retirements)
        for server in servers:
            server.close()
        if seconds > 0.0:
            await _retire(connections, seconds, stop)
            stop.set()
        await _drain(connections, config.limits.drain_timeout)
    finally:
        for connection in list(connections):
            connection.abort_for_shutdown()
        await farewells.over()
        links.close()
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        metrics.flush()


def _interface(config: Config) -> Interface:
    return Interface(
        enabled=config.sql.enabled,
        left_to_server=frozenset(name.strip().lower() for name in config.sql.left_to_server.split(",")),
        manager=config.sql.manager,
        report_query_id=config.sql.report_query_id,
        target_recall=config.learning.target_recall,
        optimize_for=config.learning.optimize_for,
        reads_settings=config.sql.enabled,
    )


async def _follow(configs: asyncio.Queue[Config], adapter: Adapter, links: Links, slow: SlowQueries) -> None:
    """Put other configurations in force as they come; what is said of tables comes from the learner."""
    while True:
        config = await configs.get()
        adapter.configure(enabled=config.learning.enabled, interface=_interface(config))
        links.configure(config)
        slow.configure(config.log)


async def _authenticator(config: Config) -> Authenticator | None:
    """Return what authenticates clients; None where that is relayed."""
    if config.auth.mode == "relay":
        return None
    secret = await asyncio.to_thread(lasting_secret, config.store.path)
    return await asyncio.to_thread(Authenticator.create, config.auth, secret)


def _calm_garbage_collector() -> None:
    """Keep full collections off the queries' path.

    What was imported lives as long as the process and need not be visited again; sessions make little that
    reference counting does not free at once.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _asked_to_end(stop: asyncio.Event, retirements: asyncio.Queue[float] | None) -> float:
    """Wait; return the seconds for which the clients that are there may stay."""
    stopped = asyncio.ensure_future(stop.wait())
    retired = asyncio.ensure_future((retirements or asyncio.Queue[float]()).get())
    try:
        await asyncio.wait({stopped, retired}, return_when=asyncio.FIRST_COMPLETED)
        return retired.result() if retired.done() and not stop.is_set() else 0.0
    finally:
        stopped.cancel()
        retired.cancel()


async def _retire(connections: set[ClientConnection], seconds: float, stop: asyncio.Event) -> None:
    """Wait until every client has left, `seconds` have passed or `stop` is set."""
    log.info("another worker has taken over; %d connections are served on here", len(connections))
    deadline = asyncio.get_running_loop().time() + seconds
    while connections and not stop.is_set() and asyncio.get_running_loop().time() < deadline:
        with suppress(TimeoutError):
            async with asyncio.timeout(_RETIRE_STEP_SECONDS):
                await stop.wait()


async def _drain(connections: set[ClientConnection], timeout: float) -> None:
    """Wait until every session could be ended, or `timeout` seconds have passed."""
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        busy = [connection for connection in list(connections) if not connection.drain()]
        if not busy:
            return
        if asyncio.get_running_loop().time() >= deadline:
            log.warning("%d connections still busy after %g s: cut off", len(busy), timeout)
            return
        await asyncio.sleep(_DRAIN_STEP_SECONDS)


async def _flush(metrics: WorkerMetrics, gate: Gate) -> None:
    while True:
        await asyncio.sleep(_METRICS_SECONDS)
        metrics.flush()
        gate.look_at_memory()
