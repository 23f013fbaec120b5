"""Fuzz: ``python -m tests.fuzz [TARGET ...] (--runs N | --seconds S) [--jobs J] [--write docs/fuzzing.md]``.

Each target runs under atheris in a process of its own, from its corpus; new inputs stay in a directory of the
run (`--keep DIR` to choose it).  Seconds are those of a processor, whatever else the machine does.  An input that
breaks a promise is printed with how to replay it: ``python -m tests.fuzz TARGET --replay FILE``.  Exit status 1
where something was found.  What was spent on each target is added to what the page says of earlier runs.

``--merge DIR`` takes what such a run has found into the corpus: the inputs that reach code which those that are
there do not, the shortest first.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent.parent
CORPUS = Path(__file__).parent / "corpus"
_INSTRUMENTED = ("proxy.wire", "proxy.sql", "proxy.session")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--runs", type=int, help="inputs to try for each target")
    parser.add_argument("--seconds", type=int, help="or seconds to spend on each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--keep", type=Path, help="directory for new inputs and findings")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument(
        "--merge", type=Path, help="take what a run has kept in this directory into the corpus"
    )
    parser.add_argument("--replay", type=Path, help="one input for one target, without atheris")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay is not None:
        from tests.fuzz import targets

        getattr(targets, f"fuzz_{options.targets[0]}")(options.replay.read_bytes())
        return 0
    if options.inside:
        return inside(options.targets[0], options)
    chosen = options.targets or names()
    if options.merge is not None:
        for target in chosen:
            merge(target, options.merge / target / "corpus")
        return 0
    directory = options.keep or Path(tempfile.mkdtemp(prefix="ruvector-fuzz-"))
    writing = Lock()

    def one(target: str) -> Run:
        result = run(target, options, directory)
        if options.write:
            with writing:  # at once, so that a run that is ended early counts as well
                text = options.write.read_text(encoding="utf-8") if options.write.exists() else ""
                options.write.write_text(page([*figures(text), result]), encoding="utf-8")
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(one, chosen))  # all of them
    print(
        f"in total {sum(each.cpu for each in runs):.0f} CPU seconds, {sum(each.executions for each in runs):,} runs"
    )
    return int(any(each.findings for each in runs))


def names() -> list[str]:
    """Return the names of all targets, without importing what is to be instrumented."""
    return sorted(path.name for path in CORPUS.iterdir() if path.is_dir())


@dataclass(frozen=True)
class Run:
    """How the run of one target went; `cpu` in seconds, start included."""

    target: str
    cpu: float
    executions: int
    covered: int  # edges, and other things that libFuzzer tells apart
    findings: int


def run(target: str, options: argparse.Namespace, directory: Path) -> Run:
    """Run one target in a process of its own, and say what it found."""
    limit = f"--seconds={options.seconds}" if options.seconds else f"--runs={options.runs or 10_000}"
    found = directory / target
    found.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status, cpu, text = _inside(target, found, limit, f"--seed={options.seed}")
    executions = re.findall(r"stat::number_of_executed_units:\s+(\d+)", text) or re.findall(
        r"^#(\d+)", text, re.M
    )
    covered = re.findall(r"ft: (\d+)", text)
    findings = sorted(path for path in found.glob("*-*") if path.is_file())
    result = Run(
        target,
        cpu,
        int(executions[-1]) if executions else 0,
        int(covered[-1]) if covered else 0,
        max(len(findings), int(status != 0)),
    )
    words = f"FOUND something (status {status})" if status else "nothing found"
    print(
        f"{target}: {words} in {cpu:.0f} CPU seconds ({time.monotonic() - started:.0f} s), "
        f"{result.executions:,} runs, {result.covered:,} features",
        flush=True,
    )
    if status:
        print(text[-9000:])
        for path in findings:
            print(f"replay with: python -m tests.fuzz {target} --replay {path}\n{path.read_bytes()!r}")
    return result


def _inside(target: str, keep: Path, *arguments: str) -> tuple[int, float, str]:
    """Run this program with --inside; return its status, its CPU seconds and what it said."""
    command = [sys.executable, "-m", "tests.fuzz", target, "--inside", f"--keep={keep}", *arguments]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # nobody else is to wait for it
        said.seek(0)
        text = said.read().decode(errors="replace")
    return process.returncode, usage.ru_utime + usage.ru_stime, text


def merge(target: str, found: Path) -> None:
    """Keep in the corpus what reaches something, the shortest of those that reach the same."""
    kept = CORPUS / target
    with tempfile.TemporaryDirectory() as scratch:
        status, _, text = _inside(target, Path(scratch), "--runs=0", f"--merge={found}")
        if status:
            raise SystemExit(f"{target}: the merge failed\n{text[-3000:]}")
        chosen = [path.read_bytes() for path in (Path(scratch) / "corpus").iterdir()]
    if not chosen:
        raise SystemExit(f"{target}: the merge chose nothing, so the corpus stays as it is\n{text[-3000:]}")
    before = len(list(kept.iterdir()))
    for path in kept.iterdir():
        path.unlink()
    for content in chosen:
        (kept / hashlib.sha1(content, usedforsecurity=False).hexdigest()[:12]).write_bytes(content)
    print(f"{target}: {len(chosen)} inputs, {sum(map(len, chosen)):,} bytes; there were {before}")


def inside(target: str, options: argparse.Namespace) -> int:
    """Hand this process over to libFuzzer; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(_INSTRUMENTED), enable_loader_override=False):
        from tests.fuzz import targets
    fuzz = getattr(targets, f"fuzz_{target}")
    found: Path = options.keep
    new = found / "corpus"
    new.mkdir(exist_ok=True)
    others = [path for path in (CORPUS / target, options.merge) if path is not None and path.is_dir()]
    again = _again(target, found)
    arguments = [
        str(again),
        f"-runs={-1 if options.seconds else options.runs}",
        f"-seed={options.seed}",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=1500",
        "-print_final_stats=1",
        f"-merge={int(options.merge is not None)}",
        f"-artifact_prefix={found}/",
        str(new),
        *map(str, others),
    ]
    if len(options.targets) > 1:  # libFuzzer has started this process, to merge in it
        arguments = [str(again), *options.targets[1:]]
    until = time.process_time() + options.seconds if options.seconds else float("inf")

    def limited(data: bytes) -> None:
        fuzz(data)
        if time.process_time() > until:
            os.kill(os.getpid(), signal.SIGUSR1)  # libFuzzer's signal to end well

    atheris.Setup(arguments, limited)
    atheris.Fuzz()
    return 0


def _again(target: str, keep: Path) -> Path:
    """Return a program that starts this one with libFuzzer's arguments: it merges in processes of its own."""
    script = keep / "again"
    command = shlex.join([sys.executable, "-m", "tests.fuzz", "--inside", f"--keep={keep}", "--", target])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return script


def figures(text: str) -> list[Run]:
    """Return what a page says."""
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", text, re.M)
    numbers = [[int(number.replace(",", "")) for number in row[1:]] for row in rows]
    return [Run(row[0], *each) for row, each in zip(rows, numbers, strict=True)]


def page(runs: list[Run]) -> str:
    """Return docs/fuzzing.md."""
    together: dict[str, Run] = {}
    for each in sorted(runs, key=lambda run: run.target):
        seen = together.get(each.target, Run(each.target, 0.0, 0, 0, 0))
        together[each.target] = Run(
            each.target,
            seen.cpu + each.cpu,
            seen.executions + each.executions,
            max(seen.covered, each.covered),
            seen.findings + each.findings,
        )
    rows = "\n".join(
        f"| {each.target} | {each.cpu:,.0f} | {each.executions:,} | {each.covered:,} | {each.findings:,} |"
        for each in together.values()
    )
    return _PAGE.format(
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        rows=rows,
        cpu=sum(each.cpu for each in runs),
        executions=sum(each.executions for each in runs),
        findings=sum(each.findings for each in runs),
    )


_PAGE = """\
# Fuzzing

<!-- Written by "make fuzz"; do not change it by hand: each run adds to the figures. -->

Every decoder of the wire protocol, the recogniser of SQL and the session between client and server are fuzzed, guided
by coverage (atheris, libFuzzer). What each target promises is written beside it in `tests/fuzz/targets.py`: no decoder
raises anything but a protocol violation, what it returns encodes to the very bytes that it came from, and the session
changes nothing that it need not change. The inputs in `tests/fuzz/corpus` are tried again with every change (`make unit`),
and a short run is made of each target.

All runs until {date}: **{cpu:,.0f} CPU seconds, {executions:,} inputs tried, {findings} findings.**

| target | CPU seconds | inputs tried | features reached | findings |
|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    sys.exit(main())
