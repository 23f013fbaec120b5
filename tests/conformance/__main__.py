"""Run the suites: ``python -m tests.conformance [SUITE ...]``; what they are and what is compared: README.md.

Exits with 1 where the proxy could be told from the server.  docs/conformance.md gets what is new.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from tests.conformance.exceptions import known_exception
from tests.conformance.harness import CACHE, ROOT, NotRunError, Outcomes, Suite, Way, compare, run_suite
from tests.conformance.report import Result, keep, kept_rows, page, print_table, row
from tests.conformance.suites import SUITES

PAGE = ROOT / "docs" / "conformance.md"
ROWS = CACHE / "rows"


def conform(suite: Suite, console: Console) -> Result:
    """Run one suite in all ways, and compare.

    Many tests have a race with the clock in them.  So where something differs, everything is run a second
    time, and what counts is what differs both times; the rest is reported, but is no finding.
    """
    started = time.monotonic()
    try:
        version = suite.prepare()
    except NotRunError as error:
        _say(console, f"{suite.name}: not run: {error}")
        return Result(suite, trouble=str(error))
    try:
        runs = run_all_ways(suite)
        differences = compare(runs)
        if any(known_exception(suite.name, difference) is None for difference in differences):
            for difference in differences:
                _say(console, f"{suite.name}: to be repeated: {difference}", "yellow")
            runs = run_all_ways(suite)
            before = {difference.test for difference in differences}
            differences = [difference for difference in compare(runs) if difference.test in before]
    except Exception as error:  # whatever ended it, the other suites are still to be run
        _say(console, f"{suite.name}: broken: {error!r}", "bold red")
        return Result(suite, version, trouble=repr(error), broken=True)
    known = [known_exception(suite.name, difference) for difference in differences]
    result = Result(
        suite,
        version,
        runs,
        differences=[d for d, exception in zip(differences, known, strict=True) if exception is None],
        known=[exception for exception in known if exception is not None],
    )
    verdict = f"{len(result.differences)} differences" if result.differences else "the same three times"
    _say(console, f"{suite.name}: {verdict} ({time.monotonic() - started:.0f} s)")
    return result


def run_all_ways(suite: Suite) -> dict[Way, Outcomes]:
    """Run a suite in all ways at the same time."""
    directory = CACHE / "runs" / suite.name
    shutil.rmtree(directory, ignore_errors=True)
    with ThreadPoolExecutor(len(Way)) as threads:
        running = {way: threads.submit(run_suite, suite, way, directory / way) for way in Way}
        return {way: run.result() for way, run in running.items()}


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, highlight=False, markup=False)


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
    results = []
    for suite in SUITES:
        if not wanted or suite.name in wanted:
            results.append(conform(suite, console))
            keep(row(results[-1]), ROWS)
    print_table(results, console)
    PAGE.write_text(page(kept_rows(SUITES, ROWS)))
    _say(console, f"written: {PAGE.relative_to(ROOT)}")
    if any(result.failed for result in results):
        console.print(f"the runs' own files: {CACHE / 'runs'}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
