"""As many rows as LIMIT asks for, before anything has been measured.

Theory
------
A plain HNSW scan returns at most ``hnsw.ef_search`` rows, 40 by default, and an IVFFlat scan what is in the
lists that it reads.  So LIMIT 500 gets 40 rows, and no measurement is needed to know that this is too few:
what a scan can return follows from the settings in force and the index.  *Floors* say which is the least arm
that returns so many rows.  They serve while a template is observed, and wherever "as is" would be chosen for
a k that it is too small for.

Rules
-----
- Only what is too little is touched: a query that "as is" has rows enough for runs as it came.
- The arm is of the index that the planner takes as it is.  Whether another one is better, labels decide.
- Settings that go on until there are rows enough (iterative scans) need no floor.
- Lists are uneven: of an IVFFlat index half as many rows are counted on as the lists have on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from learning.dialects import IndexInfo, row_limit
from learning.records import Arm

UNLIMITED = 1 << 30
"""Rows of an arm that returns all that there are."""

_UNEVEN = 0.5


def floors(
    arms: Sequence[Arm],
    indexes: Sequence[IndexInfo],
    usual: Mapping[str, str],
    used: Sequence[str],
    rows: float,
) -> tuple[tuple[int, int], ...]:
    """Return pairs (rows, number of an arm), both increasing: the arm returns so many rows at least.

    The first is "as is"; nothing: it returns enough for every k, or nothing is known of it.

    Parameters
    ----------
    arms
        "As is" first.
    indexes
        The vector indexes on the column.
    usual
        Search settings in force without the proxy.
    used
        Names of the vector indexes in the plans of "as is".
    rows
        Of the table.
    """
    methods = {index.method for index in indexes if index.name in used}
    if len(methods) != 1:
        return ()
    method = methods.pop()
    lists = max((index.lists or 0 for index in indexes if index.method == method), default=0)
    least = _as_is(method, usual, lists, rows)
    if least is None:
        return ()
    found = [(least, 0)]
    possible = sorted(
        (_rows(arm, lists, rows), arm.effort, number)
        for number, arm in enumerate(arms)
        if arm.kind == method and arm.effort
    )
    for enough, _, number in possible:
        if enough > found[-1][0]:
            found.append((enough, number))
    return tuple(found) if len(found) > 1 else ()


def _as_is(method: str, usual: Mapping[str, str], lists: int, rows: float) -> int | None:
    """Return the rows that an index returns under the usual settings; None: enough, or not known."""
    effort = {"hnsw": "hnsw.ef_search", "ivfflat": "ivfflat.probes"}.get(method, "")
    value = usual.get(effort, "")
    if not value.isdecimal() or usual.get(f"{method}.iterative_scan", "off") != "off":
        return None
    return int(value) if method == "hnsw" else _in_lists(int(value), lists, rows)


def _rows(arm: Arm, lists: int, rows: float) -> int:
    """Return the rows that an arm returns at least, as far as there are so many."""
    if any(name.endswith(".iterative_scan") for name, _ in arm.settings):
        return UNLIMITED
    return _in_lists(arm.effort, lists, rows) if arm.kind == "ivfflat" else row_limit(arm) or UNLIMITED


def _in_lists(probes: int, lists: int, rows: float) -> int:
    return UNLIMITED if probes >= lists else int(_UNEVEN * probes * rows / lists)


def enough(known: Sequence[tuple[int, int]], k: int) -> int | None:
    """Return the arm that returns `k` rows, else the one that returns most; None: "as is" does."""
    if not known or k <= known[0][0]:
        return None
    return next((arm for rows, arm in known if rows >= k), known[-1][1])
