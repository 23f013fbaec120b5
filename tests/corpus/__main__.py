"""Run it: ``python -m tests.corpus [DIRECTORY] [--generated N] [--seed N]``.

DIRECTORY holds .sql files; left out, it is the regression suite in PostgreSQL's source, which Debian's package
manager downloads.  Exit status 1 where a text does not pass byte for byte.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tests.corpus.passing import Lane, adapters, check, mutated, texts


def scripts(directory: Path | None) -> list[Path]:
    """Return the files."""
    if directory is None:
        from tests.conformance import sources

        directory = sources.source() / "src/test/regress/sql"
    return sorted(directory.glob("**/*.sql"))


def run(files: Iterable[Path], generated: int, seed: int) -> tuple[int, int, list[str]]:
    """Return how many texts passed, how many are for the proxy, and those that did not pass."""
    known: list[bytes] = []
    failed: list[str] = []
    for file in files:
        found = list(texts(file.read_bytes()))
        known += found
        for adapter in adapters():
            lane = Lane(adapter)
            for text in found:  # one session for all, so that what a text does to it shows
                statement = adapter.recognise(text, lane.session._scope)
                if statement.vector is not None or statement.rewritten is not None:
                    continue
                try:
                    lane.query(text)
                except AssertionError:
                    failed.append(f"{file.name}, in order: {text[:200]!r}")
                    lane = Lane(adapter)
    dice = random.Random(seed)
    passed = own = 0
    both = adapters()
    for text in [*known, *mutated(known, generated, seed)]:
        for adapter in both:
            try:
                left_out = check(text, adapter, dice)
            except AssertionError:
                failed.append(repr(text[:300]))
            else:
                own += left_out
                passed += not left_out
    return passed, own, failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--generated", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    files = scripts(options.directory)
    started = time.monotonic()
    passed, own, failed = run(files, options.generated, options.seed)
    print(
        f"{len(files)} files and {options.generated} generated texts: {passed} passed byte for byte, without a policy and "
        f"with one; {own} are for the proxy; {len(failed)} did not pass; {time.monotonic() - started:.0f} s"
    )
    for each in failed[:20]:
        print(f"  {each}")
    return int(bool(failed) or not passed)


if __name__ == "__main__":
    sys.exit(main())
