"""One invariant suite over the estimators, for evidence of any shape: gaps, ties, constant and absurd numbers.

Every policy is deterministic, leaves its inputs alone, survives the wire, serves only arms that exist, and never
returns fewer rows than asked for by its choice of effort.
"""

from __future__ import annotations

import copy

import msgspec
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learning.curves import costs, evidence, isotonic, ladders
from learning.dialects import IndexInfo, ladder, row_limit
from learning.distillation import Options, TableFacts, distill
from learning.optimizer import SearchOptimizer
from learning.reasoning_bank import LearnedPattern, ReasoningBank
from learning.records import ArmResult, Label, Snapshot, TemplatePolicy, context_key
from tests.unit.learning_labels import template

RECALL = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
MS = st.floats(0.0, 1e6, allow_nan=False)
VALUES = st.sampled_from(["a", "b", "c"])
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def labelled(draw: st.DrawFn, *, filtered: bool) -> tuple[tuple[object, ...], list[Label]]:
    """Return arms and labels of them, some arms missing from some labels."""
    indexes = draw(
        st.lists(st.sampled_from([IndexInfo("a", "hnsw"), IndexInfo("b", "ivfflat", lists=30)]), max_size=2)
    )
    arms = ladder(indexes, filtered=filtered, max_k=10)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dimensions = draw(st.integers(1, 5))
    same = draw(st.booleans())
    labels = []
    for number in range(draw(st.integers(0, 60))):
        k = draw(st.sampled_from([1, 10]))
        found = draw(st.integers(0, k))
        vector = np.ones(dimensions) if same else rng.normal(size=dimensions)
        names = [arm.name for arm in arms if arm.kind == "exact" or rng.random() < 0.7]
        results = {
            name: ArmResult(float(rng.choice([0.0, 0.5, 1.0])), found, float(rng.exponential()))
            for name in names
        }
        values = (draw(VALUES),) if filtered else ()
        data = vector.astype("<f4").tobytes() if rng.random() < 0.9 else None
        labels.append(
            Label("t", context_key(k, values), float(number), data, k, found, results, "as is", True)
        )
    return arms, labels


def learn(arms: tuple[object, ...], labels: list[Label], *, filtered: bool, target: float) -> TemplatePolicy:
    facts = TableFacts(
        "public.items", (25, 0, 0), (0,) if filtered else (), {"a": 0.5, "b": 0.01}, 0.001, 1e5
    )
    options = Options(target_recall=target, min_samples=10, lookup_ms=0.0, sketch_ms=0.0)
    return distill(template(filtered=filtered), facts, arms, labels, {}, options)  # type: ignore[arg-type]


@SLOW
@given(st.data(), st.booleans(), st.sampled_from([0.5, 0.8, 0.98]))
def test_a_policy_is_deterministic_pure_serialisable_and_serves_what_exists(
    data: st.DataObject, filtered: bool, target: float
) -> None:
    arms, labels = data.draw(labelled(filtered=filtered))
    before = copy.deepcopy(labels)
    policy = learn(arms, labels, filtered=filtered, target=target)
    assert labels == before
    assert learn(arms, labels, filtered=filtered, target=target) == policy
    assert learn(arms, labels[::-1], filtered=filtered, target=target) == policy
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(policy), type=TemplatePolicy) == policy
    assert policy.arms == arms
    indexes = [policy.fallback, *(c.arm for c in (*policy.contexts.values(), *policy.buckets.values()))]
    assert all(0 <= index < len(arms) for index in indexes)
    assert policy.reason


@SLOW
@given(st.data(), st.booleans(), st.integers(1, 3000))
def test_a_choice_never_returns_fewer_rows_than_asked_for(
    data: st.DataObject, filtered: bool, k: int
) -> None:
    arms, labels = data.draw(labelled(filtered=filtered))
    policy = learn(arms, labels, filtered=filtered, target=0.8)
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))
    value = data.draw(st.sampled_from(["a", "b", "c", "unseen", None]))
    vectors = [None, *(np.frombuffer(x.vector, dtype="<f4") for x in labels[:3] if x.vector)]
    for vector in vectors:
        choice = optimizer.optimize("t", vector, k, (value,) if filtered else ())
        if choice is not None:
            limit = row_limit(choice.arm)
            assert limit is None or limit >= k
            assert choice.arm in arms
            assert choice.expected_recall is None or 0.0 <= choice.expected_recall <= 1.0


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_evidence_is_complete_bounded_and_monotone(data: st.DataObject, filtered: bool) -> None:
    arms, labels = data.draw(labelled(filtered=filtered))
    known = evidence(labels, arms, learning_rate=0.01)  # type: ignore[arg-type]
    assert np.isfinite(known.recall).all()
    assert ((known.recall >= 0.0) & (known.recall <= 1.0)).all()
    groups = ladders(arms)  # type: ignore[arg-type]
    cost = costs(known.ms, groups)
    for group in groups:
        assert (np.diff(known.recall[:, group], axis=1) >= 0.0).all()
        finite = cost[group][np.isfinite(cost[group])]
        assert (np.diff(finite) >= -1e-12).all()


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0.1, 10.0)), min_size=1, max_size=20))
def test_isotonic_is_monotone_and_keeps_the_weighted_mean(pairs: list[tuple[float, float]]) -> None:
    values, weights = (np.array(column) for column in zip(*pairs, strict=True))
    fitted = isotonic(values, weights)
    assert (np.diff(fitted) >= -1e-9).all()
    np.testing.assert_allclose((fitted * weights).sum(), (values * weights).sum(), rtol=1e-9, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), RECALL, MS), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_banks_merge_to_the_same_in_any_order(parts: list[tuple[int, float, float]], random: object) -> None:
    directions = np.eye(4, dtype=np.float32)
    patterns = [
        LearnedPattern.of(directions[i], np.array([r, 1.0]), np.array([ms, np.nan])) for i, r, ms in parts
    ]
    shuffled = list(patterns)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    merged = []
    for order in (patterns, shuffled):
        bank = ReasoningBank(4)
        for pattern in order:
            bank.store(pattern)
        bank.consolidate()
        found = sorted(bank.patterns(), key=lambda p: int(np.argmax(p.vector_sum)))
        merged.append(
            [np.concatenate((p.vector_sum, p.recall_sum, p.cost_sum, p.cost_count, [p.count])) for p in found]
        )
    np.testing.assert_allclose(merged[0], merged[1], rtol=1e-9)
    assert sum(row[-1] for row in merged[0]) == len(parts)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), RECALL, MS), min_size=2, max_size=12), st.integers(1, 11))
def test_banks_learned_apart_add_up_to_the_one_learned_together(
    parts: list[tuple[int, float, float]], cut: int
) -> None:
    directions = np.eye(4, dtype=np.float32)
    patterns = [
        LearnedPattern.of(directions[i], np.array([r, 1.0]), np.array([ms, 2.0])) for i, r, ms in parts
    ]

    def sums(*banks: list[LearnedPattern]) -> dict[int, list[float]]:
        total = ReasoningBank(4)
        for patterns in banks:
            own = ReasoningBank(4)
            for pattern in patterns:
                own.store(pattern)
            own.consolidate()
            for pattern in own.patterns():
                total.store(pattern)
        total.consolidate()
        return {
            int(np.argmax(p.vector_sum)): [*p.vector_sum, *p.recall_sum, *p.cost_sum, *p.cost_count, p.count]
            for p in total.patterns()
        }

    apart, together = sums(patterns[:cut], patterns[cut:]), sums(patterns)
    assert apart.keys() == together.keys()
    for key, values in together.items():
        np.testing.assert_allclose(apart[key], values, rtol=1e-9)
