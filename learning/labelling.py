"""From a chosen query to its label, or labels: alone, in one pass with others, or by a sample of the rows.

Which it is follows from what an exact search costs and how large the table is (`learning.truth`).  Alone is
the rule; several together where an exact search was seen to take `_TOGETHER_FROM`; a sample where the table
has more than `learner.exact_rows` rows.  A thorough label (`learning.schedule`) is always made alone, and so
keeps what a single exact search costs up to date.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from config.schema import Config
from learning import truth
from learning.choosing import Chooser, Chosen
from learning.probe import (
    BoundError,
    Measured,
    Probed,
    measure_by_sample,
    measure_one,
    measure_together,
)
from learning.records import Arm, Trajectory
from learning.registry import TemplateState
from learning.schedule import LabelPlan
from learning.upstream import Session

_TOGETHER_FROM = 200.0  # milliseconds of an exact search from which several are made in one pass
_ALONE_FIRST = 3  # exact searches made alone before that, for what one costs


class Labeller:
    """Makes labels.

    Parameters
    ----------
    session
        Returns the side connection for exact searches, by database.
    spent
        Told the seconds of database time that were used.
    """

    def __init__(
        self,
        config: Config,
        chooser: Chooser,
        rng: np.random.Generator,
        session: Callable[[str], Awaitable[Session]],
        spent: Callable[[float], None],
    ) -> None:
        self._config = config
        self._chooser = chooser
        self._rng = rng
        self._session = session
        self._spent = spent

    def configure(self, config: Config) -> None:
        """Go on with other options."""
        self._config = config

    async def label(self, chosen: Chosen) -> list[tuple[Chosen, Measured]]:
        """Measure a query, where it pays with others of its template; what says nothing is left out.

        Raises
        ------
        BindingError, asyncpg.PostgresError
            As `learning.probe.measure`.
        """
        state = chosen.state
        together = self._together(chosen)
        if together:
            measured = await self._measure_together(state, together)
            if measured:
                return list(zip(together, measured, strict=True))
        alone = await self.measure(state, chosen.trajectory, _plan(chosen), uniform=chosen.uniform)
        if alone is None:
            return []
        if not alone.label.sampled:
            state.exact_alone.append(alone.exact_ms)
        return [(chosen, alone)]

    def _together(self, chosen: Chosen) -> list[Chosen]:
        """Return the queries to measure in one pass, this one included; none: measure it alone."""
        state = chosen.state
        assert state.confirmed is not None
        known = state.exact_alone
        if (
            len(known) < _ALONE_FIRST
            or statistics.median(known) < _TOGETHER_FROM
            or _share(state, self._config) < 1.0
        ):
            return []
        if _plan(chosen).thorough or not truth.can_batch(state.template, state.confirmed.types):
            return []
        found = self._chooser.companions(chosen, self._config.learner.batch)
        return found if len(found) > 1 else []

    async def _measure_together(self, state: TemplateState, together: Sequence[Chosen]) -> list[Measured]:
        """Measure several queries in one pass; an empty list: not possible."""
        assert state.confirmed is not None
        confirmed = state.confirmed
        session = await self._session(state.template.database)
        started = time.perf_counter()
        queries = [_probed(state, each.trajectory, _plan(each), uniform=each.uniform) for each in together]
        try:
            return await measure_together(
                session,
                state.template,
                confirmed.types,
                confirmed.settings,
                queries,
                exact_ms=statistics.median(state.exact_alone),
                keep_vector=not self._config.learning.anonymize,
                ks=state.common_ks,
            )
        except BoundError:
            return []
        finally:
            self._spent(time.perf_counter() - started)

    async def measure(
        self, state: TemplateState, trajectory: Trajectory, plan: LabelPlan, *, uniform: bool
    ) -> Measured | None:
        """Measure one query on the server, and charge the budget; None: it says nothing."""
        assert state.confirmed is not None
        confirmed = state.confirmed
        session = await self._session(state.template.database)
        query = _probed(state, trajectory, plan, uniform=uniform)
        share = _share(state, self._config)
        known = (session, state.template, confirmed.types, confirmed.settings)
        keep = not self._config.learning.anonymize
        started = time.perf_counter()
        try:
            if share < 1.0:
                seed = int(self._rng.integers(1 << 31))
                return await measure_by_sample(*known, query, share=share, seed=seed, keep_vector=keep)
            ks = () if confirmed.facts.filter_slots else state.common_ks
            return await measure_one(*known, query, keep_vector=keep, ks=ks)
        except BoundError:
            return None
        finally:
            self._spent(time.perf_counter() - started)


def _share(state: TemplateState, config: Config) -> float:
    assert state.confirmed is not None
    return truth.sampled_share(state.template, state.confirmed.facts.rows, config.learner.exact_rows)


def _plan(chosen: Chosen) -> LabelPlan:
    state = chosen.state
    assert state.tracker is not None
    return state.ledger.plan(state.tracker.context(chosen.trajectory))


def _probed(state: TemplateState, trajectory: Trajectory, plan: LabelPlan, *, uniform: bool) -> Probed:
    assert state.confirmed is not None
    assert state.tracker is not None
    arms = state.confirmed.arms
    served = _served(trajectory, arms)
    return Probed(
        trajectory=trajectory,
        arms=arms if served is None else (*arms, served),
        context=state.tracker.context(trajectory),
        uniform=uniform,
        plan=plan,
    )


def _served(trajectory: Trajectory, arms: tuple[Arm, ...]) -> Arm | None:
    """Return the arm that the live query got, where the ladder lacks it and knows its settings."""
    if any(arm.name == trajectory.arm for arm in arms):
        return None
    names = {name for arm in arms for name, _ in arm.settings}
    if not all(name in names for name, _ in trajectory.settings):
        return None
    return Arm(trajectory.arm, trajectory.settings)
