"""What a run of the demo found, as data: written to JSON, drawn by `plot`, told by `report`.

Systems have fixed names here (`AS_IT_COMES`, ...); latencies are in milliseconds, recall is a share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.demo.application import Answer, Learned
from bench.demo.measurement import Samples, Summary
from bench.demo.proxy import Figures
from bench.demo.workload import Truth

AS_IT_COMES, BEST_STATIC, RELAXED, PROXY, BEST_ARM = (
    "as it comes",
    "best static",
    "relaxed",
    "proxy",
    "best arm",
)
PSYCOPG = "proxy, psycopg"

TARGET = 0.98
FILTERED_RECALL = 0.99
MEAN_FACTOR = 1.1
ARM_FACTOR, ARM_SLACK_MS = 1.3, 0.2
_WINDOW = 150  # queries behind each point of the learning curve
_CURVE_ANSWERS = 4_000  # exact searches take time


@dataclass(frozen=True)
class Category:
    """One filter value: how many rows it has, the best arm found for it, and each system's summary."""

    category: int
    rows: int
    arm: str
    systems: dict[str, Summary]

    @property
    def limit_ms(self) -> float:
        """The median latency that the proxy must not exceed in this category."""
        return ARM_FACTOR * self.systems[BEST_ARM].p50_ms + ARM_SLACK_MS


@dataclass(frozen=True)
class Verdict:
    """One promise, whether it was kept, and the figures."""

    promise: str
    kept: bool
    figures: str


@dataclass(frozen=True)
class CurvePoint:
    """Mean recall of the last queries before `seconds` since the application's first query."""

    seconds: float
    recall: float


@dataclass
class Results:
    """All that a run found."""

    environment: dict[str, str | int]
    static_unfiltered: str
    static_filtered: str
    unfiltered: dict[str, Summary]
    families: dict[str, dict[str, Summary]]
    ladder: dict[str, Summary]  # static settings, measured in the same rounds on a part of the queries
    filtered: dict[str, Summary]
    categories: list[Category]  # by number of rows
    learning_seconds: float
    learning_reason: str
    learning_figures: dict[str, float]
    learning_curves: dict[str, list[CurvePoint]]
    overhead_ms: float  # the proxy's own time for a vector query, as it publishes it: mean over the whole run
    settings: dict[str, float]  # what the proxy put in force while measuring: name to share of its queries
    seconds: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list)


def by_category(samples: Mapping[str, Samples], arms: Mapping[int, str], truth: Truth) -> list[Category]:
    """Return one entry for each category that was measured, smallest first."""
    sizes = truth.category_sizes()
    measured = set(next(iter(samples.values())).category)
    return [
        Category(c, sizes[c], arms[c], {name: s.of_category(c).summary() for name, s in samples.items()})
        for c in sorted(measured, key=lambda c: sizes[c])
    ]


def learning_curves(answers: Sequence[Answer], truth: Truth) -> dict[str, list[CurvePoint]]:
    """Return how recall went while the proxy learned, for unfiltered and filtered queries."""
    curves: dict[str, list[CurvePoint]] = {}
    for name, filtered in (("unfiltered", False), ("filtered", True)):
        part = [a for a in answers if (a.query.category is not None) is filtered]
        part = part[:: 1 + len(part) // _CURVE_ANSWERS]
        limits = truth.limits([a.query for a in part])
        recalls = np.array(
            [truth.recall(a.query, a.ids, limit) for a, limit in zip(part, limits, strict=True)]
        )
        window = min(_WINDOW, max(1, len(part) // 4))
        curves[name] = [
            CurvePoint(part[end - 1].at, float(recalls[end - window : end].mean()))
            for end in sorted({*range(window, len(part), max(1, window // 10)), len(part)})
        ]
    return curves


def learning_figures(learned: Learned) -> dict[str, float]:
    """Return the proxy's own figures at the end of learning, those that are worth telling."""
    figures = learned.figures
    return {
        "queries": len(learned.answers),
        "queries through psycopg": sum(a.driver == "psycopg" for a in learned.answers),
        "labels": figures.total("ruvector_labels_total"),
        "probe seconds": figures.total("ruvector_probe_seconds_total"),
        "policies published": figures.total("ruvector_policies_published_total"),
        "queries adapted": figures.total("ruvector_queries_adapted_total"),
    }


def settings_between(before: Figures, after: Figures) -> dict[str, float]:
    """Return which settings were put in force between two scrapes: shares, largest first."""
    metric = "ruvector_queries_adapted_total"
    earlier = before.by(metric, "arm")
    counts = {arm: count - earlier.get(arm, 0) for arm, count in after.by(metric, "arm").items()}
    total = sum(counts.values())
    return {arm: n / total for arm, n in sorted(counts.items(), key=lambda item: -item[1]) if n > 0}


def overhead_ms(figures: Figures) -> float:
    """Return the mean time that the proxy itself spent on a vector query; 0 before the first."""
    queries = figures.total("ruvector_proxy_overhead_seconds_count")
    return 1e3 * figures.total("ruvector_proxy_overhead_seconds_sum") / queries if queries else 0.0


def verdicts(results: Results) -> list[Verdict]:
    """Hold the results against what the product promises."""
    filtered, plain, static = (
        results.filtered[PROXY],
        results.unfiltered[PROXY],
        results.unfiltered[BEST_STATIC],
    )
    slow = [c for c in results.categories if c.systems[PROXY].p50_ms > c.limit_ms]
    worst = max(results.categories, key=lambda c: c.systems[PROXY].p50_ms / c.limit_ms)
    return [
        Verdict(
            "Filtered: every query returns 10 rows where 10 exist",
            filtered.incomplete == 0,
            f"{filtered.incomplete} of {filtered.queries:,} queries returned fewer "
            f"(PostgreSQL as it comes: {results.filtered[AS_IT_COMES].incomplete:,})",
        ),
        Verdict(
            f"Filtered: recall@10 of at least {FILTERED_RECALL} over all categories",
            filtered.recall >= FILTERED_RECALL,
            f"{filtered.recall:.4f} (as it comes: {results.filtered[AS_IT_COMES].recall:.4f})",
        ),
        Verdict(
            f"Filtered: each category's median at most {ARM_FACTOR} x its best setting's + {ARM_SLACK_MS} ms",
            not slow,
            f"{len(results.categories) - len(slow)} of {len(results.categories)} categories; the hardest has "
            f"{worst.rows:,} rows: {worst.systems[PROXY].p50_ms:.2f} ms, the limit {worst.limit_ms:.2f} ms",
        ),
        Verdict(
            f"Unfiltered: recall@10 of at least {TARGET} on queries never seen before",
            plain.recall >= TARGET,
            f"{plain.recall:.4f} ± {plain.recall_error:.4f} (as it comes: "
            f"{results.unfiltered[AS_IT_COMES].recall:.4f}, best static {results.static_unfiltered}: "
            f"{static.recall:.4f})",
        ),
        Verdict(
            "Unfiltered: at no more than the mean latency of the best static setting + 10 %",
            plain.mean_ms <= MEAN_FACTOR * static.mean_ms,
            f"{plain.mean_ms:.2f} ms, {plain.mean_ms / static.mean_ms:.2f} of the {static.mean_ms:.2f} ms of "
            f"{results.static_unfiltered}",
        ),
    ]
