"""The benchmark suite runs unattended to its end, and measures a user's table without writing to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psycopg
import pytest
from typer.testing import CliRunner

from bench.embedded import EmbeddedPostgres
from bench.suite import main as suite
from bench.suite.contest import KNOWN_BEST, ORACLE
from bench.suite.records import Report, Result
from bench.suite.scenarios import SCENARIOS
from bench.suite.stage import Stage, proxy_name
from proxy.main import app

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

DIMENSIONS = 16


@pytest.fixture
def home() -> Iterator[Path]:
    """Return a directory that the server's user can pass through."""
    with tempfile.TemporaryDirectory(prefix="ruvector-suite-test-") as directory:
        yield Path(directory)


def processes_naming(text: str) -> list[str]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def test_rehearsal_survives_a_failing_scenario_and_leaves_no_process_behind(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(stage: Stage) -> list[Result]:
        stage.restart()
        raise RuntimeError("a scenario that breaks")

    chosen = {"broken": broken, "tenants": SCENARIOS["tenants"]}
    monkeypatch.setattr("bench.suite.main.SCENARIOS", chosen)
    code = suite.main(["--quick", "--home", str(home), "--results", str(tmp_path)])
    output = capsys.readouterr().out
    assert code == 1
    assert "failed: broken" in output
    found = Report.load(tmp_path / "results.json")
    failed, tenants = found.results
    assert failed.error == "RuntimeError: a scenario that breaks"
    assert tenants.error == ""
    names = [line.name for line in tenants.lines]
    assert {proxy_name(0.99), KNOWN_BEST, ORACLE, "as it comes", "exact"} <= set(names)
    assert all(claim.verdict for claim in tenants.claims)
    assert (tmp_path / "tenants.png").read_bytes().startswith(b"\x89PNG")
    words = (tmp_path / "results.md").read_text()
    assert "a scenario that breaks" in words
    assert "Tenant skew" in words
    assert processes_naming(str(home)) == []


def test_a_users_table_is_measured_with_nothing_but_select(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, DIMENSIONS))
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute(
            "CREATE EXTENSION IF NOT EXISTS vector; DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN; "
            f'CREATE TABLE things (name text, "Kind" text, embedding vector({DIMENSIONS}))'
        )
        with connection.cursor().copy("COPY things FROM STDIN") as copy:
            for number in range(3_000):
                vector = centres[number % 40] + rng.normal(scale=0.3, size=DIMENSIONS)
                copy.write_row((f"thing {number}", "ab"[number % 2], str(vector.round(5).tolist())))
        connection.execute("CREATE INDEX ON things USING hnsw (embedding vector_l2_ops)")
        connection.execute("GRANT SELECT ON things TO reader")
        connection.execute("ANALYZE things")
        before = connection.execute("SELECT pg_current_wal_lsn(), count(*) FROM pg_class").fetchone()
        assert before is not None
        dsn = postgres.uri(database).replace(f"{postgres.user}@", "reader@")
        command = ["bench", "--dsn", dsn, "--table", "things", "--column", "embedding"]
        result = CliRunner().invoke(
            app,
            [*command, "--filter", "Kind", "--seconds", "30", "--k", "5", "--output", str(tmp_path)],
        )
        assert result.exit_code == 0, result.output
        after = connection.execute("SELECT count(*) FROM pg_class").fetchone()
        assert after is not None
        assert after[0] == before[1]  # no table, index or sequence came
        connection.execute("DROP OWNED BY reader; DROP ROLE reader")
    assert 'ORDER BY "embedding" <-> $1 LIMIT 5' in result.output  # the index's operator
    [found] = Report.load(tmp_path / "results.json").results
    lines = {line.name: line for line in found.lines}
    assert lines["exact"].recall.value == 1.0
    assert lines[proxy_name(0.98)].queries >= 30
    assert (tmp_path / "own.png").exists()
    assert (tmp_path / "results.md").exists()


@pytest.mark.parametrize(
    ("table", "column", "words"),
    [
        ("nowhere", "embedding", "there is no column"),
        ("plain", "name", "is of type text"),
        ("plain", "embedding", "has no HNSW or IVFFlat index"),
    ],
)
def test_what_cannot_be_measured_is_said_in_words(
    postgres: EmbeddedPostgres, database: str, table: str, column: str, words: str
) -> None:
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute(
            "CREATE EXTENSION IF NOT EXISTS vector; CREATE TABLE plain (name text, embedding vector(3))"
        )
    arguments = ["bench", "--dsn", postgres.uri(database), "--table", table, "--column", column]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert words in result.output
