"""The recent queries of one template: a ring buffer, what it says, and samples from it.

The learner keeps one `TrajectoryTracker` per template.  Two kinds of sample are drawn, for two purposes
that must not be mixed:

- *uniform*: every recorded query has the same chance.  Only such a sample supports a claim about the
  traffic, so audits and the calibration of a policy use it.
- *by frequency*: distinct queries, each once, with a chance that grows with how often it was asked.
  Traffic repeats itself, and a label of a frequent query pays every time it is asked again.

Nothing here reads a clock: the time of a query is what its trajectory says.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Container, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from learning.records import Trajectory, context_key
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
    found: list[str | None] = []
    for slot in filter_slots:
        value = trajectory.values[slot] if slot < len(trajectory.values) else None
        oid = value_types[slot] if slot < len(value_types) else 0
        if value is None or value.data is None:
            found.append(None)
        else:
            found.append(canonical(oid, value.format, value.data))
    return tuple(found)


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
        self._rng = np.random.default_rng(seed)
        self._filter_slots = tuple(filter_slots)
        self._value_types = tuple(value_types)

    def __len__(self) -> int:
        return len(self._ring)

    def record(self, trajectory: Trajectory) -> None:
        """Append one query; the oldest falls out when the window is full."""
        self._ring.append(trajectory)

    def get_recent(self, n: int) -> list[Trajectory]:
        """Return the last `n` queries, newest last."""
        return list(self._ring)[-n:] if n > 0 else []

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
    ) -> list[Trajectory]:
        """Draw at most `n` queries without replacement; those that failed are never drawn.

        Parameters
        ----------
        rng
            Source of randomness; None uses the tracker's own seeded one.
        uniform
            True: every recorded query has the same chance.  False: distinct queries (see `identity`; the
            newest occurrence of each), weighted by how often they occur.
        exclude
            Identities not to draw, for instance those labelled already.  Only for ``uniform=False``: an
            audit with exclusions would not be one.
        """
        rng = self._rng if rng is None else rng
        good = [trajectory for trajectory in self._ring if trajectory.error is None]
        if uniform:
            return [good[i] for i in rng.permutation(len(good))[:n]]
        newest: dict[bytes, Trajectory] = {}
        counts: Counter[bytes] = Counter()
        for trajectory in good:
            name = identity(trajectory)
            if name not in exclude:
                newest[name] = trajectory
                counts[name] += 1
        if not newest:
            return []
        weights = np.array([counts[name] for name in newest], dtype=np.float64)
        distinct = list(newest.values())
        picked = rng.choice(
            len(distinct), size=min(n, len(distinct)), replace=False, p=weights / weights.sum()
        )
        return [distinct[i] for i in picked]

    def analyze_patterns(self) -> PatternAnalysis:
        """Return counts by context, k and arm, latencies by arm, and how much the traffic repeats itself."""
        ring = self._ring
        latencies: dict[str, list[float]] = {}
        for trajectory in ring:
            if trajectory.error is None:
                latencies.setdefault(trajectory.arm, []).append(trajectory.latency_ms)
        distinct = len({identity(trajectory) for trajectory in ring})
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
