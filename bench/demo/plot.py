"""The demo's picture: four panels, before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.demo.results import (
    AS_IT_COMES,
    BEST_ARM,
    BEST_STATIC,
    PROXY,
    RELAXED,
    TARGET,
    Category,
    Results,
)

GREY, RED, ORANGE, BLUE, GREEN = "#9aa0a6", "#d1495b", "#e9a13b", "#30638e", "#1b9e77"
_LABELS = {
    AS_IT_COMES: "pgvector as it comes",
    RELAXED: "relaxed_order",
    PROXY: "through the proxy",
    BEST_ARM: "best setting of each category",
}
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#80868b",
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.color": "#202124",
}


def draw(results: Results, path: Path) -> None:
    """Draw the picture to `path` (PNG)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 10), dpi=130, layout="constrained")
        axes = figure.subplots(2, 2)
        _recall_by_category(axes[0, 0], results)
        _latency_by_category(axes[0, 1], results)
        _recall_against_latency(axes[1, 0], results)
        _learning(axes[1, 1], results)
        figure.suptitle(
            f"ruvector-proxy on {results.environment['rows']:,} real embeddings: recall@10 against exact "
            "search, with queries not used for learning",
            fontsize=14,
            x=0.01,
            ha="left",
        )
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr,call-arg]
        figure.savefig(path)


def _scatter(axes: Any, categories: list[Category], name: str, figure: str, **style: Any) -> None:
    rows = [c.rows for c in categories]
    axes.plot(
        rows, [getattr(c.systems[name], figure) for c in categories], ls="", label=_LABELS[name], **style
    )


_AS_IT_COMES = {"marker": "o", "ms": 6.5, "mfc": "none", "mec": RED, "mew": 1.6}
_RELAXED = {"marker": "^", "ms": 6, "mfc": ORANGE, "mec": "none", "alpha": 0.9}
_PROXY = {"marker": "o", "ms": 6.5, "mfc": GREEN, "mec": "white", "mew": 0.6}


def _rows_axis(axes: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("rows in the category")


def _recall_by_category(axes: Any, results: Results) -> None:
    categories = results.categories
    lost = [c.rows for c in categories if c.systems[AS_IT_COMES].recall < 0.9]
    if lost:
        axes.axvspan(min(lost) * 0.95, max(lost) * 1.05, color=RED, alpha=0.06, lw=0)
    _scatter(axes, categories, AS_IT_COMES, "recall", **_AS_IT_COMES)
    _scatter(axes, categories, RELAXED, "recall", **_RELAXED)
    _scatter(axes, categories, PROXY, "recall", **_PROXY)
    axes.set_title("WHERE category = $1: is the answer complete?")
    axes.set_ylabel("recall@10")
    axes.set_ylim(-0.03, 1.06)
    _rows_axis(axes)
    axes.legend(loc="lower left")


def _latency_by_category(axes: Any, results: Results) -> None:
    categories = results.categories
    rows = [c.rows for c in categories]
    axes.plot(
        rows,
        [c.systems[BEST_ARM].p50_ms for c in categories],
        color=GREY,
        lw=5,
        alpha=0.55,
        solid_capstyle="round",
        label=_LABELS[BEST_ARM],
    )
    _scatter(axes, categories, AS_IT_COMES, "p50_ms", **_AS_IT_COMES)
    _scatter(axes, categories, RELAXED, "p50_ms", **_RELAXED)
    _scatter(axes, categories, PROXY, "p50_ms", **_PROXY)
    axes.set_title("WHERE category = $1: how long does it take?")
    axes.set_ylabel("median latency, ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _rows_axis(axes)
    axes.legend(loc="upper left")


def _recall_against_latency(axes: Any, results: Results) -> None:
    ladder = sorted(results.ladder.items(), key=lambda item: item[1].mean_ms)
    axes.plot(
        [s.mean_ms for _, s in ladder],
        [s.recall for _, s in ladder],
        color=GREY,
        marker="o",
        ms=4,
        lw=1.5,
        label="one ef_search for all queries",
    )
    for name, summary in ladder:
        axes.annotate(
            name,
            (summary.mean_ms, summary.recall),
            xytext=(6, -11),
            textcoords="offset points",
            fontsize=8.5,
            color="#5f6368",
        )
    points = (
        (AS_IT_COMES, "pgvector as it comes", {"marker": "o", "ms": 9, "mfc": "none", "mec": RED, "mew": 2}),
        (
            BEST_STATIC,
            f"best by hand ({results.static_unfiltered})",
            {"marker": "s", "ms": 9, "mfc": BLUE, "mec": "none"},
        ),
        (PROXY, _LABELS[PROXY], {"marker": "*", "ms": 19, "mfc": GREEN, "mec": "white"}),
    )
    for name, label, style in points:
        summary = results.unfiltered[name]
        axes.plot(summary.mean_ms, summary.recall, ls="", label=label, zorder=5, **style)
    axes.axhline(TARGET, color=GREEN, lw=1, ls="--")
    axes.annotate(
        f"target {TARGET}",
        (1, TARGET),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=GREEN,
    )
    axes.set_title("No filter, mixed queries: recall against latency")
    axes.set_xlabel("mean latency, ms")
    axes.set_ylabel("recall@10")
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")


def _learning(axes: Any, results: Results) -> None:
    for name, colour in (("filtered", GREEN), ("unfiltered", BLUE)):
        curve = results.learning_curves[name]
        axes.plot([p.seconds for p in curve], [p.recall for p in curve], color=colour, lw=2.2, label=name)
    axes.axhline(TARGET, color=GREEN, lw=1, ls="--")
    axes.set_title("The application's recall while the proxy learned")
    axes.set_xlabel("seconds since its first query")
    axes.set_ylabel("recall@10 of the latest queries")
    axes.set_xlim(left=0)
    axes.set_ylim(top=1.005)
    axes.legend(loc="lower right")
