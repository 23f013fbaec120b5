"""The recent queries of one template: a ring buffer, what it says, and samples from it.

The learner keeps one `TrajectoryTracker` per template.  Two kinds of sample are drawn, for two purposes
that must not be mixed:

- *uniform*: every recorded query has the same chance.  Only such a sample supports a claim about the
  traffic, so audits and the calibration of a policy use it.
- *by frequency*: distinct queries, each once, those first that were asked most over a longer time than the
  window (`learning.repetition`).  Traffic repeats itself, and a label of a frequent query pays every time it
  is asked again.

Nothing here reads a clock: the time of a query is what its trajectory says.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np

from learning.records import Trajectory, Value, context_key
from learning.repetition import Repetition, vector_name
from learning.values import canonical

QUANTILES = (0.5, 0.9, 0.99)
"""The latency quantiles of an analysis."""


@dataclass(frozen=True, slots=True)
class PatternAnalysis:
    """What the recorded window says.  Counts sum to `queries`; latencies are milliseconds."""

    queries: int
    errors: int
    span: float  # seconds between the first and the last query of the window
    contexts: dict[str, int]  # context_key(k, values) -> queries; the `traffic` of distillation
    ks: dict[int, int]  # LIMIT + OFFSET -> queries
    arms: dict[str, int]  # Arm.name -> queries
    latency_ms: dict[str, tuple[float, ...]]  # Arm.name -> quantiles as in QUANTILES
    incomplete: int  # queries that returned fewer rows than their LIMIT
    distinct: int  # different (vector, k, values)
    repeated: int  # queries whose (vector, k, values) occurred before in the window


def identity(trajectory: Trajectory) -> bytes:
    """Return 16 bytes, equal for equal (template, vector, k, offset, values), whatever the arm or time."""
    digest = hashlib.blake2b(trajectory.template.encode(), digest_size=16)
    digest.update(b"\0" + (trajectory.vector or b""))
    digest.update(msgspec.msgpack.encode((trajectory.k, trajectory.offset, trajectory.values)))
    return digest.digest()


def filter_values(
    trajectory: Trajectory, filter_slots: Sequence[int], value_types: Sequence[int]
) -> tuple[str | None, ...]:
    """Return canonical filter values in the order of `filter_slots`; None for NULL and for undecodable."""
    return canonical_values(trajectory.values, filter_slots, value_types)


def canonical_values(
    values: Sequence[Value | None], filter_slots: Sequence[int], value_types: Sequence[int]
) -> tuple[str | None, ...]:
    """The same for `values` by slot."""
    found: list[str | None] = []
    for slot in filter_slots:
        value = values[slot] if slot < len(values) else None
        oid = value_types[slot] if slot < len(value_types) else 0
        if value is None or value.data is None:
            found.append(None)
        else:
            found.append(canonical(oid, value.format, value.data))
    return tuple(found)


class _Mark(NamedTuple):
    """What a recorded query is recognised by, computed once."""

    identity: bytes
    context: str
    vector: bytes  # vector_name


class TrajectoryTracker:
    """The last `window` queries of one template.

    Parameters
    ----------
    window
        Queries kept; older ones fall out.
    seed
        Of the samples drawn without a generator of the caller's.
    filter_slots, value_types
        As in `TableFacts`: which slots make the context, and the type OID by slot.
    """

    def __init__(
        self,
        window: int = 1000,
        seed: int = 0,
        *,
        filter_slots: Sequence[int] = (),
        value_types: Sequence[int] = (),
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        self._ring: deque[Trajectory] = deque(maxlen=window)
        self._marks: deque[_Mark] = deque(maxlen=window)  # in step with the ring
        self._drawn: deque[bool] = deque(maxlen=window)  # uniformly, before
        self._rng = np.random.default_rng(seed)
        self._filter_slots = tuple(filter_slots)
        self._value_types = tuple(value_types)
        self.repetition = Repetition()

    def __len__(self) -> int:
        return len(self._ring)

    def emptied(self) -> TrajectoryTracker:
        """Return a tracker of the same kind without any query."""
        found = TrajectoryTracker(
            self._ring.maxlen or 1, filter_slots=self._filter_slots, value_types=self._value_types
        )
        found._rng = self._rng
        return found

    def record(self, trajectory: Trajectory) -> None:
        """Append one query; the oldest falls out when the window is full."""
        self._ring.append(trajectory)
        mark = _Mark(identity(trajectory), self.context(trajectory), vector_name(trajectory.vector or b""))
        self._marks.append(mark)
        self._drawn.append(False)
        if trajectory.vector is not None:
            self.repetition.record(mark.context, mark.vector)

    def get_recent(self, n: int) -> list[Trajectory]:
        """Return the last `n` queries, newest last."""
        return list(self._ring)[-n:] if n > 0 else []

    def find(self, query_id: bytes) -> Trajectory | None:
        """Return the recorded query of this id, or None where it has fallen out."""
        return next((t for t in reversed(self._ring) if t.query_id == query_id), None)

    def context(self, trajectory: Trajectory) -> str:
        """Return the context key of a query."""
        values = filter_values(trajectory, self._filter_slots, self._value_types)
        return context_key(trajectory.k + trajectory.offset, values)

    def sample(
        self,
        rng: np.random.Generator | None,
        n: int,
        *,
        uniform: bool,
        exclude: Container[bytes] = frozenset(),
        context: str | None = None,
    ) -> list[Trajectory]:
        """Draw at most `n` queries without replacement; those that failed are never drawn.

        Parameters
        ----------
        rng
            Source of randomness; None uses the tracker's own seeded one.
        uniform
            True: every recorded query has the same chance, those drawn before only where no other is left:
            the same occurrence measured twice says nothing more.  False: distinct queries (see `identity`;
            the newest occurrence of each), those asked most first, equal ones in random order.
        exclude
            Identities not to draw, for instance those labelled already.  Only for ``uniform=False``: an
            audit with exclusions would not be one.
        context
            Only queries of this context; likewise.
        """
        rng = self._rng if rng is None else rng
        if uniform:
            return self._uniform(rng, n)
        newest = {
            mark.identity: (trajectory, mark)
            for mark, trajectory in zip(self._marks, self._ring, strict=True)
            if trajectory.error is None
            and mark.identity not in exclude
            and (context is None or mark.context == context)
        }
        distinct = [trajectory for trajectory, _ in newest.values()]
        counts = np.array([self.repetition.count(mark.context, mark.vector) for _, mark in newest.values()])
        order = np.lexsort((rng.random(len(distinct)), -counts))
        return [distinct[i] for i in order[:n]]

    def _uniform(self, rng: np.random.Generator, n: int) -> list[Trajectory]:
        ring = list(self._ring)
        good = np.array([i for i, trajectory in enumerate(ring) if trajectory.error is None], dtype=np.intp)
        drawn = np.array(self._drawn, dtype=bool)[good]
        chosen = good[np.lexsort((rng.random(len(good)), drawn))[:n]].tolist()
        for i in chosen:
            self._drawn[i] = True
        return [ring[i] for i in chosen]

    def analyze_patterns(self) -> PatternAnalysis:
        """Return counts by context, k and arm, latencies by arm, and how much the traffic repeats itself."""
        ring = self._ring
        latencies: dict[str, list[float]] = {}
        for trajectory in ring:
            if trajectory.error is None:
                latencies.setdefault(trajectory.arm, []).append(trajectory.latency_ms)
        distinct = len({mark.identity for mark in self._marks})
        return PatternAnalysis(
            queries=len(ring),
            errors=sum(trajectory.error is not None for trajectory in ring),
            span=max((t.timestamp for t in ring), default=0.0)
            - min((t.timestamp for t in ring), default=0.0),
            contexts=dict(Counter(self.context(trajectory) for trajectory in ring)),
            ks=dict(Counter(trajectory.k + trajectory.offset for trajectory in ring)),
            arms=dict(Counter(trajectory.arm for trajectory in ring)),
            latency_ms={arm: tuple(np.quantile(ms, QUANTILES).tolist()) for arm, ms in latencies.items()},
            incomplete=sum(0 <= t.rows < t.k for t in ring if t.error is None),
            distinct=distinct,
            repeated=len(ring) - distinct,
        )
