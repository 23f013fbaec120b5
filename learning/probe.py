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

from learning.binding import Bound, ParameterType
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

_SET = "SELECT set_config(n, v, true) FROM unnest($1::text[], $2::text[]) AS s(n, v)"
_CURRENT = "SELECT n, current_setting(n, true) FROM unnest($1::text[]) AS n"


@dataclass(frozen=True, slots=True)
class Measured:
    """A label, what it cost, and how long the exact search took."""

    label: Label
    seconds: float  # of database time, to be charged to the budget
    exact_ms: float


@asynccontextmanager
async def snapshot(session: Session, settings: Settings) -> AsyncIterator[None]:
    """Open a read-only transaction with one snapshot, under `settings` and the limits; always rolled back."""
    transaction = session.connection.transaction(isolation="repeatable_read", readonly=True)
    await transaction.start()
    try:
        await apply(session, (*settings, *LIMITS))
        yield
    finally:
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
    key = (template.key, custom)
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
    started = time.perf_counter()
    k = trajectory.k + trajectory.offset
    exact = next((arm for arm in arms if arm.kind == "exact"), Arm("exact", EXACT, "exact"))
    async with snapshot(session, base):
        arguments = await session.binder.bind(template, types, trajectory)
        runner = _Runner(session, template, types, arguments)
        await runner.prepare((*arms, exact))
        await session.measure_round_trip()
        truth, exact_ms = await runner.run(exact.settings)
        if plan.warm and exact_ms < _REPEAT_BELOW_MS:
            _, exact_ms = await runner.run(exact.settings)
        results = {exact.name: ArmResult(1.0, len(truth), exact_ms, distinct(truth))}
        smaller: dict[int, dict[str, float]] = {other: {} for other in ks if other < k}
        perfect: set[object] = set()
        for arm in arms:
            needless = plan.leave_out(arm, exact_ms) or (_ladder(arm) in perfect and not plan.thorough)
            if arm.name in results or (needless and arm.name != trajectory.arm):
                continue
            distances, ms = await runner.run(arm.settings)
            result = results[arm.name] = ArmResult(
                recall(truth, distances, k), len(distances), ms, distinct(distances)
            )
            for other, recalls in smaller.items():
                recalls[arm.name] = recall(truth[:other], distances[:other], other)
            if result.recall >= 1.0 and arm.effort:
                perfect.add(_ladder(arm))
    label = Label(
        template=template.key,
        context=context,
        timestamp=time.time(),
        vector=trajectory.vector if keep_vector else None,
        k=k,
        found=len(truth),
        results=results,
        served_arm=trajectory.arm,
        uniform=uniform,
        smaller=smaller,
    )
    return Measured(label, time.perf_counter() - started, exact_ms)


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
        self._template = template
        self._types = types
        self._arguments = arguments
        self._usual: Mapping[str, str] = {}
        self._plain: Any = None
        self._custom: Any = None

    async def prepare(self, arms: Sequence[Arm]) -> None:
        """Prepare the statements and remember the usual value of every setting that any arm touches."""
        self._plain = await statement(self._session, self._template, self._types, custom=False)
        self._custom = await statement(self._session, self._template, self._types, custom=True)
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
        rows = await prepared.fetch(*self._arguments)
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
