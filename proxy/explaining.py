"""``ruvector-proxy explain``: what a statement would get, and why.

A running proxy of this configuration is asked over its HTTP address, and answers from what its learner has
in memory; where none answers, or it does not know the statement, the answer comes from what the learner has
kept in its store.  Nothing is asked of the server.  The statement is recognised by the code that
recognises the traffic, and its arguments are decoded by the code that decodes the traffic's.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from config.schema import Admin, Config
from learning.advice import Advice, TableView, for_text
from learning.answering import (
    Advise,
    AnswerError,
    Explain,
    Explained,
    Problem,
    Reply,
    advice_on,
    chosen,
    decode_reply,
    undecided,
)
from learning.explain import Explanation, explain
from learning.records import Value
from learning.sqlite_file import Kept
from learning.stored import place, read_store
from learning.trajectory import canonical_values
from proxy.admin.client import AdminClient, UnreachableError
from proxy.sql import Recogniser, Scope, VectorQuery
from proxy.sql.vectors import decode_limit, decode_vector


class CannotExplainError(Exception):
    """There is nothing to explain; the message says why and what to do, `advice` what could be changed."""

    def __init__(self, message: str, advice: Sequence[Advice] = ()) -> None:
        super().__init__(message)
        self.advice = tuple(advice)


def explain_statement(
    config: Config,
    sql: str,
    parameters: Sequence[str],
    *,
    database: str | None,
    user: str | None,
    live: bool = True,
) -> Explanation:
    """Return the explanation of one statement.

    Parameters
    ----------
    parameters
        Values of $1, $2, ... as text.
    database, user
        Narrow the choice where the same statement is known from several.
    live
        Whether a running proxy is asked first.

    Raises
    ------
    CannotExplainError
        It is no vector query, or nothing is known of it.
    """
    query = _recognised(sql)
    vector, k, values = _arguments(query, parameters)
    inquiry = Explain(
        sql=query.template.sql,
        database=database,
        user=user,
        vector=None if vector is None else vector.astype("<f4").tobytes(),
        k=k,
        values=values,
        state=str(config.store.path.absolute()),
    )
    reply = ask(config.admin, inquiry) if live else None
    if isinstance(reply, Explained):
        return reply.explanation
    if isinstance(reply, Problem) and not reply.unknown:
        raise CannotExplainError(reply.message, reply.advice)
    try:
        return _from_the_store(config, inquiry, vector)
    except AnswerError as error:
        raise CannotExplainError(str(error), error.advice) from error


def ask(admin: Admin, inquiry: Explain | Advise) -> Reply | None:
    """Ask the running proxy; None: there is none that answers."""
    try:
        return decode_reply(AdminClient(admin).request("/ask", msgspec.json.encode(inquiry)))
    except (UnreachableError, msgspec.DecodeError):  # nobody listens, or somebody else does
        return None


def _recognised(sql: str) -> VectorQuery:
    statement = Recogniser().recognise(sql.encode(), Scope("", "", None))
    if statement.vector is None:
        reason = statement.reason
        raise CannotExplainError(
            f"the proxy leaves this statement alone: {reason}"
            if reason
            else "this is no vector search: nothing in it is ordered by a distance (<->, <=>, <#>, <+>, ...)",
            for_text(reason),
        )
    return statement.vector


def _from_the_store(
    config: Config, inquiry: Explain, vector: np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None
) -> Explanation:
    kept = _kept(config)
    known = [stored.template for stored in kept.templates]
    fitting = [t for t in known if inquiry.database in (None, t.database) and inquiry.user in (None, t.user)]
    assert inquiry.sql is not None
    same = [template for template in known if template.sql == inquiry.sql]
    if same and not any(template in fitting for template in same):
        owners = ", ".join(sorted(f"database {t.database}, user {t.user}" for t in same))
        raise CannotExplainError(f"the statement is known only from {owners}: see --database and --user")
    template = chosen(inquiry.sql, [(template, template) for template in fitting])
    snapshot = kept.snapshot
    policy = snapshot.templates.get(template.key) if snapshot is not None else None
    labels = tuple(kept.labels.get(template.key, ()))
    if snapshot is None or policy is None:
        raise CannotExplainError(undecided(len(labels)))
    note = kept.notes.get(f"view:{template.key}")
    view = msgspec.msgpack.decode(note, type=TableView) if note else None
    return explain(
        template,
        policy,
        labels,
        vector=vector,
        k=inquiry.k,
        values=canonical_values(inquiry.values, policy.filter_slots, policy.value_types),
        version=snapshot.version,
        advice=advice_on(template, policy, labels, view),
    )


def _kept(config: Config) -> Kept:
    try:
        return read_store(config)
    except FileNotFoundError:
        raise CannotExplainError(
            f"nothing is kept in {place(config)}: has a proxy with a learner run with this configuration?"
        ) from None
    except (OSError, ValueError) as error:
        raise CannotExplainError(f"what is kept in {place(config)} cannot be read: {error}") from error


def _arguments(
    query: VectorQuery, parameters: Sequence[str]
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None, int, tuple[Value | None, ...]]:
    """Return the query vector, k, and the other values by slot."""
    by_slot: list[Value] = []
    for argument in query.arguments:
        if argument.parameter is None:
            by_slot.append(argument.literal or Value(0, None))
        elif argument.parameter < len(parameters):
            by_slot.append(Value(0, parameters[argument.parameter].encode()))
        else:
            number = argument.parameter + 1
            raise CannotExplainError(
                f"the statement needs a value for ${number}: add --param, {number} in all"
            )
    vector, k = None, 0
    values: list[Value | None] = []
    for slot, value in zip(query.template.slots, by_slot, strict=True):
        values.append(None if slot.role == "vector" else value)
        if slot.role == "vector" and value.data is not None:
            vector = decode_vector(value.format, value.data)
            if vector is None:
                raise CannotExplainError("the query vector cannot be read; it is written '[1, 2, 3]'")
        elif slot.role in ("limit", "offset"):
            rows = decode_limit(value)
            if rows is None:
                raise CannotExplainError(f"the {slot.role.upper()} is no number")
            k += rows
    return vector, k, tuple(values)


def as_text(found: Explanation) -> str:
    """Return the explanation for people, at most about 100 columns wide."""
    context = ", ".join(f"{name} = {value}" for name, value in found.context.items())
    settings = (
        ", ".join(f"{name} = {value}" for name, value in found.settings.items()) or "none of the proxy's"
    )
    expected = f"{found.expected_recall:.3f}" if found.expected_recall is not None else "not known"
    sure = (
        f"; at least {found.target_recall:g} with probability {found.sure:.0%}"
        if found.sure is not None
        else ""
    )
    near = f", the most similar at cosine {found.similarity:.3f}" if found.similarity is not None else ""
    lines = [
        f"table       {found.table}",
        f"statement   {found.template}",
        f"query       {context}",
        f"gets        {found.arm}: {settings}",
        f"because     {found.reason} (trust: {found.trust})",
        f"recall      expected {expected}, target {found.target_recall:g}{sure}",
        f"difficulty  {found.difficulty}",
        f"evidence    {found.labels} measured queries of this kind{near}",
        f"policy      {found.policy_version}, {'in force' if found.live else 'as kept last'}: {found.policy}",
        "",
        f"  {'arm':<22}{'recall':>8}{'nearby':>8}{'ms':>9}",
    ]
    for arm in found.arms:
        if arm.ms is None:
            continue
        nearby = f"{arm.nearby:.3f}" if arm.nearby is not None else "-"
        mark = "*" if arm.chosen else " "
        lines.append(f"{mark} {arm.name:<22}{arm.recall:>8.3f}{nearby:>8}{arm.ms:>9.2f}")
    lines += [f"\nadvice: {advice.text}" for advice in found.advice]
    return "\n".join(lines)
