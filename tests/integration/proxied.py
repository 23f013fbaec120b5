"""A real proxy worker for tests, in a thread of its own, with a policy that the test dictates."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from config.schema import Auth, Limits, Listen
from config.schema import Upstream as UpstreamOptions
from learning.optimizer import SearchOptimizer
from learning.records import Arm, Choice, Settings, Snapshot, TemplatePolicy, Trajectory, Trust
from proxy.net.admission import Gate
from proxy.net.authentication import Authenticator
from proxy.net.certificates import for_clients
from proxy.net.client_tls import ClientTLS
from proxy.net.farewell import Farewells
from proxy.net.places import Places
from proxy.net.relay import ClientConnection
from proxy.net.upstream import Upstream
from proxy.session.adaptation import Adapter, Execution
from proxy.session.counters import Counters

_R = TypeVar("_R")

SECRET = b"the secret behind stand-ins in tests"


class Dictated(SearchOptimizer):
    """Gives every recognised query the same settings."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(Snapshot(version=1, created_at=0.0, templates={}))
        self.arm = Arm(name="dictated", settings=settings)

    def template(self, key: str) -> TemplatePolicy:
        return TemplatePolicy(
            template=key,
            table="public.items",
            trust=Trust.STATIC,
            reason="dictated by a test",
            target_recall=0.98,
            arms=(self.arm,),
            value_types=(),
            filter_slots=(),
            fallback=0,
            contexts={},
        )

    def optimize(
        self,
        template_key: str,
        vector: np.ndarray | None,
        k: int,
        values: tuple[str | None, ...],
        target: float | None = None,
    ) -> Choice:
        return Choice(arm=self.arm, trust=Trust.STATIC, expected_recall=None, reason="dictated by a test")


class Proxy:
    """A worker's relay between a free local port and a server; use as a context manager.

    `upstream` takes the place of `host` and `port` where there is more to say; `listen` is for its TLS options.
    """

    def __init__(
        self,
        host: str,
        port: int,
        settings: Settings = (),
        *,
        adapter: type[Adapter] = Adapter,
        listen: Listen | None = None,
        upstream: UpstreamOptions | None = None,
        listen_port: int = 0,
        auth: Auth | None = None,
        authentication_timeout: float = 30.0,
        limits: Limits | None = None,
        places: Places | None = None,
        files: int | None = None,
    ) -> None:
        self.counters = Counters()
        self.trajectories: list[Trajectory] = []
        self.connections: set[ClientConnection] = set()
        self.upstream = Upstream.create(upstream or UpstreamOptions(host=host, port=port), timeout=5.0)
        listen = listen or Listen()
        self.certificates = for_clients(listen)
        self._client_tls = ClientTLS(listen, self.certificates)
        self._settings = settings
        self._adapter_type = adapter
        self._listen_port = listen_port
        self._auth = auth or Auth()
        self._limits = limits or Limits(authentication_timeout=authentication_timeout)
        self._places = places
        self._files = files
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.host = "127.0.0.1"
        self.port = 0

    def dictate(self, settings: Settings) -> None:
        """Put other settings in force for the next query."""
        self.adapter.swap(Dictated(settings), 1)

    def dsn(self, dbname: str, user: str) -> str:
        return f"host={self.host} port={self.port} dbname={dbname} user={user}"

    def call(self, function: Callable[[], _R]) -> _R:
        """Run a function in the worker's thread."""

        async def run() -> _R:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(5)

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.farewells = Farewells()
        self.adapter = self._adapter_type(self.counters)
        self.adapter.swap(Dictated(self._settings), 1)
        self.adapter.record = self._record
        sock = socket.create_server((self.host, self._listen_port))
        self.port = sock.getsockname()[1]

        authenticator = watching = None
        if self._auth.mode == "scram":
            authenticator = Authenticator.create(self._auth, SECRET)
            watching = asyncio.create_task(authenticator.watch())

        gate = self.gate = Gate(self._limits, self.counters, self._places, files=self._files)
        self.adapter.longest_message = int(self._limits.max_message * 1e6)

        def accept() -> ClientConnection:
            connection = ClientConnection(
                self.adapter,
                self.upstream,
                self.connections.discard,
                self.farewells,
                client_tls=self._client_tls,
                authenticator=authenticator,
                gate=gate,
            )
            self.connections.add(connection)
            return connection

        server = await self._loop.create_server(accept, sock=sock)
        self._ready.set()
        await self._stop.wait()
        server.close()
        if watching is not None:
            watching.cancel()
        for connection in list(self.connections):
            connection.close()
        await self.farewells.over()
        await asyncio.sleep(0)

    def _record(self, execution: Execution) -> None:
        self.trajectories.append(execution.trajectory())
