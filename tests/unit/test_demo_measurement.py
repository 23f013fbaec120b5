"""Systems are measured fairly, settings chosen honestly, and verdicts and reports say what was measured."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.dataset import Dataset
from bench.demo import plot, report, search
from bench.demo.application import Answer, settled
from bench.demo.measurement import BLOCK, Samples, Summary, System, measure
from bench.demo.proxy import Figures
from bench.demo.results import (
    AS_IT_COMES,
    BEST_ARM,
    BEST_STATIC,
    PROXY,
    PSYCOPG,
    RELAXED,
    Category,
    CurvePoint,
    Results,
    by_category,
    learning_curves,
    overhead_ms,
    settings_between,
    verdicts,
)
from bench.demo.workload import Query, Truth


class Recorder:
    """Answers with given ids, and notes in a shared list that it was asked."""

    def __init__(self, name: str, ids: list[int], asked: list[str]) -> None:
        self.name, self.ids, self.asked = name, ids, asked

    async def ask(self, query: Query) -> list[int]:
        self.asked.append(self.name)
        return self.ids


@pytest.fixture
def truth() -> Truth:
    """Twenty rows on the unit circle, ever farther from the first; category 1 holds the last five."""
    angles = np.linspace(0, np.pi / 2, 20)
    base = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    category = np.repeat(np.array([0, 1], dtype=np.int16), [15, 5])
    return Truth(Dataset(base, category, {}, "circle"))


def _queries(n: int, category: int | None = None) -> list[Query]:
    return [Query("gloss", np.array([1.0, 0.0], dtype=np.float32), category) for _ in range(n)]


def test_systems_take_turns_in_rotating_order_after_the_warm_up(truth: Truth) -> None:
    asked: list[str] = []
    systems = [System(name, Recorder(name, [], asked)) for name in "abc"]
    asyncio.run(measure(systems, _queries(2 * BLOCK + 1), truth, warm_up=_queries(1)))
    first, second = ("".join(name * BLOCK for name in order) for order in ("abc", "bca"))
    assert "".join(asked) == "abc" + first + second + "cab"


def test_recall_rows_and_missing_rows_are_recorded(truth: Truth) -> None:
    good, poor = Recorder("good", list(range(10)), []), Recorder("poor", [0, 1, 2], [])
    result = asyncio.run(measure([System("good", good), System("poor", poor)], _queries(4), truth))
    summary = {name: samples.summary() for name, samples in result.items()}
    assert (summary["good"].recall, summary["good"].rows, summary["good"].incomplete) == (1.0, 10.0, 0)
    assert (summary["poor"].recall, summary["poor"].rows, summary["poor"].incomplete) == (0.3, 3.0, 4)
    assert summary["poor"].queries == 4


def test_all_rows_of_a_small_category_are_a_complete_answer(truth: Truth) -> None:
    whole = Recorder("whole", list(range(15, 20)), [])
    result = asyncio.run(measure([System("whole", whole)], _queries(2, category=1), truth))
    assert result["whole"].summary().incomplete == 0
    assert result["whole"].summary().recall == 1.0


def test_stride_and_time_limit_are_kept(truth: Truth) -> None:
    often, rarely = System("often", Recorder("o", [], [])), System("rarely", Recorder("r", [], []), stride=4)
    result = asyncio.run(measure([often, rarely], _queries(9), truth))
    assert (len(result["often"].ms), len(result["rarely"].ms)) == (9, 3)
    cut = asyncio.run(measure([often], _queries(9), truth, seconds=-1.0))
    assert cut["often"].ms == []
    with pytest.raises(ValueError, match="no samples"):
        cut["often"].summary()


def _samples(recall: float, ms: float, category: int = -1, n: int = 10) -> Samples:
    return Samples([category] * n, ["gloss"] * n, [recall] * n, [10] * n, [0] * n, [ms] * n)


def test_best_static_setting_is_the_cheapest_that_reaches_the_target() -> None:
    tried = {"fast": _samples(0.9, 1.0), "right": _samples(0.98, 3.0), "slow": _samples(1.0, 4.0)}
    assert search.best(tried, 0.98) == "right"
    assert search.best({"fast": tried["fast"], "faster": _samples(0.8, 0.5)}, 0.98) == "fast"


def test_best_setting_of_a_category_falls_back_to_exact_search() -> None:
    tried = {"exact": _samples(1.0, 9.0, category=3), "quick": _samples(0.5, 1.0, category=3)}
    assert search.best_by_category(tried, [3, 4], 0.98) == {3: "exact", 4: "exact"}
    tried["good"] = _samples(0.99, 2.0, category=3)
    assert search.best_by_category(tried, [3], 0.98) == {3: "good"}


def test_learning_is_settled_only_when_the_credit_is_spent_and_every_template_judged() -> None:
    def figures(credit: float, version: float, **trust: float) -> Figures:
        return Figures(
            {
                "ruvector_probe_credit_seconds": [({}, credit)],
                "ruvector_policy_version": [({}, version)],
                "ruvector_templates": [({"trust": name}, count) for name, count in trust.items()],
            }
        )

    assert settled(figures(0.1, 4, query=1, context=1, observe=0))
    assert not settled(figures(9.0, 4, query=1, context=1))
    assert not settled(figures(0.1, 4, query=1, observe=1))
    assert not settled(figures(0.1, 0, query=1))
    assert not settled(Figures({}))


def test_figures_are_added_up_over_labels() -> None:
    figures = Figures({"x": [({"table": "a", "arm": "1"}, 2.0), ({"table": "a", "arm": "2"}, 3.0)]})
    assert figures.total("x") == 5.0
    assert figures.total("x", arm="2") == 3.0
    assert figures.total("missing") == 0.0
    assert figures.by("x", "table") == {"a": 5.0}


def test_choices_and_overhead_are_taken_from_the_proxys_figures() -> None:
    def scrape(exact: float, wide: float) -> Figures:
        return Figures(
            {
                "ruvector_queries_adapted_total": [({"arm": "exact"}, exact), ({"arm": "ef=100"}, wide)],
                "ruvector_proxy_overhead_seconds_sum": [({}, 0.02)],
                "ruvector_proxy_overhead_seconds_count": [({}, 400.0)],
            }
        )

    assert settings_between(scrape(10, 5), scrape(40, 15)) == {"exact": 0.75, "ef=100": 0.25}
    assert settings_between(scrape(10, 5), scrape(11, 5)) == {"exact": 1.0}
    assert overhead_ms(scrape(1, 1)) == pytest.approx(0.05)
    assert overhead_ms(Figures({})) == 0.0


def test_learning_curve_shows_recall_rising(truth: Truth) -> None:
    answers = [
        Answer(float(i), "asyncpg", _queries(1, category)[0], list(range(10)) if i >= 50 else [0], 1.0)
        for i in range(100)
        for category in (None, 0)
    ]
    for curve in learning_curves(answers, truth).values():
        assert curve[0].recall == pytest.approx(0.1)
        assert curve[-1].recall == 1.0
        assert curve[-1].seconds == 99.0


def _summary(recall: float = 1.0, ms: float = 1.0, incomplete: int = 0) -> Summary:
    return Summary(100, recall, 0.001, 10.0, incomplete, ms, ms, 2 * ms)


def _results(proxy: Summary, plain: Summary) -> Results:
    systems = {AS_IT_COMES: _summary(0.2), RELAXED: _summary(0.9, 9.0), PROXY: proxy, BEST_ARM: _summary()}
    return Results(
        environment={"rows": 30_000, "cores": 2},
        static_unfiltered="ef=100",
        static_filtered="exact",
        unfiltered={
            AS_IT_COMES: _summary(0.95),
            BEST_STATIC: _summary(0.985, 4.0),
            RELAXED: _summary(0.95),
            PROXY: plain,
            PSYCOPG: plain,
        },
        families={},
        ladder={"ef=40": _summary(0.95), "ef=100": _summary(0.985, 4.0)},
        filtered={**systems, BEST_STATIC: _summary(1.0, 2.0), PSYCOPG: proxy},
        categories=[Category(c, 10 * 4**c, "exact", systems) for c in range(5)],
        learning_seconds=60.0,
        learning_reason="the starting credit for measuring is spent",
        learning_figures={"queries": 9_000.0},
        learning_curves={
            name: [CurvePoint(float(t), 0.9 + t / 1_000) for t in range(60)]
            for name in ("filtered", "unfiltered")
        },
        overhead_ms=0.05,
        settings={"exact": 0.75, "ef=100": 0.25},
    )


@pytest.mark.parametrize(
    ("proxy", "plain", "kept"),
    [
        (_summary(1.0, 1.4), _summary(0.981, 4.3), [True, True, True, True, True]),
        (_summary(1.0, 1.6), _summary(0.981, 4.5), [True, True, False, True, False]),
        (_summary(0.98, 1.4, incomplete=1), _summary(0.979, 2.0), [False, False, True, False, True]),
    ],
)
def test_verdicts_follow_the_figures(proxy: Summary, plain: Summary, kept: list[bool]) -> None:
    assert [verdict.kept for verdict in verdicts(_results(proxy, plain))] == kept


def test_categories_are_reported_from_small_to_large(truth: Truth) -> None:
    samples = {PROXY: _samples(1.0, 1.0, category=0)}
    more = _samples(0.5, 2.0, category=1)
    for name in ("category", "family", "recall", "rows", "missing", "ms"):
        getattr(samples[PROXY], name).extend(getattr(more, name))
    categories = by_category(samples, {0: "exact", 1: "ef=100"}, truth)
    assert [(c.category, c.rows, c.arm, c.systems[PROXY].recall) for c in categories] == [
        (1, 5, "ef=100", 0.5),
        (0, 15, "exact", 1.0),
    ]


def test_reports_hold_every_verdict_and_fit_a_terminal_of_80_columns(tmp_path: Path) -> None:
    results = _results(_summary(1.0, 1.6), _summary(0.981, 4.3))
    results.verdicts = verdicts(results)
    console = Console(record=True, width=80, force_terminal=False)
    report.tell(results, console)
    text = console.export_text()
    assert "…" not in text
    assert (text.count("PASS"), text.count("FALLS SHORT")) == (4, 1)
    report.write(results, tmp_path)
    markdown = (tmp_path / "demo.md").read_text()
    assert all(verdict.promise in markdown for verdict in results.verdicts)
    assert json.loads((tmp_path / "demo.json").read_text())["filtered"][PROXY]["p50_ms"] == 1.6


@pytest.mark.slow
def test_picture_is_drawn(tmp_path: Path) -> None:
    plot.draw(_results(_summary(), _summary(0.981, 3.0)), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
