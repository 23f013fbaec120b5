"""As many rows as LIMIT asks for, before anything has been measured."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest

from learning.dialects import AS_IS, IndexInfo, ladder
from learning.distillation import Options, distill
from learning.floors import UNLIMITED, enough, floors
from learning.optimizer import SearchOptimizer
from learning.policy import material
from learning.records import Arm, ContextPolicy, Snapshot, TemplatePolicy, Trust
from tests.unit.learning_labels import facts, mixed_labels, template

HNSW = IndexInfo("items_hnsw", "hnsw")
IVFFLAT = IndexInfo("items_ivfflat", "ivfflat", lists=100)
USUAL = {"hnsw.ef_search": "40", "hnsw.iterative_scan": "off", "ivfflat.probes": "1"}
ROWS = 20_000.0
T = template()


def arms_of(*indexes: IndexInfo, max_k: int = 500) -> tuple[Arm, ...]:
    return ladder(indexes, filtered=False, min_k=1, max_k=max_k)


def of(
    *indexes: IndexInfo, usual: Mapping[str, str] = USUAL, used: str = "items_hnsw", max_k: int = 500
) -> tuple[tuple[Arm, ...], tuple[tuple[int, int], ...]]:
    arms = arms_of(*indexes, max_k=max_k)
    return arms, floors(arms, indexes, usual, (used,), ROWS)


def observing(*indexes: IndexInfo, used: str = "items_hnsw") -> TemplatePolicy:
    arms, known = of(*indexes, used=used)
    policy = distill(T, facts(), arms, mixed_labels(5, 0), {}, Options())
    assert policy.trust is Trust.OBSERVE
    return msgspec.structs.replace(policy, floors=known)


def served(policy: TemplatePolicy, k: int) -> str | None:
    choice = SearchOptimizer(Snapshot(1, 0.0, {"t": policy})).optimize("t", None, k, ())
    return choice.arm.name if choice is not None else None


@pytest.mark.parametrize("k", [1, 10, 39, 40])
def test_what_has_rows_enough_runs_as_it_came(k: int) -> None:
    assert served(observing(HNSW), k) is None


@pytest.mark.parametrize(("k", "arm"), [(41, "ef=50"), (100, "ef=100"), (101, "ef=128"), (500, "ef=512")])
def test_a_larger_limit_gets_as_many_candidates_from_the_first_query_on(k: int, arm: str) -> None:
    choice = SearchOptimizer(Snapshot(1, 0.0, {"t": observing(HNSW)})).optimize("t", None, k, ())
    assert choice is not None
    assert (choice.arm.name, choice.trust, choice.expected_recall) == (arm, Trust.OBSERVE, None)
    assert choice.arm.effort >= k


def test_beyond_the_ladder_the_arm_that_returns_most_serves() -> None:
    assert served(observing(HNSW), 3000) == "ef=1000"
    arms, known = of(HNSW, max_k=3000)
    number = enough(known, 3000)
    assert number is not None
    assert arms[number].name.startswith("strict")


def test_a_server_with_more_candidates_by_default_is_not_lowered() -> None:
    arms, known = of(HNSW, usual=USUAL | {"hnsw.ef_search": "200"})
    assert enough(known, 200) is None
    number = enough(known, 201)
    assert number is not None
    assert arms[number].effort == 256


@pytest.mark.parametrize(
    ("usual", "used"),
    [
        (USUAL | {"hnsw.iterative_scan": "relaxed_order"}, "items_hnsw"),  # goes on by itself
        (USUAL, "items_pkey"),  # an exact plan
        ({}, "items_hnsw"),  # a server that does not know the setting yet
    ],
)
def test_where_rows_are_not_limited_nothing_is_done(usual: dict[str, str], used: str) -> None:
    assert of(HNSW, usual=usual, used=used)[1] == ()


def test_lists_are_read_until_there_are_rows_enough() -> None:
    arms, known = of(IVFFLAT, used="items_ivfflat")  # 200 rows in a list, of which half are counted on
    assert known[0] == (100, 0)
    number = enough(known, 500)
    assert number is not None
    assert (arms[number].name, arms[number].settings) == ("probes=6", (("ivfflat.probes", "6"),))
    assert known[-1][0] == UNLIMITED  # all lists


def test_of_two_indexes_the_one_in_use_is_kept() -> None:
    policy = observing(HNSW, IVFFLAT, used="items_ivfflat")
    assert served(policy, 100) is None
    assert served(policy, 500) == "probes=6"


def test_as_is_gives_way_where_it_was_measured_for_a_smaller_k() -> None:
    arms, known = of(HNSW)
    policy = msgspec.structs.replace(
        observing(HNSW), trust=Trust.STATIC, contexts={"10": ContextPolicy(0, 0.99, 200)}, floors=known
    )
    assert policy.arms == arms
    assert served(policy, 10) == AS_IS.name
    assert served(policy, 100) == "ef=100"


def test_floors_are_published_once() -> None:
    policy = observing(HNSW)
    without = msgspec.structs.replace(policy, floors=())
    assert material(without, policy)
    assert not material(policy, msgspec.structs.replace(policy, reason="6 of the 100 labels"))
    assert not without.serves
    assert policy.serves
