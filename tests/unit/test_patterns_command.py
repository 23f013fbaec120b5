"""`ruvector-proxy patterns`: what is kept comes out, goes in elsewhere, and unites."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from learning.exchange import decode, encode, evidence
from learning.sqlite_file import StoredTemplate
from learning.store import Store
from proxy.main import app
from tests.unit.test_exchange import KEY, TEMPLATE, document, label


def run(*arguments: str, input: bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["patterns", *arguments], input=input)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "proxy.toml"
    path.write_text("[store]\npath = 'state'\n")

    async def fill() -> None:
        store = Store(tmp_path / "state")
        await store.open()
        stored = StoredTemplate(TEMPLATE, table="public.items")
        await store.save(templates=[stored], labels=[label(0), label(1, context="10\x1fEntenhausen")])
        await store.close()

    asyncio.run(fill())
    return str(path)


def handed_in(directory: Path) -> list[bytes]:
    async def look() -> list[bytes]:
        store = Store(directory)
        await store.open()
        found = await store.handed_in()
        await store.close()
        return found

    return asyncio.run(look())


def test_export_writes_a_private_document(config: str, tmp_path: Path) -> None:
    file = tmp_path / "patterns.json"
    result = run("export", "-c", config, "-o", str(file), "--table", "public.items")
    assert result.exit_code == 0, result.output
    assert "2 measured queries of 1 kinds" in result.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (found,) = evidence(decode(file.read_bytes()))
    assert (found.template, found.table) == (TEMPLATE, "public.items")
    assert [x.context for x in found.labels] == ["10", "10\x1fEntenhausen"]


def test_export_to_standard_output_can_be_anonymized(config: str) -> None:
    result = run("export", "-c", config, "--anonymize")
    assert "Entenhausen" not in result.stdout
    (found,) = evidence(decode(result.stdout))
    assert [x.vector for x in found.labels] == [None]


def test_export_names_the_tables_that_are_known(config: str, tmp_path: Path) -> None:
    result = run("export", "-c", config, "--table", "public.other")
    assert result.exit_code == 1
    assert "nothing is known about public.other; known tables: public.items" in result.stderr
    empty = tmp_path / "empty.toml"
    empty.write_text("[store]\npath = 'nowhere'\n")
    assert "has a proxy with a learner run" in run("export", "-c", str(empty)).stderr


def test_import_hands_a_document_in_under_the_names_that_hold_here(config: str, tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    file.write_bytes(encode(document(label(3))))
    result = run("import", "-c", config, str(file), "--database", "prod")
    assert result.exit_code == 0, result.output
    (data,) = handed_in(tmp_path / "state")
    (found,) = evidence(decode(data))
    assert found.template.database == "prod"
    assert found.template.key != KEY


def test_import_refuses_what_is_no_document(config: str, tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    file.write_text('{"format": "ruvector-patterns", "version": 99, "templates": []}')
    result = run("import", "-c", config, str(file))
    assert result.exit_code == 1
    assert "in.json" in result.stderr
    assert "newer program" in result.stderr
    assert not handed_in(tmp_path / "state")
    assert "cannot read" in run("import", "-c", config, str(tmp_path / "missing")).stderr


def test_merge_unites_files_and_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(encode(document(label(0), label(1))))
    result = run("merge", str(file), "-", input=encode(document(label(1), label(2))))
    assert result.exit_code == 0, result.output
    assert "3 measured queries" in result.stderr
    assert len(json.loads(result.stdout)["templates"][0]["patterns"]) == 3
