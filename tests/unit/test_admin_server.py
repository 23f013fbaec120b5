"""The admin HTTP server: status codes, bodies, and nothing but GET."""

from __future__ import annotations

import asyncio
import json
import re

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from proxy.admin import server


async def ask(path: str, reasons: list[str], method: str = "GET") -> tuple[int, str, str]:
    """Return status, content type and body of one request to a server with the given readiness."""

    async def readiness() -> list[str]:
        return reasons

    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    admin = await server.start("127.0.0.1", 0, registry, readiness)
    try:
        host, port = admin.address
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"http://{host}:{port}{path}") as response,
        ):
            return response.status, response.headers["Content-Type"], await response.text()
    finally:
        await admin.close()


def test_metrics_are_in_prometheus_text_format() -> None:
    status, content_type, body = asyncio.run(ask("/metrics", []))
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert "# HELP things_total Things.\n# TYPE things_total counter\nthings_total 3.0\n" in body


@pytest.mark.parametrize("reasons", [[], ["no worker is up"]])
def test_health_does_not_depend_on_readiness(reasons: list[str]) -> None:
    assert asyncio.run(ask("/healthz", reasons))[0] == 200


def test_readiness_gives_its_reasons_as_json() -> None:
    status, _, body = asyncio.run(ask("/readyz", ["no worker is up", "upstream is away"]))
    assert status == 503
    assert json.loads(body) == {"ready": False, "reasons": ["no worker is up", "upstream is away"]}
    status, _, body = asyncio.run(ask("/readyz", []))
    assert status == 200
    assert json.loads(body) == {"ready": True, "reasons": []}


def test_every_link_of_the_page_leads_somewhere() -> None:
    status, content_type, body = asyncio.run(ask("/", []))
    assert (status, content_type) == (200, "text/html; charset=utf-8")
    links = re.findall(r'href="([^"]+)"', body)
    assert links == ["/metrics", "/healthz", "/readyz"]
    assert [asyncio.run(ask(link, []))[0] for link in links] == [200, 200, 200]


def test_nothing_can_be_posted() -> None:
    assert asyncio.run(ask("/readyz", [], "POST"))[0] == 405
    assert asyncio.run(ask("/no/such/page", []))[0] == 404
