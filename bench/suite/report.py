"""A run in words: lines for the terminal, ``results.md`` beside the pictures, and the page of the docs.

The page leads with where the proxy does not help.  It is made from ``results.json`` alone, and a test fails
where it differs from what that file gives: no figure on it was typed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.suite.records import NOISY, PASS, SHORT, Claim, Interval, Line, Ratio, Report, Result

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
PICTURES = "../bench/results/"
HELPS = 0.97
"""Below this the whole interval of a ratio has to lie for the proxy to count as a help."""
_MARKS = {PASS: "pass", SHORT: "**falls short**", NOISY: "too noisy to say"}
_SHOWN_STATICS = 4


# -- terminal ----------------------------------------------------------------------------------------------
def tell(result: Result, console: Console) -> None:
    """Print a scenario's claims."""
    console.print(f"\n{result.title}", style="bold", highlight=False)
    if result.error:
        console.print(f"  failed: {result.error}", style="bold red", markup=False, highlight=False)
    for claim in result.claims:
        console.print(
            f"  {claim.verdict:<17}{claim.text}: {_figure(claim.found)}, wanted {claim.wanted}",
            highlight=False,
        )
    for note in result.notes:
        console.print(f"  {note}", style="dim", highlight=False, markup=False)
    console.print()


def tell_verdicts(report: Report, console: Console) -> None:
    """Print how many claims pass, and those that do not."""
    claims = [(result, claim) for result in report.results for claim in result.claims]
    counts = {
        verdict: sum(claim.verdict == verdict for _, claim in claims) for verdict in (PASS, SHORT, NOISY)
    }
    console.print(
        ", ".join(f"{verdict}: {count}" for verdict, count in counts.items())
        + f"; {report.seconds / 60:.0f} minutes",
        style="bold",
        highlight=False,
    )
    for result, claim in claims:
        if claim.verdict != PASS:
            console.print(
                f"  {claim.verdict}: {result.scenario}: {claim.text}: {_figure(claim.found)}, wanted "
                f"{claim.wanted}",
                highlight=False,
            )


def lines_table(result: Result) -> Table:
    """Return a scenario's systems as a table for the terminal."""
    shown = Table(title=result.title, title_justify="left")
    for heading in ("system", "recall", "mean ms", "p50", "p99", "incomplete"):
        shown.add_column(heading, justify="left" if heading == "system" else "right")
    for row in _rows(result.lines):
        shown.add_row(*row)
    return shown


# -- Markdown ----------------------------------------------------------------------------------------------
def markdown(report: Report) -> str:
    """Return everything, in full: ``results.md``."""
    parts = ["# Results", _environment(report), verdicts(report), published(report)]
    parts += [section(result, "") for result in report.results]
    return "\n\n".join(part for part in parts if part) + "\n"


def page(report: Report) -> str:
    """Return the page of the docs."""
    parts = [
        _OPENING,
        _environment(report),
        "## Where the proxy does not help\n\n" + not_helping(report),
        "## Where it helps\n\n" + helping(report),
        "## The plan's published targets\n\n" + (published(report) or "Not measured in this run."),
        "## Every scenario",
        *(section(result, PICTURES) for result in report.results),
        _PROTOCOL,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_page(report: Report) -> None:
    """Write the page of the docs."""
    PAGE.write_text(page(report))


def picture(result: Result) -> str:
    """Return the name of a result's picture."""
    return "".join(c if c.isalnum() else "-" for c in result.scenario).replace("--", "-") + ".png"


def not_helping(report: Report) -> str:
    """Return ratios that are not clearly below one, claims that fall short, and what could not be said."""
    parts = []
    even = sorted(_ratios(report, helps=False), key=lambda ratio: -ratio.found.value)
    if even:
        parts.append(
            "Here the best single setting, tuned by hand, is as good at the recall that the proxy "
            "reached, or better:\n\n" + _ratio_table(even)
        )
    for verdict, words in (
        (SHORT, "What falls short of what was claimed:"),
        (NOISY, "What this run was too noisy to say:"),
    ):
        rows = [
            (result.title, claim.text, claim.wanted, _figure(claim.found))
            for result in report.results
            for claim in result.claims
            if claim.verdict == verdict
        ]
        if rows:
            parts.append(f"{words}\n\n" + table(("scenario", "claim", "wanted", "found"), rows, left=2))
    failed = [f"- {result.scenario}: {result.error}" for result in report.results if result.error]
    if failed:
        parts.append("Scenarios that failed:\n\n" + "\n".join(failed))
    return "\n\n".join(parts) or "Nothing of the kind was found in this run."


def helping(report: Report) -> str:
    """Return the ratios that are below one with their whole interval."""
    found = sorted(_ratios(report, helps=True), key=lambda ratio: ratio.found.value)
    if not found:
        return "Nowhere in this run."
    return (
        "Mean latency through the proxy, its own time included, over that of the cheapest static "
        "settings at the recall "
        "that the proxy reached:\n\n" + _ratio_table(found)
    )


def published(report: Report) -> str:
    """Return the table of the published targets; empty where it was not measured."""
    found = next((result for result in report.results if result.scenario == "published targets"), None)
    if found is None:
        return ""
    return _claims(found.claims) + "\n\n" + " ".join(found.notes)


def verdicts(report: Report) -> str:
    """Return how many claims there are of each verdict."""
    claims = [claim for result in report.results for claim in result.claims]
    return ", ".join(f"{sum(c.verdict == v for c in claims)} {words}" for v, words in _MARKS.items()) + "."


def section(result: Result, pictures: str) -> str:
    """Return one scenario."""
    parts = [f"### {result.title}", result.question]
    if result.error:
        parts.append(f"**Failed:** {result.error}")
    if result.panels:
        parts.append(f"![{result.title}]({pictures}{picture(result)})")
    if result.claims:
        parts.append(_claims(result.claims))
    if result.lines:
        parts.append(_lines(result.lines, everything=not pictures))
    parts += result.notes
    facts = [f"{name}: {value}" for name, value in result.facts.items()]
    if result.noise is not None:
        facts.append(f"two identical systems differed by up to {result.noise:.1%}")
    if facts:
        parts.append("; ".join(facts) + ".")
    return "\n\n".join(part for part in parts if part)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are words."""
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append("|" + "|".join("---" if i < left else "--:" for i in range(len(headings))) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _environment(report: Report) -> str:
    facts = "; ".join(f"{name} {value}" for name, value in report.environment.items())
    minutes = f"{report.seconds / 60:.0f} minutes"
    return f"{facts}; the run took {minutes}. Compare within this run, not across machines."


def _ratios(report: Report, *, helps: bool) -> list[Ratio]:
    every = [ratio for result in report.results for ratio in result.ratios]
    return [ratio for ratio in every if (ratio.found.high < HELPS) is helps]


def _ratio_table(ratios: Sequence[Ratio]) -> str:
    rows = [
        (
            ratio.name,
            f"{ratio.found.value:.2f}",
            f"{ratio.found.low:.2f} to {ratio.found.high:.2f}",
            ratio.own_time,
        )
        for ratio in ratios
    ]
    headings = (
        "scenario",
        "of the best static setting",
        "95 % of the bootstrap",
        "the proxy's own time in it",
    )
    return table(headings, rows)


def _claims(claims: Sequence[Claim]) -> str:
    rows = [(claim.text, claim.wanted, _figure(claim.found), _MARKS[claim.verdict]) for claim in claims]
    return table(("claim", "wanted", "found", "verdict"), rows)


def _lines(lines: Sequence[Line], everything: bool) -> str:
    shown = [line for line in lines if everything or line.kind in ("default", "derived", "proxy")]
    return table(("system", "recall", "mean ms", "p50", "p99", "incomplete"), _rows(shown))


def _rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    return [
        (
            line.name,
            f"{line.recall.value:.4f}",
            f"{line.mean_ms:.2f}",
            f"{line.p50_ms:.2f}",
            f"{line.p99_ms:.2f}",
            f"{line.short:,}",
        )
        for line in lines
    ]


def _figure(found: Interval) -> str:
    if found.low == found.high:
        return f"{found.value:.4g}"
    digits = 4 if found.value < 1 else 2
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


_OPENING = """\
# Benchmarks

`make bench` measures everything on this page in about twenty-five minutes on two processors that have nothing
else to do, and writes it anew. `bench/results/` has all figures as JSON and Markdown and all pictures.
`ruvector-proxy bench` makes the same comparison on a table of your own, without writing to your database."""

_PROTOCOL = """\
## How it is measured

- *Data.* Real embeddings (bench/data/README.md); filter columns and longer vectors are constructed from them
  (bench/suite/tables.py). `python -m bench.suite --data FILE` takes your own: npy, fvecs, hdf5 of
  ann-benchmarks, parquet.
- *Queries.* Those that the proxy learns from, those that static settings are tuned by, and those that
  everything is measured with are disjoint, but where the subject is that queries repeat themselves.
- *Systems take turns*, fifteen queries at a time in an order that rotates, each on a connection of its own,
  with its statement prepared: noise and warm caches hit all of them alike. Latency is what the application
  sees, so the proxy's own time is in it. All connect in the same way, by unix socket, and so does the proxy.
- *Recall* is counted by distance, against exact answers computed outside the server; ties are no misses,
  missing rows are.
- *Learning and measuring are apart.* The proxy that is measured has learned from live traffic, was started
  again with what it knows, and may measure nothing more; what learning costs is a section of its own. New
  policies are put on trial while learning, and not while measuring (`canary_share = 0`).
- *At equal recall:* the curve of the static settings, interpolated, at the recall that the proxy reached.
- *Derived systems* are computed from measured ones: the best static setting, tuned (on the tuning queries) or
  known afterwards (on the test queries themselves, which nobody can do); the best for each filter value, k or
  table, chosen on other queries; and an oracle that knows every query's recall under every setting.
- *Verdicts.* A bootstrap over blocks of queries, common to all systems, gives each figure an interval of 95
  %. A claim passes where the whole interval keeps the limit, falls short where none of it does, and else the
  run was too noisy to say. A target of recall counts as kept with a margin of 0.005. `python -m bench.suite
  --compare A.json B.json` tells whether two runs contradict each other.
- *Noise.* One static setting runs twice, on two connections; how far both differ is said everywhere."""
