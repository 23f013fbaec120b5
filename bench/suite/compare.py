"""Do two runs give the same verdicts?

Two verdicts of one claim *agree* where they are the same, *contradict* each other where one run passes and
the other falls short, and else one of the runs was too noisy to say.  Only a contradiction is an error: an
interval was narrower than what happens between two runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.suite.records import NOISY, Claim, Report


@dataclass(frozen=True)
class Pair:
    """One claim in two runs."""

    scenario: str
    first: Claim
    second: Claim

    @property
    def relation(self) -> str:
        """How the verdicts stand to each other."""
        if self.first.verdict == self.second.verdict:
            return "same"
        return "one too noisy" if NOISY in (self.first.verdict, self.second.verdict) else "CONTRADICTION"


def pairs(first: Report, second: Report) -> list[Pair]:
    """Return the claims that both runs made; figures within a claim's words, in parentheses, may differ."""

    def claims(report: Report) -> dict[tuple[str, str], Claim]:
        return {
            (result.scenario, re.sub(r"\s*\([^)]*\)", "", claim.text)): claim
            for result in report.results
            for claim in result.claims
        }

    other = claims(second)
    return [Pair(key[0], claim, other[key]) for key, claim in claims(first).items() if key in other]


def main(first: Path, second: Path) -> int:
    """Print what differs; return 1 where verdicts contradict each other."""
    found = pairs(Report.load(first), Report.load(second))
    table = Table("scenario", "claim", "wanted", "first", "second", "")
    for pair in found:
        if pair.relation != "same":
            figures = [
                f"{c.found.value:.3f} ({c.found.low:.3f} to {c.found.high:.3f})"
                for c in (pair.first, pair.second)
            ]
            table.add_row(pair.scenario, pair.first.text, pair.first.wanted, *figures, pair.relation)
    console = Console(width=180)
    counts = {
        relation: sum(pair.relation == relation for pair in found)
        for relation in ("same", "one too noisy", "CONTRADICTION")
    }
    if table.row_count:
        console.print(table)
    console.print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    return 1 if counts["CONTRADICTION"] else 0
