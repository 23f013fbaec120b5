"""Unfiltered templates: the steps of trust, the gate, and calibration, on synthetic worlds with a known truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from learning.distillation import Options, distill
from learning.lookup import QueryLookup
from learning.optimizer import SearchOptimizer
from learning.records import ArmResult, Label, Snapshot, TemplatePolicy, Trust
from learning.repetition import Asked, vector_name
from tests.unit.learning_labels import (
    ARMS,
    cost,
    facts,
    labels,
    mixed_labels,
    queries,
    recalls,
    table_rows,
    template,
)

T = template()
TRAFFIC = {"10": 1000}
FREE = Options(repeat_ms=0.0, lookup_ms=0.0, sketch_ms=0.0)
TOLLED = replace(FREE, lookup_ms=0.5)  # more than mixing two rungs by chance can save


def outcome(policy: TemplatePolicy, *, seed: int = 999, even: bool = False) -> tuple[float, float]:
    """Return mean recall and mean cost of 1,000 unseen queries under a policy."""
    vectors, hard = queries(1000, seed)
    truth = recalls(hard, seed, even=even)
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))
    number = {arm.name: index for index, arm in enumerate(ARMS)}
    chosen = []
    for vector in vectors:
        choice = optimizer.optimize("t", vector, 10, ())
        chosen.append(number[choice.arm.name] if choice is not None else 0)
    recall = truth[np.arange(len(chosen)), chosen]
    return float(recall.mean()), float(np.mean([cost(ARMS[index]) for index in chosen]))


def test_too_few_labels_leave_the_query_alone_and_say_how_many_are_needed() -> None:
    policy = distill(T, facts(), ARMS, mixed_labels(99, 0), TRAFFIC, FREE)
    assert policy.trust == Trust.OBSERVE
    assert policy.reason == "99 of the 100 labels needed for one k"
    assert SearchOptimizer(Snapshot(1, 0.0, {"t": policy})).optimize("t", None, 10, ()) is None


def test_a_target_close_to_one_needs_more_labels() -> None:
    policy = distill(T, facts(), ARMS, mixed_labels(150, 0), TRAFFIC, replace(FREE, target_recall=0.99))
    assert policy.reason == "150 of the 200 labels needed for one k"


def test_a_policy_without_arms_is_an_error() -> None:
    with pytest.raises(ValueError, match="as is"):
        distill(T, facts(), (), [], {}, FREE)


@pytest.mark.slow
@pytest.mark.parametrize("sketched", [True, False])
def test_where_vectors_tell_difficulty_each_query_gets_its_own_arm(sketched: bool) -> None:
    sketch = table_rows(2000, 1) if sketched else None
    policy = distill(T, facts(sketch=sketch), ARMS, mixed_labels(600, 0), TRAFFIC, FREE)
    assert policy.trust == Trust.QUERY
    recall, mean_cost = outcome(policy)
    assert recall >= 0.975
    static = policy.arms[policy.contexts["10"].arm]
    assert mean_cost < 0.8 * cost(static)


def test_where_all_queries_are_alike_one_arm_serves_all() -> None:
    vectors, _ = queries(400, 0)
    alike = np.repeat(recalls(np.ones(1, dtype=bool), 0), 400, axis=0)
    policy = distill(T, facts(sketch=table_rows(2000, 1)), ARMS, labels(vectors, alike), TRAFFIC, FREE)
    assert policy.trust == Trust.STATIC
    assert policy.query is None
    assert "held-out" in policy.reason


@pytest.mark.slow
def test_where_vectors_tell_nothing_choosing_per_query_costs_nothing() -> None:
    policy = distill(T, facts(), ARMS, mixed_labels(600, 0, even=True), TRAFFIC, FREE)
    recall, mean_cost = outcome(policy, even=True)
    assert recall >= 0.975
    assert mean_cost <= 1.02 * cost(policy.arms[policy.contexts["10"].arm])


@pytest.mark.slow
def test_the_lookup_must_earn_its_own_time() -> None:
    known = mixed_labels(600, 0)
    assert distill(T, facts(), ARMS, known, TRAFFIC, FREE).trust == Trust.QUERY
    slow = replace(FREE, lookup_ms=10.0)
    assert distill(T, facts(), ARMS, known, TRAFFIC, slow).trust == Trust.STATIC


def test_the_static_arm_is_the_cheapest_that_keeps_the_target() -> None:
    known = mixed_labels(400, 0)
    policy = distill(T, facts(), ARMS, known, TRAFFIC, replace(FREE, min_samples=400, optimize_for="latency"))
    arm = policy.contexts["10"].arm
    means = {a.name: np.mean([x.results[a.name].recall for x in known]) for a in ARMS}
    assert means[ARMS[arm].name] >= 0.98
    cheaper = [a for a in ARMS if cost(a) < 0.9 * cost(ARMS[arm])]
    assert cheaper
    assert all(means[a.name] < 0.98 for a in cheaper)


def test_the_users_own_settings_stay_where_nothing_keeps_the_target_for_less() -> None:
    vectors, _ = queries(300, 0)
    perfect = np.ones((300, len(ARMS)))
    perfect[:, [i for i, arm in enumerate(ARMS) if 0 < arm.effort <= 40]] = 0.9
    policy = distill(T, facts(), ARMS, labels(vectors, perfect), TRAFFIC, FREE)
    assert policy.arms[policy.contexts["10"].arm].name == "as is"


@pytest.mark.slow
def test_more_caution_never_costs_less() -> None:
    known = mixed_labels(400, 0)
    costs = []
    for aim in ("latency", "balanced", "recall"):
        policy = distill(T, facts(), ARMS, known, TRAFFIC, replace(FREE, optimize_for=aim))
        costs.append(outcome(policy)[1])
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


@pytest.mark.slow
def test_a_higher_target_gives_a_higher_recall() -> None:
    known = mixed_labels(600, 0)
    recall = [
        outcome(distill(T, facts(), ARMS, known, TRAFFIC, replace(FREE, target_recall=target)))[0]
        for target in (0.9, 0.95, 0.99)
    ]
    assert recall == sorted(recall)
    assert recall[0] < recall[2]


def test_an_unreachable_target_is_said_and_served_best() -> None:
    vectors, hard = queries(300, 0)
    low = np.minimum(recalls(hard, 0), 0.9)
    low[:, -1] = 1.0
    without_exact = replace(FREE, max_exact_ms=1.0)
    policy = distill(T, facts(), ARMS, labels(vectors, low), TRAFFIC, without_exact)
    assert "no arm is sure to keep 0.98" in policy.reason
    served = policy.contexts["10"]
    assert policy.arms[served.arm].kind == "hnsw"
    assert served.expected_recall == pytest.approx(0.9, abs=0.005)


@pytest.mark.slow
def test_a_strict_contract_keeps_the_target_for_the_hard_third_too() -> None:
    known = mixed_labels(900, 0)
    vectors, hard = queries(500, 7, hard_share=1.0)
    truth = recalls(hard, 7)
    number = {arm.name: index for index, arm in enumerate(ARMS)}
    recall = {}
    for contract in ("mean", "strict"):
        options = replace(FREE, contract=contract, target_recall=0.95)
        policy = distill(T, facts(), ARMS, known, TRAFFIC, options)
        assert policy.trust == Trust.QUERY
        optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))
        choices = [optimizer.optimize("t", vector, 10, ()) for vector in vectors]
        recall[contract] = np.mean(
            [truth[i, number[c.arm.name]] for i, c in enumerate(choices) if c is not None]
        )
    assert recall["strict"] >= 0.945
    assert recall["mean"] < recall["strict"]


@pytest.mark.slow
def test_the_target_is_kept_over_seeded_replays() -> None:
    recall = [
        outcome(distill(T, facts(), ARMS, mixed_labels(300, seed), TRAFFIC, FREE))[0] for seed in range(20)
    ]
    assert sum(each < 0.975 for each in recall) <= 1
    assert np.mean(recall) >= 0.98


def test_a_repeated_query_is_remembered_as_it_was() -> None:
    vectors, hard = queries(400, 3)
    truth = recalls(hard, 3)
    odd = np.flatnonzero(~hard)[0]  # easy by its place, hard in fact
    hardest = recalls(np.ones(1, dtype=bool), 0)[0]
    truth[odd] = np.minimum(hardest, 0.7)
    truth[odd, [i for i, arm in enumerate(ARMS) if arm.effort >= 320 or arm.kind == "exact"]] = 1.0
    policy = distill(T, facts(), ARMS, labels(vectors, truth), TRAFFIC, FREE)
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))
    same = optimizer.optimize("t", vectors[odd], 10, ())
    other = optimizer.optimize("t", vectors[np.flatnonzero(~hard)[5]], 10, ())
    assert same is not None
    assert other is not None
    assert same.arm.effort > other.arm.effort


def test_uniform_labels_calibrate_where_they_are_enough() -> None:
    easy_vectors, easy = queries(600, 0, hard_share=0.0)
    chosen = labels(easy_vectors, recalls(easy, 0), uniform=False)
    fair_vectors, fair = queries(600, 1, hard_share=0.5)
    audited = labels(fair_vectors, recalls(fair, 1), start=1000.0)
    policy = distill(T, facts(), ARMS, chosen + audited, TRAFFIC, FREE)
    assert policy.trust == Trust.QUERY
    assert "over 600 labels" in policy.reason


def test_the_sketch_is_used_only_where_it_earns_its_time() -> None:
    known = facts(sketch=table_rows(2000, 1))
    used = distill(T, known, ARMS, mixed_labels(500, 0), TRAFFIC, replace(FREE, sketch_ms=-10.0))
    dear = distill(T, known, ARMS, mixed_labels(500, 0), TRAFFIC, replace(FREE, sketch_ms=100.0))
    assert used.query is not None
    assert "codes" in used.query.extra
    assert dear.query is None or "codes" not in dear.query.extra


def test_repetitions_of_a_query_do_not_flatter_the_estimate() -> None:
    """Where nothing but the very same query says how hard a query is, unseen queries get one arm for all."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(120, 16)).astype(np.float32)
    _, hard = queries(120, 5, hard_share=0.3)
    curves = recalls(hard, 5)
    repeated = [label for turn in range(5) for label in labels(vectors, curves, start=1000.0 * turn)]
    policy = distill(T, facts(sketch=None), ARMS, repeated, TRAFFIC, TOLLED)
    assert policy.trust == Trust.STATIC


def test_each_k_has_its_own_arm_and_the_main_one_the_vectors() -> None:
    vectors, hard = queries(300, 0)
    harder = np.floor(recalls(hard, 0) * 9.0) / 10.0
    harder[:, -1] = 1.0
    both = mixed_labels(300, 0) + labels(vectors, harder, k=50, start=500.0)
    policy = distill(T, facts(), ARMS, both, {"10": 900, "50": 100}, FREE)
    assert set(policy.contexts) == {"10", "50"}
    assert (policy.min_k, policy.max_k) == (10, 50)
    assert policy.query is not None
    assert QueryLookup(policy.query, {}).k == 10
    other = distill(T, facts(), ARMS, both, {"10": 100, "50": 900}, FREE)
    if other.query is not None:
        assert QueryLookup(other.query, {}).k == 50


def test_vectors_of_other_dimensions_and_missing_ones_are_left_out() -> None:
    known = mixed_labels(400, 0)
    strange = [msgspec.structs.replace(x, vector=b"\0" * 12) for x in mixed_labels(20, 1)]
    none = [msgspec.structs.replace(x, vector=None) for x in mixed_labels(20, 2)]
    policy = distill(
        T, facts(sketch=np.ones((600, 3), np.float32)), ARMS, known + strange + none, TRAFFIC, FREE
    )
    assert policy.trust == Trust.QUERY
    assert policy.query is not None
    assert policy.query.dimensions == 16
    assert "codes" not in policy.query.extra


def test_labels_without_any_vector_give_a_static_policy() -> None:
    known = [msgspec.structs.replace(x, vector=None) for x in mixed_labels(200, 0)]
    policy = distill(T, facts(), ARMS, known, TRAFFIC, FREE)
    assert policy.trust == Trust.STATIC
    assert "only 0 labels have a vector" in policy.reason


def test_arms_that_were_never_measured_are_never_chosen() -> None:
    kept = {arm.name for arm in ARMS if arm.effort in (0, 20, 80, 320)}
    known = [
        msgspec.structs.replace(x, results={name: r for name, r in x.results.items() if name in kept})
        for x in mixed_labels(600, 0)
    ]
    policy = distill(T, facts(), ARMS, known, TRAFFIC, FREE)
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))
    vectors, _ = queries(200, 5)
    choices = [optimizer.optimize("t", vector, 10, ()) for vector in vectors]
    assert {choice.arm.name for choice in choices if choice is not None} <= kept


def test_the_bank_is_bounded() -> None:
    policy = distill(T, facts(), ARMS, mixed_labels(600, 0), TRAFFIC, replace(FREE, max_patterns=150))
    assert policy.query is not None
    assert len(policy.query.weights) == 4 * 150


def test_slow_outliers_do_not_change_an_arms_cost() -> None:
    known = mixed_labels(300, 0)
    spiky = [
        msgspec.structs.replace(
            x,
            results={
                n: ArmResult(r.recall, r.rows, r.ms * (100.0 if i % 5 == 0 else 1.0))
                for n, r in x.results.items()
            },
        )
        for i, x in enumerate(known)
    ]
    plain = distill(T, facts(), ARMS, known, TRAFFIC, FREE)
    disturbed = distill(T, facts(), ARMS, spiky, TRAFFIC, FREE)
    assert plain.query is not None
    assert disturbed.query is not None
    ratio = [a / b for a, b in zip(disturbed.query.costs, plain.query.costs, strict=True)]
    assert max(ratio) < 1.1


def test_a_policy_is_finite_in_all_its_numbers() -> None:
    policy = distill(T, facts(sketch=table_rows(2000, 1)), ARMS, mixed_labels(300, 0), TRAFFIC, FREE)
    assert policy.query is not None
    assert all(
        math.isfinite(value) for value in (*policy.query.costs, *policy.query.prior, policy.query.price)
    )


def repeating(count: int, asked: int, seed: int) -> tuple[list[Label], Callable[[str], Asked]]:
    """Return labels of queries whose difficulty no vector tells, each asked equally often."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 16)).astype(np.float32)
    _, hard = queries(count, seed)
    known = labels(vectors, recalls(hard, seed), uniform=False)
    counts = {vector_name(label.vector or b""): asked for label in known}
    return known, lambda _: Asked(counts, asked * count)


def test_repeated_queries_get_their_own_arm_where_nothing_else_tells_them_apart() -> None:
    known, asked = repeating(200, 5, 5)
    alone = distill(T, facts(), ARMS, known, TRAFFIC, TOLLED)
    assert alone.trust == Trust.STATIC
    policy = distill(T, facts(), ARMS, known, TRAFFIC, TOLLED, asked=asked)
    assert policy.trust == Trust.QUERY
    assert "100% of the traffic repeats" in policy.reason
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))
    chosen, spent = [], []
    for label in known:
        choice = optimizer.optimize("t", np.frombuffer(label.vector or b"", dtype="<f4"), 10, ())
        assert choice is not None
        assert choice.reason == "measured for this very query"
        chosen.append(label.results[choice.arm.name].recall)
        spent.append(cost(choice.arm))
    assert np.mean(chosen) >= 0.98
    assert np.mean(spent) < 0.6 * cost(alone.arms[alone.contexts["10"].arm])


def test_rare_repetitions_do_not_lower_the_recall_of_new_queries() -> None:
    known, _ = repeating(200, 1, 5)
    names = [vector_name(label.vector or b"") for label in known]
    once = Asked(dict.fromkeys(names, 1), 200)
    policy = distill(T, facts(), ARMS, known, TRAFFIC, TOLLED, asked=lambda _: once)
    assert policy.trust == Trust.STATIC  # nothing returned, so nothing is expected to


def test_of_equal_arms_the_one_in_use_stays() -> None:
    vectors, _ = queries(300, 0)
    curves = np.ones((300, len(ARMS)))
    curves[:, [i for i, arm in enumerate(ARMS) if arm.effort < 100 and arm.kind != "exact"]] = 0.9
    same = {arm.name: ArmResult(1.0, 10, 2.0) for arm in ARMS if arm.effort in (100, 128)}
    known = [
        msgspec.structs.replace(x, results=x.results | same)
        for x in labels(vectors, np.floor(curves * 10) / 10)
    ]
    served = distill(T, facts(), ARMS, known, TRAFFIC, FREE)
    assert served.arms[served.contexts["10"].arm].effort == 100
    other = next(i for i, arm in enumerate(ARMS) if arm.effort == 128)
    context = msgspec.structs.replace(served.contexts["10"], arm=other)
    before = msgspec.structs.replace(served, contexts={"10": context})
    assert distill(T, facts(), ARMS, known, TRAFFIC, FREE, previous=before).contexts["10"].arm == other


def test_the_price_in_use_stays_while_it_costs_hardly_more() -> None:
    known = mixed_labels(600, 0)
    first = distill(T, facts(), ARMS, known[:590], TRAFFIC, FREE)
    second = distill(T, facts(), ARMS, known, TRAFFIC, FREE, previous=first)
    assert first.query is not None
    assert second.query is not None
    free = distill(T, facts(), ARMS, known, TRAFFIC, FREE)
    assert free.query is not None
    assert second.query.price in (first.query.price, free.query.price)


def test_labels_split_and_shuffled_give_the_same_policy() -> None:
    known, asked = repeating(100, 3, 6)
    twice = known + [msgspec.structs.replace(x, timestamp=x.timestamp + 1000.0) for x in known]
    order = np.random.default_rng(0).permutation(len(twice))
    shuffled = [twice[i] for i in order]
    assert distill(T, facts(), ARMS, twice, TRAFFIC, FREE, asked=asked) == distill(
        T, facts(), ARMS, shuffled, TRAFFIC, FREE, asked=asked
    )


def test_repeated_and_new_queries_keep_the_target_each_by_itself() -> None:
    known = mixed_labels(600, 0)
    names = [vector_name(label.vector or b"") for label in known]
    asked = Asked(dict.fromkeys(names[:150], 20) | dict.fromkeys(names[150:], 1), 150 * 20 + 450)
    policy = distill(T, facts(), ARMS, known, TRAFFIC, FREE, asked=lambda _: asked)
    assert policy.trust == Trust.QUERY
    optimizer = SearchOptimizer(Snapshot(1, 0.0, {"t": policy}))
    repeated = []
    for label in known[:150]:
        choice = optimizer.optimize("t", np.frombuffer(label.vector or b"", dtype="<f4"), 10, ())
        assert choice is not None
        repeated.append(label.results[choice.arm.name].recall)
    assert 0.98 <= np.mean(repeated) < 0.99  # not more than was asked for, to make up for others
    assert outcome(policy)[0] >= 0.975


def several_ks(seed: int, *, own: int = 110, other_recall: float = 0.0) -> list[Label]:
    """Return labels of k = 10, and 300 of k = 100 whose first ten rows found `other_recall` more or less."""
    vectors, hard = queries(own, seed)
    ten = labels(vectors, recalls(hard, seed), seed=seed)
    vectors, hard = queries(300, seed + 1)
    curve = recalls(hard, seed + 1)
    hundred = labels(vectors, curve, k=100, seed=seed, start=float(own))
    found = np.clip(curve + other_recall, 0.0, 1.0)
    return ten + [
        msgspec.structs.replace(
            label, smaller={10: {arm.name: float(r) for arm, r in zip(ARMS, row, strict=True)}}
        )
        for label, row in zip(hundred, found, strict=True)
    ]


def static_arm(made: list[Label]) -> tuple[int, float]:
    policy = distill(T, facts(), ARMS, made, {"10": 1000, "100": 1}, replace(FREE, target_recall=0.97))
    return ARMS[policy.contexts["10"].arm].effort, policy.contexts["10"].expected_recall


def test_queries_with_a_larger_k_make_the_choice_for_a_smaller_one_surer() -> None:
    alone, together = [], []
    for seed in range(8):
        made = several_ks(10 * seed)
        alone.append(static_arm([label for label in made if label.k == 10])[0])
        together.append(static_arm(made)[0])
    assert all(b <= a for a, b in zip(alone, together, strict=True))
    assert sum(together) < 0.95 * sum(alone)
    _, hard = queries(4000, 999)
    truth = recalls(hard, 999)
    number = {arm.effort: index for index, arm in enumerate(ARMS) if arm.effort}
    assert np.mean([truth[:, number[effort]].mean() for effort in together]) >= 0.97


def test_easier_queries_with_a_larger_k_promise_nothing() -> None:
    made = several_ks(3, other_recall=0.5)
    chosen, expected = static_arm(made)
    own = [label for label in made if label.k == 10]
    seen = np.mean([label.results[f"ef={chosen}"].recall for label in own])
    assert seen >= 0.97
    assert expected == pytest.approx(seen, abs=0.01)
    harder, _ = static_arm(several_ks(3, other_recall=-0.5))
    assert harder == static_arm(own)[0]


def of_two_ks(small: int, large: int) -> list[Label]:
    """Return labels with k = 10, and of others with k = 100, which say as much about k = 10."""
    some, others = mixed_labels(small, 0), mixed_labels(large, 1)
    return some + [
        msgspec.structs.replace(
            label, k=100, context="100", found=100,
            results={n: ArmResult(r.recall, 100, r.ms) for n, r in label.results.items()},
            smaller={10: {name: result.recall for name, result in label.results.items()}},
        )
        for label in others
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("small", "large", "trusted"),
    [
        (19, 99, []),  # 19 of its own lend weight to 76 others
        (20, 99, ["10"]),
        (0, 100, ["100"]),
        (20, 100, ["10", "100"]),
        (99, 1, ["10"]),
        (99, 0, []),
    ],
)
def test_labels_of_a_larger_k_count_and_each_k_is_trusted_by_itself(
    small: int, large: int, trusted: list[str]
) -> None:
    policy = distill(T, facts(), ARMS, of_two_ks(small, large), {}, FREE)
    assert sorted(policy.contexts) == trusted
    assert (policy.trust == Trust.OBSERVE) == (not trusted)


def test_a_k_with_few_labels_of_its_own_is_never_bolder_than_they_are() -> None:
    known = of_two_ks(20, 200)
    policy = distill(T, facts(), ARMS, known, {}, FREE)
    own = [label for label in known if label.k == 10]
    arm = policy.arms[policy.contexts["10"].arm]
    assert arm.kind == "exact" or np.mean([label.results[arm.name].recall for label in own]) >= 0.98 - 1e-9
