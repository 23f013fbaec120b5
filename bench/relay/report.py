"""Tables and picture of one run, and whether it shows what it has to show."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.relay import bulk, idle, ordinary, vectors
from bench.relay.results import DIRECT, FORWARDER, ORDER, PGBOUNCER, PROXY, TWO_WORKERS, Results

PAGE, PICTURE = "performance.md", "performance.png"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

_COLOURS = {
    DIRECT: "#9aa0a6",
    PGBOUNCER: "#e9a13b",
    FORWARDER: "#6a994e",
    PROXY: "#30638e",
    TWO_WORKERS: "#1b9e77",
}
_OTHER = "#d1495b"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Claim:
    """Something that the run has to show."""

    text: str
    wanted: str
    found: str
    met: bool | None  # None: not measured


def claims(results: Results) -> list[Claim]:
    """Return what has to be shown, and what this run shows."""
    eight = "prepared, 8 clients"
    found = [
        _at_least(
            f"ordinary traffic, {eight}, one worker: tps, of pgbouncer's",
            0.85,
            results.ratio(ordinary.GROUP, eight, "tps", PROXY, PGBOUNCER),
        )
    ]
    for case in results.cases(ordinary.SCALING):
        two = results.ratio(ordinary.SCALING, case, "tps", TWO_WORKERS, PGBOUNCER)
        found.append(_at_least(f"two workers, {case}: tps, of pgbouncer's", 1.2, two))
    rows = results.ratio(bulk.GROUP, "100,000 rows", "rate", PROXY, PGBOUNCER)
    found.append(_at_least("result of 100,000 rows: throughput, of pgbouncer's", 0.9, rows))
    for case, limit in (("384 dimensions, binary", 150.0), ("1536 dimensions, text", 250.0)):
        for measure, factor in (("p50", 1), ("p99", 3)):
            added = results.added(vectors.GROUP, case, measure, PROXY)
            value = statistics.median(added) if added else None
            found.append(_at_most(f"adapted query, {case}: added {measure}", limit * factor, value, "us"))
    rest, work = (
        statistics.median(added) if (added := results.added(vectors.LEARNER, case, "p50", PROXY)) else None
        for case in ("at rest", "at work")
    )
    change = abs(work / rest - 1) if rest and work else None
    found.append(_at_most("learner at work or at rest: difference in added p50", 0.1, change))
    largest = results.cases(idle.GROUP)[-1:]
    for case in largest:
        kilobytes = results.get(idle.GROUP, case, "kilobytes", PROXY)
        found.append(_at_most(f"memory per idle connection, {case}", 30.0, kilobytes[0], "kB"))
    return found


def _at_least(text: str, wanted: float, value: float | None) -> Claim:
    shown = "not measured" if value is None else f"{value:.2f}"
    return Claim(text, f">= {wanted:g}", shown, None if value is None else value >= wanted)


def _at_most(text: str, wanted: float, value: float | None, unit: str = "") -> Claim:
    digits = ".0f" if unit == "us" else ".2f"
    shown = "not measured" if value is None else f"{value:{digits}} {unit}".strip()
    return Claim(text, f"<= {wanted:g} {unit}".strip(), shown, None if value is None else value <= wanted)


# -- tables ------------------------------------------------------------------------------------------------
def markdown(results: Results) -> str:
    """Return all tables."""
    parts = ["; ".join(f"{name}: {value}" for name, value in results.facts.items())]
    rows = [
        [c.text, c.wanted, c.found, {True: "yes", False: "**no**", None: "-"}[c.met]] for c in claims(results)
    ]
    parts.append("### What it has to show\n\n" + _table(["", "wanted", "this run", "met"], rows, left=1))
    for title, table in (
        ("Ordinary traffic: pgbench -S", _ordinary(results, ordinary.GROUP)),
        ("Two workers, each process with the same share of a core", _ordinary(results, ordinary.SCALING)),
        ("Who takes the processor", _accounts(results)),
        ("Many bytes, MB/s", _rates(results, bulk.GROUP, "MB/s", "CPU ms per MB")),
        ("A storm of connections", _rates(results, bulk.STORM, "connections/s", "CPU ms each")),
        ("Vector queries, microseconds", _added(results, vectors.GROUP)),
        ("The learner at work and at rest, microseconds", _added(results, vectors.LEARNER)),
        ("Memory of idle connections", _idle(results)),
    ):
        if table:
            parts.append(f"### {title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append("|" + "|".join("---" if i < left else "--:" for i in range(len(headings))) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, and in brackets the least and the most over the rounds."""
    if not values:
        return "-"
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def _ratio(results: Results, group: str, case: str, measure: str, way: str) -> str:
    value = results.ratio(group, case, measure, way, PGBOUNCER)
    return "-" if value is None else f"{value:.2f}"


def _ordinary(results: Results, group: str) -> str:
    rows = []
    for case in results.cases(group):
        for way in results.ways(group, case):
            added = [_spread(results.added(group, case, q, way)) for q in ("p50", "p99", "p99.9")]
            rows.append(
                [
                    case,
                    way,
                    _spread(results.get(group, case, "tps", way)),
                    _ratio(results, group, case, "tps", way),
                    *(["-"] * 3 if way == DIRECT else added),
                    _spread(results.get(group, case, "cpu", way), 3),
                ]
            )
    heads = ["", "way", "tps", "of pgbouncer's"]
    heads += [f"added {q}, us" for q in ("p50", "p99", "p99.9")] + ["CPU s per 1,000"]
    return _table(heads, rows, left=2) if rows else ""


def _accounts(results: Results) -> str:
    """Who spends what on pgbench's prepared transactions, and what that lets all cores carry."""
    rows = []
    for case in (case for case in results.cases(ordinary.GROUP) if case.startswith("prepared")):
        bound = {}
        for way in results.ways(ordinary.GROUP, case):
            parts = [results.get(ordinary.GROUP, case, who, way) for who in ("server", "pgbench", "cpu")]
            middle = [statistics.median(part) if part else 0.0 for part in parts]
            if not middle[0]:
                continue
            bound[way] = 1000 / sum(middle)
            share = bound[way] / bound[PGBOUNCER] if PGBOUNCER in bound else 0.0
            cells = [f"{each:.3f}" if each else "-" for each in middle]
            rows.append([case, way, *cells, f"{bound[way]:,.0f}", f"{share:.2f}" if share else "-"])
    heads = ["", "way", "server", "pgbench", "hop", "transactions for a second of one core"]
    return _table([*heads, "of pgbouncer's"], rows, left=2) if rows else ""


def _rates(results: Results, group: str, unit: str, cpu: str) -> str:
    rows = [
        [
            case,
            way,
            _spread(results.get(group, case, "rate", way)),
            _ratio(results, group, case, "rate", way),
            _spread(results.get(group, case, "cpu", way), 2),
        ]
        for case in results.cases(group)
        for way in results.ways(group, case)
    ]
    return _table(["", "way", unit, "of pgbouncer's", cpu], rows, left=2) if rows else ""


def _added(results: Results, group: str) -> str:
    rows = []
    for case in results.cases(group):
        for way in results.ways(group, case):
            row = [case, way, _spread(results.get(group, case, "p50", way))]
            for quantile in ("p50", "p99", "p99.9"):
                added = results.added(group, case, quantile, way)
                row.append("-" if way == DIRECT else _spread(added))
            share = results.get(group, case, "learner's share of a core", way)
            rows.append([*row, _spread(share, 2)] if group == vectors.LEARNER else row)
    heads = ["", "way", "p50", "added p50", "added p99", "added p99.9"]
    if group == vectors.LEARNER:
        heads.append("learner's share of a core")
    return _table(heads, rows, left=2) if rows else ""


def _idle(results: Results) -> str:
    rows = [
        [case, way, f"{results.get(idle.GROUP, case, 'kilobytes', way)[0]:.1f}"]
        for case in results.cases(idle.GROUP)
        for way in results.ways(idle.GROUP, case)
    ]
    return _table(["", "way", "kB per connection"], rows, left=2) if rows else ""


# -- picture and page --------------------------------------------------------------------------------------
def write(results: Results, text: str, directory: Path) -> None:
    """Put the tables between the marks of the page, and the picture beside it."""
    page = directory / PAGE
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    draw(results, directory / PICTURE)


def draw(results: Results, path: Path) -> None:
    """Draw throughput, processor time, added latency and memory to `path` (PNG)."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(13, 8), dpi=120, layout="constrained")
        axes = figure.subplots(2, 2)
        _by_clients(axes[0, 0], results, "tps", "pgbench -S prepared, transactions per second")
        _by_clients(axes[0, 1], results, "cpu", "CPU seconds of the hop per 1,000 transactions")
        _by_case(axes[1, 0], results)
        _by_size(axes[1, 1], results)
        figure.savefig(path)


def _by_clients(axes: Axes, results: Results, measure: str, title: str) -> None:
    for way in ORDER:
        points = [
            (count, values)
            for count in ordinary.CLIENTS
            if (values := results.get(ordinary.GROUP, f"prepared, {count} clients", measure, way))
        ]
        if points:
            middle = [statistics.median(values) for _, values in points]
            low = [m - min(values) for m, (_, values) in zip(middle, points, strict=True)]
            high = [max(values) - m for m, (_, values) in zip(middle, points, strict=True)]
            places = [count for count, _ in points]
            axes.errorbar(places, middle, [low, high], marker="o", capsize=3, label=way, color=_COLOURS[way])
    axes.set_xscale("log")
    axes.set_xticks(ordinary.CLIENTS, [str(count) for count in ordinary.CLIENTS])
    axes.set_xlabel("clients")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.legend()


def _by_case(axes: Axes, results: Results) -> None:
    cases = results.cases(vectors.GROUP)
    ways = [PGBOUNCER, FORWARDER, vectors.NOT_ADAPTED, PROXY]
    for place, way in enumerate(ways):
        found = [results.added(vectors.GROUP, case, "p50", way) for case in cases]
        heights = [statistics.median(each) if each else 0.0 for each in found]
        at = [number + (place - 1.5) * 0.21 for number in range(len(cases))]
        label = "proxy, adapted" if way == PROXY else way
        axes.bar(at, heights, 0.19, label=label, color=_COLOURS.get(way, _OTHER))
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
    axes.set_title("vector query: added p50 over direct, microseconds")
    if cases:
        axes.legend()


def _by_size(axes: Axes, results: Results) -> None:
    cases = results.cases(idle.GROUP)
    sizes = [int(case.split(" ")[0].replace(",", "")) for case in cases]
    heights = [results.get(idle.GROUP, case, "kilobytes", PROXY)[0] for case in cases]
    axes.plot(sizes, heights, marker="o", color=_COLOURS[PROXY])
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("idle connections in one worker")
    axes.set_title("memory per idle connection, kB")
