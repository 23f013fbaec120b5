"""Explain: the choice is the one that is served, and what is said about it was measured."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from learning.dialects import IndexInfo, ladder
from learning.explain import explain
from learning.optimizer import SearchOptimizer
from learning.records import (
    ArmResult,
    ContextPolicy,
    Label,
    Slot,
    SlotRole,
    Snapshot,
    Template,
    TemplatePolicy,
    Trust,
)

ARMS = ladder([IndexInfo("i", "hnsw")], filtered=False, max_k=10)
NAMES = [arm.name for arm in ARMS]
TEMPLATE = Template(
    "t",
    "app",
    "app",
    None,
    "SELECT ...",
    "",
    (),
    (Slot(SlotRole.FILTER, "category", "="), Slot(SlotRole.VECTOR)),
    "items",
    "embedding",
    "<->",
)
POLICY = TemplatePolicy(
    template="t",
    table="public.items",
    trust=Trust.STATIC,
    reason="k=10: ef=80 for every query",
    target_recall=0.95,
    arms=ARMS,
    value_types=(),
    filter_slots=(),
    fallback=NAMES.index("ef=80"),
    contexts={"10": ContextPolicy(NAMES.index("ef=80"), 0.97, 60)},
)


def labels(count: int = 60, recall: float = 0.97) -> list[Label]:
    """Return labels; those with an even number lie at (1, 0) and are easy, the others at (0, 1)."""
    found = []
    for number in range(count):
        easy = number % 2 == 0
        vector = np.array([1.0, 0.0] if easy else [0.0, 1.0], dtype="<f4").tobytes()
        results = {
            "ef=40": ArmResult(1.0 if easy else 0.8, 10, 1.0),
            "ef=80": ArmResult(1.0 if easy else 2 * recall - 1.0, 10, 2.0),
            "exact": ArmResult(1.0, 10, 30.0),
        }
        found.append(Label("t", "10", float(number), vector, 10, 10, results, "as is", True))
    return found


def test_choice_is_the_one_that_is_served_with_its_evidence() -> None:
    vector = np.array([1.0, 0.0], dtype=np.float32)
    found = explain(TEMPLATE, POLICY, labels(), vector=vector, k=10, version=7)
    served = SearchOptimizer(Snapshot(7, 0.0, {"t": POLICY})).optimize("t", vector, 10, ())
    assert served is not None
    assert (found.arm, found.settings) == (served.arm.name, dict(served.arm.settings))
    assert (found.expected_recall, found.labels, found.policy_version) == (0.97, 60, 7)
    assert [arm.name for arm in found.arms if arm.chosen] == ["ef=80"]
    chosen = next(arm for arm in found.arms if arm.chosen)
    assert chosen.recall == pytest.approx(0.97)
    assert chosen.ms == 2.0
    assert next(arm for arm in found.arms if arm.name == "ef=200").ms is None  # never measured


def test_labelled_queries_around_tell_how_hard_a_query_is() -> None:
    easy, hard = (
        explain(TEMPLATE, POLICY, labels(), vector=np.array(v, dtype=np.float32), k=10)
        for v in ([1.0, 0.05], [0.05, 1.0])
    )
    assert easy.difficulty.startswith("easier")
    assert hard.difficulty.startswith("harder")
    assert (easy.similarity or 0) > 0.99
    assert explain(TEMPLATE, POLICY, labels(), vector=None, k=10).similarity is None


def test_surer_with_more_recall_and_not_at_all_with_too_few_labels() -> None:
    def sure(count: int, recall: float) -> float | None:
        return explain(TEMPLATE, POLICY, labels(count, recall), vector=None, k=10).sure

    low, high = sure(60, 0.93), sure(60, 0.99)
    assert low is not None
    assert high is not None
    assert low < 0.5 < high
    assert sure(2, 0.99) is None


def test_query_that_is_left_alone_is_explained_as_well() -> None:
    observing = msgspec.structs.replace(POLICY, trust=Trust.OBSERVE, reason="too few labels", contexts={})
    found = explain(TEMPLATE, observing, [], vector=None, k=10)
    assert (found.arm, found.settings, found.sure) == ("as is", {}, None)
    assert found.reason == "it runs as it came"
    assert found.policy == "too few labels"


def test_filter_values_are_named_by_their_column() -> None:
    filtered = msgspec.structs.replace(POLICY, trust=Trust.CONTEXT, filter_slots=(0,), contexts={})
    assert explain(TEMPLATE, filtered, [], vector=None, k=5, values=("books",)).context == {
        "k": "5",
        "category": "books",
    }
    assert explain(TEMPLATE, filtered, [], vector=None, k=5, values=(None,)).context["category"] == "NULL"


def test_explanation_survives_json() -> None:
    found = explain(TEMPLATE, POLICY, labels(), vector=np.array([1, 0], dtype=np.float32), k=10)
    assert msgspec.json.decode(msgspec.json.encode(found), type=type(found)) == found
