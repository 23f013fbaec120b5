"""The dashboard in a real browser, over a proxy that has learned from real queries."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.embedded import EmbeddedPostgres
from proxy.main import app
from tests.integration.browser import CHROMIUM, page
from tests.integration.interface_kit import Interface, interface
from tests.integration.learner_kit import text
from tests.integration.test_serve import until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def learned(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interface]:
    with interface(postgres, tmp_path_factory.mktemp("proxy"), "dashboard") as running:
        filtered = "SELECT id FROM items WHERE section = %s ORDER BY embedding <-> %s::vector LIMIT 10"
        with running.connect() as connection:
            for number, vector in enumerate(running.vectors[200:320] + 0.3):
                connection.execute(filtered, (number % 3, text(vector)))
        running.learn()
        until(lambda: all(each["trust"] != "observe" for each in templates(running)))
        with running.connect() as connection:  # so that adapted queries are among the recent ones
            for vector in running.vectors[400:460] + 0.3:
                connection.execute(
                    "SELECT id FROM items ORDER BY embedding <-> %s::vector LIMIT 10", (text(vector),)
                )
                connection.execute(filtered, (1, text(vector)))
        yield running


def overview(running: Interface) -> dict[str, Any]:
    status, body = running.served.get("/api/overview")
    assert status == 200
    return dict(json.loads(body))


def templates(running: Interface) -> list[dict[str, Any]]:
    learner = overview(running)["learner"] or {"tables": []}
    return [
        each for table in learner["tables"] if table["table"] == "public.items" for each in table["templates"]
    ]


def test_the_overview_tells_what_the_functions_tell(learned: Interface) -> None:
    with learned.connect() as connection:
        rows = connection.execute(
            "SELECT template, recall, target_recall, labels FROM ruvector_learning_stats('items')"
        ).fetchall()
    until(lambda: all(len(each["audits"]) > 0 for each in templates(learned)))
    time.sleep(1.1)  # an answer holds for a second
    found = {each["template"]: each for each in templates(learned)}
    assert found.keys() == {row[0] for row in rows}
    for template, recall, target, labels in rows:
        each = found[str(template)]
        assert each["labels"] >= labels  # it goes on measuring
        assert each["target_recall"] == target == 0.95
        assert (each["recall"] is None) == (recall is None)
        assert 0.0 <= each["recall_low"] <= each["recall"] <= each["recall_high"] <= 1.0


def test_the_overview_shows_what_was_served_and_why(learned: Interface) -> None:
    for each in templates(learned):
        assert sum(sum(bin["arms"].values()) for bin in each["timeline"]) >= 120
        assert sum(arm["share"] for arm in each["arms"]) == pytest.approx(1.0)
        assert each["recent"]
        assert all(query["why"] and query["ms"] > 0.0 for query in each["recent"])
        at = [query["at"] for query in each["recent"]]
        assert at == sorted(at, reverse=True)
        assert "vector" not in each["recent"][0]
    (by_section,) = (each for each in templates(learned) if each["filters"])
    assert {row["values"][0] for row in by_section["filters"]} <= {"0", "1", "2"}
    assert all(query["values"] for query in by_section["recent"])


def test_asking_neither_counts_as_a_worker_nor_costs_the_workers_anything(learned: Interface) -> None:
    overview(learned)
    until(lambda: learned.served.metric("ruvector_learner_workers") == 1.0)


def test_status_and_top_tell_the_same_in_a_terminal(
    learned: Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUVECTOR_ADMIN_PORT", str(learned.served.admin_port))

    def told(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.stdout

    answer = json.loads(told("status", "--json"))
    assert answer["ready"] is True
    assert answer["queries_adapted"] > 0
    (items,) = (table for table in answer["tables"] if table["table"] == "public.items")
    assert {kind["statement"] for kind in items["kinds"]} == {each["template"] for each in templates(learned)}
    assert "public.items, target recall 0.95" in told("status")
    frames = told("top", "--count", "2", "--interval", "0.5")
    for words in ("ready", "statements/s", "public.items", "0.95", "recent queries"):
        assert words in frames


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")
def test_people_can_read_and_use_it(learned: Interface, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    asyncio.run(look(learned, tmp_path / "profile", pictures))


async def look(learned: Interface, profile: Path, pictures: Path) -> None:
    url = f"http://127.0.0.1:{learned.served.admin_port}/"
    async with page(url, profile) as shown:
        await shown.wait("document.querySelectorAll('details').length > 1")
        await shown.value("document.querySelectorAll('details').forEach(each => each.open = true)")
        words = await shown.value("document.body.innerText")
        for word in ("public.items", "ready", "learner is up", "0.950", "audited recall", "Recent queries"):
            assert word in words
        assert "admin.token" not in words  # it asks for one only where one is wanted
        assert await shown.value("document.querySelectorAll('svg[role=img][aria-label]').length") >= 4
        for name, width, dark in (("desktop", 1280, False), ("dark", 1280, True), ("phone", 390, True)):
            await shown.look(
                pictures / f"{name}.png", width=width, height=1400, dark=dark, phone=name == "phone"
            )
            wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await shown.value(wider) <= 0, f"{name}: has to be moved sideways"
            colour = await shown.value("getComputedStyle(document.body).backgroundColor")
            assert colour == ("rgb(15, 19, 24)" if dark else "rgb(246, 247, 249)")
        # By keyboard: to the first kind of query; Enter closes it; a refresh leaves focus and state as they are.
        await shown.value("document.activeElement.blur()")
        for _ in range(10):
            await shown.press("Tab", 9)
            if await shown.value("document.activeElement.tagName") == "SUMMARY":
                break
        assert await shown.value("document.activeElement.tagName") == "SUMMARY"
        await shown.press("Enter", 13)
        assert await shown.value("document.querySelector('details').open") is False
        await shown.value("refresh()")
        assert await shown.value("document.activeElement.tagName") == "SUMMARY"
        assert await shown.value("document.querySelector('details').open") is False
        # A configuration that is refused is said.
        file = learned.served.file
        written = file.read_text()
        file.write_text(written + "[nonsense]\n")
        await shown.wait("document.body.innerText.includes('unknown section')")
        file.write_text(written)
        # Another page can neither read the data nor show it inside itself.
        await shown.do("Page.navigate", url="data:text/html,elsewhere")
        await shown.wait("document.body && document.body.innerText === 'elsewhere'")
        assert shown.problems == []
        read = f"fetch('{url}api/overview').then(() => 'read', () => 'refused')"
        assert await shown.value(read) == "refused"
