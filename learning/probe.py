"""Labels: one query measured against the exact search, with every arm, in one snapshot of the database.

A label is made in one REPEATABLE READ, READ ONLY transaction, so that all arms see the same rows:

1. the settings of the application's role and its search_path, then limits on time and locks, all SET LOCAL;
2. the truth: the exact arm (no vector index can be used).  It comes first and so warms the cache;
3. the arms, each with its settings set and every other setting put back.

Recall is counted by distance, not by row: a returned distance that is not above the k-th true one is a hit,
so that ties are not misses, and rows that are missing are.  ``recall = hits / min(k, rows that exist)``.  NaN
distances (the cosine of a zero vector) sort last in PostgreSQL and count as infinite; NULL distances are no
results.

Time is what the client sees of one warm execution of a prepared statement, minus the connection's median
empty round trip.  ``EXPLAIN ANALYZE`` would exclude the network but returns no rows, so each arm would have
to run twice, and it adds its own overhead per node.  What remains of the network is the same for every arm;
outliers are for the median over labels to deal with.  Planning is included, as an arm with
``force_custom_plan`` pays for it in real life too.

The exact search of a context that is new is timed again, warm, where it was quick: a cold cache tells nothing
about the arm.

Settings that change plans are tried on a statement of their own, so that they do not change what the server
believes about custom and generic plans of the statement that stands for the application's.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from learning import truth
from learning.binding import Bound, ParameterType, vector_text
from learning.dialects import effort_setting
from learning.records import Arm, ArmResult, Label, Settings, Template, Trajectory
from learning.schedule import LabelPlan
from learning.upstream import Session

EXACT: Settings = (("plan_cache_mode", "force_custom_plan"), ("enable_indexscan", "off"))
"""The truth's settings: what is left to the planner, sequential and bitmap scans, uses no vector index."""

LIMITS: Settings = (("statement_timeout", "30s"), ("lock_timeout", "100ms"))

_REPEAT_BELOW_MS = 50.0
_STATEMENTS = 128
_TOLERANCE = 1e-9  # relative; the same function computes both distances, so they are equal or truly different

# They run under the application's search_path too: every name bears its schema.
_SET = (
    "SELECT pg_catalog.set_config(n, v, true) FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), "
    "pg_catalog.unnest($2::pg_catalog.text[])) AS s(n, v)"
)
_CURRENT = "SELECT n, pg_catalog.current_setting(n, true) FROM pg_catalog.unnest($1::pg_catalog.text[]) AS n"


@dataclass(frozen=True, slots=True)
class Measured:
    """A label, what it cost, and how long the exact search took."""

    label: Label
    seconds: float  # of database time, to be charged to the budget
    exact_ms: float


@dataclass(frozen=True, slots=True)
class Probed:
    """One query to be measured; arguments as of `measure`."""

    trajectory: Trajectory
    arms: Sequence[Arm]
    context: str
    uniform: bool
    plan: LabelPlan

    @property
    def k(self) -> int:
        """Rows that have to be found: LIMIT + OFFSET."""
        return self.trajectory.k + self.trajectory.offset


class BoundError(Exception):
    """This query cannot be measured in this way; the message says why."""


@asynccontextmanager
async def snapshot(session: Session, settings: Settings) -> AsyncIterator[None]:
    """Open a read-only transaction with one snapshot, under `settings` and the limits; always rolled back.

    A search_path among the settings is the application's (see learning.names).
    """
    transaction = session.connection.transaction(isolation="repeatable_read", readonly=True)
    await transaction.start()
    try:
        await apply(session, (*settings, *LIMITS))
        session.connection.is_applications = "search_path" in dict(settings)
        yield
    finally:
        session.connection.is_applications = False
        if not session.connection.is_closed():
            await transaction.rollback()


async def apply(session: Session, settings: Settings) -> None:
    """Set every setting until the end of the transaction, in one trip; values travel as parameters."""
    if settings:
        await session.connection.fetch(_SET, [name for name, _ in settings], [value for _, value in settings])


async def statement(
    session: Session, template: Template, types: Sequence[ParameterType], *, custom: bool
) -> Any:
    """Return the template's prepared probe; to be called in `snapshot`, under the template's search_path."""
    key = (template.key, "custom" if custom else "plain")
    found = session.statements.get(key)
    if found is None:
        await session.binder.declare(types)
        found = session.statements[key] = await session.connection.prepare(template.probe_sql)
        while len(session.statements) > _STATEMENTS:
            session.statements.popitem(last=False)
    session.statements.move_to_end(key)
    return found


async def measure(
    session: Session,
    template: Template,
    types: Sequence[ParameterType],
    base: Settings,
    trajectory: Trajectory,
    arms: Sequence[Arm],
    *,
    context: str,
    uniform: bool,
    plan: LabelPlan,
    keep_vector: bool = True,
    ks: Sequence[int] = (),
) -> Measured:
    """Run the truth and the arms for one query.

    Parameters
    ----------
    base
        Settings of the application's session that matter for planning, its search_path among them.
    arms
        The arms to run, each ladder in order of effort; the exact arm is run whether it is among them or not.
    plan
        Which arms are left out of the label; never the one that the live query was served with.
    keep_vector
        False leaves the vector out of the label.
    ks
        Other LIMITs that the traffic has: recall for the smaller ones is counted from the same rows.  Only
        where an arm's plan does not depend on LIMIT.

    Raises
    ------
    BindingError
        The trajectory's values cannot be bound.
    asyncpg.PostgresError
        The server refused or cancelled a statement.
    """
    query = Probed(trajectory, arms, context, uniform, plan)
    return await measure_one(session, template, types, base, query, keep_vector=keep_vector, ks=ks)


async def measure_one(
    session: Session,
    template: Template,
    types: Sequence[ParameterType],
    base: Settings,
    query: Probed,
    *,
    keep_vector: bool = True,
    ks: Sequence[int] = (),
) -> Measured:
    """The same with the query's own arguments in one record."""
    started = time.perf_counter()
    exact = _exact(query.arms)
    async with snapshot(session, base):
        runner = await _Runner.ready(session, template, types, query.trajectory, (*query.arms, exact))
        await session.measure_round_trip()
        exactly, exact_ms = await runner.run(exact.settings)
        if query.plan.warm and exact_ms < _REPEAT_BELOW_MS:
            _, exact_ms = await runner.run(exact.settings)
        label = await _label(runner, query, exactly, exact_ms, keep_vector=keep_vector, ks=ks)
    return Measured(label, time.perf_counter() - started, exact_ms)


async def measure_together(
    session: Session,
    template: Template,
    types: Sequence[ParameterType],
    base: Settings,
    queries: Sequence[Probed],
    *,
    exact_ms: float,
    keep_vector: bool = True,
    ks: Sequence[int] = (),
) -> list[Measured]:
    """The same for several queries, whose exact answers come from one pass over the table (learning.truth).

    Parameters
    ----------
    exact_ms
        What one exact search takes alone, as measured before.

    Raises
    ------
    BoundError
        No arm returns as many rows as a query asks for, so that nothing bounds its answer.
    """
    started = time.perf_counter()
    async with snapshot(session, base):
        await session.measure_round_trip()
        runners, vectors, bounds = [], [], []
        for query in queries:
            exact = _exact(query.arms)
            runner = await _Runner.ready(session, template, types, query.trajectory, (*query.arms, exact))
            runners.append(runner)
            vectors.append(vector_text(query.trajectory.vector))
            bounds.append(await _bound(runner, query))
        await apply(session, _exact(queries[0].arms).settings)
        truths, _ = await truth.batched(session, template, types, vectors, bounds)
        labels = [
            await _label(runner, query, found[: query.k], exact_ms, keep_vector=keep_vector, ks=ks)
            for runner, query, found in zip(runners, queries, truths, strict=True)
        ]
    each = (time.perf_counter() - started) / len(queries)
    return [Measured(label, each, exact_ms) for label in labels]


async def measure_by_sample(
    session: Session,
    template: Template,
    types: Sequence[ParameterType],
    base: Settings,
    query: Probed,
    *,
    share: float,
    seed: int,
    keep_vector: bool = True,
) -> Measured:
    """The same for one query of a table that is too large: recall is estimated by a sample (learning.truth).

    Raises
    ------
    BoundError
        Nothing was sampled near the query: it says nothing.
    """
    started = time.perf_counter()
    exact = _exact(query.arms)
    async with snapshot(session, base):
        runner = await _Runner.ready(session, template, types, query.trajectory, (*query.arms, exact))
        await session.measure_round_trip()
        await apply(session, exact.settings)
        rows, seconds = await truth.sampled(session, template, runner.arguments, share, seed)
        exact_ms = seconds / share * 1e3
        found: dict[str, tuple[list[float], float]] = {}
        for arm in query.arms:
            if arm.kind != "exact" and (
                arm.name == query.trajectory.arm or not query.plan.leave_out(arm, exact_ms)
            ):
                found[arm.name] = await runner.run(arm.settings)
    bound = min((d[query.k - 1] for d, _ in found.values() if len(d) >= query.k), default=math.inf)
    near = [number(row) for row in rows]
    results = {exact.name: ArmResult(1.0, query.k, exact_ms)}
    for name, (distances, ms) in found.items():
        recall_of = truth.estimated_recall(near, distances, bound) if math.isfinite(bound) else None
        if recall_of is None:
            raise BoundError("no sampled row is near the query")
        results[name] = ArmResult(recall_of, len(distances), ms, distinct(distances))
    label = _made(template, query, query.k, results, keep_vector=keep_vector, sampled=share)
    return Measured(label, time.perf_counter() - started, exact_ms)


def _exact(arms: Sequence[Arm]) -> Arm:
    return next((arm for arm in arms if arm.kind == "exact"), Arm("exact", EXACT, "exact"))


async def _bound(runner: _Runner, query: Probed) -> float:
    """Return a distance within which the query's k nearest rows certainly lie."""
    served = [arm for arm in query.arms if arm.name == query.trajectory.arm and arm.kind != "exact"]
    strongest = sorted((arm for arm in query.arms if arm.effort), key=lambda arm: -arm.effort)[:1]
    for arm in (*served, *strongest):
        distances, _ = await runner.run(arm.settings)
        if len(distances) >= query.k and math.isfinite(max(distances[: query.k])):
            return max(distances[: query.k])
    raise BoundError("no arm returns as many rows as are asked for")


async def _label(
    runner: _Runner,
    query: Probed,
    exactly: Sequence[float],
    exact_ms: float,
    *,
    keep_vector: bool,
    ks: Sequence[int],
) -> Label:
    """Run the arms of one query whose exact answer is known."""
    k = query.k
    results = {_exact(query.arms).name: ArmResult(1.0, len(exactly), exact_ms, distinct(exactly))}
    smaller: dict[int, dict[str, float]] = {other: {} for other in ks if other < k}
    perfect: set[object] = set()
    for arm in query.arms:
        needless = query.plan.leave_out(arm, exact_ms) or (
            _ladder(arm) in perfect and not query.plan.thorough
        )
        if arm.name in results or (needless and arm.name != query.trajectory.arm):
            continue
        distances, ms = await runner.run(arm.settings)
        result = results[arm.name] = ArmResult(
            recall(exactly, distances, k), len(distances), ms, distinct(distances)
        )
        for other, recalls in smaller.items():
            recalls[arm.name] = recall(exactly[:other], distances[:other], other)
        if result.recall >= 1.0 and arm.effort:
            perfect.add(_ladder(arm))
    return _made(runner.template, query, len(exactly), results, keep_vector=keep_vector, smaller=smaller)


def _made(
    template: Template,
    query: Probed,
    found: int,
    results: dict[str, ArmResult],
    *,
    keep_vector: bool,
    smaller: dict[int, dict[str, float]] | None = None,
    sampled: float = 0.0,
) -> Label:
    return Label(
        template=template.key,
        context=query.context,
        timestamp=time.time(),
        vector=query.trajectory.vector if keep_vector else None,
        k=query.k,
        found=found,
        results=results,
        served_arm=query.trajectory.arm,
        uniform=query.uniform,
        smaller=smaller or {},
        sampled=sampled,
    )


def _ladder(arm: Arm) -> object:
    """Return what the arms of one ladder have in common: everything but the effort."""
    effort = effort_setting(arm)
    return arm.kind, tuple(pair for pair in arm.settings if pair[0] != effort)


class _Runner:
    """Runs one query under one set of settings after another."""

    def __init__(
        self, session: Session, template: Template, types: Sequence[ParameterType], arguments: Sequence[Bound]
    ) -> None:
        self._session = session
        self.template = template
        self._types = types
        self.arguments = arguments
        self._usual: Mapping[str, str] = {}
        self._plain: Any = None
        self._custom: Any = None

    @classmethod
    async def ready(
        cls,
        session: Session,
        template: Template,
        types: Sequence[ParameterType],
        trajectory: Trajectory,
        arms: Sequence[Arm],
    ) -> _Runner:
        """Return a runner of one query, prepared for these arms."""
        runner = cls(session, template, types, await session.binder.bind(template, types, trajectory))
        await runner.prepare(arms)
        return runner

    async def prepare(self, arms: Sequence[Arm]) -> None:
        """Prepare the statements and remember the usual value of every setting that any arm touches."""
        self._plain = await statement(self._session, self.template, self._types, custom=False)
        self._custom = await statement(self._session, self.template, self._types, custom=True)
        names = sorted({name for arm in arms for name, _ in arm.settings} | {name for name, _ in EXACT})
        rows = await self._session.connection.fetch(_CURRENT, names)
        # A setting that the server does not know (yet) has no usual value and is not put back.
        self._usual = {name: value for name, value in rows if value is not None}

    async def run(self, settings: Settings) -> tuple[list[float], float]:
        """Return the distances, sorted as returned, and the server-side milliseconds."""
        wanted = {**self._usual, **dict(settings)}
        await apply(self._session, tuple(wanted.items()))
        prepared = self._custom if "plan_cache_mode" in dict(settings) else self._plain
        started = time.perf_counter()
        rows = await prepared.fetch(*self.arguments)
        elapsed = (time.perf_counter() - started) * 1e3
        return [number(row[0]) for row in rows if row[0] is not None], max(
            0.001, elapsed - self._session.round_trip_ms
        )


def number(distance: float | str) -> float:
    """Return a distance as a float that can be compared; NaN is larger than everything, as in PostgreSQL."""
    value = float(distance)
    return math.inf if math.isnan(value) else value


def distinct(distances: Sequence[float]) -> int:
    """Count distances that differ by more than rounding: copies of one vector have the same."""
    ordered = sorted(distances)
    return sum(
        i == 0 or not distance <= ordered[i - 1] + _TOLERANCE * max(1.0, abs(distance))
        for i, distance in enumerate(ordered)
    )


def recall(truth: Sequence[float], found: Sequence[float], k: int) -> float:
    """Return the share of the true neighbours that were found, counted by distance, in [0, 1].

    `truth` holds the min(k, rows that exist) smallest distances; where nothing exists nothing can be missed.
    """
    wanted = min(k, len(truth))
    if wanted == 0:
        return 1.0
    kth = max(truth[:wanted])
    bound = kth + _TOLERANCE * max(1.0, abs(kth)) if math.isfinite(kth) else kth
    return min(1.0, sum(distance <= bound for distance in found) / wanted)
