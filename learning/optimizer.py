"""Choosing an arm for a query, in the proxy's hot path.

`SearchOptimizer` is a snapshot made ready for lookup: indexes are built and every choice that does not
depend on the query vector is prepared when the snapshot arrives (in a thread, if the caller likes), so that
a filtered or static template costs a few dictionary lookups and a per-query one what `learning.lookup`
says.  It is read-only afterwards, apart from a small bounded memo, and answers None ("leave the query
alone") wherever it has nothing to say.

Order of the evidence
---------------------
filtered    the context itself; the same values with another k; the class of the value's selectivity; the
next larger
            class, if exact search serves it (fewer rows are searched faster); the fallback.
unfiltered  the query vector, for k up to the policy's, unless a smaller k was measured that is enough; the k
itself; another k's arm, its effort scaled to this k.

Whatever is chosen, an index arm whose effort is below k would silently return too few rows: it is raised to
a rung that is enough, in proportion to k where k lies above the evidence.  Where the ladder ends below k:
None.  "As is" gives way likewise, while observing too, to the least arm that returns k rows
(`learning.floors`).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from learning.anonymizer import Anonymizer
from learning.contexts import bucket
from learning.curves import ladders
from learning.density import Sketch
from learning.dialects import row_limit
from learning.floors import enough
from learning.lookup import QueryLookup
from learning.records import (
    Choice,
    ContextPolicy,
    Snapshot,
    TemplatePolicy,
    Trust,
    context_key,
    is_hashed,
)

BY_VECTOR = "chosen for this query vector"
BY_HEART = "measured for this very query"

_MEMO = 4096  # k's remembered per template; a k is an integer that a client sends


class SearchOptimizer:
    """A snapshot ready for lookup.

    Parameters
    ----------
    snapshot
        The policy to serve.  A template whose per-query part is malformed is served without it.
    previous
        The optimizer in use so far: indexes of what did not change are taken over.
    """

    def __init__(self, snapshot: Snapshot, previous: SearchOptimizer | None = None) -> None:
        self.version = snapshot.version
        self.baseline_versions = snapshot.baseline_versions
        self.canary_share = snapshot.canary_share
        self.baseline: SearchOptimizer | None = None  # of the templates on trial: the policies before
        if snapshot.baselines:
            served = previous.baseline if previous is not None and previous.baseline is not None else previous
            baselines = msgspec.structs.replace(snapshot, templates=snapshot.baselines, baselines={})
            self.baseline = SearchOptimizer(baselines, served)
        old = previous._templates if previous is not None else {}
        sketches: dict[bytes, Sketch] = dict(previous._sketches) if previous is not None else {}
        self._templates: dict[str, _Prepared] = {}
        for key, policy in snapshot.templates.items():
            before = old.get(key)
            same = before is not None and before.policy.query == policy.query
            lookup = before.lookup if before and same else None
            self._templates[key] = _Prepared(policy, lookup, sketches, snapshot.salt)
        lookups = (prepared.lookup for prepared in self._templates.values())
        used = {lookup.sketch_name for lookup in lookups if lookup is not None}
        self._sketches: dict[bytes, Sketch] = {
            name: sketch for name, sketch in sketches.items() if name in used
        }

    def template(self, key: str) -> TemplatePolicy | None:
        """Return the policy of a template, or None."""
        prepared = self._templates.get(key)
        return prepared.policy if prepared is not None else None

    def optimize(
        self,
        template_key: str,
        vector: NDArray[np.float32] | None,
        k: int,
        values: tuple[str | None, ...],
        target: float | None = None,
    ) -> Choice | None:
        """Return the choice for one query; None means leave it alone.

        Parameters
        ----------
        template_key
            `Template.key`; unknown: None.
        vector
            float32 [dimensions], or None where it could not be decoded.
        k
            LIMIT + OFFSET.
        values
            Canonical filter values in the order of the template's filter slots; None = SQL NULL or
            undecodable.
        target
            A lower recall than the policy's that the client is content with; for filtered templates only: of
            the others the outlook tells (`learning.steering`).
        """
        prepared = self._templates.get(template_key)
        if prepared is None or k < 1:
            return None
        if prepared.policy.filter_slots:
            return prepared.under(target).filtered(k, values)
        return prepared.unfiltered(k, vector)


class _Prepared:
    """One template's policy with its choices made beforehand."""

    def __init__(
        self,
        policy: TemplatePolicy,
        lookup: QueryLookup | None,
        sketches: dict[bytes, Sketch],
        salt: bytes = b"",
    ) -> None:
        self.policy = policy
        self._salt = salt
        named = any(map(is_hashed, policy.contexts)) or any(map(is_hashed, policy.selectivity))
        self._anonymizer = Anonymizer(salt) if salt and named else None
        self.lookup = lookup
        if policy.query is not None and lookup is None:
            try:
                self.lookup = QueryLookup(policy.query, sketches)
            except (KeyError, ValueError, RuntimeError):  # RuntimeError: from the index
                self.lookup = None
        self._observing = policy.trust == Trust.OBSERVE
        self._arms = policy.arms
        self._ladder_of = {arm: ladder for ladder in ladders(policy.arms) for arm in ladder}
        self._memo: dict[int, Choice | None] = {}
        self._looked_up: dict[int, bool] = {}  # by k: whether the query vector is looked up
        self._lowered: dict[int, _Prepared] = {}  # made when a client first asks
        self._by_values: dict[str, dict[int, ContextPolicy]] = {}
        self._contexts: dict[str, Choice | None] = {}
        for key, context in policy.contexts.items():
            number, _, values = key.partition("\x1f")
            k = int(number)
            self._by_values.setdefault(values, {})[k] = context
            self._contexts[key] = self._choice(context, k, k, "measured")

    def under(self, target: float | None) -> _Prepared:
        """Return what serves a target: the choices for the least one at hand that is not below it."""
        policy = self.policy
        if target is None or target >= policy.target_recall:
            return self
        for number, lowered in enumerate(policy.lowered):
            if target <= lowered.target_recall:
                if number not in self._lowered:
                    less = msgspec.structs.replace(
                        policy,
                        target_recall=lowered.target_recall,
                        contexts=lowered.contexts,
                        buckets=lowered.buckets,
                        lowered=(),
                    )
                    self._lowered[number] = _Prepared(less, None, {}, self._salt)
                return self._lowered[number]
        return self

    def filtered(self, k: int, values: tuple[str | None, ...]) -> Choice | None:
        if self._observing:
            return self._floor(k)
        if None in values:
            return self._fallback(k, "filter value not known")
        key = context_key(k, values)
        if key in self._contexts:
            return self._contexts[key]
        policy = self.policy
        rest = key.partition("\x1f")[2]
        others, share = self._by_values.get(rest), policy.selectivity.get(rest)
        if self._anonymizer is not None:
            key = self._anonymizer.context(key)
            if key in self._contexts:
                return self._contexts[key]
            others = others or self._by_values.get(key.partition("\x1f")[2])
            share = policy.selectivity.get(self._anonymizer.share(rest)) if share is None else share
        if others:
            nearest = _nearest(others, k)
            return self._choice(others[nearest], nearest, k, f"measured with k={nearest}")
        number = bucket(policy.rare_selectivity if share is None else share)
        if number is not None:
            if number in policy.buckets:
                return self._choice(policy.buckets[number], policy.max_k, k, "values of the same selectivity")
            larger = min((other for other in policy.buckets if other > number), default=None)
            if larger is not None and policy.arms[policy.buckets[larger].arm].kind == "exact":
                return self._choice(policy.buckets[larger], policy.max_k, k, "values of larger selectivity")
        return self._fallback(k, "filter value without evidence")

    def unfiltered(self, k: int, vector: NDArray[np.float32] | None) -> Choice | None:
        if self._observing:
            return self._floor(k)
        lookup = self.lookup
        if (
            lookup is not None
            and vector is not None
            and self._is_for(lookup.k, k)
            and len(vector) == lookup.dimensions
        ):
            try:
                chosen = lookup.choose(vector)
            except RuntimeError:  # the index found too few neighbours: possible where its graph is torn
                chosen = None
            if chosen is None:
                return self._fallback(k, "unlike every labelled query")
            arm, recall, repeated = chosen
            return Choice(self._arms[arm], Trust.QUERY, recall, BY_HEART if repeated else BY_VECTOR)
        if k not in self._memo:
            if len(self._memo) >= _MEMO:
                self._memo.clear()
            self._memo[k] = self._static(k)
        return self._memo[k]

    def _is_for(self, evidence_k: int, k: int) -> bool:
        """Tell whether the per-query part, about `evidence_k`, is the nearest evidence for k from above.

        An arm that was measured for a smaller k serves that k better than one chosen for a larger: with
        LIMIT 10 and LIMIT 500 in one template, ten rows must not cost what five hundred do.
        """
        known = self._looked_up.get(k)
        if known is None:
            if len(self._looked_up) >= _MEMO:
                self._looked_up.clear()
            others = self._by_values.get("", {})
            known = k <= evidence_k and not any(k <= other < evidence_k for other in others)
            self._looked_up[k] = known
        return known

    def _static(self, k: int) -> Choice | None:
        known = self._by_values.get("", {})
        if not known:
            return self._fallback(k, "no evidence for any k")
        nearest = _nearest(known, k)
        reason = "measured" if nearest == k else f"measured with k={nearest}"
        return self._choice(known[nearest], nearest, k, reason)

    def _fallback(self, k: int, reason: str) -> Choice | None:
        return self._choice(ContextPolicy(self.policy.fallback, -1.0, 0), self.policy.max_k, k, reason)

    def _floor(self, k: int) -> Choice | None:
        """Return the choice for a query that nothing but its k is known of; None: it has rows enough."""
        index = enough(self.policy.floors, k)
        if index is None or not 0 <= index < len(self.policy.arms):
            return None
        return Choice(self.policy.arms[index], self.policy.trust, None, "as many rows as are asked for")

    def _choice(self, context: ContextPolicy, evidence_k: int, k: int, reason: str) -> Choice | None:
        """Return the choice of a context's arm for `k`, the arm's effort raised where `k` needs it."""
        if not 0 <= context.arm < len(self.policy.arms):
            return None
        if self.policy.arms[context.arm].kind == "as-is" and (floor := self._floor(k)) is not None:
            return floor
        index = self._enough(context.arm, evidence_k, k)
        if index is None:
            return None
        expected = context.expected_recall if context.expected_recall >= 0.0 and k <= evidence_k else None
        trust = self.policy.trust if self.policy.trust == Trust.CONTEXT else Trust.STATIC
        return Choice(self.policy.arms[index], trust, expected, reason)

    def _enough(self, arm: int, evidence_k: int, k: int) -> int | None:
        """Return `arm`, or the least arm of its ladder that is enough for `k`; None where there is none."""
        arms = self.policy.arms
        ladder = self._ladder_of.get(arm)
        if ladder is None:
            return arm  # no effort to raise
        limited = row_limit(arms[arm]) is not None
        if limited and arms[ladder[-1]].effort < k:
            return None
        wanted = arms[arm].effort * max(1.0, k / max(1, evidence_k))
        if limited:
            wanted = max(wanted, k)
        return next((index for index in ladder if arms[index].effort >= wanted), ladder[-1])


def _nearest(known: Mapping[int, ContextPolicy], k: int) -> int:
    """Return the smallest known k not below `k` (its recall is the safer claim), else the largest."""
    return min((other for other in known if other >= k), default=max(known))
