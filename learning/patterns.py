"""Learned patterns out of and into a running learner: what `patterns` and the SQL functions have in common.

Rules
-----
- Taking a document in twice changes nothing the second time.
- Labels about a table of quite another size are not taken in: how many neighbours an index misses depends on
  the number of rows, and labels from before such a change are dropped here as well (`learning.drift`).
- Nothing is taken in about a table whose learning is off.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from learning.drift import ROWS_CHANGED
from learning.exchange import Document, Evidence, evidence, export
from learning.records import Label
from learning.registry import Phase, Registry, TemplateState
from learning.sqlite_file import StoredTemplate


@dataclass(slots=True)
class TakenIn:
    """What came of a document: new templates and labels, and in words what was left out."""

    templates: list[StoredTemplate] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def known(registry: Registry, *, tables: Collection[str] | None = None) -> Document:
    """Return the document of everything that a learner knows, or of some tables."""
    return export(
        (
            Evidence(state.template, state.table, tuple(state.labels), _rows(state))
            for state in registry
            if state.labels
        ),
        tables=tables,
    )


def take_in(registry: Registry, document: Document, learns: Callable[[str], bool], now: float) -> TakenIn:
    """Add what a document says to what is known.

    Parameters
    ----------
    learns
        Whether a table (resolved name) may be learned about.
    now
        Seconds of a steady clock.
    """
    found = TakenIn()
    for each in evidence(document):
        reason = _refusal(registry.get(each.template.key), each, learns)
        state = registry.add(each.template, now) if reason is None else None
        if state is None:
            found.left_out.append(f"{each.template.sql}: {reason or 'too many kinds of query are known'}")
            continue
        found.templates.append(StoredTemplate(each.template, table=each.table))
        found.labels += state.merge_labels(each.labels)
    return found


def _refusal(state: TemplateState | None, new: Evidence, learns: Callable[[str], bool]) -> str | None:
    table = new.table or (state.table if state is not None else "")
    if table and not learns(table):
        return f"learning about {table} is switched off"
    if state is None:
        return None
    if state.phase is Phase.OFF:
        return "it is switched off, because the server refused a setting"
    few, many = sorted((_rows(state), new.rows))
    if few > 0 and many > ROWS_CHANGED * few:
        return f"measured on {new.rows:,.0f} rows, the table here has {_rows(state):,.0f}"
    return None


def _rows(state: TemplateState) -> float:
    return state.watch.world.rows if state.watch.world is not None else 0.0
