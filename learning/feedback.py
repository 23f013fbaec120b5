"""What users say about results, and how much more recall it asks for.  Pure.

A rating names a query by its id, and rows by their key: relevant or irrelevant.  The learner finds out on
the server what it can mean for recall (`learning.ratings`): a relevant row that is among the true neighbours
and was not returned was *missed* by the index.  Irrelevant rows, and relevant ones beyond the k nearest, are
matters of the embedding, not of the index: no setting helps against them, so they count in verdicts only.

The target follows by a controller with one number per table, `strictness` in [1/10, 1], the share of the
misses that the configured target allows which is still allowed:

    target = 1 - (1 - configured target) * strictness

Every missed row takes off a fifth of it, every rating without one gives back a fiftieth.  So it comes to
rest where users report a miss with about one rating in twelve, and one angry user cannot ask for exact
search: at most ten times fewer misses than configured.

What is kept of ratings are these counts, by table; neither the rows' keys nor who rated.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from learning.verdict import Feedback

LEAST = 0.1
_PER_MISS, _PER_RATING = 0.8, 1.02


class Ratings(msgspec.Struct, frozen=True):
    """The ratings of one table so far."""

    queries: int = 0
    relevant: int = 0
    irrelevant: int = 0
    missed: int = 0
    strictness: float = 1.0

    def rated(self, feedback: Feedback) -> Ratings:
        """Return the ratings with one query's added."""
        if feedback.missed:
            strictness = max(LEAST, self.strictness * _PER_MISS**feedback.missed)
        else:
            strictness = min(1.0, self.strictness * _PER_RATING)
        return Ratings(
            queries=self.queries + 1,
            relevant=self.relevant + feedback.relevant,
            irrelevant=self.irrelevant + feedback.irrelevant,
            missed=self.missed + feedback.missed,
            strictness=strictness,
        )

    def target(self, configured: float) -> float:
        """Return the recall to aim at, in (0, 1]."""
        return 1.0 - (1.0 - configured) * self.strictness


class FeedbackLog:
    """The ratings of all tables."""

    def __init__(self) -> None:
        self._tables: dict[str, Ratings] = {}

    def __getitem__(self, table: str) -> Ratings:
        return self._tables.get(table, Ratings())

    def rated(self, table: str, feedback: Feedback) -> Ratings:
        """Count one rated query of a table and return the table's ratings."""
        ratings = self._tables[table] = self[table].rated(feedback)
        return ratings

    def forget(self, table: str) -> None:
        """Drop what is known of a table."""
        self._tables.pop(table, None)

    def restore(self, notes: Mapping[str, bytes]) -> None:
        """Read what was kept; a note of another version that does not decode is skipped."""
        for name, note in notes.items():
            kind, _, table = name.partition(":")
            if kind == "feedback" and note:
                try:
                    self._tables[table] = msgspec.msgpack.decode(note, type=Ratings)
                except msgspec.DecodeError:
                    continue

    def note(self, table: str) -> tuple[str, bytes]:
        """Return the name and content of a table's note for the store."""
        return f"feedback:{table}", msgspec.msgpack.encode(self[table])


def attainable(wanted: float, configured: float, labels: int) -> float:
    """Return the target that so many labels can support, between the configured and the wanted one.

    A policy needs 2 / (1 - target) labels (learning.distillation).  Aiming higher with fewer would end in
    no policy at all, which is less recall, not more.
    """
    return max(configured, min(wanted, 1.0 - 2.0 / max(labels, 1)))
