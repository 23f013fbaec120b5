"""Licences of everything that is installed with the product, into docs/licences.md: ``python -m tests.licences``.

Names come from the packages' own metadata (what each requires, by extra), licences from pip-licenses.  Only
permissive licences are permitted; what has another one is named below, with the reason why it may stay.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "licences.md"
PRODUCT = "ruvector-proxy"
PERMITTED = re.compile(
    r"(MIT(-0|-CMU)?|0?BSD(-[023]-Clause)?|3-Clause BSD|Apache(-| )(Software|2\.0)|PSF-2\.0|Python Software Foundation|"
    r"ISC|Zlib|CC0-1\.0|DFSG approved)( License)?( \(ISCL\))?"
)
STATED = {"atheris": "Apache-2.0", "hnswlib": "Apache-2.0", "pgserver": "Apache-2.0", "pysimdjson": "MIT"}
"""Packages whose metadata do not say; by the licence file that comes with them."""

OTHERS = {
    "hypothesis": "MPL-2.0: for tests only, unchanged",
    "pathspec": "MPL-2.0: comes with mypy, for development only, unchanged",
    "psycopg": "LGPL-3.0: for `ruvector-proxy demo`, `bench` and tests; the proxy and the learner do not import it",
    "psycopg-binary": "LGPL-3.0: as psycopg",
}
SECTIONS = {"Runtime": ("",), "Extras (demo, bench)": ("demo", "bench"), "Development": ("dev",)}


def closure(extras: Iterable[str]) -> set[str]:
    """Return the names of all installed packages that the product requires with these extras."""
    found: set[str] = set()
    todo = [(PRODUCT, extra) for extra in extras]
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        try:
            needed = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        found.add(canonicalize_name(name))
        for each in needed:
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                for wanted in ("", *each.extras):
                    pair = (canonicalize_name(each.name), wanted)
                    if pair not in seen:
                        seen.add(pair)
                        todo.append(pair)
    return found - {PRODUCT}


def licences() -> dict[str, str]:
    """Return the licence of each package that is installed."""
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--with-system", "--format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {canonicalize_name(row["Name"]): row["License"] for row in json.loads(done.stdout)}
    return {str(name): STATED.get(name, text) for name, text in found.items()}


def is_permitted(licence: str) -> bool:
    """Tell whether every part of an expression, or one of several offered, is permissive."""
    parts = re.split(r"\s+AND\s+|;\s*", licence)
    return all(any(PERMITTED.fullmatch(one.strip()) for one in re.split(r"\s+OR\s+", part)) for part in parts)


def sections() -> dict[str, dict[str, str]]:
    """Return names and licences by section; a package stands in the first one that needs it."""
    known, before, found = licences(), set[str](), {}
    for title, extras in SECTIONS.items():
        names = closure(extras) - before
        before |= names
        found[title] = {name: known[name] for name in sorted(names) if name in known}
    return found


def page() -> str:
    """Return docs/licences.md."""
    parts = [_HEAD, "Not permissive, and why they may stay:\n"]
    parts += [f"- {name}: {reason}" for name, reason in OTHERS.items()]
    for title, rows in sections().items():
        parts.append(f"\n## {title}\n\n| package | licence |\n|---|---|")
        parts += [f"| {name} | {licence} |" for name, licence in rows.items()]
    return "\n".join(parts) + "\n"


_HEAD = """\
# Licences

<!-- Written by "make licences"; do not change it by hand. -->

What is installed with the product, and under which licence (pip-licenses). A test fails where one is not permissive and
not named here.
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
