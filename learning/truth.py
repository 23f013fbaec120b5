"""Exact answers where a scan of the whole table for every query would cost too much.

One pass for several queries
    A candidate list from the index gives an upper bound of a query's k-th distance.  So one statement reads
    the table once, computes the distances to all queries of the batch, and returns the few rows within each
    query's bound: no sort, and the exact answers are among them.  The distances are those that the exact
    search of each query would have computed, so nothing is estimated.  What a single exact search costs is
    not measured that way; it is taken from those that were made alone.

A sample of the rows
    For a table of more than `learner.exact_rows` rows, some of its pages are searched (``TABLESAMPLE
    SYSTEM``, with another seed each time).  Let B be the smallest k-th distance that any arm returned.  The
    sampled rows within B stand for all rows within B, and an arm's recall is estimated by the share of them
    that it returned:

        recall(arm)  =  sampled rows within B that the arm returned  /  sampled rows within B

    *Bias.*  Every row has the same chance to be sampled, so the estimate is unbiased for the share of the
    rows within B.  Those are the true neighbours, and as many more as the best arm itself missed, m: an arm
    that returned all but these gets k / (k + m) where (k - m) / k is true.  The difference,
    m^2 / (k (k + m)), flatters; at a recall of 0.98 it is 0.0004.  An arm below the best is underestimated by
    at most the factor k / (k + m).  So a sample ranks arms and holds a target, and what no arm finds it sees
    all the same.

    *Variance.*  A label rests on about k * share rows instead of k, so it takes 1 / share times as many
    labels for the same standard error.  A query without any sampled row within B says nothing and makes no
    label, which favours no arm: whether a row is sampled does not depend on whether it was found.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any

from learning.binding import Bound, ParameterType, parameter_types
from learning.records import SlotRole, Template
from learning.upstream import Session

BATCHED_TYPES = frozenset({"vector", "halfvec"})
"""Types whose text can be cast back without a length."""

_TOLERANCE = 1e-9  # relative, as for ties in learning.probe
_LEAST_SHARE = 1e-4


def can_batch(template: Template, types: Sequence[ParameterType]) -> bool:
    """Tell whether the template's exact searches can share one pass."""
    kind = _vector_type(template, types)
    return bool(template.scan_sql) and kind is not None and kind.name in BATCHED_TYPES and not kind.array


def sampled_share(template: Template, rows: float, exact_rows: int) -> float:
    """Return the share of the rows to search for the truth: 1.0 is the whole table.

    Filtered templates are searched whole: few rows pass, and a sample of them would hold nothing.
    """
    filtered = any(slot.role is SlotRole.FILTER for slot in template.slots)
    if not template.sample_sql or filtered or rows <= exact_rows:
        return 1.0
    return max(_LEAST_SHARE, exact_rows / rows)


async def batched(
    session: Session,
    template: Template,
    types: Sequence[ParameterType],
    vectors: Sequence[str],
    bounds: Sequence[float],
) -> tuple[list[list[float]], float]:
    """Return for each query the distances of all rows within its bound, sorted, and the seconds it took.

    To be called in `learning.probe.snapshot`, under the settings of the exact search.
    """
    key = (template.key, "batch")
    prepared = session.statements.get(key)
    if prepared is None:
        prepared = session.statements[key] = await session.connection.prepare(_batch_sql(template, types))
    limits = [repr(bound + _TOLERANCE * max(1.0, abs(bound))) for bound in bounds]
    started = time.perf_counter()
    rows = await prepared.fetch(list(vectors), limits)
    seconds = time.perf_counter() - started
    found: list[list[float]] = [[] for _ in vectors]
    for number, distance in rows:
        found[int(number) - 1].append(float(distance))
    return [sorted(each) for each in found], seconds


def _batch_sql(template: Template, types: Sequence[ParameterType]) -> str:
    kind = _vector_type(template, types)
    assert kind is not None
    name = ".".join('"' + part.replace('"', '""') + '"' for part in (kind.schema, kind.name))
    scan = re.sub(
        r'"(?:[^"]|"")*"|\$1\b',
        lambda found: "ruvector_batch.v" if found[0] == "$1" else found[0],
        template.scan_sql,
    )
    # The text of the vectors is read once, not once for every row of the table: hence MATERIALIZED.
    return (
        f"WITH ruvector_batch AS MATERIALIZED (SELECT n, v::{name} AS v, d::pg_catalog.float8 AS bound "  # noqa: S608
        "FROM ROWS FROM (pg_catalog.unnest($1::pg_catalog.text[]), pg_catalog.unnest($2::pg_catalog.text[])) "
        "WITH ORDINALITY AS u (v, d, n)) "
        f"SELECT ruvector_batch.n, found.distance FROM ruvector_batch, LATERAL ({scan}) AS found "
        "WHERE found.distance OPERATOR(pg_catalog.<=) ruvector_batch.bound"
    )


def _vector_type(template: Template, types: Sequence[ParameterType]) -> ParameterType | None:
    for slot, kind in zip(template.probe_slots, types, strict=True):
        if template.slots[slot].role is SlotRole.VECTOR:
            return kind
    return None


async def sampled(
    session: Session, template: Template, arguments: Sequence[Bound], share: float, seed: int
) -> tuple[list[Any], float]:
    """Return the nearest distances in about `share` of the table's pages, and the seconds it took.

    To be called like `batched`.
    """
    key = (template.key, "sample")
    prepared = session.statements.get(key)
    if prepared is None:
        prepared = await session.connection.prepare(template.sample_sql)
        await session.binder.declare(parameter_types(prepared))
        prepared = session.statements[key] = await session.connection.prepare(template.sample_sql)
    started = time.perf_counter()
    rows = await prepared.fetch(*arguments, repr(100.0 * share), str(seed))
    return [row[0] for row in rows if row[0] is not None], time.perf_counter() - started


def estimated_recall(sample: Sequence[float], returned: Sequence[float], bound: float) -> float | None:
    """Return the share of the sampled rows within `bound` that were returned; None: there are none.

    Rows are matched by their distance, each returned one once.
    """
    within = [distance for distance in sample if _at_most(distance, bound)]
    if not within:
        return None
    left = sorted(returned)
    hits = 0
    for distance in within:
        match = next((i for i, other in enumerate(left) if _same(distance, other)), None)
        if match is not None:
            hits += 1
            del left[match]
    return hits / len(within)


def _same(one: float, other: float) -> bool:
    return one == other or abs(one - other) <= _TOLERANCE * max(1.0, abs(one))


def _at_most(distance: float, bound: float) -> bool:
    return math.isfinite(distance) and (distance <= bound or _same(distance, bound))
