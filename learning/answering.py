"""Questions to the running learner, and its answers: for the command line, SQL functions, a dashboard.

A question is one JSON object with a ``kind``, an answer another; on the channel both travel as bytes that
only the two ends read (`learning.channel.Question`, `Answer`), so that whoever carries them, a worker or the
supervisor's HTTP, need not know them.  Bytes inside are base64.

Rules
-----
- A question changes nothing, and is answered from memory: the server is not asked.
- What takes long (the index of a sample of the table) happens in a thread, once for each policy.
- Whoever asks gets a sentence in place of an answer, never silence: `Problem`.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import numpy as np

from learning.advice import Advice, TableView, for_rejected, for_table
from learning.explain import Explanation, explain
from learning.optimizer import SearchOptimizer
from learning.records import Label, Snapshot, Template, TemplatePolicy, Value
from learning.registry import Registry, TemplateState
from learning.trajectory import canonical_values

_Found = TypeVar("_Found")

_OPTIMIZERS = 4  # kept for further questions; each may hold an index of a sample of the table


class Explain(msgspec.Struct, frozen=True, tag_field="kind", tag="explain"):
    """What would this query get, and why?  Named by its statement, or by its table where that is enough."""

    sql: str | None = None  # Template.sql, the canonical text
    table: str | None = None  # resolved: "public.items"; its unfiltered statement with most traffic
    database: str | None = None  # where several know the statement
    user: str | None = None
    vector: bytes | None = None  # float32, little endian
    k: int = 10  # LIMIT + OFFSET
    values: tuple[Value | None, ...] = ()  # by slot of the template
    state: str | None = None  # absolute path of the learner's state directory, to be sure that it is the one


class Advise(msgspec.Struct, frozen=True, tag_field="kind", tag="advise"):
    """What could a person change about a table?"""

    table: str | None = None  # resolved; None: every table


class Overview(msgspec.Struct, frozen=True, tag_field="kind", tag="overview"):
    """What is there to show of everything?  Answered by a JSON object of `learning.overview`."""


class Explained(msgspec.Struct, frozen=True, tag_field="kind", tag="explained"):
    """The answer to `Explain`."""

    explanation: Explanation


class TableAdvice(msgspec.Struct, frozen=True):
    """Advice on one statement."""

    table: str
    template: str  # its canonical text
    advice: tuple[Advice, ...]


class Advised(msgspec.Struct, frozen=True, tag_field="kind", tag="advised"):
    """The answer to `Advise`; statements without advice are not mentioned."""

    tables: tuple[TableAdvice, ...]


class Problem(msgspec.Struct, frozen=True, tag_field="kind", tag="problem"):
    """There is no answer; `message` says why and what to do."""

    message: str
    advice: tuple[Advice, ...] = ()
    unknown: bool = False  # the learner does not know what was asked about


Inquiry = Explain | Advise | Overview
Reply = Explained | Advised | Problem

_inquiries: msgspec.json.Decoder[Inquiry] = msgspec.json.Decoder(Inquiry)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def decode_reply(body: bytes) -> Reply:
    """Read an answer; raises msgspec.DecodeError where it is none."""
    return _replies.decode(body)


class AnswerError(Exception):
    """There is nothing to answer; the message says why and what to do, `advice` what could be changed."""

    def __init__(self, message: str, advice: tuple[Advice, ...] = (), *, unknown: bool = False) -> None:
        super().__init__(message)
        self.advice = advice
        self.unknown = unknown


class Answering:
    """Answers from what the learner has in memory.

    Parameters
    ----------
    version
        Returns the version of the policy published last.
    state
        Absolute path of the learner's state directory.
    overview
        Returns the answer to `Overview`.
    """

    def __init__(
        self,
        registry: Registry,
        version: Callable[[], int],
        state: str,
        overview: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._overview = overview
        self._registry = registry
        self._version = version
        self._state = state
        self._optimizers: OrderedDict[str, tuple[TemplatePolicy, SearchOptimizer]] = OrderedDict()

    async def answer(self, body: bytes) -> bytes:
        """Return the answer to one question, both JSON."""
        try:
            inquiry = _inquiries.decode(body)
        except msgspec.DecodeError as error:
            return msgspec.json.encode(Problem(f"the question cannot be read: {error}"))
        if isinstance(inquiry, Overview):
            return msgspec.json.encode(await self._overview())
        try:
            reply = await self._reply(inquiry)
        except AnswerError as error:
            reply = Problem(str(error), error.advice, error.unknown)
        return msgspec.json.encode(reply)

    async def _reply(self, inquiry: Explain | Advise) -> Reply:
        if isinstance(inquiry, Advise):
            return Advised(self._advised(inquiry.table))
        if inquiry.state not in (None, self._state):
            raise AnswerError(f"this learner keeps its state in {self._state}", unknown=True)
        return Explained(await self.explain(self._find(inquiry), inquiry))

    def _find(self, inquiry: Explain) -> TemplateState:
        """Return the one template that is meant."""
        fitting = [
            state
            for state in self._registry
            if inquiry.database in (None, state.template.database)
            and inquiry.user in (None, state.template.user)
        ]
        if inquiry.sql is not None:
            return chosen(inquiry.sql, [(state.template, state) for state in fitting])
        of_table = [state for state in fitting if state.table == inquiry.table and state.policy is not None]
        if not of_table:
            raise AnswerError(f"no vector query of the table {inquiry.table} is known", unknown=True)
        return max(of_table, key=lambda state: (not state.filtered, state.traffic.total))

    async def explain(self, state: TemplateState, inquiry: Explain) -> Explanation:
        """Return what a query of a template gets, and why.

        Raises
        ------
        AnswerError
            Nothing was decided about the template yet, or a value is missing.
        """
        policy = state.policy
        labels = tuple(state.labels)
        if policy is None:
            raise AnswerError(undecided(len(labels)))
        if inquiry.k < 1:
            raise AnswerError(f"k (LIMIT + OFFSET) must be at least 1, not {inquiry.k}")
        values = canonical_values(inquiry.values, policy.filter_slots, policy.value_types)
        vector = np.frombuffer(inquiry.vector, dtype="<f4") if inquiry.vector is not None else None
        optimizer = await self._optimizer(state.template.key, policy)
        return await asyncio.to_thread(
            explain,
            state.template,
            policy,
            labels,
            vector=vector,
            k=inquiry.k,
            values=values,
            version=self._version(),
            advice=advice_on(state.template, policy, labels, table_view(state)),
            optimizer=optimizer,
            live=True,
        )

    async def _optimizer(self, key: str, policy: TemplatePolicy) -> SearchOptimizer:
        """Return what serves the template, made once for each policy."""
        known = self._optimizers.get(key)
        if known is None or known[0] is not policy:
            snapshot = Snapshot(self._version(), 0.0, {key: policy})
            before = known[1] if known is not None else None
            known = (policy, await asyncio.to_thread(SearchOptimizer, snapshot, before))
            self._optimizers[key] = known
        self._optimizers.move_to_end(key)
        while len(self._optimizers) > _OPTIMIZERS:
            self._optimizers.popitem(last=False)
        return known[1]

    def _advised(self, table: str | None) -> tuple[TableAdvice, ...]:
        found = []
        for state in self._registry:
            if state.policy is None or table not in (None, state.table):
                continue
            advice = advice_on(state.template, state.policy, tuple(state.labels), table_view(state))
            if advice:
                found.append(TableAdvice(state.table, state.template.sql, advice))
        return tuple(found)


def undecided(labels: int) -> str:
    """Say that a statement is known without a policy."""
    return (
        f"the statement is known, and nothing was decided about it yet: {labels} queries of its kind were "
        "measured. Send more of them, or wait"
    )


def chosen(sql: str, known: list[tuple[Template, _Found]]) -> _Found:
    """Return what belongs to the one template with this text.

    Raises
    ------
    AnswerError
        There is none, or several of different databases or users.
    """
    same = [pair for pair in known if pair[0].sql == sql]
    if not same:
        listed = "".join(f"\n  {one}" for one in sorted({template.sql for template, _ in known})[:5])
        raise AnswerError(
            f"no such statement has gone through the proxy yet; known are:{listed}"
            if listed
            else "no vector query has gone through the proxy yet",
            unknown=True,
        )
    if len({(template.database, template.user) for template, _ in same}) > 1:
        owners = ", ".join(sorted(f"--database {t.database} --user {t.user}" for t, _ in same))
        raise AnswerError(f"the statement is known from several: add one of {owners}")
    return same[-1][1]


def advice_on(
    template: Template, policy: TemplatePolicy, labels: tuple[Label, ...], view: TableView | None
) -> tuple[Advice, ...]:
    """Return advice on a template: on why it is left alone, or on what was measured."""
    if len(policy.arms) == 1:
        return tuple(for_rejected(policy.reason, policy.table, template.column, template.operator))
    known = view or TableView(policy.table, template.column, 0.0, ())
    return tuple(for_table(known, policy.arms, labels, policy.target_recall))


def table_view(state: TemplateState) -> TableView | None:
    """Return what the live inventory says of a template's table; None before the server was asked."""
    confirmed = state.confirmed
    if confirmed is None:
        return None
    latest = state.watch.latest
    facts = confirmed.facts
    shares = [
        facts.selectivity.get(context.partition("\x1f")[2], facts.rare_selectivity)
        for context in state.traffic.counts
    ]
    return TableView(
        table=facts.table,
        column=state.template.column,
        rows=latest.rows if latest is not None else facts.rows,
        indexes=confirmed.indexes,
        usual=dict(confirmed.usual),
        unindexed=confirmed.unindexed,
        typical_share=statistics.median(shares) if facts.filter_slots and any(shares) else None,
        rows_when_built=dict(state.watch.built),
    )
