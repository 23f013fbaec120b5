"""The ReasoningBank: what labelled queries taught, found by similarity.

A *pattern* is one labelled query, or several that are all but equal.  Patterns are fine-grained on purpose:
how hard a query is, is a local property of the index, and coarse clusters of query vectors average it away.

A pattern carries sums and counts, never means: merging is addition, so that banks learned by different
replicas merge to the same result in any order (up to rounding).  Everything a person wants to read
(centroid, optimal ef_search, expected recall, confidence) is computed from the sums.

Lookup uses an HNSW index over the normalised centroids.  It is built when it is first needed after a
change, with one thread and a fixed seed, so that equal contents give equal answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import hnswlib
import numpy as np
from numpy.typing import NDArray

from learning.dialects import effort_setting
from learning.records import Arm

Floats = NDArray[np.float64]

EQUAL = 0.999
"""Cosine from which patterns are taken for the same."""

_CONFIDENCE_PRIOR = 4.0  # labels at which confidence is one half
_SEARCH = 24  # ef of a lookup; 64 takes twice the time and changed no choice that mattered
_BLOCK = 512  # rows of the similarity matrix that are in memory at once


@dataclass(frozen=True, slots=True, eq=False)
class LearnedPattern:
    """Sums over the labelled queries of one pattern.

    Attributes
    ----------
    vector_sum
        Sum of the normalised query vectors, [dimensions].
    recall_sum
        Sum of their recall curves, [arms].
    cost_sum
        Sum of their latencies in milliseconds, [arms]; arms that were not measured add nothing.
    cost_count
        Measured latencies behind each `cost_sum`, [arms].
    count
        Labels (aged ones count less than 1 each).
    usage
        How often such a query was asked, as far as known.
    difficulty_sum
        Sum of their difficulties (`learning.difficulty`); 0 where no model was fitted.
    """

    vector_sum: Floats
    recall_sum: Floats
    cost_sum: Floats
    cost_count: Floats
    count: float
    usage: float
    difficulty_sum: float = 0.0

    @staticmethod
    def of(
        vector: NDArray[np.float32],
        curve: Floats,
        ms: Floats,
        *,
        weight: float = 1.0,
        usage: float = 1.0,
        difficulty: float = 0.0,
    ) -> LearnedPattern:
        """Return the pattern of one labelled query; `ms` holds NaN where an arm was not measured."""
        unit = vector.astype(np.float64)
        unit = unit / max(float(np.linalg.norm(unit)), 1e-30)
        known = np.isfinite(ms)
        return LearnedPattern(
            vector_sum=unit * weight,
            recall_sum=curve * weight,
            cost_sum=np.where(known, ms, 0.0),
            cost_count=known.astype(np.float64),
            count=weight,
            usage=usage,
            difficulty_sum=difficulty * weight,
        )

    def __add__(self, other: LearnedPattern) -> LearnedPattern:
        return LearnedPattern(
            self.vector_sum + other.vector_sum,
            self.recall_sum + other.recall_sum,
            self.cost_sum + other.cost_sum,
            self.cost_count + other.cost_count,
            self.count + other.count,
            self.usage + other.usage,
            self.difficulty_sum + other.difficulty_sum,
        )

    @property
    def query_cluster_centroid(self) -> NDArray[np.float32]:
        """Mean direction of the queries, length 1, float32 [dimensions]."""
        length = max(float(np.linalg.norm(self.vector_sum)), 1e-30)
        return (self.vector_sum / length).astype(np.float32)

    @property
    def curve(self) -> Floats:
        """Mean recall under every arm, [arms]."""
        return self.recall_sum / self.count

    @property
    def confidence(self) -> float:
        """How much the pattern is to be believed by itself, in [0, 1)."""
        return self.count / (self.count + _CONFIDENCE_PRIOR)

    def best_arm(self, arms: Sequence[Arm], target: float) -> int:
        """Return the arm of least effort that reaches `target`, else the one of highest recall."""
        curve = self.curve
        enough = [i for i, arm in enumerate(arms) if arm.effort and curve[i] >= target]
        return min(enough, key=lambda i: arms[i].effort) if enough else int(np.argmax(curve))

    def optimal(self, arms: Sequence[Arm], target: float, setting: str) -> int | None:
        """Return `setting` ("hnsw.ef_search", "ivfflat.probes") in the best arm that has it, or None."""
        having = [i for i, arm in enumerate(arms) if effort_setting(arm) == setting]
        if not having:
            return None
        part = replace(self, recall_sum=self.recall_sum[having])
        kept = [arms[i] for i in having]
        return kept[part.best_arm(kept, target)].effort


class ReasoningBank:
    """Patterns of one template, by id.

    Parameters
    ----------
    dimensions
        Of the query vectors.
    seed
        Of the lookup index.
    """

    def __init__(self, dimensions: int, seed: int = 0) -> None:
        self._dimensions = dimensions
        self._seed = seed
        self._patterns: dict[int, LearnedPattern] = {}
        self._next = 0
        self._index: PatternIndex | None = None

    def __len__(self) -> int:
        return len(self._patterns)

    def patterns(self) -> list[LearnedPattern]:
        """Return all patterns in the order of their ids."""
        return list(self._patterns.values())

    def store(self, pattern: LearnedPattern) -> int:
        """Add a pattern and return its id.

        Raises
        ------
        ValueError
            The pattern has other dimensions than the bank.
        """
        if pattern.vector_sum.shape != (self._dimensions,):
            raise ValueError(
                f"pattern of shape {pattern.vector_sum.shape}, the bank has {self._dimensions} dimensions"
            )
        number = self._next
        self._next += 1
        self._patterns[number] = pattern
        self._index = None
        return number

    def lookup(self, query: NDArray[np.float32], k: int) -> list[tuple[LearnedPattern, float]]:
        """Return the `k` nearest patterns with their cosine similarity, nearest first."""
        if not self._patterns or k < 1:
            return []
        if self._index is None:
            self._index = PatternIndex(self.centroids(), self._seed)
        numbers, cosines = self._index.nearest(query, k)
        patterns = list(self._patterns.values())
        return [(patterns[number], float(cosine)) for number, cosine in zip(numbers, cosines, strict=True)]

    def consolidate(self, similarity: float = EQUAL) -> int:
        """Merge patterns whose centroids are at least so similar (cosine); return how many disappeared.

        Groups are the connected components of "similar enough", which do not depend on the order of storing.
        """
        return self.merge(_components(self.centroids(), similarity) if self._patterns else [])

    def merge(self, groups: Sequence[Sequence[int]]) -> int:
        """Merge the patterns at these places, which are all of them; return how many disappeared."""
        numbers = list(self._patterns)
        merged: dict[int, LearnedPattern] = {}
        for group in groups:
            first, *others = (self._patterns[numbers[i]] for i in group)
            merged[numbers[group[0]]] = _total(first, others)
        removed = len(numbers) - len(merged)
        if removed:
            self._patterns, self._index = merged, None
        return removed

    def prune(self, min_usage: float, min_confidence: float, *, limit: int | None = None) -> int:
        """Remove patterns used or believed less than that, then the least used beyond `limit`; return how
        many.

        Among equally used patterns the older one goes first.
        """
        kept = {
            number: pattern
            for number, pattern in self._patterns.items()
            if pattern.usage >= min_usage and pattern.confidence >= min_confidence
        }
        if limit is not None and len(kept) > limit:
            ranked = sorted(kept, key=lambda number: (kept[number].usage, number), reverse=True)[:limit]
            kept = {number: kept[number] for number in sorted(ranked)}
        removed = len(self._patterns) - len(kept)
        if removed:
            self._patterns, self._index = kept, None
        return removed

    def centroids(self) -> NDArray[np.float32]:
        """Return normalised centroids, float32 [patterns, dimensions]."""
        if not self._patterns:
            return np.zeros((0, self._dimensions), dtype=np.float32)
        return np.stack([pattern.query_cluster_centroid for pattern in self._patterns.values()])

    def curves(self) -> Floats:
        """Return mean recall curves [patterns, arms]."""
        return np.stack([pattern.curve for pattern in self._patterns.values()])

    def difficulties(self) -> Floats:
        """Return the mean difficulty of each pattern [patterns]."""
        return np.array([pattern.difficulty_sum / pattern.count for pattern in self._patterns.values()])

    def counts(self) -> Floats:
        """Return the labels behind each pattern [patterns]."""
        return np.array([pattern.count for pattern in self._patterns.values()])


class PatternIndex:
    """Nearest centroids by cosine, in microseconds; read-only.

    Parameters
    ----------
    centroids
        float32 [n, dimensions], normalised, n >= 1.
    seed
        Of the graph's levels.
    """

    def __init__(self, centroids: NDArray[np.float32], seed: int = 0) -> None:
        count, dimensions = centroids.shape
        self._count = count
        self._index = hnswlib.Index("ip", dimensions)
        self._index.init_index(count, M=16, ef_construction=100, random_seed=seed)
        self._index.set_num_threads(1)
        self._index.add_items(centroids, num_threads=1)
        self._index.set_ef(_SEARCH)

    def nearest(self, query: NDArray[np.float32], k: int) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """Return numbers and cosines of the nearest min(k, n) centroids, nearest first.

        `query` is float32 [dimensions] of any length; a zero vector has cosine 0 with everything.
        """
        length = math.sqrt(float(query @ query)) or 1.0
        numbers, distances = self._index.knn_query(query, min(k, self._count), num_threads=1)
        return numbers[0], (1.0 - distances[0]) / np.float32(length)


def _total(first: LearnedPattern, others: Iterable[LearnedPattern]) -> LearnedPattern:
    for other in others:
        first = first + other
    return first


def _components(centroids: NDArray[np.float32], similarity: float) -> list[list[int]]:
    """Return the groups of rows connected by cosines of at least `similarity`, sorted by their first."""
    blocks = (
        (start, centroids[start : start + _BLOCK] @ centroids.T >= similarity)
        for start in range(0, len(centroids), _BLOCK)
    )
    return components(len(centroids), blocks)


def components(count: int, blocks: Iterable[tuple[int, NDArray[np.bool_]]]) -> list[list[int]]:
    """Return the groups of what is connected, sorted by their first; a block is some rows of a matrix."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for start, near in blocks:
        for left, right in np.argwhere(near):
            a, b = root(start + int(left)), root(int(right))
            parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
