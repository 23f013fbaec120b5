"""Filtered templates: the arm for each value, for values alike, and for values unknown."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from learning.contexts import bucket
from learning.distillation import Options, TableFacts, distill
from learning.optimizer import SearchOptimizer
from learning.records import ArmResult, Label, Snapshot, TemplatePolicy, Trust, context_key
from tests.unit.learning_labels import FILTERED_ARMS, template

ROWS = 100_000
INT4 = 23
SHARES = {"small": 0.001, "middle": 0.01, "large": 0.3}
T = template(filtered=True)
FACTS = TableFacts("public.items", (INT4, 0, 0), (0,), SHARES, rare_selectivity=0.0005, rows=float(ROWS))


def label(number: int, value: str, *, k: int = 10) -> Label:
    """Exact search pays by the row; an index scan finds what share of its candidates passes, and relaxed most."""
    share = SHARES[value]
    rng = np.random.default_rng(number)
    results = {}
    for arm in FILTERED_ARMS:
        passing = (arm.effort or 40) * share
        if arm.kind == "exact":
            recall, ms = 1.0, 0.2 + share * ROWS / 2000.0
        elif arm.name.startswith(("strict", "relaxed")):
            recall, ms = 0.9 if share < 0.1 else 1.0, 1.0 + 0.2 / share
        else:
            recall, ms = min(1.0, passing / k), 0.5 + 0.02 * (arm.effort or 40)
        results[arm.name] = ArmResult(recall, max(1, round(recall * k)), ms * float(rng.lognormal(0, 0.05)))
    return Label("t", context_key(k, (value,)), float(number), None, k, k, results, "as is", True)


def policy(per_value: int, options: Options | None = None, facts: TableFacts = FACTS) -> TemplatePolicy:
    labels = [label(i * 3 + j, value) for i in range(per_value) for j, value in enumerate(SHARES)]
    return distill(T, facts, FILTERED_ARMS, labels, {}, options or Options())


def served(made: TemplatePolicy, value: str | None, k: int = 10) -> str | None:
    choice = SearchOptimizer(Snapshot(1, 0.0, {"t": made})).optimize("t", None, k, (value,))
    return choice.arm.name if choice is not None else None


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(share) for share in (1.0, 0.6, 0.5, 0.25, 0.2)] == [0, -1, -1, -2, -3]
    assert bucket(0.0) is None
    assert bucket(1.5) is None


def test_without_labels_the_query_is_left_alone() -> None:
    made = distill(T, FACTS, FILTERED_ARMS, [], {}, Options())
    assert made.trust == Trust.OBSERVE
    assert served(made, "small") is None


def test_three_labels_suffice_for_exact_search_where_it_is_cheap() -> None:
    made = policy(3)
    assert made.trust == Trust.CONTEXT
    assert served(made, "small") == "exact"
    assert served(made, "middle") == "exact"


def test_with_evidence_a_common_value_is_searched_by_the_index() -> None:
    made = policy(80)
    assert served(made, "small") == "exact"
    common = made.arms[made.contexts[context_key(10, ("large",))].arm]
    assert common.kind == "hnsw"
    assert made.contexts[context_key(10, ("large",))].expected_recall >= 0.98


def test_the_users_own_settings_never_serve_a_filter() -> None:
    for made in (policy(3), policy(80)):
        chosen = [context.arm for context in (*made.contexts.values(), *made.buckets.values())]
        assert all(made.arms[arm].kind != "as-is" for arm in (*chosen, made.fallback))


def test_a_value_without_labels_is_served_like_values_of_its_selectivity() -> None:
    made = policy(80, facts=replace(FACTS, selectivity={**SHARES, "new": 0.29}))
    assert served(made, "new") == served(made, "large")


def test_a_rarer_value_than_any_measured_is_searched_exactly() -> None:
    made = policy(20)
    choice = SearchOptimizer(Snapshot(1, 0.0, {"t": made})).optimize("t", None, 10, ("never seen",))
    assert choice is not None
    assert choice.arm.kind == "exact"
    assert choice.reason == "values of larger selectivity"


def test_what_nothing_is_known_of_gets_exact_search_only_if_the_whole_table_can_bear_it() -> None:
    facts = replace(FACTS, rare_selectivity=0.0)
    cheap = policy(20, facts=facts)
    assert cheap.arms[cheap.fallback].kind == "exact"
    assert served(cheap, None) == "exact"
    dear = policy(20, Options(max_exact_ms=20.0), facts)
    assert dear.arms[dear.fallback].name.startswith("strict")
    assert served(dear, "never seen") == dear.arms[dear.fallback].name


def test_exact_search_above_its_limit_is_not_chosen_and_the_policy_says_what_is_reached() -> None:
    made = policy(3, Options(max_exact_ms=0.1))
    assert all(made.arms[context.arm].kind != "exact" for context in made.contexts.values())
    assert "0 keep recall 0.98" in made.reason


def test_another_k_of_a_known_value_is_served_by_its_evidence() -> None:
    made = policy(80)
    assert served(made, "small", k=7) == "exact"
    assert served(made, "small", k=50) == "exact"
    arm = made.contexts[context_key(10, ("large",))].arm
    larger = served(made, "large", k=500)
    assert larger is not None
    names = {a.name: a for a in made.arms}
    assert names[larger].effort >= 500 or "strict" in larger or "relaxed" in larger
    assert names[larger].effort >= made.arms[arm].effort


def test_a_value_with_fewer_matching_rows_than_k_is_complete_with_what_exists() -> None:
    few = [
        msgspec.structs.replace(
            label(i, "small"),
            found=4,
            results={n: ArmResult(1.0, 4, 1.0) for n in ("as is", "exact", "ef=40")},
        )
        for i in range(3)
    ]
    made = distill(T, FACTS, FILTERED_ARMS, few, {}, Options())
    assert served(made, "small") == "exact"
    assert made.contexts[context_key(10, ("small",))].expected_recall == 1.0


def test_a_value_of_its_own_kind_is_not_judged_by_its_class() -> None:
    labels = [label(i, "large") for i in range(200)]
    odd = [
        msgspec.structs.replace(
            label(1000 + i, "large"),
            context=context_key(10, ("odd",)),
            results={
                arm.name: ArmResult(1.0 if arm.kind == "exact" else 0.2, 10, 5.0) for arm in FILTERED_ARMS
            },
        )
        for i in range(5)
    ]
    facts = replace(FACTS, selectivity={**SHARES, "odd": 0.3})
    made = distill(T, facts, FILTERED_ARMS, labels + odd, {}, Options())
    assert served(made, "odd") == "exact"


@pytest.mark.parametrize("optimize_for", ["recall", "balanced", "latency"])
def test_every_context_keeps_the_target_whatever_is_optimized_for(optimize_for: str) -> None:
    made = policy(30, Options(optimize_for=optimize_for))  # type: ignore[arg-type]
    for value in SHARES:
        context = made.contexts[context_key(10, (value,))]
        truth = np.mean([label(i, value).results[made.arms[context.arm].name].recall for i in range(20)])
        assert truth >= 0.98
