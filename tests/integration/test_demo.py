"""The demo from beginning to end, small; and what is left of it when it is interrupted or cannot start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.demo import main
from bench.demo.proxy import STATE
from bench.demo.results import AS_IT_COMES, PROXY
from bench.embedded import EmbeddedPostgres

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]

_RUN = (
    "import sys; from pathlib import Path; from bench.demo import main; "
    "sys.exit(main(fast=True, home=Path(sys.argv[1]), results=Path(sys.argv[2])))"
)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Return a directory of its own: another pytest run closes pytest's to the server's user."""
    with tempfile.TemporaryDirectory(prefix="ruvector-demo-test-") as directory:
        yield Path(directory)


@pytest.fixture
def started(home: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process of its own."""
    command = [sys.executable, "-c", _RUN, str(home), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        yield process
        process.kill()


def _processes_naming(text: str) -> list[str]:
    """Return the command lines of all processes that mention `text`, without this test's own demo process."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line and _RUN not in line:
                found.append(line)
    return found


def _wait_until(*, log: Path, words: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not (log.exists() and words in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{words!r} not in {log}"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_demo_leaves_no_process_behind(
    started: subprocess.Popen[str], home: Path, how: signal.Signals
) -> None:
    (home / "proxy.log").unlink(missing_ok=True)
    _wait_until(log=home / "proxy.log", words="learning about", process=started)
    assert len(_processes_naming(str(home))) >= 2  # PostgreSQL and the proxy's supervisor
    os.kill(started.pid, how)
    output, _ = started.communicate(timeout=60)
    assert started.returncode == (130 if how is signal.SIGINT else -how)
    assert how is signal.SIGKILL or "nothing is left running" in output
    deadline = time.monotonic() + 40
    while _processes_naming(str(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes_naming(str(home)) == []


def test_demo_ends_with_a_picture_and_figures_and_is_kept_where_that_is_wanted(
    home: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-c",
        _RUN.replace("fast=True", "fast=True, keep=True"),
        str(home),
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "Ctrl-C ends it" in " ".join(output.split()).rpartition("Still running")[2]:
                break
        else:
            pytest.fail(output)
        addresses = re.findall(r"http://127\.0\.0\.1:\d+/", output)
        assert len(addresses) == 3  # at the beginning, when it is there, and at the end
        _wait_for_more_statements(addresses[0] + "metrics")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert len(set(addresses)) == 1
    assert "still there from an earlier run" in output
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (home / STATE).is_dir()
    assert "## Verdicts" in (tmp_path / "demo.md").read_text()
    results = json.loads((tmp_path / "demo.json").read_text())
    assert len(results["categories"]) == 45
    assert results["learning_figures"]["queries adapted"] > 0
    assert results["filtered"][AS_IT_COMES]["incomplete"] > 0
    assert results["filtered"][PROXY]["recall"] > results["filtered"][AS_IT_COMES]["recall"]


def _wait_for_more_statements(url: str) -> None:
    def asked() -> float:
        with urllib.request.urlopen(url, timeout=30) as response:
            found = re.findall(r"^ruvector_statements_total (.*)$", response.read().decode(), re.MULTILINE)
        return float(found[0])

    before, deadline = asked(), time.monotonic() + 90
    while asked() <= before:
        assert time.monotonic() < deadline, "nobody asks"
        time.sleep(0.2)


def test_demo_beside_a_running_one_is_refused_in_plain_words(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedPostgres(home / "postgres") as other:
        assert main(fast=True, home=home, results=tmp_path) == 1
        said = " ".join(capsys.readouterr().out.split())  # wherever the console broke the line
        assert f"kill -INT {other.pid}" in said
        assert other.pid is not None


def test_proxy_that_ends_at_once_is_reported_with_its_log(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complaint = "import sys; print('port 1 is in use'); sys.exit(1)"
    monkeypatch.setattr("bench.demo.proxy.command", lambda: [sys.executable, "-c", complaint])
    assert main(fast=True, home=home, results=tmp_path) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "exit code 1" in output
    assert "port 1 is in use" in output
