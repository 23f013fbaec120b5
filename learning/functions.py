"""The functions that clients call, on the learner's side: who answers what, and with which effect.

Each takes the question, its arguments by name, and a way to report progress; it returns JSON values: a value,
or a list of rows.  Rights were looked after by the worker, with the client's own session.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from learning import answers, benchmarks, exchange
from learning.channel import Ask, Rated
from learning.naming import query_id
from learning.optimizer import SearchOptimizer
from learning.records import Settings, Snapshot, Trust
from learning.registry import TemplateState
from learning.service import Handler, ProblemError, Report

if TYPE_CHECKING:
    from learning.worker import Learner

_OPTIONS = (
    "trajectory_window", "learning_rate", "min_samples", "target_recall", "optimize_for", "adaptive_search",
)  # fmt: skip
_OLDER_NAMES = {"max_trajectories": "trajectory_window"}
_TRAJECTORY_WAIT = 1.0  # seconds until a query that was just answered has reached the learner
_TELL_EVERY = 20  # measured queries

Arguments = dict[str, Any]


class Functions:
    """Answers from one learner."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by function."""
        return {
            "ruvector_enable_learning": self._enable,
            "ruvector_disable_learning": self._disable,
            "ruvector_clear_learning": self._by_the_leader(self._clear, self._told),
            "ruvector_learning_stats": self._learning_stats,
            "ruvector_recommend_params": self._recommend_params,
            "ruvector_auto_tune": self._auto_tune,
            "ruvector_get_search_params": self._get_search_params,
            "ruvector_record_feedback": self._record_feedback,
            "ruvector_export_patterns": self._export,
            "ruvector_import_patterns": self._import,
            "ruvector_extract_patterns": self._by_the_leader(self._extract, self._count),
            "ruvector_consolidate_patterns": self._by_the_leader(self._consolidate, self._count),
            "ruvector_prune_patterns": self._by_the_leader(self._prune, self._count),
            "ruvector_ground_truth": self._ground_truth,
            "ruvector_benchmark_recall": self._benchmark_recall,
            "ruvector_benchmark_latency": self._benchmark_latency,
        }

    def _states(self, ask: Ask) -> list[TemplateState]:
        """Return the templates of the table that was asked about."""
        return [
            state
            for state in self._learner.registry
            if state.template.database == ask.database and state.table == ask.table
        ]

    # --- replicas ---

    def _by_the_leader(self, handler: Handler, otherwise: Callable[[Ask], Any]) -> Handler:
        """Return a handler that has the replica do it that leads, where this one does not."""

        async def handle(ask: Ask, arguments: Arguments, report: Report) -> Any:
            if self._learner.leads:
                return await handler(ask, arguments, report)
            self._learner.tell_leader(ask)
            report("another replica leads: it was told, and does it within seconds")
            return otherwise(ask)

        return handle

    def _told(self, ask: Ask) -> str:
        return f"the replica that leads was told to forget what was learned about {ask.table}"

    def _count(self, ask: Ask) -> int:
        return sum(answers.pattern_count(state.policy) for state in self._states(ask))

    # --- switches ---

    async def _enable(self, ask: Ask, arguments: Arguments, report: Report) -> str:
        changes: dict[str, object] = {n: arguments[n] for n in _OPTIONS if arguments[n] is not None}
        for name, value in (arguments["config"] or {}).items():
            known = _OLDER_NAMES.get(name, name)
            if known not in _OPTIONS:
                raise ProblemError(
                    "22023", f'unknown option "{name}"', hint="Known are " + ", ".join(_OPTIONS) + "."
                )
            changes[known] = value
        await self._override(ask, {"adaptive_search": True, **changes, "learning": True})
        return f"learning about {ask.table} is on"

    async def _override(self, ask: Ask, changes: Mapping[str, object]) -> None:
        """Put options of a table in force, or refuse a value."""
        try:
            await self._learner.override(ask.table, changes)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise ProblemError("22023", f"invalid value for {place}: {problem['msg']}") from None

    async def _disable(self, ask: Ask, arguments: Arguments, report: Report) -> str:
        await self._learner.override(ask.table, {"learning": False})
        return f"learning about {ask.table} is off, and nothing is kept about its queries"

    async def _clear(self, ask: Ask, arguments: Arguments, report: Report) -> str:
        states = self._states(ask)
        for state in states:
            await self._learner.clear(state)
        self._learner.measuring.ratings.forget(ask.table)
        return f"what was learned about {ask.table} is forgotten: {len(states)} kinds of query"

    # --- looking ---

    async def _learning_stats(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        measuring = self._learner.measuring
        return answers.learning_stats(
            self._states(ask), measuring.ratings[ask.table], measuring.target(ask.table)
        )

    async def _recommend_params(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        return answers.recommend_params(self._states(ask), self._learner.measuring.target(ask.table))

    async def _get_search_params(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        vector = vector_of(arguments["query"])
        return answers.search_params(self._states(ask), vector, arguments["k"], self._learner.version)

    # --- feedback ---

    async def _record_feedback(self, ask: Ask, arguments: Arguments, report: Report) -> bool:
        """Count a rating; False where the query is not (or no longer) known."""
        relevant = tuple(one for one in arguments["relevant_ids"] or () if one is not None)
        irrelevant = tuple(one for one in arguments["irrelevant_ids"] or () if one is not None)
        if "query" in arguments:
            found = self._by_vector(ask, arguments["query"])
        else:
            if arguments["query_id"] is None:
                raise ProblemError("22004", "query_id must not be NULL")
            found = await self._by_id(query_id(arguments["query_id"]))
        if found is None:
            report("no such query is among the recent ones: nothing was recorded")
            return False
        self._learner.measuring.rated(Rated(found, relevant, irrelevant))
        return True

    async def _by_id(self, wanted: bytes) -> bytes | None:
        for _ in range(round(_TRAJECTORY_WAIT / 0.1)):
            for state in self._learner.registry:
                if state.tracker is not None and state.tracker.find(wanted) is not None:
                    return wanted
            await asyncio.sleep(0.1)
        return None

    def _by_vector(self, ask: Ask, text: str | None) -> bytes | None:
        """Return the id of the latest query of a table with this vector."""
        wanted = vector_of(text).astype("<f4").tobytes()
        for state in self._states(ask):
            recent = state.tracker.get_recent(len(state.tracker)) if state.tracker is not None else []
            for trajectory in reversed(recent):
                if trajectory.vector == wanted:
                    return trajectory.query_id
        return None

    # --- patterns ---

    async def _export(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        return json.loads(exchange.encode(self._learner.export_patterns(ask.table)))

    async def _import(self, ask: Ask, arguments: Arguments, report: Report) -> str:
        if arguments["patterns"] is None:
            raise ProblemError("22004", "the patterns must not be NULL")
        try:
            document = exchange.decode(json.dumps(arguments["patterns"]))
        except exchange.ExchangeError as error:
            raise ProblemError("22023", f"the patterns cannot be imported: {error}") from None
        others = {each.table for each in exchange.evidence(document) if each.table not in ("", ask.table)}
        if others:
            raise ProblemError(
                "22023",
                f"the patterns are about {', '.join(sorted(others))}, not about {ask.table}",
                hint="Call the function with the table that they are about.",
            )
        document = exchange.moved(document, database=ask.database)
        if not self._learner.leads:
            self._learner.hand_in(document)
            kinds = len(document.entries)
            return f"{document.patterns} measured queries of {kinds} kinds given to the replica that leads"
        taken = self._learner.import_patterns(document)
        for words in taken.left_out:
            report(f"not imported: {words}")
        return f"{len(taken.labels)} measured queries of {len(taken.templates)} kinds imported"

    async def _extract(self, ask: Ask, arguments: Arguments, report: Report) -> int:
        """Derive the patterns anew, from now on at most so many of each kind of query."""
        if arguments["num_clusters"] is not None:
            await self._override(ask, {"max_patterns": arguments["num_clusters"]})
        return await self._derive(ask, arguments, report)

    async def _consolidate(self, ask: Ask, arguments: Arguments, report: Report) -> int:
        """Derive the patterns anew, from now on with those merged that are so similar."""
        if arguments["similarity_threshold"] is not None:
            await self._override(ask, {"pattern_similarity": arguments["similarity_threshold"]})
        return await self._derive(ask, arguments, report)

    async def _derive(self, ask: Ask, arguments: Arguments, report: Report) -> int:
        """Derive the patterns anew, which merges similar ones and prunes; return how many there are."""
        states = self._states(ask)
        await self._learner.derive(states)
        return self._count(ask)

    async def _prune(self, ask: Ask, arguments: Arguments, report: Report) -> int:
        """Drop what is known of kinds of query with too few measured ones; return the number of patterns."""
        least, confidence = arguments["min_usage"] or 0, arguments["min_confidence"] or 0.0
        for state in self._states(ask):
            state.prune(least, confidence)
        return await self._derive(ask, arguments, report)

    # --- measuring ---

    async def _auto_tune(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        wanted = arguments["optimize_for"]
        if wanted not in ("recall", "latency", "balanced"):
            raise ProblemError(
                "22023", f'invalid value for optimize_for: "{wanted}"', hint="recall, latency or balanced."
            )
        queries = bounded("sample_queries", arguments["sample_queries"])
        index = ask.index.rpartition(".")[2]
        states = [
            state
            for state in self._states(ask)
            if state.confirmed is not None
            and any(one.name.rpartition(".")[2].strip('"') == index for one in state.confirmed.indexes)
        ]
        if not states:
            raise ProblemError(
                "55000",
                f"no query that uses {ask.index} has been seen yet",
                hint="Send some vector queries through the proxy first: it tunes for the traffic.",
            )
        await self._learner.override(ask.table, {"optimize_for": wanted})
        measured = await self._measure(states, queries, report)
        await self._learner.derive(states)
        return [row for state in states for row in answers.tuned(state, measured[state.template.key])]

    async def _measure(self, states: list[TemplateState], queries: int, report: Report) -> dict[str, int]:
        """Measure up to so many queries, of each kind in turn; the newest that were not measured yet."""
        rng = np.random.default_rng()
        measured = {state.template.key: 0 for state in states}
        left = list(states)
        while left and sum(measured.values()) < queries:
            for state in tuple(left):
                tracker = state.tracker
                found = (
                    tracker.sample(rng, 1, uniform=False, exclude=state.labelled)
                    if tracker is not None
                    else []
                )
                if not found or not await self._learner.measuring.measure_now(state, found[0]):
                    left.remove(state)
                    continue
                measured[state.template.key] += 1
                done = sum(measured.values())
                if done % _TELL_EVERY == 0:
                    report(f"{done} of at most {queries} queries measured")
        return measured

    async def _ground_truth(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        n, k = bounded("num_queries", arguments["num_queries"]), bounded("k", arguments["k"])
        async with benchmarks.connection(self._learner.dsn, ask.database) as server:
            column = await benchmarks.column_of(server, ask.relation)
            queries = await self._queries(server, column, ask, n)
            return await benchmarks.ground_truth(server, column, queries, k, report)

    async def _queries(self, server: Any, column: benchmarks.Column, ask: Ask, n: int) -> list[str]:
        """Return recent queries, filled up with rows of the table."""
        recent = [
            trajectory
            for state in self._states(ask)
            if state.tracker is not None
            for trajectory in state.tracker.get_recent(len(state.tracker))
        ]
        queries = benchmarks.queries_of([trajectory.vector for trajectory in recent], n)
        return queries + await benchmarks.sample_rows(server, column, n - len(queries))

    async def _benchmark_recall(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        n, k = bounded("num_queries", arguments["num_queries"]), bounded("k", arguments["k"])
        async with benchmarks.connection(self._learner.dsn, ask.database) as server:
            column = await benchmarks.column_of(server, ask.relation)
            truth = await benchmarks.read_truth(server, arguments["ground_truth_table"], n)
            if not truth:
                raise ProblemError("02000", "the ground truth is empty")
            return await benchmarks.recall_rows(server, column, truth, k, self._chooser(ask), report)

    async def _benchmark_latency(self, ask: Ask, arguments: Arguments, report: Report) -> Any:
        n, k = bounded("num_queries", arguments["num_queries"]), bounded("k", arguments["k"])
        percentiles = arguments["percentiles"] or []
        if not percentiles or any(not 0.0 <= p <= 100.0 for p in percentiles):
            raise ProblemError("22023", "percentiles are between 0 and 100, and at least one is needed")
        async with benchmarks.connection(self._learner.dsn, ask.database) as server:
            column = await benchmarks.column_of(server, ask.relation)
            distinct = await self._queries(server, column, ask, n)
            queries = [distinct[i % len(distinct)] for i in range(n)] if distinct else []
            return await benchmarks.latency_rows(
                server, column, queries, k, percentiles, self._chooser(ask), report
            )

    def _chooser(self, ask: Ask) -> benchmarks.Chooser | None:
        """Return what the proxy would choose for plain queries of the table; None: it leaves them alone."""
        states = [
            state
            for state in self._states(ask)
            if state.policy is not None
            and state.policy.trust is not Trust.OBSERVE
            and not state.policy.filter_slots
        ]
        if not states:
            return None
        state = max(states, key=lambda state: state.traffic.total)
        key = state.template.key
        assert state.policy is not None
        optimizer = SearchOptimizer(Snapshot(self._learner.version, 0.0, {key: state.policy}))

        def choose(query: str, k: int) -> Settings:
            choice = optimizer.optimize(key, vector_of(query), k, ())
            return choice.arm.settings if choice is not None else ()

        return choose


def bounded(name: str, number: int | None) -> int:
    """Return a number of queries or rows.

    Raises
    ------
    ProblemError
        It is out of range.
    """
    if number is None or not 1 <= number <= benchmarks.MAX_QUERIES:
        raise ProblemError("22023", f"{name} must be between 1 and {benchmarks.MAX_QUERIES}, not {number}")
    return number


def vector_of(text: str | None) -> np.ndarray[Any, Any]:
    """Read a vector as pgvector writes it.

    Raises
    ------
    ProblemError
        It is none.
    """
    if text is None:
        raise ProblemError("22004", "the vector must not be NULL")
    try:
        return np.array([float(part) for part in text.strip().strip("[]").split(",")], dtype=np.float32)
    except ValueError:
        raise ProblemError("22P02", "the vector cannot be read; it is written '[1, 2, 3]'") from None
