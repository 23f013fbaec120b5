"""The admin HTTP server, which runs in the supervisor so that it answers whatever becomes of the workers.

/metrics   Prometheus text: what all processes have written, added up; also while the proxy drains
/healthz   200 as long as the supervisor lives: a restart would help where this fails
/readyz    200 when clients can be served, else 503 with the reasons: send traffic elsewhere meanwhile
/advice    what could be changed about the tables, as JSON (learning.answering.Advised)
/ask       POST: a question to the learner as JSON and its answer (learning.answering), as `explain` asks it
/relay-only  the kill switch (proxy.relay_only): GET tells, POST {"relay_only": true} throws it, false back
/          the dashboard: one page without outside resources, and
/api/overview what it shows, as JSON: the supervisor's state, and the learner's knowledge by table

Only POST /relay-only changes anything, and only where admin.token is set.  `proxy.admin.guard` says who may
ask.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from config.schema import Admin
from proxy.admin.asking import Ask, NoAnswerError
from proxy.admin.guard import guard
from proxy.admin.learner import LearnerOverview
from proxy.relay_only import KillSwitch
from proxy.version import version

MAX_QUESTION = 1 << 19
"""Bytes of a question; a vector of 16,000 dimensions takes 90 KB."""

Readiness = Callable[[], Awaitable[list[str]]]
"""Returns the reasons for which clients cannot be served; none: ready."""

_ATTEMPTS = 20
_PAUSE = 0.05  # seconds

PAGE = Path(__file__).with_name("dashboard.html")


@dataclass(frozen=True, slots=True)
class AdminServer:
    """A running server; `address` is where it listens, with the port resolved."""

    address: tuple[str, int]
    _runner: web.AppRunner

    async def close(self) -> None:
        """Stop answering."""
        await self._runner.cleanup()


async def start(
    options: Admin,
    registry: CollectorRegistry,
    readiness: Readiness,
    ask: Ask,
    switch: KillSwitch | None = None,
    refused: Callable[[], str] = str,
) -> AdminServer:
    """Start the server; port 0 takes any free one.  Raises OSError where it cannot listen.

    `refused` returns why the configuration file is not in force; empty: it is.
    """
    application = web.Application(client_max_size=MAX_QUESTION, middlewares=[guard(options)])
    application.add_routes(_routes(registry, readiness, ask, switch, refused))
    if switch is not None:
        application.add_routes(_switch_routes(switch, has_token=options.token is not None))
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port).start()
    except OSError:
        await runner.cleanup()
        raise
    bound = runner.addresses[0]
    return AdminServer((bound[0], bound[1]), runner)


async def _exposition(registry: CollectorRegistry) -> bytes:
    """Return the metrics; a child that begins makes its files a moment before there is anything in them."""
    for _ in range(_ATTEMPTS):
        try:
            return generate_latest(registry)
        except struct.error:
            await asyncio.sleep(_PAUSE)
    return generate_latest(registry)


def _switch_routes(switch: KillSwitch, *, has_token: bool) -> list[web.RouteDef]:
    def state() -> web.Response:
        return web.json_response({"relay_only": switch.on, "why": switch.why})

    async def tell(_: web.Request) -> web.Response:
        return state()

    async def throw(request: web.Request) -> web.Response:
        if not has_token:
            text = "this changes what the proxy does, and needs admin.token to be set in its configuration\n"
            return web.Response(status=403, text=text)
        try:
            wanted = (await request.json())["relay_only"]
        except (ValueError, KeyError, TypeError):
            wanted = None
        if not isinstance(wanted, bool):
            return web.Response(status=400, text='the body has to be {"relay_only": true} or false\n')
        switch.throw(wanted, f"HTTP from {request.remote}")
        return state()

    return [web.get("/relay-only", tell), web.post("/relay-only", throw)]


def _routes(
    registry: CollectorRegistry,
    readiness: Readiness,
    ask: Ask,
    switch: KillSwitch | None,
    refused: Callable[[], str],
) -> list[web.RouteDef]:
    learner = LearnerOverview(ask)

    async def answered(question: bytes) -> web.Response:
        try:
            return web.Response(body=await ask(question), content_type="application/json")
        except NoAnswerError as error:
            problem = {"kind": "problem", "message": str(error), "unknown": True}
            return web.json_response(problem, status=503)

    async def asked(request: web.Request) -> web.Response:
        return await answered(await request.read())

    async def advice(_: web.Request) -> web.Response:
        return await answered(b'{"kind": "advise"}')

    async def metrics(_: web.Request) -> web.Response:
        await readiness()  # so that ruvector_upstream_up is as of now
        return web.Response(body=await _exposition(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reasons = await readiness()
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    async def overview(_: web.Request) -> web.Response:
        reasons = await readiness()
        try:
            known, away = await learner.get(), None
        except NoAnswerError as error:
            known, away = b"null", str(error)
        proxy = {
            "version": version(),
            "reasons": reasons,
            "relay_only": switch.why if switch is not None and switch.on else None,
            "config_refused": refused(),
            "learner_away": away,
        }
        # The learner's answer is JSON already.
        body = json.dumps(proxy)[:-1].encode() + b', "learner": ' + known + b"}"
        return web.Response(body=body, content_type="application/json")

    async def index(_: web.Request) -> web.Response:
        return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html")

    return [
        web.get("/metrics", metrics),
        web.get("/healthz", healthz),
        web.get("/readyz", readyz),
        web.get("/advice", advice),
        web.post("/ask", asked),
        web.get("/api/overview", overview),
        web.get("/", index),
    ]
