"""A bounded cache in two generations.

New entries go to the young generation.  When that is full (half of either limit) it becomes the old one,
and what was old until then is forgotten.  A hit in the old generation moves the entry back to the young
one.  So whatever is used at least once while half the cache fills stays, as with LRU, but a hit in the
young generation is a plain dictionary lookup that changes nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class GenerationCache(Generic[K, V]):
    """Keep at most `max_entries` entries of at most `max_bytes` together, by the callers' estimate."""

    __slots__ = ("_half_bytes", "_half_entries", "_old", "_weight", "_young")

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._half_entries = max(1, max_entries // 2)
        self._half_bytes = max_bytes // 2
        self._young: dict[K, tuple[V, int]] = {}
        self._old: dict[K, tuple[V, int]] = {}
        self._weight = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    @property
    def weight(self) -> int:
        """Estimated bytes of the young generation; the old one weighs at most half of the limit."""
        return self._weight

    def get(self, key: K) -> V | None:
        """Return the value, or None."""
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.pop(key, None)
            if entry is None:
                return None
            self.put(key, *entry)
        return entry[0]

    def put(self, key: K, value: V, weight: int) -> None:
        """Store a value of `weight` bytes; one that is heavier than half of the limit is not kept."""
        if weight > self._half_bytes:
            return
        previous = self._young.pop(key, None)
        if previous is not None:
            self._weight -= previous[1]
        if self._weight + weight > self._half_bytes or len(self._young) >= self._half_entries:
            self._old = self._young
            self._young = {}
            self._weight = 0
        self._young[key] = (value, weight)
        self._weight += weight
