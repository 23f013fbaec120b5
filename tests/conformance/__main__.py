"""Run the suites: ``python -m tests.conformance [SUITE ...]``; what they are and what is compared: README.md.

Exits with 1 where the proxy could be told from the server.  A run of all suites writes docs/conformance.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from tests.conformance.exceptions import known_exception
from tests.conformance.harness import CACHE, ROOT, NotRunError, Suite, Way, compare, run_suite
from tests.conformance.report import Result, page, print_table
from tests.conformance.suites import SUITES

PAGE = ROOT / "docs" / "conformance.md"


def conform(suite: Suite, console: Console) -> Result:
    """Run one suite in all ways, at the same time, and compare."""
    started = time.monotonic()
    try:
        version = suite.prepare()
    except NotRunError as error:
        console.print(f"{suite.name}: not run: {error}", highlight=False, markup=False)
        return Result(suite, trouble=str(error))
    directory = CACHE / "runs" / suite.name
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with ThreadPoolExecutor(len(Way)) as threads:
            running = {way: threads.submit(run_suite, suite, way, directory / way) for way in Way}
            runs = {way: run.result() for way, run in running.items()}
    except Exception as error:  # whatever ended it, the other suites are still to be run
        console.print(f"{suite.name}: broken: {error!r}", style="bold red", highlight=False, markup=False)
        return Result(suite, version, trouble=repr(error), broken=True)
    differences = compare(runs)
    known = [known_exception(suite.name, difference) for difference in differences]
    result = Result(
        suite,
        version,
        runs,
        differences=[d for d, exception in zip(differences, known, strict=True) if exception is None],
        known=[exception for exception in known if exception is not None],
    )
    seconds = time.monotonic() - started
    verdict = f"{len(result.differences)} differences" if result.differences else "the same three times"
    console.print(f"{suite.name}: {verdict} ({seconds:.0f} s)", highlight=False, markup=False)
    return result


def main() -> int:
    """Run what was asked for; return the exit status."""
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(description="third-party suites, direct and through the proxy")
    parser.add_argument("suite", nargs="*", metavar="SUITE", help=f"one of: {', '.join(names)}; default: all")
    wanted = parser.parse_args().suite
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"no such suite: {', '.join(unknown)}; there are {', '.join(names)}")
    console = Console()
    results = [conform(suite, console) for suite in SUITES if not wanted or suite.name in wanted]
    print_table(results, console)
    if not wanted:
        PAGE.write_text(page(results))
        console.print(f"written: {PAGE.relative_to(ROOT)}", highlight=False)
    if any(result.failed for result in results):
        console.print(f"the runs' own files: {CACHE / 'runs'}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
