"""``ruvector-proxy explain`` on what a real learner keeps: human and JSON output, and clear errors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner

from bench.embedded import EmbeddedPostgres, free_port
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
from tests.integration.test_serve import serving, until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

QUERIES = clustered(300) + 0.3


def test_explain_answers_from_the_store(
    postgres: EmbeddedPostgres,
    database: str,
    tmp_path: Path,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create_items(postgres.dsn(database))
    monkeypatch.setenv("RUVECTOR_ADMIN_PORT", str(free_port()))  # nobody answers there
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
            await worker.policy(found)
            await asyncio.sleep(1.5)
            await asyncio.to_thread(while_it_runs)

    def while_it_runs() -> None:
        assert explained(UNFILTERED, "--param", text(QUERIES[0]))[0] == 0

    asyncio.run(scenario())
    code, output = explained(UNFILTERED, "--param", text(QUERIES[0]))
    assert code == 0, output
    for part in ("table       public.items", "target 0.95", "measured queries", "as kept last"):
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


@pytest.mark.timeout(400)  # the learner gives way to a machine that is busy with other tests
def test_explain_asks_the_running_proxy_and_advice_knows_the_inventory(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_items(postgres.dsn(database))
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute("DROP INDEX items_section_idx")
        connection.execute("CREATE INDEX items_second ON items USING hnsw (embedding vector_l2_ops)")
        connection.execute(f"ALTER DATABASE {database} SET hnsw.ef_search = 20")
    more = "[learning]\ntarget_recall = 0.95\nmin_samples = 40\n"
    with serving(tmp_path, ("127.0.0.1", postgres.port), more, postgres.uri()) as served:
        served.wait_ready()
        monkeypatch.setenv("RUVECTOR_ADMIN_PORT", str(served.admin_port))
        monkeypatch.chdir(tmp_path)

        def explained(sql: str, *more: str) -> str:
            arguments = [
                "explain",
                "--config",
                str(tmp_path / "proxy.toml"),
                "--param",
                text(QUERIES[0]),
                *more,
            ]
            return CliRunner().invoke(app, [*arguments, sql]).output

        plain = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 30"
        filtered = "SELECT id FROM items WHERE section = 2 ORDER BY embedding <-> $1 LIMIT 10"
        wrong = "SELECT id FROM items ORDER BY embedding <=> $1 LIMIT 10"
        with served.connect(database) as client:
            for vector in QUERIES[:150]:
                for sql in (plain, filtered, wrong):
                    client.execute(sql.replace("$1", f"'{text(vector)}'"))
        until(lambda: "in force" in explained(plain) and "trust: observe" not in explained(plain))
        until(lambda: "trust: context" in explained(filtered))
        output = explained(plain)
        assert "items_hnsw, items_second serve the same queries by the same method" in output
        assert "LIMIT 30 with ef_search 20 can return at most 20 rows" in output
        assert "CREATE INDEX ON public.items (section)" in explained(filtered)
        assert "does not match the operator class of the index" in explained(wrong)
        codes = {
            advice["code"]
            for one in json.loads(served.get("/advice")[1])["tables"]
            for advice in one["advice"]
        }
        assert codes >= {"several-indexes", "limit-above-ef", "filter-index", "operator-class"}
    # The same from the store, once the proxy has ended.
    kept = explained(plain)
    assert "as kept last" in kept
    assert "LIMIT 30 with ef_search 20 can return at most 20 rows" in kept
