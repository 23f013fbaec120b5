"""A short fuzz of every target, always the same number of runs, and every input of the corpus once more."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzzing
from tests.fuzz.__main__ import CORPUS, ROOT, Run, figures, names, page
from tests.fuzz.targets import TARGETS, fuzz_planted

RUNS = {"session": 100, "recogniser": 300}
needs_atheris = pytest.mark.skipif(
    find_spec("atheris") is None, reason="atheris has no wheel for this Python or platform"
)


def test_every_target_has_a_corpus() -> None:
    assert set(names()) == set(TARGETS)
    assert all(any((CORPUS / name).iterdir()) for name in names())


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_corpus_holds_breaks_no_promise(name: str) -> None:
    for path in sorted((CORPUS / name).iterdir()):
        TARGETS[name](path.read_bytes())


@needs_atheris
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    """Two targets at a time: most of it is the start of a process."""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda name: fuzz(name, RUNS.get(name, 1000), tmp_path), TARGETS))
    assert not [process.stdout for process in done if process.returncode != 0]


@needs_atheris
@pytest.mark.slow
def test_a_planted_fault_is_found_and_can_be_replayed(tmp_path: Path) -> None:
    done = fuzz("planted", 200_000, tmp_path)
    assert done.returncode == 1
    (finding,) = (tmp_path / "planted").glob("crash-*")
    assert str(finding) in done.stdout
    with pytest.raises(AssertionError):
        fuzz_planted(finding.read_bytes())


@needs_atheris
@pytest.mark.slow
def test_a_merge_keeps_what_reaches_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, found = tmp_path / "copying", tmp_path / "found"
    kept.mkdir()
    found.mkdir()
    (kept / "old").write_bytes(b"what the corpus held before")
    for path in (CORPUS / "copying").iterdir():
        (found / path.name).write_bytes(path.read_bytes())
        (found / f"{path.name}-again").write_bytes(path.read_bytes())
    monkeypatch.setattr(fuzzing, "CORPUS", tmp_path)
    fuzzing.merge("copying", found)
    after = {path.read_bytes() for path in kept.iterdir()}
    assert 0 < len(after) == len(list(kept.iterdir()))
    assert after <= {path.read_bytes() for path in found.iterdir()}


def test_the_page_adds_up_what_was_spent() -> None:
    first = page([Run("startup", 60.0, 1000, 70, 0), Run("session", 3000.0, 20_000, 4000, 1)])
    second = page([*figures(first), Run("startup", 40.0, 500, 80, 0)])
    assert figures(second) == [Run("session", 3000, 20_000, 4000, 1), Run("startup", 100, 1500, 80, 0)]
    assert "**3,100 CPU seconds, 21,500 inputs tried, 1 findings.**" in second


def test_the_page_has_nothing_but_targets() -> None:
    assert {run.target for run in figures((ROOT / "docs" / "fuzzing.md").read_text())} <= set(TARGETS)


def fuzz(name: str, runs: int, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", name, "--runs", str(runs), "--keep", str(directory)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
