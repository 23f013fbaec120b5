"""What a client asks for itself: other targets, fixed efforts, other limits of the patterns."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from learning.anonymizer import Anonymizer
from learning.distillation import Options, TableFacts, distill
from learning.optimizer import SearchOptimizer
from learning.records import Choice, Snapshot, TemplatePolicy, Trust
from proxy.interface.records import RefusalError
from proxy.interface.settings import NOTHING, Steering, read_values, steering
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.sql import Recogniser, Scope
from tests.unit.learning_labels import (
    ARMS,
    FILTERED_ARMS,
    facts,
    labels,
    mixed_labels,
    queries,
    recalls,
    template,
)

FILTERED = template(filtered=True)
FREE = Options(repeat_ms=0.0, lookup_ms=0.0, sketch_ms=0.0)


def filtered_policy() -> TemplatePolicy:
    known = TableFacts("public.items", (25, 0, 0), (0,), {"a": 0.3, "b": 0.3}, rows=20_000.0)
    vectors, hard = queries(60, 1)
    curves = recalls(hard, 1, FILTERED_ARMS)
    # Exact search would be right for every target if it were not the dearest.
    found = labels(vectors[:30], curves[:30], values=("a",), arms=FILTERED_ARMS)
    found += labels(vectors[30:], curves[30:], values=("b",), arms=FILTERED_ARMS, start=100.0)
    return distill(FILTERED, known, FILTERED_ARMS, found, {}, replace(FREE, target_recall=0.98))


def test_a_lower_target_is_followed_for_filtered_queries() -> None:
    policy = filtered_policy()
    assert policy.trust is Trust.CONTEXT
    assert [lowered.target_recall for lowered in policy.lowered] == [0.6, 0.8, 0.9, 0.95]
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))

    def chosen(target: float | None, value: str = "a", k: int = 10) -> Choice:
        choice = optimizer.optimize("t", None, k, (value,), target)
        assert choice is not None
        return choice

    usual = chosen(None)
    assert chosen(0.98) == usual
    assert chosen(0.99) == usual  # a higher one is not met here
    less = chosen(0.6)
    assert less.arm.effort < (usual.arm.effort or 10_000)
    assert less.expected_recall is not None
    assert 0.6 <= less.expected_recall < 0.98
    assert chosen(0.55) == less  # rounded up to the next one that is at hand
    assert chosen(0.7) == chosen(0.8)
    assert chosen(0.97) == usual
    assert chosen(0.6, "b").arm.effort < (chosen(None, "b").arm.effort or 10_000)
    # Of a value without evidence nothing is known: it gets what it always gets, or its class of selectivity.
    assert chosen(0.6, "never seen").arm == chosen(None, "never seen").arm


def test_hashed_values_are_served_like_the_values_themselves() -> None:
    policy = filtered_policy()
    plain = Snapshot(1, 0.0, {"t": policy})
    anonymizer = Anonymizer(b"salt")
    hidden = anonymizer.snapshot(plain)
    assert hidden == anonymizer.snapshot(hidden)
    told = msgspec.msgpack.encode(hidden)
    assert len(policy.contexts) == len(hidden.templates["t"].contexts) == 2
    assert not any(key.encode() in told for key in (*policy.contexts, "\xa1a", "\xa1b"))
    by_value, by_hash = SearchOptimizer(plain), SearchOptimizer(anonymizer.serving(hidden))
    without = SearchOptimizer(hidden)
    for value in ("a", "b", "never seen"):
        for k in (10, 25):
            for target in (None, 0.6):
                expected = by_value.optimize("t", None, k, (value,), target)
                assert by_hash.optimize("t", None, k, (value,), target) == expected
    assert by_value.optimize("t", None, 10, ("a",)) != without.optimize("t", None, 10, ("a",))
    other = SearchOptimizer(Anonymizer(b"another").serving(hidden))
    assert other.optimize("t", None, 10, ("a",)) == without.optimize("t", None, 10, ("a",))


def test_fewer_patterns_and_patterns_that_are_less_alike() -> None:
    def patterns(operator: str, **changes: float) -> int:
        options = replace(FREE, **changes)  # type: ignore[arg-type]
        policy = distill(
            template(operator=operator), facts(), ARMS, mixed_labels(600, 0), {"10": 1000}, options
        )
        assert policy.query is not None
        assert np.isfinite(np.frombuffer(policy.query.curves, dtype="<f4")).all()
        assert SearchOptimizer(Snapshot(1, 0.0, {"t": policy})).optimize("t", queries(1, 7)[0][0], 10, ())
        return len(policy.query.weights) // 4

    for operator in ("<=>", "<->"):
        assert patterns(operator) == 600
        assert patterns(operator, max_patterns=40) == 40
        assert 10 <= patterns(operator, pattern_similarity=0.9) < 550


def test_values_are_read_and_wrong_ones_refused() -> None:
    assert steering({"ef_search": "80", "probes": "AUTO"}) == Steering(ef_search=80)
    for name, text in {"ef_search": "1001", "probes": "0"}.items():
        with pytest.raises(RefusalError, match="invalid value"):
            steering({name: text})
    assert read_values(b"off\n0.9\nlatency\n40\n7") == Steering(False, 0.9, "latency", 40, 7)
    assert read_values(b"\n\n\n\n") == NOTHING


def test_a_fixed_effort_is_what_the_query_gets_before_anything_is_learned_and_after() -> None:
    sql = b"SELECT id FROM items ORDER BY embedding <=> '[1,2]' LIMIT 10"
    query = Recogniser().recognise(sql, Scope("db", "app", None)).vector
    assert query is not None
    adapter = Adapter(Counters())
    assert adapter.bind(query, ()).choice.arm.settings == ()
    both = Steering(ef_search=77, probes=5)
    assert adapter.bind(query, (), both).choice.arm.settings == (
        ("hnsw.ef_search", "77"),
        ("ivfflat.probes", "5"),
    )
    policy = distill(template(), facts(), ARMS, mixed_labels(200, 0), {"10": 1000}, FREE)
    adapter.swap(SearchOptimizer(Snapshot(1, 0.0, {query.template.key: policy})), 1)
    assert adapter.bind(query, (), both).choice.arm.settings == (("hnsw.ef_search", "77"),)
    off = replace(both, adaptive_search=False)
    assert adapter.bind(query, (), off).choice.arm.settings == (("hnsw.ef_search", "77"),)
    assert adapter.bind(query, (), Steering(probes=5)).choice.arm.name != "as asked"
