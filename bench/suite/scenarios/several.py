"""Where one setting cannot be right for all: k from 1 to 500, two kinds of index, two tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.suite import contest, statistics, traffic
from bench.suite.contest import Contest, Outcome, run
from bench.suite.queries import Question, Statement
from bench.suite.records import Claim, Panel, Result, Series
from bench.suite.scenarios.shared import small
from bench.suite.stage import Stage, proxy_name
from bench.suite.systems import AS_IT_COMES, EXACT, PLAIN, Way, ladder
from bench.suite.tables import HNSW
from bench.suite.traffic import Make

KS = (1, 10, 100, 500)
LISTS = 170
PROBES = (1, 2, 4, 8, 12, 20, 32, 50, 80, 120, 170)
IVFFLAT = f"USING ivfflat (embedding vector_cosine_ops) WITH (lists = {LISTS})"
COARSE = "USING hnsw (embedding vector_cosine_ops) WITH (m = 8, ef_construction = 32)"
WITH_EXACT: dict[str, Way] = PLAIN | {EXACT: Way("static", {"enable_indexscan": "off"})}


def _any_k(table: str) -> Make:
    statement = Statement(table, None, None)

    def make(family: str, vector: NDArray[np.float32], rng: np.random.Generator) -> Question:
        return Question(family, vector, None, statement, int(rng.choice(KS)))

    return make


async def ks(stage: Stage) -> list[Result]:
    """LIMIT $2 with 1, 10, 100 and 500 rows."""
    table = await small(stage)
    split = traffic.distinct(
        stage.data, _any_k("small"), tuning=stage.scale.queries(160), test=stage.scale.queries(480), seed=5
    )
    wanted = Contest(
        "k",
        "k from 1 to 500",
        "One statement whose LIMIT is a parameter. An ef_search that is right for 10 rows returns 40 of 500.",
        {"small": table},
        split,
        WITH_EXACT,
        group=("k", lambda query: str(query.k)),
        learning=32.0,
        credit=22.0,
        tuning=6.0,
        measuring=22.0,
    )
    outcome = await run(stage, wanted)
    result = contest.judge(outcome)
    result.claims.append(_to_each_best(outcome))
    shown = [AS_IT_COMES, "ef=120", "ef=1000", contest.KNOWN_BY_GROUP.format("k"), proxy_name(0.98)]
    at = {str(k): float(k) for k in KS}
    result.panels += contest.group_panels(contest.derive(outcome), shown, at, "k")
    return [result]


async def indexes(stage: Stage) -> list[Result]:
    """HNSW and IVFFlat on one column, against each of them alone on a table of its own."""
    await small(stage)
    await small(stage, "small_ivfflat", indexes=(IVFFLAT,))
    table = await small(stage, "small_both", indexes=(HNSW, IVFFLAT))
    split = traffic.distinct(
        stage.data,
        _any_k("small_both"),
        tuning=stage.scale.queries(160),
        test=stage.scale.queries(480),
        seed=6,
    )
    alone = {"small_both": "small"}
    hnsw = {f"HNSW alone, {name}": Way("static", way.settings, alone) for name, way in ladder().items()}
    ivfflat = {
        f"IVFFlat alone, probes={probes}": Way(
            "static", {"ivfflat.probes": str(probes)}, {"small_both": "small_ivfflat"}
        )
        for probes in PROBES
    }
    exact = {EXACT: Way("static", {"enable_indexscan": "off"})}
    wanted = Contest(
        "indexes",
        "HNSW and IVFFlat on one column",
        "Both indexes are there. Static settings have only one of them, on a table of its own with "
        "the same rows.",
        {"small_both": table},
        split,
        {AS_IT_COMES: Way("default"), **hnsw, **ivfflat, **exact},
        group=("k", lambda query: str(query.k)),
        control="HNSW alone, ef=80",
        learning=35.0,
        credit=25.0,
        tuning=9.0,
        measuring=28.0,
    )
    outcome = await run(stage, wanted)
    result = contest.judge(outcome)
    result.claims.append(_to_each_best(outcome))
    derived = contest.derive(outcome)
    for name, system in (("HNSW", "HNSW alone"), ("IVFFlat", "IVFFlat alone")):
        statics = [each for each in derived.statics if each.startswith(system)]
        best = statistics.best_by_group(outcome.found, statics, 0.98, [str(k) for k in KS])
        result.notes.append(
            f"Best {name} alone, known afterwards: "
            + ", ".join(f"k={k}: {best[str(k)].split(', ')[1]}" for k in KS)
        )
    shown = [AS_IT_COMES, contest.KNOWN_BY_GROUP.format("k"), proxy_name(0.98)]
    result.panels += contest.group_panels(derived, shown, {str(k): float(k) for k in KS}, "k")
    return [result]


async def two_tables(stage: Stage) -> list[Result]:
    """Easy queries on a good index, hard ones on a coarse index; a session has one ef_search."""
    good = await small(stage)
    coarse = await small(stage, "coarse", indexes=(COARSE,))
    statements = {False: Statement("small"), True: Statement("coarse")}
    families = list(stage.data.queries)
    hard = "lemma" if "lemma" in families else families[0]

    def make(family: str, vector: NDArray[np.float32], rng: np.random.Generator) -> Question:
        return Question(family, vector, None, statements[family == hard])

    split = traffic.distinct(
        stage.data,
        make,
        tuning=stage.scale.queries(150),
        test=stage.scale.queries(480),
        families=list(dict.fromkeys([families[-1], hard])),
        seed=7,
    )
    wanted = Contest(
        "two tables",
        "Two tables with different needs",
        "Half definitions on a table with a good index, single words on one with a coarse index (m = 8, "
        "ef_construction = 32), over the same connections. One ef_search for the application is "
        "wrong for one of "
        "them.",
        {"small": good, "coarse": coarse},
        split,
        PLAIN,
        group=("table", lambda query: query.statement.table),
        learning=35.0,
        credit=25.0,
        tuning=6.0,
        measuring=20.0,
    )
    outcome = await run(stage, wanted)
    result = contest.judge(outcome)
    result.claims.append(_to_each_best(outcome))
    derived = contest.derive(outcome)
    shown = [AS_IT_COMES, contest.TUNED, contest.KNOWN_BY_GROUP.format("table"), proxy_name(0.98)]
    recall, ms, _ = contest.by_group(derived, shown, {"small": 0.0, "coarse": 1.0})
    for title, figures in (("recall", recall), ("mean ms", ms)):
        series = [
            Series(name, [0.0, 1.0], figures[name], "points", ["good index", "coarse index"])
            for name in shown
        ]
        result.panels.append(Panel(title, "table", title, series, target=0.98 if title == "recall" else None))
    return [result]


def _to_each_best(outcome: Outcome) -> Claim:
    derived = contest.derive(outcome)
    assert outcome.contest.group is not None
    group = outcome.contest.group[0]
    return statistics.at_most(
        f"mean latency over that of the best static setting of each {group}, chosen on other queries",
        1.15,
        statistics.ratio(derived.found, proxy_name(0.98), contest.KNOWN_BY_GROUP.format(group)),
    )
