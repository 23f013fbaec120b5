"""docs/sql.md: every example runs, and the tables on the page are the functions' declarations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from proxy.interface.signatures import FUNCTIONS, Access
from tests.integration.interface_kit import Interface, interface

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

PAGE = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()


def examples() -> list[str]:
    blocks = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    return [part.strip() for block in blocks for part in block.split(";\n") if part.strip()]


@pytest.fixture(scope="module")
def learned(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interface]:
    with interface(postgres, tmp_path_factory.mktemp("docs"), "interface_docs") as found:
        found.learn()
        yield found


def test_the_page_has_examples() -> None:
    assert len(examples()) > 25


@pytest.mark.parametrize("cursors", [psycopg.ClientCursor, psycopg.RawCursor])
def test_every_example_runs(learned: Interface, cursors: type[psycopg.Cursor]) -> None:
    with learned.connect(cursor_factory=cursors) as connection:
        for example in examples():
            cursor = connection.execute(example)
            if cursor.description:
                assert cursor.fetchall(), example


def test_every_function_is_on_the_page_with_its_right() -> None:
    words = {
        Access.READ: "SELECT on the table",
        Access.CHANGE: "ownership of the table",
        Access.SUPERUSER: "superuser",
    }
    for function in FUNCTIONS.values():
        assert PAGE.count(function.name) >= 2, function.name
        if function.access in words:
            row = next(
                line for line in PAGE.splitlines() if line.startswith("|") and f"`{function.name}`" in line
            )
            assert words[function.access] in row


def test_the_columns_of_the_statistics_are_those_declared() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| .* \|$", PAGE, re.MULTILINE)
    documented: list[tuple[str, str]] = []
    for names, types in rows:
        columns = re.findall(r"`(\w+)`", names)
        kinds = types.split(", ")
        if columns and kinds[0] in ("text", "int8", "float8", "jsonb"):
            documented += [(c, kinds[min(i, len(kinds) - 1)]) for i, c in enumerate(columns)]
    declared = FUNCTIONS["ruvector_learning_stats"].columns
    assert documented == [(column.name, column.type.removeprefix("pg_catalog.")) for column in declared]
