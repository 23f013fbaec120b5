"""From a recognised query and its arguments to the settings that it gets.

One `Adapter` serves all connections of a worker.  It owns the statement cache (through the recogniser) and
the current policy, which is replaced by swapping one reference; a session asks it what a query gets and
tells it how the query went.  Nothing here blocks, waits or raises: whatever cannot be decoded is left alone
and counted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from random import Random
from time import perf_counter
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learning import naming
from learning.optimizer import BY_VECTOR, SearchOptimizer
from learning.records import Arm, Choice, Settings, Snapshot, TemplatePolicy, Trajectory, Trust, Value
from learning.steering import steered
from learning.values import canonical
from proxy.interface.options import Interface
from proxy.interface.questions import Question
from proxy.interface.records import RefusalError
from proxy.interface.rewriting import Rewriter
from proxy.interface.settings import NOTHING, Steering, without_clause
from proxy.session.counters import Counters
from proxy.session.injection import valid_settings
from proxy.sql import Recogniser, Scope, Statement, VectorQuery
from proxy.sql.vectors import decode_limit, decode_vector
from proxy.wire import framing

AS_IS: Final = Arm(name="as is", settings=(), kind="as-is")
_UNKNOWN: Final = Choice(arm=AS_IS, trust=Trust.OBSERVE, expected_recall=None, reason="no policy yet")

_MAX_FORMS: Final = 1_000

Parameters = Sequence[tuple[int, bytes | memoryview | None]]
"""Bound parameters: (format code, bytes); None is NULL."""


Told = Callable[[str], None]
"""Called with each report of progress."""

Answered = Callable[[object], None]
"""Called once with the answer (JSON values), or with a RefusalError."""

Consult = Callable[[Question, Told, Answered], Callable[[], None]]
"""Asks the learner; returns what gives the question up."""


class BoundQuery:
    """A vector query with its arguments: what it is and what it gets."""

    __slots__ = (
        "_vector",
        "choice",
        "k",
        "lookup",
        "offset",
        "overhead",
        "policy_version",
        "query",
        "query_id",
        "raw_vector",
        "settings",
        "table",
        "values",
    )

    def __init__(self, query: VectorQuery) -> None:
        self.query = query
        self.table = query.template.relation  # resolved once there is a policy: "public.items"
        self.raw_vector: tuple[int, bytes] | None = None  # format code, bytes
        self._vector: NDArray[np.float32] | None = None
        self.k = 0
        self.offset = 0
        self.values: tuple[Value | None, ...] = ()
        self.choice: Choice = _UNKNOWN
        self.settings: Settings = ()  # what was really put in force
        self.policy_version = 0
        self.query_id: bytes | None = None  # UUID of its latest execution, once that has been answered
        self.overhead = 0.0  # seconds that the proxy spent on it
        self.lookup: float | None = None  # seconds in which its arm was chosen by its vector

    @property
    def vector(self) -> NDArray[np.float32] | None:
        """The query vector, decoded when it is first asked for; None where that is not possible."""
        if self._vector is None and self.raw_vector is not None:
            self._vector = decode_vector(*self.raw_vector)
        return self._vector

    @property
    def arm(self) -> Arm:
        """What was really in force."""
        arm = self.choice.arm
        return arm if self.settings or not arm.settings else AS_IS


class _Form:
    """What all executions of a query have in common: its literals, and where its parameters belong."""

    __slots__ = ("k", "offset", "parameters", "query", "raw_vector", "readable", "values")

    def __init__(self, query: VectorQuery) -> None:
        self.query = query
        self.raw_vector: tuple[int, bytes] | None = None
        self.k = self.offset = 0
        self.values: list[Value | None] = []  # by slot; None for the vector and for parameters
        self.parameters: list[tuple[int, int, str]] = []  # slot, parameter, role
        self.readable = True  # nothing in it is of a form that is not known
        for argument, slot in zip(query.arguments, query.template.slots, strict=True):
            role, value = slot.role, argument.literal
            self.values.append(None)
            if argument.parameter is not None:
                self.parameters.append((len(self.values) - 1, argument.parameter, str(role)))
            elif value is None:
                self.readable = False
            elif role == "vector":
                self.raw_vector = None if value.data is None else (value.format, value.data)
            else:
                self.values[-1] = value
                if role == "limit" or role == "offset":
                    number = _count(value)
                    self.readable = self.readable and number is not None
                    if role == "limit":
                        self.k = number or 0
                    else:
                        self.offset = number or 0


def _count(value: Value) -> int | None:
    """Return a LIMIT or OFFSET; None where it is none that can be told."""
    number = decode_limit(value)
    return None if number is None or number < 0 else number


class Outcome(NamedTuple):
    """How one execution of a query ended; times in seconds since the statement was sent upstream."""

    rows: int  # -1: unknown
    first_byte: float
    latency: float
    error: str | None  # SQLSTATE


class Execution(NamedTuple):
    """One execution of a query.  Its trajectory is made later, away from the query's own path."""

    bound: BoundQuery
    outcome: Outcome
    timestamp: float  # Unix time, seconds
    query_id: bytes  # UUID, known to the client's session as well

    def trajectory(self) -> Trajectory:
        """Return the record for the learner."""
        bound, outcome = self.bound, self.outcome
        vector = bound.vector
        return Trajectory(
            query_id=self.query_id,
            template=bound.query.template.key,
            timestamp=self.timestamp,
            vector=None if vector is None else vector.tobytes(),
            k=bound.k,
            offset=bound.offset,
            values=bound.values,
            arm=bound.arm.name,
            settings=bound.settings,
            trust=bound.choice.trust,
            policy_version=bound.policy_version,
            rows=outcome.rows,
            first_byte_ms=outcome.first_byte * 1e3,
            latency_ms=outcome.latency * 1e3,
            error=outcome.error,
            lookup_ms=None if bound.lookup is None else bound.lookup * 1e3,
        )


def _ignore_execution(execution: Execution) -> None:
    """Recorder in use while no learner is configured."""


def _ignore_observation(table: str, arm: str, trust: str, seconds: float, overhead: float) -> None:
    """Observer in use while nobody scrapes."""


def _ignore_failure(template: str, sqlstate: str, message: str) -> None:
    """Reporter of failed injections in use while no learner is configured."""


def _no_learner(question: Question, told: Told, answered: Answered) -> Callable[[], None]:
    """What answers calls while no learner is configured."""
    answered(
        RefusalError(
            "55000",
            f"{question.function} cannot be answered: this proxy runs without a learner",
            hint="Set learner.dsn in the proxy's configuration.",
        )
    )
    return lambda: None


class Adapter:
    """Chooses settings for recognised queries and reports how they went."""

    def __init__(
        self, counters: Counters, *, enabled: bool = True, interface: Interface | None = None
    ) -> None:
        self.interface = interface if interface is not None else Interface()
        self.counters = counters
        self.enabled = enabled
        self.observe: Callable[[str, str, str, float, float], None] = _ignore_observation
        self.forget_learner()
        self._recogniser = _recogniser(self.interface)
        self.slow_from = math.inf  # seconds
        self.slow: Callable[[BoundQuery, Outcome], None] = lambda bound, outcome: None
        self.relay_only = False  # the kill switch, see proxy.relay_only
        self.throw: Callable[[bool, str], None] = lambda on, by: None  # tells the supervisor
        self.longest_message = framing.MAX_LENGTH + 1  # bytes that a client may send in one, header included
        self.accepted: set[Settings] = set()  # by the server, once at least
        self._forms: dict[int, _Form] = {}  # by id of the query
        self.defers = False  # whoever moves the bytes calls `settle` once they are away
        self.unsettled: list[tuple[BoundQuery, Outcome]] = []  # executions that are over, not recorded yet
        self._switched_off: set[str] = set()
        self._optimizer = SearchOptimizer(Snapshot(version=0, created_at=0.0, templates={}))
        self._version = 0
        self._lots = Random()  # of the queries of a template on trial

    def forget_learner(self) -> None:
        """There is no learner (any more): nothing is recorded, and nobody can be asked."""
        self.consult: Consult = _no_learner
        self.record: Callable[[Execution], None] = _ignore_execution
        self.injection_failed: Callable[[str, str, str], None] = _ignore_failure

    def configure(self, *, enabled: bool, interface: Interface) -> None:
        """Put other options in force from the next query on."""
        self.enabled = enabled
        if interface != self.interface:  # what was cached of texts holds the old defaults
            self.interface, self._recogniser = interface, _recogniser(interface)

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
        statement = self._recogniser.recognise(sql, scope)
        if self.relay_only and (statement.vector is not None or statement.reason is not None):
            return dataclasses.replace(statement, vector=None, reason=None)
        return statement

    def switch(self, relay_only: bool) -> None:
        """The kill switch was thrown, or thrown back."""
        self.relay_only = relay_only

    def switch_by_client(self, relay_only: bool | None, username: str) -> bool:
        """Throw the kill switch for a client, or back; None only asks.  Return how it is then."""
        if relay_only is not None:
            self.relay_only = relay_only  # the others hear of it by the supervisor, which has the last word
            self.throw(relay_only, f"user {username}, from SQL")
        return self.relay_only

    def adapts(self, query: VectorQuery) -> bool:
        """Tell whether queries of this kind get settings at all."""
        policy = self._optimizer.template(query.template.key)
        serves = self.enabled and not self.relay_only
        return serves and policy is not None and policy.serves

    def bind(self, query: VectorQuery, parameters: Parameters, steering: Steering = NOTHING) -> BoundQuery:
        """Decode a query's arguments and choose its settings; `steering` is what the client has asked for."""
        bound = BoundQuery(query)
        key = query.template.key
        optimizer, version = self._optimizer, self._version
        if optimizer.baseline is not None:
            before = optimizer.baseline_versions.get(key)
            if before is not None and self._lots.random() >= optimizer.canary_share:
                optimizer, version = optimizer.baseline, before
        policy = optimizer.template(key)
        if policy is not None:
            bound.table = policy.table
        self.counters.recognised[bound.table] += 1
        if not self._decode(bound, parameters):
            self.counters.left_alone["arguments"] += 1
            return bound
        if not self.enabled or key in self._switched_off:
            return bound
        asked = _asked_for(steering, policy) if steering is not NOTHING else None
        if asked is not None:
            bound.choice = asked
            return bound
        if policy is None:
            return bound
        if steering.adaptive_search is False:
            self.counters.left_alone["ruvector.adaptive_search"] += 1
            return bound
        bound.policy_version = version
        values: tuple[str | None, ...] = ()
        if policy.filter_slots:
            values = tuple(
                _canonical(bound.values[slot], policy.value_types[slot]) for slot in policy.filter_slots
            )
        started = perf_counter()
        vector = bound.vector if policy.query is not None else None
        choice = optimizer.optimize(key, vector, bound.k + bound.offset, values, steering.target_recall)
        if choice is not None and choice.reason is BY_VECTOR:
            bound.lookup = perf_counter() - started
        if choice is not None and steering is not NOTHING:
            choice = steered(policy, choice, steering.target_recall, steering.optimize_for)
        if choice is None or not valid_settings(choice.arm.settings):
            return bound
        if choice.arm.kind == "exact" and not query.template.whole:
            # It was measured for the search alone; what surrounds it would lose its index scans as well.
            self.counters.left_alone["exact search in a larger statement"] += 1
            return bound
        bound.choice = choice
        return bound

    def _decode(self, bound: BoundQuery, parameters: Parameters) -> bool:
        """Fill in vector, k, offset and values; False where the query's shape cannot be told."""
        form = self._form(bound.query, prepared=bool(parameters))
        if not form.readable:
            return False
        bound.k, bound.offset, bound.raw_vector = form.k, form.offset, form.raw_vector
        values = form.values.copy()
        for slot, number, role in form.parameters:
            if number >= len(parameters):
                return False  # Bind will fail; the server says so
            format_code, raw = parameters[number]
            data = raw if raw is None or type(raw) is bytes else bytes(raw)
            if role == "vector":
                bound.raw_vector = None if data is None else (format_code, data)
                continue
            value = values[slot] = Value(format_code, data)
            if role == "limit" or role == "offset":
                count = _count(value)
                if count is None:
                    return False
                if role == "limit":
                    bound.k = count
                else:
                    bound.offset = count
        bound.values = tuple(values)
        return bound.k > 0

    def _form(self, query: VectorQuery, *, prepared: bool) -> _Form:
        """Return the form of a query, kept from one execution to the next where it has parameters."""
        form = self._forms.get(id(query))
        if form is None or form.query is not query:
            form = _Form(query)
            if prepared:
                if len(self._forms) >= _MAX_FORMS:
                    self._forms.clear()
                self._forms[id(query)] = form  # which keeps the query, and so nothing else has its id
        return form

    def finished(self, bound: BoundQuery, outcome: Outcome) -> None:
        """Take note of one execution; it is recorded at once, or by `settle`."""
        if self.relay_only:
            return
        self.unsettled.append((bound, outcome))
        if not self.defers or self.interface.report_query_id:
            self.settle()

    def settle(self) -> None:
        """Record the executions that are over: what no client has to wait for."""
        unsettled, self.unsettled = self.unsettled, []
        for bound, outcome in unsettled:
            self._record(bound, outcome)

    def _record(self, bound: BoundQuery, outcome: Outcome) -> None:
        if outcome.error is None:
            self.observe(bound.table, bound.arm.name, bound.choice.trust, outcome.latency, bound.overhead)
        if outcome.latency >= self.slow_from:
            self.slow(bound, outcome)
        if bound.k > 0:
            chosen = bound.query.query_id
            bound.query_id = query_id = os.urandom(16) if chosen is None else naming.query_id(chosen)
            self.record(Execution(bound, outcome, time.time(), query_id))

    def accept(self, bound: BoundQuery) -> None:
        """The server has not refused the settings tried for a query, unless `switch_off` was told so."""
        if bound.settings:
            self.accepted.add(bound.settings)

    def switch_off(self, bound: BoundQuery, sqlstate: str, message: str) -> None:
        """The server refused the settings: leave this template alone until the process restarts."""
        self.counters.injection_errors += 1
        self.accepted.discard(bound.settings)
        bound.settings = ()
        self._switched_off.add(bound.query.template.key)
        self.injection_failed(bound.query.template.key, sqlstate, message)


def _recogniser(interface: Interface) -> Recogniser:
    return Recogniser(
        rewrite=Rewriter(interface.defaults, interface.left_to_server) if interface.enabled else None,
        without_clause=without_clause if interface.enabled else None,
    )


_EFFORTS: Final = (("hnsw", "hnsw.ef_search", "ef_search"), ("ivfflat", "ivfflat.probes", "probes"))


def _asked_for(steering: Steering, policy: TemplatePolicy | None) -> Choice | None:
    """Return what the client has fixed itself, of what the template's indexes know; None: nothing."""
    kinds = {arm.kind for arm in policy.arms if arm.effort} if policy is not None else set()
    settings = tuple(
        (setting, str(value))
        for kind, setting, name in _EFFORTS
        if (value := getattr(steering, name)) is not None and (not kinds or kind in kinds)
    )
    if not settings:
        return None
    return Choice(Arm("as asked", settings), Trust.STATIC, None, "the client has fixed it")


def _canonical(value: Value | None, type_oid: int) -> str | None:
    if value is None or value.data is None:
        return None
    return canonical(type_oid, value.format, value.data)
