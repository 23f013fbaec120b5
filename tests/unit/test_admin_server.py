"""The admin HTTP server: status codes, bodies, and nothing but GET."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import SecretStr

from config.schema import Admin
from proxy.admin import server
from proxy.admin.asking import Ask, NoAnswerError
from proxy.admin.learner import LearnerOverview


async def learner(question: bytes) -> bytes:
    """Answer every question with itself; one is too much."""
    if question == b"too much":
        raise NoAnswerError("the learner did not answer within 15 s")
    return question


TOKEN = "0123456789abcdef"


async def ask(
    path: str,
    reasons: Sequence[str] = (),
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    options: Admin | None = None,
    body: bytes | None = None,
    asked: Ask = learner,
) -> tuple[int, str, str]:
    """Return status, content type and body of one request to a server with the given readiness."""

    async def readiness() -> list[str]:
        return list(reasons)

    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    admin = await server.start(options or Admin(port=0), registry, readiness, asked)
    try:
        host, port = admin.address
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"http://{host}:{port}{path}", headers=headers, data=body) as response,
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


def test_every_link_of_the_page_leads_somewhere_and_none_leads_out() -> None:
    status, content_type, body = asyncio.run(ask("/", []))
    assert (status, content_type) == (200, "text/html; charset=utf-8")
    links = re.findall(r'href="([^"]+)"', body)
    assert links == ["data:,", "/metrics", "/readyz", "/api/overview"]
    assert [asyncio.run(ask(link, []))[0] for link in links[1:]] == [200, 200, 200]
    assert re.findall(r"\bsrc=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", body) == []


def test_the_overview_says_what_the_learner_says_and_whether_clients_are_served() -> None:
    status, content_type, body = asyncio.run(ask("/api/overview", ["no worker is up"]))
    assert (status, content_type) == (200, "application/json")
    found = json.loads(body)
    assert found["learner"] == {"kind": "overview"}
    assert (found["learner_away"], found["reasons"]) == (None, ["no worker is up"])


def test_the_overview_says_that_the_learner_does_not_answer() -> None:
    async def away(question: bytes) -> bytes:
        raise NoAnswerError("there is no learner")

    status, _, body = asyncio.run(ask("/api/overview", asked=away))
    assert status == 200
    assert (json.loads(body)["learner"], json.loads(body)["learner_away"]) == (None, "there is no learner")


def test_many_open_pages_cost_the_learner_one_question_a_second() -> None:
    questions = []

    async def counting(question: bytes) -> bytes:
        questions.append(question)
        return b"{}"

    async def many() -> None:
        known = LearnerOverview(counting)
        assert await asyncio.gather(*(known.get() for _ in range(50))) == [b"{}"] * 50

    asyncio.run(many())
    assert len(questions) == 1


GUARDED = ("/", "/metrics", "/api/overview", "/advice")


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),  # a name that was pointed at this address
        ({"Host": "evil.example:9464"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
        ({"Host": "localhost:9464", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "[::1]:9464", "Origin": "http://[::1]:9464"}, 200),
        ({"Host": "10.1.2.3:9464"}, 200),
        ({"Host": "Proxy.example"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_no_page_of_another_origin_may_ask(path: str, headers: dict[str, str], status: int) -> None:
    options = Admin(port=0, names="other, proxy.example")
    assert asyncio.run(ask(path, headers=headers, options=options))[0] == status


def test_a_link_from_elsewhere_may_lead_to_the_page_but_not_to_data() -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert asyncio.run(ask("/", headers=headers))[0] == 200
    assert asyncio.run(ask("/api/overview", headers=headers))[0] == 403


@pytest.mark.parametrize("path", ["/metrics", "/api/overview", "/advice"])
@pytest.mark.parametrize(
    ("given", "status"),
    [(None, 401), ("Bearer wrong", 401), (f"Basic {TOKEN}", 401), (f"Bearer {TOKEN}", 200)],
)
def test_with_a_token_data_is_for_those_who_present_it(path: str, given: str | None, status: int) -> None:
    options = Admin(port=0, token=SecretStr(TOKEN))
    headers = {"Authorization": given} if given else {}
    assert asyncio.run(ask(path, headers=headers, options=options))[0] == status
    for open_to_all in ("/healthz", "/readyz", "/"):
        assert asyncio.run(ask(open_to_all, options=options))[0] == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_come_with_any_host(path: str) -> None:
    assert asyncio.run(ask(path, headers={"Host": "anything"}))[0] == 200


def test_questions_are_carried_to_the_learner_and_answers_back() -> None:
    status, content_type, body = asyncio.run(ask("/ask", method="POST", body=b'{"kind":"explain"}'))
    assert (status, content_type, body) == (200, "application/json", '{"kind":"explain"}')
    assert json.loads(asyncio.run(ask("/advice", []))[2]) == {"kind": "advise"}
    status, _, body = asyncio.run(ask("/ask", method="POST", body=b"too much"))
    assert status == 503
    assert json.loads(body)["message"] == "the learner did not answer within 15 s"
    assert asyncio.run(ask("/ask", method="POST", body=bytes(server.MAX_QUESTION + 1)))[0] == 413


def test_nothing_else_can_be_posted() -> None:
    assert asyncio.run(ask("/readyz", [], "POST"))[0] == 405
    assert asyncio.run(ask("/no/such/page", []))[0] == 404


def test_no_page_of_another_origin_can_post_a_question() -> None:
    headers = {"Origin": "http://evil.example"}
    assert asyncio.run(ask("/ask", method="POST", body=b"{}", headers=headers))[0] == 403


def test_metrics_wait_for_a_child_that_is_making_its_files(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))  # type: ignore[no-untyped-call]
    (tmp_path / "counter_1.db").touch()

    async def scrape() -> bytes:
        asyncio.get_running_loop().call_later(0.1, (tmp_path / "counter_1.db").unlink)
        return await server._exposition(registry)

    assert asyncio.run(scrape()) == b""
