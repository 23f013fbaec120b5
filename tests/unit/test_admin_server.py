"""The admin HTTP server: status codes, bodies, and nothing but GET."""

from __future__ import annotations

import asyncio
import json
import re

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from proxy.admin import server
from proxy.admin.asking import NoAnswerError


async def learner(question: bytes) -> bytes:
    """Answer every question with itself; one is too much."""
    if question == b"too much":
        raise NoAnswerError("the learner did not answer within 15 s")
    return question


async def ask(
    path: str, reasons: list[str], method: str = "GET", body: bytes | None = None
) -> tuple[int, str, str]:
    """Return status, content type and body of one request to a server with the given readiness."""

    async def readiness() -> list[str]:
        return reasons

    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    admin = await server.start("127.0.0.1", 0, registry, readiness, learner)
    try:
        host, port = admin.address
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"http://{host}:{port}{path}", data=body) as response,
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
    assert links == ["/metrics", "/healthz", "/readyz", "/advice"]
    assert [asyncio.run(ask(link, []))[0] for link in links] == [200, 200, 200, 200]


def test_questions_are_carried_to_the_learner_and_answers_back() -> None:
    status, content_type, body = asyncio.run(ask("/ask", [], "POST", b'{"kind":"explain"}'))
    assert (status, content_type, body) == (200, "application/json", '{"kind":"explain"}')
    assert json.loads(asyncio.run(ask("/advice", []))[2]) == {"kind": "advise"}
    status, _, body = asyncio.run(ask("/ask", [], "POST", b"too much"))
    assert status == 503
    assert json.loads(body)["message"] == "the learner did not answer within 15 s"
    assert asyncio.run(ask("/ask", [], "POST", bytes(server.MAX_QUESTION + 1)))[0] == 413


def test_nothing_else_can_be_posted() -> None:
    assert asyncio.run(ask("/readyz", [], "POST"))[0] == 405
    assert asyncio.run(ask("/no/such/page", []))[0] == 404
