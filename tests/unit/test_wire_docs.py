"""The table in docs/wire.md that names a test for every rule of the wire names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "wire.md").read_text().partition("## Each rule")[2]
NAMED = re.compile(r"`(tests/[^`:]+)::(\w+)`")


def defined_in(path: Path) -> set[str]:
    """Return the names of all functions and classes of a file."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, definitions)}


def test_every_test_named_exists() -> None:
    named = NAMED.findall(TABLE)
    assert len(named) > 40
    missing = [(file, name) for file, name in named if name not in defined_in(ROOT / file)]
    assert missing == []


def test_every_rule_names_a_test() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "**" not in line]
    assert [row for row in rows[1:] if "`tests/" not in row] == []
