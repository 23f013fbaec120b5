"""Audited recall: what a uniform sample of the traffic got, measured against exact search.

Only audits (`Label.uniform`) count, and each counts with the arm that the live query was really served with.
The window slides by number of queries, per table.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from learning.records import Label

WINDOW = 200


@dataclass(frozen=True, slots=True)
class Audited:
    """Mean recall in [0, 1] of `queries` audited queries."""

    recall: float
    queries: int


class Audit:
    """The last audits of each table."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._seen: dict[str, deque[float]] = {}

    def record(self, table: str, label: Label) -> None:
        """Count a label if it is an audit and measured the arm that was served."""
        result = label.results.get(label.served_arm)
        if label.uniform and result is not None:
            self._seen.setdefault(table, deque(maxlen=self._window)).append(result.recall)

    def tables(self) -> dict[str, Audited]:
        """Return the audited recall of every table that has audits."""
        return {table: Audited(sum(seen) / len(seen), len(seen)) for table, seen in self._seen.items()}
