"""``ruvector-proxy explain``: what a statement would get, and why, read from what the learner keeps.

The learner writes what it learns to its state directory within a second, and SQLite lets others read
meanwhile; so the answer is the same whether a proxy runs or not, and nothing is asked of the server.  The
statement is recognised by the code that recognises the traffic, and its arguments are decoded by the code
that decodes the traffic's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from config.schema import Config
from learning.advice import Advice, TableView, for_rejected, for_table, for_text
from learning.drift import World
from learning.explain import Explanation, explain
from learning.records import Label, Template, TemplatePolicy, Value
from learning.sqlite_file import Kept, read
from learning.values import canonical
from proxy.sql import Recogniser, Scope, VectorQuery
from proxy.sql.vectors import decode_limit, decode_vector


class CannotExplainError(Exception):
    """There is nothing to explain; the message says why and what to do, `advice` what could be changed."""

    def __init__(self, message: str, advice: Sequence[Advice] = ()) -> None:
        super().__init__(message)
        self.advice = tuple(advice)


def explain_statement(
    config: Config, sql: str, parameters: Sequence[str], *, database: str | None, user: str | None
) -> Explanation:
    """Return the explanation of one statement.

    Parameters
    ----------
    parameters
        Values of $1, $2, ... as text.
    database, user
        Narrow the choice where the same statement is known from several.

    Raises
    ------
    CannotExplainError
        It is no vector query, or nothing is known of it.
    """
    query = _recognised(sql)
    kept = _kept(config.store.path)
    template = _template(kept, query, database, user)
    snapshot = kept.snapshot
    policy = snapshot.templates.get(template.key) if snapshot is not None else None
    labels = kept.labels.get(template.key, [])
    if snapshot is None or policy is None:
        raise CannotExplainError(
            f"the statement is known, and nothing was decided about it yet: {len(labels)} queries of its "
            "kind were measured. Send more of them, or wait"
        )
    vector, k, values = _arguments(query, policy, parameters)
    return explain(
        template,
        policy,
        labels,
        vector=vector,
        k=k,
        values=values,
        version=snapshot.version,
        advice=_advice(kept, template, policy, labels),
    )


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


def _kept(directory: Path) -> Kept:
    try:
        return read(directory)
    except FileNotFoundError:
        raise CannotExplainError(
            f"nothing is kept in {directory} (store.path): has a proxy with a learner run with this "
            "configuration?"
        ) from None
    except (OSError, ValueError) as error:
        raise CannotExplainError(
            f"what is kept in {directory} (store.path) cannot be read: {error}"
        ) from error


def _template(kept: Kept, query: VectorQuery, database: str | None, user: str | None) -> Template:
    same = [stored.template for stored in kept.templates if stored.template.sql == query.template.sql]
    if not same:
        known = sorted({stored.template.sql for stored in kept.templates})[:5]
        listed = "".join(f"\n  {sql}" for sql in known)
        raise CannotExplainError(
            "no such statement has gone through the proxy yet; known are:" + listed
            if known
            else "no vector query has gone through the proxy yet"
        )
    fitting = [t for t in same if database in (None, t.database) and user in (None, t.user)]
    if not fitting:
        owners = ", ".join(sorted(f"database {t.database}, user {t.user}" for t in same))
        raise CannotExplainError(f"the statement is known only from {owners}: see --database and --user")
    if len({(t.database, t.user) for t in fitting}) > 1:
        owners = ", ".join(sorted(f"--database {t.database} --user {t.user}" for t in fitting))
        raise CannotExplainError(f"the statement is known from several: add one of {owners}")
    return fitting[-1]


def _arguments(
    query: VectorQuery, policy: TemplatePolicy, parameters: Sequence[str]
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None, int, tuple[str | None, ...]]:
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
    for slot, value in zip(query.template.slots, by_slot, strict=True):
        if slot.role == "vector" and value.data is not None:
            vector = decode_vector(value.format, value.data)
            if vector is None:
                raise CannotExplainError("the query vector cannot be read; it is written '[1, 2, 3]'")
        elif slot.role in ("limit", "offset"):
            rows = decode_limit(value)
            if rows is None:
                raise CannotExplainError(f"the {slot.role.upper()} is no number")
            k += rows
    values = tuple(_canonical(by_slot[slot], policy.value_types[slot]) for slot in policy.filter_slots)
    return vector, k, values


def _canonical(value: Value, type_oid: int) -> str | None:
    return None if value.data is None else canonical(type_oid, value.format, value.data)


def _advice(kept: Kept, template: Template, policy: TemplatePolicy, labels: Sequence[Label]) -> list[Advice]:
    if len(policy.arms) == 1:
        return for_rejected(policy.reason, policy.table, template.column, template.operator)
    note = kept.notes.get(f"world:{template.key}")
    rows = msgspec.msgpack.decode(note, type=World).rows if note else 0.0
    view = TableView(policy.table, template.column, rows, ())
    return for_table(view, policy.arms, labels, policy.target_recall)


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
        f"policy      {found.policy_version}: {found.policy}",
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
