"""``ruvector-proxy explain`` on what a real learner keeps: human and JSON output, and clear errors."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.embedded import EmbeddedPostgres
from proxy.main import app
from tests.integration.learner_kit import (
    UNFILTERED,
    clustered,
    configuration,
    create_items,
    learner,
    query,
    template,
    text,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUERIES = clustered(300) + 0.3


def test_explain_answers_from_the_store(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_items(postgres.dsn(database))
    socket_path = Path("/tmp") / f"rvl-{uuid.uuid4().hex[:12]}.sock"
    monkeypatch.setenv("RUVECTOR_STORE_PATH", str(tmp_path))
    runner = CliRunner()

    def explained(*arguments: str) -> tuple[int, str]:
        result = runner.invoke(app, ["explain", *arguments])
        return result.exit_code, result.output

    code, output = explained(UNFILTERED, "--param", text(QUERIES[0]))
    assert code == 1
    assert "nothing is kept" in output

    async def scenario() -> None:
        found = template(UNFILTERED, database)
        async with learner(configuration(postgres, tmp_path), socket_path) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            await worker.policy(found, timeout=90.0)
            await asyncio.sleep(1.5)
            await asyncio.to_thread(while_it_runs)

    def while_it_runs() -> None:
        assert explained(UNFILTERED, "--param", text(QUERIES[0]))[0] == 0

    asyncio.run(scenario())
    code, output = explained(UNFILTERED, "--param", text(QUERIES[0]))
    assert code == 0, output
    for part in ("table       public.items", "target 0.95", "measured queries"):
        assert part in output
    literal = UNFILTERED.replace("$1", f"'{text(QUERIES[1])}'")
    code, output = explained("--json", literal)
    assert code == 0, output
    answer = json.loads(output)
    chosen = [arm for arm in answer["arms"] if arm["chosen"]]
    assert [arm["name"] for arm in chosen] == [answer["arm"]]
    assert chosen[0]["recall"] > 0.5
    assert answer["labels"] >= 40
    assert 0.0 < answer["similarity"] <= 1.0001
    assert 0.0 <= answer["sure"] <= 1.0

    for sql, words in {
        "SELECT 1": "no vector search",
        UNFILTERED: "needs a value for $1",
        "SELECT id FROM items ORDER BY embedding <-> '[1]' DESC LIMIT 5": "DESC disables the index",
        "SELECT id FROM items ORDER BY embedding <-> '[1]'": "no LIMIT",
        "SELECT id FROM other ORDER BY embedding <-> '[1]' LIMIT 5": "known are:",
    }.items():
        code, output = explained(sql)
        assert code == 1, sql
        assert words in output, sql
    code, output = explained("--database", "nowhere", literal)
    assert code == 1
    assert f"database {database}, user postgres" in output
