"""Queries without a filter: mixed families, one family alone, and what follows from the mixed ones' learning.

`mixed` is the headline: the largest table, three families of queries of different difficulty.  Its learning
phase also gives the learning curve, the cost of learning and the published targets, and the proxies that it
taught are put under concurrent load before they end (`load`).
"""

from __future__ import annotations

import numpy as np

from bench.suite import contest, statistics, traffic
from bench.suite.contest import Contest, Outcome, run
from bench.suite.queries import Question, Statement
from bench.suite.records import Claim, Interval, Panel, Result, Series
from bench.suite.scenarios import load
from bench.suite.scenarios.shared import items, plain, small
from bench.suite.stage import Stage, proxy_name, resident_megabytes
from bench.suite.statistics import at_least, at_most, exactly
from bench.suite.systems import AS_IT_COMES, PLAIN

TARGETS: dict[float, float | None] = {0.98: 0.78, 0.99: 0.70}
_CURVE = 3_000  # answers of which the recall is computed
_WINDOW = 200


async def mixed(stage: Stage) -> list[Result]:
    """Mixed families, and all that comes from the same learning."""
    table = await items(stage)
    each = min(len(vectors) for vectors in stage.data.queries.values())
    split = traffic.distinct(
        stage.data,
        plain(Statement("items")),
        each=each,
        tuning=stage.scale.queries(200),
        test=stage.scale.queries(900),
    )
    wanted = Contest(
        "mixed",
        "Mixed query families, no filter",
        "Three families of queries (sentences, single words, half definitions), none asked before. Does "
        "choosing ef_search for each query beat the best single one?",
        {"items": table},
        split,
        PLAIN,
        targets=TARGETS,
        learning=120.0,
        credit=95.0,
        tuning=12.0,
        measuring=75.0,
    )
    concurrent: list[Result] = []
    megabytes: list[float] = []

    async def beside(outcome: Outcome) -> None:
        megabytes.append(
            resident_megabytes(outcome.taught.proxies[proxy_name(0.98)]) - outcome.taught.bare_megabytes
        )
        concurrent.append(await load.concurrency(stage, outcome))
        concurrent.append(await load.cold(stage, outcome))

    outcome = await run(stage, wanted, beside)
    result = contest.judge(outcome)
    result.notes.append(_partial_knowledge(outcome))
    return [
        result,
        learning_curve(outcome, result),
        cost(outcome),
        published(outcome, megabytes[0]),
        *concurrent,
    ]


async def sentences(stage: Stage) -> list[Result]:
    """One family alone: there is little to tell apart."""
    table = await small(stage)
    split = traffic.distinct(
        stage.data,
        plain(Statement("small")),
        families=[next(iter(stage.data.queries))],
        seed=1,
        tuning=stage.scale.queries(150),
        test=stage.scale.queries(500),
    )
    wanted = Contest(
        "sentences",
        "One query family alone",
        "Sentences only. Where all queries are about equally hard, does choosing per query do harm?",
        {"small": table},
        split,
        PLAIN,
        learning=35.0,
        credit=26.0,
        tuning=6.0,
        measuring=28.0,
        parity=1.03,
    )
    return [contest.judge(await run(stage, wanted))]


def _partial_knowledge(outcome: Outcome) -> str:
    """Return what one gets who tuned by hand on yesterday's queries, which were all of one family."""
    families = np.array([query.family for query in outcome.contest.split.tuning[: outcome.tuned.queries]])
    yesterday = outcome.tuned.only(families == families[np.argsort(families == "lemma")[0]])
    target = next(iter(outcome.contest.targets))
    chosen = statistics.best_static(yesterday, outcome.statics, target)
    line = outcome.found.line(chosen, "static")
    return (
        f"Partial knowledge: tuned by hand on yesterday's queries, all of one family, one would have taken "
        f"{chosen}, and have today a recall of {line.recall.value:.4f} at {line.mean_ms:.2f} ms."
    )


def learning_curve(outcome: Outcome, main: Result) -> Result:
    """Recall and latency of the application's queries while the proxy learned."""
    answers = outcome.taught.learned.answers
    stride = 1 + len(answers) // _CURVE
    numbers = np.arange(0, len(answers), stride)
    part = [answers[i] for i in numbers]
    asked = [answer.query for answer in part if isinstance(answer.query, Question)]
    limits = outcome.truth.limits(asked)
    recall = np.array(
        [
            outcome.truth.recall(query, answer.ids, limit)
            for query, answer, limit in zip(asked, part, limits, strict=True)
        ]
    )
    ms = np.array([answer.ms for answer in part])
    window = max(1, min(_WINDOW, len(part) // 5))
    kernel = np.ones(window) / window
    at = numbers[window - 1 :][:: max(1, window // 10)].tolist()

    def smooth(values: np.ndarray) -> list[float]:
        found: list[float] = np.convolve(values, kernel, "valid")[:: max(1, window // 10)].tolist()
        return found

    plain_line = next(line for line in main.lines if line.name == AS_IT_COMES)
    result = Result(
        "learning curve",
        "Learning curve",
        "How do recall and latency go while the proxy learns, from the first query on?",
        facts=outcome.taught.facts,
    )
    result.panels = [
        Panel(
            f"recall of the last {window * stride:,} queries",
            "queries asked",
            "recall",
            [
                Series("through the proxy", at, smooth(recall)),
                Series(AS_IT_COMES, [0, float(at[-1])], [plain_line.recall.value] * 2),
            ],
            target=0.98,
        ),
        Panel(
            f"mean latency of the last {window * stride:,} queries",
            "queries asked",
            "mean ms, learning beside it",
            [Series("through the proxy", at, smooth(ms))],
        ),
    ]
    first = recall[: max(1, len(recall) // 20)]
    spread = 1.96 * float(first.std()) / np.sqrt(len(first))
    mean = float(first.mean())
    result.claims.append(
        at_least(
            "cold start: recall of the first twentieth of all queries, at least as without the proxy",
            round(plain_line.recall.value, 4),
            Interval(mean, mean - spread, mean + spread),
            margin=0.02,
        )
    )
    return result


def cost(outcome: Outcome) -> Result:
    """Database seconds spent on measuring."""
    taught = outcome.taught
    moments = taught.moments
    asked = np.array([answer.at for answer in taught.learned.answers])
    queries = [float(np.searchsorted(asked, moment.seconds)) for moment in moments]
    served = sum(answer.ms for answer in taught.learned.answers) / 1e3
    spent = moments[-1].probe_seconds if moments else 0.0
    result = Result(
        "cost of learning",
        "What learning costs",
        "How much database time goes into measuring, and how does it grow?",
        facts=taught.facts,
        notes=[
            f"The application's own queries took {served:.0f} s meanwhile, the learner's measurements "
            f"{spent:.0f} s, on one connection and never more than one statement at a time. When the "
            "credit is "
            "spent (60 s by default, here as configured), 2 % of one connection's time go on being spent."
        ],
    )
    result.panels = [
        Panel(
            "database time spent on measuring",
            "queries asked",
            "seconds",
            [
                Series("learner's measurements", queries, [moment.probe_seconds for moment in moments]),
                Series(
                    "application's own queries",
                    [float(i) for i in range(0, len(asked), 1 + len(asked) // 200)],
                    np.cumsum([answer.ms / 1e3 for answer in taught.learned.answers])[
                        :: 1 + len(asked) // 200
                    ].tolist(),
                ),
            ],
        ),
        Panel(
            "queries measured",
            "seconds since the first query",
            "queries",
            [
                Series(
                    "measured against exact search", [m.seconds for m in moments], [m.labels for m in moments]
                )
            ],
        ),
    ]
    return result


def published(outcome: Outcome, megabytes: float) -> Result:
    """The plan's published targets."""
    derived = contest.derive(outcome)
    found, ours = derived.found, proxy_name(0.98)
    before, after = found.line(AS_IT_COMES, "default"), found.line(ours, "proxy")
    static = found.line(contest.TUNED, "derived")
    a, b = found.index(ours), found.index(contest.TUNED)
    figures = outcome.taught.learned.figures
    labels = figures.total("ruvector_labels_total")
    policies = max(1.0, figures.total("ruvector_policies_published_total"))
    distilling = figures.total("ruvector_distill_seconds_total") / policies
    tails = _p99_ratio(found.ms[a], found.ms[b])
    claims: list[Claim] = [
        at_least(
            f"recall@10 after learning (as it comes: {before.recall.value:.4f})",
            0.98,
            after.recall,
            0.005,
        ),
        at_most(
            f"p99 latency after learning over the best static setting's ({static.p99_ms:.1f} ms; now "
            f"{after.p99_ms:.1f} ms)",
            0.6,
            tails,
        ),
        at_most(
            "memory that a worker has taken since its start, learned and all", 100.0, exactly(megabytes), "MB"
        ),
        at_most(
            f"one derivation of a policy, from {labels:,.0f} labels at the end, mean of {policies:.0f}",
            1.0,
            exactly(distilling),
            "s",
        ),
    ]
    asked = len(outcome.taught.learned.answers)
    return Result(
        "published targets",
        "The plan's published targets",
        "recall@10 from 0.95 to 0.98 after 10,000 queries; p99 from 5 to 3 ms; patterns under 100 "
        "MB; learning "
        "under 1 s for 1,000 queries.",
        facts=outcome.taught.facts,
        claims=claims,
        notes=[
            f"{asked:,} queries had been asked when learning ended. p99 is compared as a ratio, since "
            "milliseconds are the machine's. Through the proxy a query that is easy takes less and a "
            "hard one "
            f"more: the tail is where the saved time goes (p50 {after.p50_ms:.2f} against "
            f"{static.p50_ms:.2f} ms)."
        ],
        panels=[
            Panel(
                "latency: how many queries take longer",
                "ms",
                "share of queries",
                [
                    _tail(name, found.ms[found.index(system)])
                    for name, system in (
                        ("through the proxy", ours),
                        (contest.TUNED, contest.TUNED),
                        (AS_IT_COMES, AS_IT_COMES),
                    )
                ],
                log_x=True,
                log_y=True,
            )
        ],
    )


def _tail(name: str, ms: np.ndarray) -> Series:
    ordered = np.sort(ms)
    share = 1.0 - np.arange(len(ordered)) / len(ordered)
    step = 1 + len(ordered) // 150
    return Series(name, ordered[::step].tolist(), share[::step].tolist())


def _p99_ratio(ours: np.ndarray, other: np.ndarray) -> Interval:
    """Return the ratio of both 99th percentiles, by a bootstrap over queries."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(ours), size=(statistics.DRAWS, len(ours)))
    draws = np.quantile(ours[drawn], 0.99, axis=1) / np.quantile(other[drawn], 0.99, axis=1)
    return statistics.interval(float(np.quantile(ours, 0.99) / np.quantile(other, 0.99)), draws)
