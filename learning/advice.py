"""Advice in words: what a person could change, and what speaks for it.  Pure.

Three sources, none of them guesswork:

`for_text`      the recogniser's reason why a statement is left alone: DESC, no LIMIT, a set operation, ...
`for_rejected`  the server's reason why a template is left alone: no index, another opclass, ...
`for_table`     what was measured: the labels of a template, beside the inventory of its table.

Each advice has a stable `code` for metrics and programs, and a sentence that names the figures it rests on.

Rules
-----
- A label says what the application's own settings ("as is") returned, so a LIMIT above ef_search is a fact
  seen in rows, not an inference from settings.
- An IVFFlat index whose recall grows no faster than the share of its lists that are read has lists that say
  nothing about the data: it was built before the data was there, or the data has moved away.
- An index that was built, by what the learner saw itself, for a table of less than half the rows of today is
  worth a REINDEX if it is IVFFlat; an HNSW graph grows with its table.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from learning.dialects import AS_IS, IndexInfo
from learning.records import Arm, Label

MIN_LABELS = 20
"""Labels from which a claim about a whole template is made."""

_OUTGROWN = 2.0  # times the rows that an IVFFlat index was built for
_SELECTIVE = 0.2  # share of the rows below which an index on the filter column pays
_UNINFORMED = 1.5  # recall per share of lists read, at most, of lists that say nothing


class Advice(msgspec.Struct, frozen=True):
    """One thing worth doing."""

    code: str
    text: str


class TableView(msgspec.Struct, frozen=True):
    """What is known of a template's table, and of what the application itself has set."""

    table: str
    column: str
    rows: float
    indexes: tuple[IndexInfo, ...]
    usual: dict[str, str] = {}  # settings in force without the proxy
    unindexed: tuple[str, ...] = ()  # filter columns that no ordinary index begins with
    typical_share: float | None = None  # share of the rows that a typical filter value keeps
    rows_when_built: dict[str, float] = {}  # index -> rows, where it was seen


_TEXT: Mapping[str, tuple[str, str]] = {
    "descending": (
        "descending",
        "ORDER BY ... DESC disables the index: vector indexes yield the nearest rows first. For the largest "
        "inner product use <#>, which is negative, in ascending order.",
    ),
    "no limit": ("no-limit", "there is no LIMIT, so the whole table is sorted and no vector index is used"),
    "with ties": ("with-ties", "FETCH ... WITH TIES cannot use a vector index; use LIMIT"),
    "no order by": (
        "no-order-by",
        "a distance is computed but nothing is ordered by it, so no vector index is used; add ORDER BY with "
        "the distance itself, and a LIMIT",
    ),
    "expression": (
        "expression",
        "ORDER BY an expression around the distance (1 - distance, a sum, a cast) disables the index; order "
        "by the distance itself, ascending",
    ),
    "not the first sort key": (
        "not-first-key",
        "the distance is not the first sort key, so no vector index is used",
    ),
    "distinct": ("distinct", "DISTINCT beside the vector search: put the search into a subquery"),
    "group by": ("group-by", "GROUP BY beside the vector search: put the search into a subquery"),
}


def for_text(reason: str | None) -> list[Advice]:
    """Return advice on a statement that the recogniser leaves alone for `reason`."""
    known = _TEXT.get(reason or "")
    return [Advice(*known)] if known else []


def for_rejected(reason: str, table: str, column: str, operator: str) -> list[Advice]:
    """Return advice on a template that the server did not confirm, by the reason in words."""
    with_class = f" USING hnsw ({column}{_opclass(reason, column, operator)})"
    if "no vector index on" in reason and "serves" in reason:
        return [
            Advice(
                "operator-class",
                f"the operator {operator} does not match the operator class of the index, so no index is "
                f"used: CREATE INDEX ON {table}{with_class}",
            )
        ]
    if "no vector index on" in reason:
        return [Advice("no-index", f"every query reads the whole table: CREATE INDEX ON {table}{with_class}")]
    if "is not valid yet" in reason:
        return [
            Advice("invalid-index", "wait for the index to be built; after a failed build drop and repeat it")
        ]
    return []


OPCLASS: Mapping[str, tuple[str, str]] = {
    "<->": ("vector", "l2_ops"),
    "<=>": ("vector", "cosine_ops"),
    "<#>": ("vector", "ip_ops"),
    "<+>": ("vector", "l1_ops"),
    "<~>": ("bit", "hamming_ops"),
    "<%>": ("bit", "jaccard_ops"),
}
"""For each of pgvector's operators its ordinary type, and its operator class without the type."""


def _opclass(reason: str, column: str, operator: str) -> str:
    """Return the operator class for a column, a blank in front; the reason says of which type it is."""
    if operator not in OPCLASS:
        return ""
    usual, name = OPCLASS[operator]
    said = re.search(rf"\({re.escape(column)} (vector|halfvec|sparsevec|bit)\)", reason)
    return f" {said[1] if said else usual}_{name}"


def for_table(view: TableView, arms: Sequence[Arm], labels: Sequence[Label], target: float) -> list[Advice]:
    """Return advice on a confirmed template, the most urgent first.

    Parameters
    ----------
    arms
        Those that were measured.
    labels
        Recent ones of the template.
    target
        Recall that is to be kept, in (0, 1].
    """
    return [
        *_too_few_rows(view, labels),
        *_weak_index(view, arms, labels, target),
        *_outgrown(view),
        *_filter_index(view),
        *_redundant(view),
    ]


def _too_few_rows(view: TableView, labels: Sequence[Label]) -> list[Advice]:
    """LIMIT above what the application's own settings can return."""
    short = [
        (label.k, label.results[AS_IS.name].rows)
        for label in labels
        if AS_IS.name in label.results and label.results[AS_IS.name].rows < label.found
    ]
    if not short:
        return []
    ef = view.usual.get("hnsw.ef_search", "40")
    limited = [(k, rows) for k, rows in short if ef.isdigit() and k > int(ef) >= rows]
    if limited and "\x1f" not in labels[0].context:
        k, _ = max(limited)
        text = f"LIMIT {k} with ef_search {ef} can return at most {ef} rows"
        return [Advice("limit-above-ef", f"{text}; seen in {len(limited)} of {len(labels)} measured queries")]
    k, rows = min(short, key=lambda pair: pair[1] / pair[0])
    return [
        Advice(
            "too-few-rows",
            f"with the application's own settings {len(short)} of {len(labels)} measured queries lost rows "
            f"({rows} of {k} in the worst case): the filter is applied after the index has chosen; an "
            "iterative or exact search is needed, which the proxy sets where it may",
        )
    ]


def _weak_index(view: TableView, arms: Sequence[Arm], labels: Sequence[Label], target: float) -> list[Advice]:
    found: list[Advice] = []
    ivfflat = next((index for index in view.indexes if index.method == "ivfflat"), None)
    hnsw = next((index for index in view.indexes if index.method == "hnsw"), None)
    plain = [arm for arm in arms if arm.effort and not arm.name.startswith(("strict", "relaxed"))]
    if ivfflat is not None and ivfflat.lists and _uninformed(ivfflat.lists, plain, labels):
        found.append(
            Advice(
                "reindex-ivfflat",
                f"the lists of {ivfflat.name} do not follow the data (recall grows no faster than the share "
                f"of its lists that are read): the index was built before the data was there, or the data "
                f"has moved: REINDEX INDEX {ivfflat.name}",
            )
        )
    if hnsw is not None:
        top = max((arm for arm in plain if arm.kind == "hnsw"), key=lambda arm: arm.effort, default=None)
        recall = _mean_recall(top.name, labels) if top is not None else None
        if top is not None and recall is not None and recall < target:
            found.append(
                Advice(
                    "weak-hnsw",
                    f"{hnsw.name} reaches recall {recall:.3f} even with {top.name}, below the target "
                    f"{target:g}: rebuild it with a larger m (now {hnsw.m or 16}) or ef_construction "
                    f"(now {hnsw.ef_construction or 64})",
                )
            )
    return found


def _uninformed(lists: int, plain: Sequence[Arm], labels: Sequence[Label]) -> bool:
    """Tell whether reading a share of the lists finds little more than that share of the neighbours."""
    looked_at = [arm for arm in plain if arm.kind == "ivfflat" and 0.05 * lists <= arm.effort <= 0.4 * lists]
    shares = [
        (recall, arm.effort / lists)
        for arm in looked_at
        if (recall := _mean_recall(arm.name, labels)) is not None
    ]
    return bool(shares) and all(recall < _UNINFORMED * share + 0.05 for recall, share in shares)


def _mean_recall(arm: str, labels: Sequence[Label]) -> float | None:
    seen = [label.results[arm].recall for label in labels if arm in label.results]
    return statistics.fmean(seen) if len(seen) >= MIN_LABELS else None


def _outgrown(view: TableView) -> list[Advice]:
    return [
        Advice(
            "outgrown-ivfflat",
            f"{index.name} was built for {built:,.0f} rows and the table now holds {view.rows:,.0f}: its "
            f"{index.lists} lists are too few and too coarse: REINDEX INDEX {index.name}",
        )
        for index in view.indexes
        if index.method == "ivfflat"
        and (built := view.rows_when_built.get(index.name)) is not None
        and view.rows > _OUTGROWN * max(built, 1.0)
    ]


def _filter_index(view: TableView) -> list[Advice]:
    if view.typical_share is not None and view.typical_share > _SELECTIVE:
        return []
    return [
        Advice(
            "filter-index",
            f"no index begins with the filter column {column}, so an exact search of the rows that pass has "
            f"to read the whole table: CREATE INDEX ON {view.table} ({column})",
        )
        for column in view.unindexed
    ]


def _redundant(view: TableView) -> list[Advice]:
    found = []
    for method in sorted({index.method for index in view.indexes}):
        same = [index.name for index in view.indexes if index.method == method]
        if len(same) > 1:
            found.append(
                Advice(
                    "several-indexes",
                    f"{', '.join(same)} serve the same queries by the same method, and no setting makes the "
                    "planner choose among them: all but one cost writes and memory for nothing",
                )
            )
    return found
