"""Which recorded query to measure next, out of those of all templates.

Audits and targeted queries take turns (`learning.schedule` says why).  An audit is drawn from the *latest*
queries of a template, each with the same chance, and the template in proportion to its traffic: an audit is
about now.  What is targeted is the context that lacks labels most, and in it a query that is asked often and
was not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learning.records import Trajectory
from learning.registry import Registry, TemplateState
from learning.schedule import ENOUGH, ENOUGH_UNFILTERED, Candidate, backing, draw, neediest

_AUDIT_AMONG = 50  # latest queries that an audit is drawn from, at least


@dataclass(frozen=True, slots=True)
class Chosen:
    """A query to measure, and whether it is an audit."""

    state: TemplateState
    trajectory: Trajectory
    uniform: bool


class Chooser:
    """Chooses from the registry's templates; `rng` is the only chance in it."""

    def __init__(self, registry: Registry, rng: np.random.Generator) -> None:
        self._registry = registry
        self._rng = rng
        self._audit_next = False

    def choose(self) -> Chosen | None:
        """Choose the query to measure next: audits and targeted ones in turn, whichever there is."""
        uniform = self._audit_next
        chosen = (self._audit() if uniform else self._target(list(self._registry))) or (
            self._target(list(self._registry)) if uniform else self._audit()
        )
        self._audit_next = not uniform
        return chosen

    def companions(self, first: Chosen, count: int) -> list[Chosen]:
        """Return `first` and others of its template, `count` at most, audits and targets in turn.

        An audit that falls on a query chosen before makes that one an audit: were it dropped instead, the
        queries that are targeted would be missing from the audits, which then stood for the others only.
        """
        found = {first.trajectory.query_id: first}
        uniform = first.uniform
        for _ in range(2 * count):
            if len(found) >= count:
                break
            uniform = not uniform
            chosen = self._audit_of(first.state) if uniform else self._target([first.state])
            if chosen is not None and (uniform or chosen.trajectory.query_id not in found):
                found[chosen.trajectory.query_id] = chosen
        return list(found.values())

    def latest(self, state: TemplateState) -> Trajectory | None:
        """Draw one of the latest queries, each with the same chance."""
        assert state.tracker is not None
        latest = state.tracker.get_recent(max(_AUDIT_AMONG, min(state.unaudited, 4 * _AUDIT_AMONG)))
        good = [trajectory for trajectory in latest if trajectory.error is None]
        return good[int(self._rng.integers(len(good)))] if good else None

    def _audit(self) -> Chosen | None:
        weights = {
            s.template.key: s.traffic.total for s in self._registry if s.tracker is not None and s.unaudited
        }
        key = draw(weights, self._rng)
        state = self._registry.get(key) if key is not None else None
        return self._audit_of(state) if state is not None else None

    def _audit_of(self, state: TemplateState) -> Chosen | None:
        if state.tracker is None or not state.unaudited:
            return None
        sample = self.latest(state)
        state.unaudited -= 1
        return Chosen(state, sample, True) if sample is not None else None

    def _target(self, states: list[TemplateState]) -> Chosen | None:
        candidates = [
            Candidate(
                template=state.template.key,
                context=context,
                traffic=traffic,
                labels=_labels(state, context),
                enough=ENOUGH if state.confirmed.facts.filter_slots else ENOUGH_UNFILTERED,
                seconds=state.label_seconds,
            )
            for state in states
            if state.tracker is not None and state.confirmed is not None
            for context, traffic in state.traffic.counts.items()
        ]
        best = neediest(candidates)
        state = self._registry.get(best.template) if best is not None else None
        if best is None or state is None:
            return None
        trajectory = self._pick(state, best.context)
        return Chosen(state, trajectory, False) if trajectory is not None else None

    def _pick(self, state: TemplateState, context: str) -> Trajectory | None:
        """Return a query of the context, one that was not measured yet where there is one."""
        assert state.confirmed is not None
        assert state.tracker is not None
        if not state.confirmed.facts.filter_slots:  # few contexts, many queries: those asked often come first
            found = state.tracker.sample(self._rng, 1, uniform=False, exclude=state.labelled, context=context)
            if found:
                return found[0]
        recent = state.traffic.recent(context)
        return recent[int(self._rng.integers(len(recent)))] if recent else None


def _labels(state: TemplateState, context: str) -> float:
    """Return the labels that speak for a context: without a filter, those of larger k among them."""
    own = state.label_counts.get(context, 0)
    if state.confirmed is None or state.confirmed.facts.filter_slots or not own:
        return own
    nested = sum(count for other, count in state.label_counts.items() if int(other) > int(context))
    return backing(own, nested)
