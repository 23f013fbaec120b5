"""The demo's words: tables and verdicts for the terminal, the same as Markdown, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.demo.measurement import Summary
from bench.demo.results import AS_IT_COMES, BEST_ARM, BEST_STATIC, PROXY, PSYCOPG, RELAXED, Category, Results

_COLUMNS = ("", "recall", "rows", "p50", "p99", "mean", "short", "queries")
_SHOWN_SETTINGS = 6
_LEGEND = "latency in ms; short: queries that returned fewer rows than exist, up to 10"


def tell(results: Results, console: Console) -> None:
    """Print tables and verdicts."""
    for title, summaries in _systems(results):
        console.print(_table(title, summaries))
    console.print(_category_table(results))
    console.print(_LEGEND + "\n", style="dim", highlight=False)
    console.print(_choices(results) + "\n", style="dim", highlight=False)
    verdicts = Table.grid(padding=(0, 2))
    for verdict in results.verdicts:
        mark = "[bold green]PASS[/]" if verdict.kept else "[bold red]FALLS SHORT[/]"
        verdicts.add_row(mark, f"{verdict.promise}\n[dim]{verdict.figures}[/]")
    console.print(verdicts)


def write(results: Results, directory: Path) -> None:
    """Write ``demo.json`` and ``demo.md`` to `directory`."""
    (directory / "demo.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    (directory / "demo.md").write_text(markdown(results))


def markdown(results: Results) -> str:
    """Return tables and verdicts as Markdown."""
    lines = ["# ruvector-proxy demo", "", _environment(results), "", "![The picture](demo.png)"]
    for title, summaries in _systems(results):
        rows = [_cells(label, summary) for label, summary in summaries]
        lines += ["", f"## {title}", "", *_markdown_table(_COLUMNS, rows)]
    lines += ["", _LEGEND]
    lines += ["", "## Filtered, by size of the category: means of n categories", ""]
    lines += _markdown_table(_GROUP_COLUMNS, [_group_cells(*group) for group in _groups(results.categories)])
    lines += ["", _choices(results), "", "## Verdicts", ""]
    lines += [
        f"- **{'PASS' if v.kept else 'FALLS SHORT'}** {v.promise}: {v.figures}" for v in results.verdicts
    ]
    return "\n".join(lines) + "\n"


def _systems(results: Results) -> list[tuple[str, list[tuple[str, Summary]]]]:
    plain, filtered = results.unfiltered, results.filtered
    return [
        (
            "Filtered: WHERE category = $1 ORDER BY embedding <=> $2 LIMIT 10",
            [
                ("(a) as it comes, ef=40", filtered[AS_IT_COMES]),
                (f"(b) best by hand: {results.static_filtered}", filtered[BEST_STATIC]),
                ("(c) relaxed_order scan", filtered[RELAXED]),
                ("(d) through the proxy, learned", filtered[PROXY]),
                ("    the same with psycopg", filtered[PSYCOPG]),
                ("    best of each category", filtered[BEST_ARM]),
            ],
        ),
        (
            "Unfiltered: ORDER BY embedding <=> $1 LIMIT 10",
            [
                ("(a) as it comes, ef=40", plain[AS_IT_COMES]),
                (f"(b) best by hand: {results.static_unfiltered}", plain[BEST_STATIC]),
                ("(c) relaxed_order scan", plain[RELAXED]),
                ("(d) through the proxy, learned", plain[PROXY]),
                ("    the same with psycopg", plain[PSYCOPG]),
            ],
        ),
    ]


def _cells(label: str, s: Summary) -> tuple[str, ...]:
    figures = (f"{s.recall:.4f}", f"{s.rows:.2f}", f"{s.p50_ms:.2f}", f"{s.p99_ms:.2f}", f"{s.mean_ms:.2f}")
    return (label, *figures, f"{s.incomplete:,}", f"{s.queries:,}")


def _empty_table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )


def _table(title: str, summaries: Iterable[tuple[str, Summary]]) -> Table:
    table = _empty_table(title)
    for i, column in enumerate(_COLUMNS[:-1]):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for label, summary in summaries:
        style = "bold green" if label.startswith("(d)") else "dim" if label.startswith(" ") else ""
        table.add_row(*_cells(label, summary)[:-1], style=style)
    return table


_GROUP_COLUMNS = (
    "rows in it",
    "n",
    "(a) recall",
    "p50",
    "(c) recall",
    "p50",
    "(d) recall",
    "p50",
    "best",
)
_GROUPS = ((0, 100), (100, 500), (500, 1_000), (1_000, 2_000), (2_000, 1 << 60))


def _groups(categories: list[Category]) -> list[tuple[str, list[Category]]]:
    groups = []
    for low, high in _GROUPS:
        members = [c for c in categories if low <= c.rows < high]
        if members:
            groups.append((f"{members[0].rows:,}-{members[-1].rows:,}", members))
    return groups


def _group_cells(name: str, members: list[Category]) -> tuple[str, ...]:
    def mean(system: str, figure: str) -> float:
        return float(sum(getattr(c.systems[system], figure) for c in members) / len(members))

    cells = [name, str(len(members))]
    for system in (AS_IT_COMES, RELAXED, PROXY):
        cells += [f"{mean(system, 'recall'):.2f}", f"{mean(system, 'p50_ms'):.2f}"]
    return (*cells, f"{mean(BEST_ARM, 'p50_ms'):.2f}")


def _category_table(results: Results) -> Table:
    table = _empty_table("Filtered, by size of the category: means of n categories")
    for i, column in enumerate(_GROUP_COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for group in _groups(results.categories):
        table.add_row(*_group_cells(*group))
    return table


def _choices(results: Results) -> str:
    shares = [f"{arm} {share:.0%}" for arm, share in results.settings.items()]
    others = f", {len(shares) - _SHOWN_SETTINGS} others" if len(shares) > _SHOWN_SETTINGS else ""
    return (
        f"The proxy chose, for both statements together: {', '.join(shares[:_SHOWN_SETTINGS])}{others}. "
        f"It spent {1e3 * results.overhead_ms:.0f} µs of its own on a query."
    )


def _environment(results: Results) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in results.environment.items())
    return (
        f"{facts}. Learning took {results.learning_seconds:.0f} s ({results.learning_reason}), the whole run "
        f"{results.seconds:.0f} s. Milliseconds differ from machine to machine: compare within this run."
    )


def _markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(columns)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' + '---:|' * (len(head) - 1)}"]
    return lines + [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]
