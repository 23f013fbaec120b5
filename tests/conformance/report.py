"""The table on the terminal and the page in the docs: the same facts, without dates and durations.

What a suite's row says is kept below `harness.CACHE`, so that a run of one suite renews its row of the page
and leaves the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.conformance.exceptions import KnownException
from tests.conformance.harness import ADAPTED, ARM, STRAGGLERS, Difference, Outcomes, Suite, Way

_COLUMNS = ("suite", "version", "tests", "direct", "proxied", "forced", "skipped", "differences")


@dataclass(slots=True)
class Result:
    """How a suite went: `runs` is empty where it was not run, and `trouble` says why."""

    suite: Suite
    version: str = ""
    runs: Mapping[Way, Outcomes] = field(default_factory=dict)
    trouble: str = ""
    broken: bool = False  # it could be prepared, but not run to its end
    differences: Sequence[Difference] = ()  # those that count
    known: Sequence[KnownException] = ()  # those that are explained

    @property
    def failed(self) -> bool:
        """Tell whether the proxy could be told from the server."""
        return self.broken or bool(self.differences)

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table, as `_COLUMNS` say."""
        name = self.suite.name
        if not self.runs:
            return (
                name,
                self.version,
                *["-"] * 5,
                f"{'broken' if self.broken else 'not run'}: {self.trouble}",
            )
        passes = [str(_count(self.runs[way], "pass")) for way in Way]
        told = str(len(self.differences)) + (f" (+{len(self.known)} known)" if self.known else "")
        direct = self.runs[Way.DIRECT]
        tests = sum(1 for test in direct if test not in (ADAPTED, STRAGGLERS))
        return (name, self.version, str(tests), *passes, str(_count(direct, "skip")), told)


def _count(outcomes: Outcomes, status: str) -> int:
    return sum(
        1
        for test, outcome in outcomes.items()
        if outcome.status == status and test not in (ADAPTED, STRAGGLERS)
    )


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print what the docs will say, and every difference."""
    table = Table(title="passes: direct, through the proxy, with injection forced on")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _COLUMNS[2:7] else "left", overflow="fold")
    for result in results:
        table.add_row(*result.cells())
    console.print(table)
    for result in results:
        for difference in result.differences:
            console.print(
                f"{result.suite.name}: {difference}", style="bold red", markup=False, highlight=False
            )


_PAGE = """\
# Third-party suites through the proxy

Made by `make conformance`; do not edit. Every suite is run three ways, each against a server of its own:
**direct**, **proxied** (a dictated setting for every vector query that is recognised) and **forced** (that setting
for every SELECT that can carry one, vector query or not). What counts is not that everything passes, but that
the outcome is the same three times, test by test, and the same text where a suite produces one. Tests that
fail or are skipped everywhere do so for reasons of their own: another server version, another platform.

The setting is `{arm}`: it cannot change a result. After each suite no idle session may be left on the server, and in
forced mode a minimum of statements must really have been adapted; both count as tests that must come out alike.

{table}

{suites}

## Known exceptions

{exceptions}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """What the page says of a suite: plain text, so that it can be kept."""

    name: str
    title: str
    cells: Sequence[str]
    differences: Sequence[str]
    known: Sequence[str]


def row(result: Result) -> Row:
    """Return what the page says of a result."""
    name = result.suite.name
    return Row(
        name,
        result.suite.title,
        result.cells(),
        [f"{name}: {difference}" for difference in result.differences],
        [f"{name}, `{e.test}` ({', '.join(sorted(e.ways))}): {e.reason}." for e in result.known],
    )


def keep(kept: Row, directory: Path) -> None:
    """Keep a row for later pages."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{kept.name}.json").write_text(json.dumps(asdict(kept)))


def kept_rows(suites: Sequence[Suite], directory: Path) -> list[Row]:
    """Return the rows of these suites; one that was never run on this machine says so."""
    rows = []
    for suite in suites:
        path = directory / f"{suite.name}.json"
        if path.exists():
            rows.append(Row(**json.loads(path.read_text())))
        else:
            rows.append(row(Result(suite, trouble="not yet on this machine")))
    return rows


def page(rows: Sequence[Row]) -> str:
    """Return docs/conformance.md."""
    header = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"
    suites = _list(f"**{row.name}**: {row.title}." for row in rows)
    differences = _list(text for row in rows for text in row.differences)
    return _PAGE.format(
        arm=", ".join(ARM),
        table=header + "\n".join(f"| {' | '.join(row.cells)} |" for row in rows),
        suites=f"{suites}\n\n## Differences\n\n{differences}" if differences else suites,
        exceptions=_list(text for row in rows for text in row.known) or "None.",
    )


def _list(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)
