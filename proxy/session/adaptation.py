"""From a recognised query and its arguments to the settings that it gets.

One `Adapter` serves all connections of a worker.  It owns the statement cache (through the recogniser) and
the current policy, which is replaced by swapping one reference; a session asks it what a query gets and
tells it how the query went.  Nothing here blocks, waits or raises: whatever cannot be decoded is left alone
and counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from learning.optimizer import SearchOptimizer
from learning.records import Arm, Choice, Settings, Snapshot, Trajectory, Trust, Value
from learning.values import canonical
from proxy.session.counters import Counters
from proxy.session.injection import valid_settings
from proxy.sql import Recogniser, Scope, Statement, VectorQuery
from proxy.sql.vectors import decode_limit, decode_vector

if TYPE_CHECKING:
    import numpy as np

AS_IS: Final = Arm(name="as is", settings=(), kind="as-is")
_UNKNOWN: Final = Choice(arm=AS_IS, trust=Trust.OBSERVE, expected_recall=None, reason="no policy yet")

Parameters = Sequence[tuple[int, bytes | memoryview | None]]
"""Bound parameters: (format code, bytes); None is NULL."""


class BoundQuery:
    """A vector query with its arguments: what it is, what it gets, and how far it has come."""

    __slots__ = (
        "choice",
        "k",
        "offset",
        "overhead",
        "policy_version",
        "query",
        "settings",
        "values",
        "vector",
    )

    def __init__(self, query: VectorQuery) -> None:
        self.query = query
        self.vector: np.ndarray | None = None
        self.k = 0
        self.offset = 0
        self.values: tuple[Value | None, ...] = ()
        self.choice: Choice = _UNKNOWN
        self.settings: Settings = ()  # what was really put in force
        self.policy_version = 0
        self.overhead = 0.0  # seconds that the proxy spent on it


class Outcome:
    """How one execution of a query ended; times in seconds since the statement was sent upstream."""

    __slots__ = ("error", "first_byte", "latency", "rows")

    def __init__(self, rows: int, first_byte: float, latency: float, error: str | None) -> None:
        self.rows = rows
        self.first_byte = first_byte
        self.latency = latency
        self.error = error


def _ignore_trajectory(template: VectorQuery, trajectory: Trajectory) -> None:
    """Recorder in use while no learner is configured."""


def _ignore_observation(table: str, arm: str, trust: str, seconds: float, overhead: float) -> None:
    """Observer in use while nobody scrapes."""


def _ignore_failure(template: str, sqlstate: str, message: str) -> None:
    """Reporter of failed injections in use while no learner is configured."""


class Adapter:
    """Chooses settings for recognised queries and reports how they went."""

    def __init__(self, counters: Counters, *, enabled: bool = True) -> None:
        self.counters = counters
        self.enabled = enabled
        self.record: Callable[[VectorQuery, Trajectory], None] = _ignore_trajectory
        self.observe: Callable[[str, str, str, float, float], None] = _ignore_observation
        self.injection_failed: Callable[[str, str, str], None] = _ignore_failure
        self._recogniser = Recogniser()
        self._switched_off: set[str] = set()
        self._optimizer = SearchOptimizer(Snapshot(version=0, created_at=0.0, templates={}))
        self._version = 0

    @property
    def version(self) -> int:
        """Version of the policy in force; 0 before the first."""
        return self._version

    def swap(self, optimizer: SearchOptimizer, version: int) -> None:
        """Put another policy in force from the next query on."""
        self._optimizer = optimizer
        self._version = version
        self.counters.policy_version = version

    def recognise(self, sql: bytes, scope: Scope) -> Statement:
        """Return what the session must know about a text; a dictionary lookup for one seen before."""
        return self._recogniser.recognise(sql, scope)

    def bind(self, query: VectorQuery, parameters: Parameters) -> BoundQuery:
        """Decode a query's arguments and choose its settings."""
        bound = BoundQuery(query)
        template = query.template
        self.counters.recognised[template.relation] += 1
        if not self._decode(bound, parameters):
            self.counters.left_alone["arguments"] += 1
            return bound
        policy = self._optimizer.template(template.key)
        if policy is None or not self.enabled or template.key in self._switched_off:
            return bound
        bound.policy_version = self._version
        values = tuple(
            _canonical(bound.values[slot], policy.value_types[slot]) for slot in policy.filter_slots
        )
        choice = self._optimizer.optimize(template.key, bound.vector, bound.k + bound.offset, values)
        if choice is not None and valid_settings(choice.arm.settings):
            bound.choice = choice
        return bound

    def _decode(self, bound: BoundQuery, parameters: Parameters) -> bool:
        """Fill in vector, k, offset and values; False where the query's shape cannot be told."""
        values: list[Value | None] = []
        for slot, argument in zip(bound.query.template.slots, bound.query.arguments, strict=True):
            if argument.parameter is None:
                value = argument.literal
                if value is None:
                    return False
                format_code, data = value.format, value.data
            elif argument.parameter < len(parameters):
                value = None
                format_code, raw = parameters[argument.parameter]
                data = raw if raw is None or type(raw) is bytes else bytes(raw)
            else:
                return False  # Bind will fail; the server says so
            role = slot.role
            if role == "vector":
                bound.vector = None if data is None else decode_vector(format_code, data)
                values.append(None)
                continue
            value = value or Value(format_code, data)
            values.append(value)
            if role == "limit" or role == "offset":
                number = decode_limit(value)
                if number is None or number < 0:
                    return False
                if role == "limit":
                    bound.k = number
                else:
                    bound.offset = number
        bound.values = tuple(values)
        return bound.k > 0

    def finished(self, bound: BoundQuery, outcome: Outcome) -> None:
        """Record one execution."""
        choice = bound.choice
        arm = choice.arm if bound.settings or not choice.arm.settings else AS_IS
        template = bound.query.template
        if outcome.error is None:
            self.observe(template.relation, arm.name, choice.trust, outcome.latency, bound.overhead)
        if bound.k <= 0:
            return
        self.record(
            bound.query,
            Trajectory(
                query_id=os.urandom(16),
                template=template.key,
                timestamp=time.time(),
                vector=None if bound.vector is None else bound.vector.tobytes(),
                k=bound.k,
                offset=bound.offset,
                values=bound.values,
                arm=arm.name,
                settings=bound.settings,
                trust=choice.trust,
                policy_version=bound.policy_version,
                rows=outcome.rows,
                first_byte_ms=outcome.first_byte * 1e3,
                latency_ms=outcome.latency * 1e3,
                error=outcome.error,
            ),
        )

    def switch_off(self, bound: BoundQuery, sqlstate: str, message: str) -> None:
        """The server refused the settings: leave this template alone until the process restarts."""
        self.counters.injection_errors += 1
        self._switched_off.add(bound.query.template.key)
        self.injection_failed(bound.query.template.key, sqlstate, message)


def _canonical(value: Value | None, type_oid: int) -> str | None:
    if value is None or value.data is None:
        return None
    return canonical(type_oid, value.format, value.data)
