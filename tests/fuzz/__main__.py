"""Fuzz: ``python -m tests.fuzz [TARGET ...] (--runs N | --seconds S) [--jobs J]``.

Each target runs under atheris in a process of its own, from its corpus; new inputs stay in a directory of the
run (`--keep DIR` to choose it).  An input that breaks a promise is printed with how to replay it:
``python -m tests.fuzz TARGET --replay FILE``.  Exit status 1 where something was found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    parser.add_argument("--keep", type=Path, help="directory for new inputs and findings")
    parser.add_argument("--replay", type=Path, help="one input for one target, without atheris")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replay is not None:
        from tests.fuzz import targets

        getattr(targets, f"fuzz_{options.targets[0]}")(options.replay.read_bytes())
        return 0
    if options.inside:
        return inside(options.targets[0], options)
    directory = options.keep or Path(tempfile.mkdtemp(prefix="ruvector-fuzz-"))
    outcomes = [run(target, options, directory) for target in options.targets or names()]  # all of them
    return int(not all(outcomes))


def names() -> list[str]:
    """Return the names of all targets, without importing what is to be instrumented."""
    return sorted(path.name for path in CORPUS.iterdir() if path.is_dir())


def run(target: str, options: argparse.Namespace, directory: Path) -> bool:
    """Run one target in a process of its own; tell whether it found nothing."""
    limit = f"--seconds={options.seconds}" if options.seconds else f"--runs={options.runs or 10_000}"
    found = directory / target
    found.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        target,
        "--inside",
        limit,
        f"--seed={options.seed}",
        f"--keep={found}",
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    words = "nothing found" if done.returncode == 0 else f"FOUND something (status {done.returncode})"
    last = [line for line in done.stderr.splitlines() if line.startswith("#")][-1:]
    print(f"{target}: {words} in {time.monotonic() - started:.0f} s; {' '.join(last)}", flush=True)
    if done.returncode != 0:
        print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
        for path in sorted(found.glob("*-*")):
            print(f"replay with: python -m tests.fuzz {target} --replay {path}\n{path.read_bytes()!r}")
    return done.returncode == 0


def inside(target: str, options: argparse.Namespace) -> int:
    """Hand this process over to libFuzzer; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(_INSTRUMENTED), enable_loader_override=False):
        from tests.fuzz import targets
    found: Path = options.keep
    new = found / "corpus"
    new.mkdir(exist_ok=True)
    seeds = CORPUS / target
    limit = f"-max_total_time={options.seconds}" if options.seconds else f"-runs={options.runs}"
    arguments = [
        "fuzz",
        limit,
        f"-seed={options.seed}",
        "-max_len=4096",
        "-timeout=20",
        "-rss_limit_mb=1500",
        f"-artifact_prefix={found}/",
        str(new),
        *([str(seeds)] if seeds.is_dir() else []),
    ]
    atheris.Setup(arguments, getattr(targets, f"fuzz_{target}"))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
