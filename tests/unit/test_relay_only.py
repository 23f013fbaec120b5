"""The kill switch: who holds it, what survives a restart, who is told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from config.schema import Admin
from proxy.admin import server
from proxy.children import Orders
from proxy.relay_only import FILE, KillSwitch

TOKEN = "0123456789abcdef"


def switch(state: Path, told: list[bool], *, configured: bool = False) -> KillSwitch:
    return KillSwitch(state, configured=configured, told=told.append)


def test_thrown_and_thrown_back_and_told_once_each(tmp_path: Path) -> None:
    told: list[bool] = []
    one = switch(tmp_path / "state", told)
    assert not one.on
    one.throw(True, "ann")
    one.throw(True, "bob")
    assert (one.on, one.why) == (True, "bob")
    one.throw(False, "ann")
    assert (one.on, one.why) == (False, "")
    assert told == [True, False]


def test_it_holds_over_a_restart(tmp_path: Path) -> None:
    switch(tmp_path, []).throw(True, "SIGUSR1")
    again = switch(tmp_path, [])
    assert (again.on, again.why) == (True, "SIGUSR1")
    again.throw(False, "SIGUSR2")
    assert not switch(tmp_path, []).on


def test_the_configuration_holds_it_against_everybody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[bool] = []
    one = switch(tmp_path, told, configured=True)
    assert one.on
    one.throw(False, "ann")
    assert one.on
    assert "stays thrown" in caplog.text
    one.configure(False)
    one.configure(True)
    assert told == [False, True]


def test_a_state_directory_that_cannot_be_written_is_no_reason_not_to_throw_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    told: list[bool] = []
    switch(tmp_path / "file", told).throw(True, "ann")
    assert told == [True]
    assert "a restart will not know" in caplog.text


def test_a_child_follows() -> None:
    orders = Orders("worker 1")
    told: list[bool] = []
    orders.switch.told = told.append
    orders.feed(b'{"type":"RelayOnly","on":true}\n{"type":"Relo')
    assert orders.switch.on
    orders.feed(b'ad"}\n{"type":"RelayOnly","on":false}\n')
    assert told == [True, False]
    assert orders.reload.is_set()


async def asked(one: KillSwitch, options: Admin, *requests: tuple[str, dict[str, str], bytes]) -> list[int]:
    """Return the status of each request: method, headers, body."""

    async def ready() -> list[str]:
        return []

    async def learner(question: bytes) -> bytes:
        return question

    admin = await server.start(options, CollectorRegistry(), ready, learner, one)
    try:
        async with aiohttp.ClientSession() as session:
            found = []
            for method, headers, body in requests:
                url = f"http://{admin.address[0]}:{admin.address[1]}/relay-only"
                async with session.request(method, url, headers=headers, data=body) as response:
                    found.append(response.status)
                    if response.status == 200:
                        assert (await response.json())["relay_only"] is one.on
            return found
    finally:
        await admin.close()


def test_http_needs_the_token_and_no_web_page_can_do_it(tmp_path: Path) -> None:
    one = switch(tmp_path, [])
    throw = json.dumps({"relay_only": True}).encode()
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    secured = Admin(port=0, token=SecretStr(TOKEN))
    assert asyncio.run(asked(one, Admin(port=0), ("POST", {}, throw), ("GET", {}, b""))) == [403, 200]
    refused = [
        ("POST", {}, throw),
        ("POST", {"Authorization": "Bearer another-token-here"}, throw),
        ("POST", {**bearer, "Origin": "https://evil.example"}, throw),
        ("POST", {**bearer, "Sec-Fetch-Site": "cross-site"}, throw),
        ("POST", {**bearer, "Host": "evil.example"}, throw),
        ("POST", bearer, b"relay_only=true"),
        ("POST", bearer, b'{"relay_only": "yes"}'),
        ("POST", bearer, b"[]"),
    ]
    assert asyncio.run(asked(one, secured, *refused)) == [401, 401, 403, 403, 421, 400, 400, 400]
    assert not (tmp_path / FILE).exists()
    assert asyncio.run(asked(one, secured, ("POST", bearer, throw), ("GET", bearer, b""))) == [200, 200]
    assert one.on
    assert one.why.startswith("HTTP from ")
    assert (tmp_path / FILE).exists()
