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
    ContextPolicy,
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

    def serving(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot with what a worker needs in order to find a value by its hash."""
        return msgspec.structs.replace(snapshot, salt=self._salt)

    def share(self, values: str) -> str:
        """Hash the values that a share of the rows is known of; hashed ones stay as they are."""
        return values if values.startswith(HASHED) else f"{HASHED}{self._digest(values.encode())}"

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
        """Return the snapshot without patterns and with filter values hashed."""
        return msgspec.structs.replace(
            snapshot, templates={key: self._policy(policy) for key, policy in snapshot.templates.items()}
        )

    def _policy(self, policy: TemplatePolicy) -> TemplatePolicy:
        query: QueryPolicy | None = None
        lowered = tuple(
            msgspec.structs.replace(less, contexts=self._contexts(less.contexts)) for less in policy.lowered
        )
        return msgspec.structs.replace(
            policy,
            contexts=self._contexts(policy.contexts),
            selectivity={self.share(values): share for values, share in policy.selectivity.items()},
            query=query,
            lowered=lowered,
        )

    def _contexts(self, contexts: dict[str, ContextPolicy]) -> dict[str, ContextPolicy]:
        return {self.context(context): arm for context, arm in contexts.items()}

    def _digest(self, data: bytes) -> str:
        return hashlib.blake2b(data, key=self._salt, digest_size=16).hexdigest()
