"""What is written where `learning.anonymize` is on: no query vector, and hashes in place of filter values.

The salt is random, one for each state directory, or one for all replicas of a shared store; so hashes
cannot be compared between installations.  Whoever has the store has the salt, and can still try out guessed
values: hashing hides, it does not encrypt.
"""

from __future__ import annotations

import hashlib

import msgspec

from learning.records import (
    HASHED,
    Label,
    QueryPolicy,
    Snapshot,
    TemplatePolicy,
    Trajectory,
    Value,
    is_hashed,
)


class Anonymizer:
    """Replaces vectors by nothing and filter values by salted hashes."""

    def __init__(self, salt: bytes) -> None:
        self._salt = salt

    def context(self, context: str) -> str:
        """Hash a context key; one that is hashed already, or is nothing but a k, stays as it is."""
        if "\x1f" not in context or is_hashed(context):
            return context
        k, _, values = context.partition("\x1f")
        return f"{k}{HASHED}{self._digest(values.encode())}"

    def label(self, label: Label) -> Label:
        """Return the label without its vector and with its context hashed."""
        return msgspec.structs.replace(label, vector=None, context=self.context(label.context))

    def trajectory(self, trajectory: Trajectory) -> Trajectory:
        """Return the trajectory without its vector; every value is replaced by its hash."""
        hashed = tuple(
            Value(0, self._digest(value.data).encode())
            if value is not None and value.data is not None
            else value
            for value in trajectory.values
        )
        return msgspec.structs.replace(trajectory, vector=None, values=hashed)

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot without patterns and filter values: after a restart these are learned again."""
        return msgspec.structs.replace(
            snapshot, templates={key: self._policy(policy) for key, policy in snapshot.templates.items()}
        )

    def _policy(self, policy: TemplatePolicy) -> TemplatePolicy:
        contexts = {context: arm for context, arm in policy.contexts.items() if "\x1f" not in context}
        query: QueryPolicy | None = None
        return msgspec.structs.replace(policy, contexts=contexts, selectivity={}, query=query, lowered=())

    def _digest(self, data: bytes) -> str:
        return hashlib.blake2b(data, key=self._salt, digest_size=16).hexdigest()
