"""Merging what several learners know: the order, the split and repetitions do not matter."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learning import exchange
from learning.distillation import Options, TableFacts, distill
from learning.exchange import Document, Evidence, encode, evidence, export, merge
from learning.reasoning_bank import LearnedPattern, ReasoningBank
from learning.records import Arm, ArmResult, Label, Template

TEMPLATES = [
    Template(f"k{n}", "db", "u", None, f"SELECT {n}", "", (), (), "items", "embedding", "<->")
    for n in range(3)
]
ARMS = (
    Arm("as is", (), "as-is"),
    Arm("ef=20", (("hnsw.ef_search", "20"),), "hnsw", 20),
    Arm("ef=80", (("hnsw.ef_search", "80"),), "hnsw", 80),
    Arm("exact", (("enable_indexscan", "off"),), "exact"),
)


def labels(count: int, seed: int) -> list[Label]:
    """Labels of three templates; some share their time."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        recall = np.sort(rng.random(2)).tolist()
        results = {
            "as is": ArmResult(recall[0], 10, 1.0),
            "ef=20": ArmResult(recall[0], 10, 1.0 + rng.random() / 10),
            "ef=80": ArmResult(recall[1], 10, 2.0 + rng.random() / 10),
            "exact": ArmResult(1.0, 10, 9.0),
        }
        vector = rng.normal(size=4).astype("<f4").tobytes()
        template = TEMPLATES[number % 3].key
        found.append(
            Label(
                template, "10", float(number // 2), vector, 10, 10, results, "as is", uniform=bool(number % 2)
            )
        )
    return found


def document(part: list[Label]) -> Document:
    return export(
        Evidence(template, "public.items", [x for x in part if x.template == template.key])
        for template in TEMPLATES
        if any(x.template == template.key for x in part)
    )


@given(
    st.lists(st.lists(st.integers(0, 29), max_size=40), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_documents_merge_to_the_same_bytes_however_split_shuffled_and_repeated(parts, random) -> None:  # type: ignore[no-untyped-def]
    pool = labels(30, seed=1)
    documents = [document([pool[i] for i in part]) for part in parts]
    together = document([pool[i] for part in parts for i in part])
    expected = encode(merge([together]))
    random.shuffle(documents)
    assert encode(merge(documents)) == expected
    assert encode(merge([*documents, *documents])) == expected  # idempotent
    middle = random.randrange(len(documents) + 1)
    halves = [merge(documents[:middle]), merge(documents[middle:])]
    assert encode(merge(halves)) == expected  # associative
    assert encode(merge([exchange.decode(encode(one)) for one in documents])) == expected


def test_the_newest_are_kept_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PATTERNS", 4)
    pool = labels(30, seed=2)
    one, other, whole = document(pool[:15]), document(pool[15:]), document(pool)
    assert encode(merge([one, other])) == encode(merge([other, one])) == encode(whole)
    assert [len(each.labels) for each in evidence(whole)] == [4, 4, 4]


@given(st.randoms(use_true_random=False), st.integers(2, 5))
@settings(max_examples=15, deadline=None)
def test_replicas_that_share_their_labels_derive_the_same_policy(random, replicas) -> None:  # type: ignore[no-untyped-def]
    pool = [x for x in labels(900, seed=3) if x.template == "k0"]
    facts = TableFacts("public.items", (), ())
    parts: list[list[Label]] = [[] for _ in range(replicas)]
    for each in pool:
        parts[random.randrange(replicas)].append(each)
    random.shuffle(parts)
    (merged,) = evidence(merge([document(part) for part in parts if part]))
    (alone,) = evidence(document(pool))
    options = Options(target_recall=0.7)
    policy = distill(TEMPLATES[0], facts, ARMS, merged.labels, {"10": 300}, options)
    assert policy == distill(TEMPLATES[0], facts, ARMS, alone.labels, {"10": 300}, options)
    assert policy.contexts["10"].labels == len(pool)


@given(st.randoms(use_true_random=False), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_sums_of_patterns_do_not_depend_on_order_and_split(random, parts) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(4)
    patterns = [
        LearnedPattern.of(
            rng.normal(size=6).astype(np.float32),
            rng.random(3),
            np.where(rng.random(3) < 0.3, np.nan, rng.random(3)),
            weight=float(rng.random()),
            usage=float(rng.integers(1, 9)),
            difficulty=float(rng.random()),
        )
        for _ in range(24)
    ]
    expected = sum(patterns[1:], patterns[0])
    shuffled = list(patterns)
    random.shuffle(shuffled)
    split = [shuffled[n::parts] for n in range(parts)]
    sums = [sum(part[1:], part[0]) for part in split]
    random.shuffle(sums)
    found = sum(sums[1:], sums[0])
    for name in ("vector_sum", "recall_sum", "cost_sum", "cost_count", "count", "usage", "difficulty_sum"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@given(st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_a_bank_consolidates_to_the_same_patterns_in_any_order_of_storing(random) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(5, 8))
    vectors = [(centres[n % 5] + 1e-4 * rng.normal(size=8)).astype(np.float32) for n in range(40)]

    def consolidated(order: list[int]) -> list[tuple[float, bytes]]:
        bank = ReasoningBank(8)
        for n in order:
            bank.store(LearnedPattern.of(vectors[n], rng.random(2) * 0 + n, np.ones(2)))
        bank.consolidate()
        return sorted((p.count, np.round(p.recall_sum, 6).tobytes()) for p in bank.patterns())

    order = list(range(40))
    expected = consolidated(order)
    random.shuffle(order)
    assert consolidated(order) == expected
    assert len(expected) == 5


def test_a_label_is_named_by_what_was_measured_not_by_what_was_found() -> None:
    one = labels(1, seed=6)[0]
    assert exchange.label_id(one) == exchange.label_id(msgspec.structs.replace(one, results={}, uniform=True))
    assert exchange.label_id(one) != exchange.label_id(msgspec.structs.replace(one, k=11))
