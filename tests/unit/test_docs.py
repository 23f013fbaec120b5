"""The pages: their links lead somewhere, and each command in them is run by a test or said not to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "helm/ruvector-proxy/README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

NOT_RUN = "not run by a test"
"""Said behind a command, or in the sentence before its block."""

RUN_WHOLE = {"docs/getting-started.md", "docs/operations.md"}
"""Their blocks are run as they stand by tests/integration/test_getting_started.py."""

PROGRAMS = "CHURN apt-get cat curl docker export git helm kill kubectl make openssl pip pipx psql python python3 ruvector-proxy"
COVERED = {
    r"make demo": ("tests/integration/test_demo.py", "main(fast=True"),
    r"make (test|lint)": (".ci/run", "make"),
    r"curl .*/relay-only": ("tests/integration/test_relay_only.py", "/relay-only"),
    r"ruvector-proxy bench --dsn": ("tests/integration/test_suite.py", '"bench", "--dsn", dsn'),
    r"ruvector-proxy serve": ("tests/integration/test_serve.py", '"proxy.main", "serve", "--config"'),
    r"ruvector-proxy check-config": ("tests/unit/test_cli.py", '"check-config", "--config"'),
    r"ruvector-proxy demo": ("tests/integration/test_demo.py", "main(fast=True"),
    r"ruvector-proxy explain": ("tests/integration/test_explain.py", '"--param"'),
    r"ruvector-proxy status": ("tests/integration/test_dashboard.py", '"status", "--json"'),
    r"ruvector-proxy top": ("tests/integration/test_dashboard.py", '"top", "--count"'),
    r"ruvector-proxy version": ("tests/unit/test_cli.py", 'run("version")'),
    r"ruvector-proxy patterns export": ("tests/unit/test_patterns_command.py", "export"),
    r"ruvector-proxy patterns import": ("tests/unit/test_patterns_command.py", "import"),
    r"ruvector-proxy patterns merge": ("tests/unit/test_patterns_command.py", "merge"),
}
"""What the commands of other pages begin with, and what runs the same: a file, and words that are in it."""


def commands(page: Path) -> list[str]:
    """Return the commands in a page's blocks (fenced as sh, or indented), without those said not to be run."""
    found = []
    text = page.read_text()
    for block in re.finditer(r"^```sh\n(.*?)^```$|^((?: {4}[^\n]*\n)+)", text, re.M | re.S):
        before = text[: block.start()].rstrip().rpartition("\n\n")[2]
        body = (block[1] or block[2]).replace("\\\n", " ")
        for line in body.splitlines():
            word = line.split()[0].split("=")[0] if line.split() else ""
            if word in PROGRAMS.split() and NOT_RUN not in line and NOT_RUN not in before:
                found.append(line.strip())
    return found


@pytest.mark.parametrize("package", ["learning", "proxy"])
def test_a_package_says_what_each_of_its_modules_is_for(package: str) -> None:
    words = set(re.findall(r"\w+", (ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert modules
    assert not modules - words


def test_there_are_commands_to_check() -> None:
    assert len({command for page in PAGES for command in commands(page)}) >= 20


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RUN_WHOLE])
def test_each_command_is_run_by_a_test_or_said_not_to_be(name: str) -> None:
    for command in commands(ROOT / name):
        where = next((where for words, where in COVERED.items() if re.match(words, command)), None)
        assert where is not None, f'{name}: "{command}" is run by no test, and does not say so ("{NOT_RUN}")'
        file, words = where
        assert words in (ROOT / file).read_text(), f"{file} does not run {command} any more"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{name}: {target}"


@pytest.mark.parametrize("name", NAMES)
def test_every_page_can_be_reached_from_the_readme(name: str) -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text())
        todo += [(page.parent / link).resolve() for link in links if ":" not in link]
        todo += [path / "README.md" for path in todo if path.is_dir()]
    assert ROOT / name in reached
