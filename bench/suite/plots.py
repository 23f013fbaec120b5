"""One picture for each scenario, drawn from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.demo.plot import BLUE, GREEN, GREY, ORANGE, RED
from bench.demo.plot import STYLE as DEMO_STYLE
from bench.suite.records import Panel, Result, Series

_PROXY = (GREEN, "#0b6e4f", "#66c2a4")
_OTHERS = (BLUE, RED, ORANGE, "#7b5ea7", "#8c6d46", "#4a90a4", "#b15c8b", "#5f6368")
_STYLE: dict[Any, Any] = {**DEMO_STYLE, "font.size": 10, "axes.titlesize": 11.5}
_WIDTH, _HEIGHT = 6.8, 4.9
_COLUMNS = 3


def draw(result: Result, path: Path) -> None:
    """Draw a result's panels to `path` (PNG)."""
    columns = min(_COLUMNS, len(result.panels))
    rows = -(-len(result.panels) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows + 0.4), dpi=110, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, panel in zip(axes, result.panels, strict=False):
            _panel(place, panel)
        for place in axes[len(result.panels) :]:
            place.set_visible(False)
        figure.suptitle(result.title, x=0.01, ha="left", fontsize=13)
        figure.savefig(path)


def _panel(axes: Axes, panel: Panel) -> None:
    colours = _colours(panel)
    for series in panel.series:
        _series(axes, series, colours[series.name])
    if panel.target is not None:
        axes.axhline(panel.target, color=GREEN, lw=1, ls="--")
    for wanted, set_scale, axis in (
        (panel.log_x, axes.set_xscale, axes.xaxis),
        (panel.log_y, axes.set_yscale, axes.yaxis),
    ):
        if wanted:
            set_scale("log")
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.legend(fontsize=8.5)


def _colours(panel: Panel) -> dict[str, str]:
    """Return a colour for each series: green for proxies, grey for the static curve."""
    colours: dict[str, str] = {}
    proxies, others = iter(_PROXY * 4), iter(_OTHERS * 4)
    for series in panel.series:
        if "proxy" in series.name:
            colours[series.name] = next(proxies)
        elif series.name == "static settings":
            colours[series.name] = GREY
        else:
            colours[series.name] = next(others)
    return colours


def _series(axes: Axes, series: Series, colour: str) -> None:
    styles: dict[str, dict[str, Any]] = {
        "line": {"lw": 1.8, "marker": "o" if len(series.x) < 30 else "", "ms": 4},
        "points": {"ls": "", "marker": "o", "ms": 7, "mec": "white", "mew": 0.6},
        "hollow": {"ls": "", "marker": "s", "ms": 7, "mfc": "none", "mew": 1.6},
        "star": {"ls": "", "marker": "*", "ms": 17, "mec": "white", "zorder": 5},
        "bars": {},
    }
    style = styles[series.style]
    if series.style == "bars":
        axes.bar(series.labels, series.y, color=colour, label=series.name, width=0.6)
        return
    axes.plot(series.x, series.y, color=colour, label=series.name, **style)
    for x, y, label in zip(series.x, series.y, series.labels, strict=False):
        axes.annotate(
            label, (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7.5, color="#5f6368"
        )
