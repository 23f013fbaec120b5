"""The hot path: what it answers, what it leaves alone, and that it computes what calibration assumed."""

from __future__ import annotations

import gc
import time

import msgspec
import numpy as np
import pytest

from learning import calibration, density, difficulty
from learning.distillation import Options, distill
from learning.lookup import QueryLookup
from learning.optimizer import SearchOptimizer
from learning.projection import Frame
from learning.records import Arm, ContextPolicy, Snapshot, TemplatePolicy, Trust
from tests.unit.learning_labels import ARMS, DIMENSIONS, facts, mixed_labels, queries, table_rows, template

T = template()
FREE = Options(lookup_ms=0.0, sketch_ms=-10.0)  # a sketch that pays by itself is always used


@pytest.fixture(scope="module")
def learned() -> TemplatePolicy:
    policy = distill(T, facts(sketch=table_rows(2000, 1)), ARMS, mixed_labels(600, 0), {"10": 1}, FREE)
    assert policy.trust == Trust.QUERY
    return policy


def static(arm: int, *, k: int = 10) -> TemplatePolicy:
    return TemplatePolicy(
        template="t",
        table="public.items",
        trust=Trust.STATIC,
        reason="",
        target_recall=0.98,
        arms=ARMS,
        value_types=(),
        filter_slots=(),
        fallback=arm,
        contexts={str(k): ContextPolicy(arm, 0.99, 300)},
        min_k=k,
        max_k=k,
    )


def number(name: str) -> int:
    return next(index for index, arm in enumerate(ARMS) if arm.name == name)


def serve(policy: TemplatePolicy) -> SearchOptimizer:
    return SearchOptimizer(Snapshot(7, 0.0, {"t": policy}))


def test_an_unknown_template_and_a_senseless_k_are_left_alone() -> None:
    optimizer = serve(static(number("ef=40")))
    assert optimizer.optimize("other", None, 10, ()) is None
    assert optimizer.template("other") is None
    assert optimizer.optimize("t", None, 0, ()) is None
    assert optimizer.version == 7


def test_a_static_template_needs_no_vector() -> None:
    choice = serve(static(number("ef=40"))).optimize("t", None, 10, ())
    assert choice is not None
    assert (choice.arm.name, choice.trust, choice.expected_recall) == ("ef=40", Trust.STATIC, 0.99)


@pytest.mark.parametrize(("k", "effort"), [(1, 40), (10, 40), (20, 80), (45, 200), (100, 400), (999, 1000)])
def test_effort_grows_with_k_beyond_the_evidence(k: int, effort: int) -> None:
    choice = serve(static(number("ef=40"))).optimize("t", None, k, ())
    assert choice is not None
    assert choice.arm.effort == effort
    assert choice.arm.effort >= k
    assert (choice.expected_recall is None) == (k > 10)


def test_more_rows_than_any_arm_returns_are_left_alone() -> None:
    assert serve(static(number("ef=40"))).optimize("t", None, 1001, ()) is None
    exact = serve(static(number("exact"))).optimize("t", None, 1001, ())
    assert exact is not None
    assert exact.arm.kind == "exact"


def test_a_smaller_k_than_the_evidence_is_served_by_it() -> None:
    choice = serve(static(number("ef=64"), k=50)).optimize("t", None, 10, ())
    assert choice is not None
    assert choice.arm.name == "ef=64"


def test_hard_queries_get_more_effort_than_easy_ones(learned: TemplatePolicy) -> None:
    optimizer = serve(learned)
    vectors, hard = queries(200, 50)
    effort = []
    for vector in vectors:
        choice = optimizer.optimize("t", vector, 10, ())
        assert choice is not None
        assert choice.trust == Trust.QUERY
        effort.append(choice.arm.effort or 40)  # as is
    assert np.median(np.array(effort)[hard]) > 2 * np.median(np.array(effort)[~hard])


def test_the_hot_path_computes_what_calibration_assumed(learned: TemplatePolicy) -> None:
    """One query at a time gives the same curve and arm as the batch functions."""
    query = learned.query
    assert query is not None
    lookup = QueryLookup(query, {})
    arms = len(learned.arms)
    extra = {name: np.frombuffer(data, dtype="<f8") for name, data in query.extra.items() if name in _DOUBLES}
    surface = extra["surface"].reshape(-1, arms)
    frame = Frame(query.extra["basis"], query.extra["centre"], 1.0, euclidean=False)
    sketch = density.Sketch(
        density.SketchData(query.extra["codes"], query.extra["cells"], float(extra["density"][0]), frame)
    )
    vectors, _ = queries(100, 51)
    points, residues = sketch.projection.many(vectors)
    counts = np.frombuffer(query.weights, dtype="<f4").astype(float)
    patterns = np.frombuffer(query.extra["points"], dtype="<f4").reshape(len(counts), -1)
    alike = difficulty.likeness(points, patterns)
    memory = difficulty.neighbourhood(alike, extra["misses"], counts)
    around = density.features(sketch.look_around(points, residues), float(extra["density"][1]))
    features = np.column_stack((around, memory))
    z = features @ extra["slope"] + extra["intercept"][0]
    z += np.maximum(features - extra["knot"], 0.0) @ extra["bend"]
    curves = np.frombuffer(query.curves, dtype="<f4").reshape(-1, arms)
    residuals = curves - difficulty.interpolate(extra["grid"], surface, extra["z"])
    base = difficulty.interpolate(extra["grid"], surface, z)
    expected = difficulty.remember(base, alike, residuals, counts)
    arm = calibration.choose(expected, np.array(query.costs), query.price)
    agreed = 0
    for i, vector in enumerate(vectors):
        chosen = lookup.choose(vector)
        assert chosen is not None
        agreed += chosen[0] == arm[i]
        assert chosen[1] == pytest.approx(min(1.0, expected[i, arm[i]]), abs=1e-3)
    assert agreed >= 97


_DOUBLES = ("slope", "bend", "knot", "intercept", "grid", "surface", "z", "misses", "density")


def test_the_length_of_a_vector_does_not_matter_for_cosine(learned: TemplatePolicy) -> None:
    lookup = QueryLookup(learned.query, {}) if learned.query is not None else None
    assert lookup is not None
    vectors, _ = queries(50, 52)
    for vector in vectors:
        assert lookup.choose(vector) == pytest.approx(lookup.choose(vector * np.float32(4.0)))


@pytest.mark.parametrize("strange", ["opposite", "zero", "nan", "infinite"])
def test_a_query_unlike_all_that_is_known_gets_the_safe_arm(learned: TemplatePolicy, strange: str) -> None:
    vector = {
        "opposite": np.eye(DIMENSIONS, dtype=np.float32)[5] * 100.0,
        "zero": np.zeros(DIMENSIONS, dtype=np.float32),
        "nan": np.full(DIMENSIONS, np.nan, dtype=np.float32),
        "infinite": np.full(DIMENSIONS, np.inf, dtype=np.float32),
    }[strange]
    with np.errstate(all="ignore"):
        choice = serve(learned).optimize("t", vector, 10, ())
    assert choice is not None
    assert choice.arm == learned.arms[learned.fallback]
    assert choice.reason == "unlike every labelled query"
    assert choice.arm.effort >= learned.arms[learned.contexts["10"].arm].effort


def test_without_a_usable_vector_the_static_arm_of_its_k_serves(learned: TemplatePolicy) -> None:
    optimizer = serve(learned)
    for vector in (None, np.ones(3, dtype=np.float32)):
        choice = optimizer.optimize("t", vector, 10, ())
        assert choice is not None
        assert choice.arm == learned.arms[learned.contexts["10"].arm]
        assert choice.trust == Trust.STATIC


def test_a_k_above_the_per_query_evidence_is_served_without_the_vector(learned: TemplatePolicy) -> None:
    vectors, _ = queries(1, 53)
    choice = serve(learned).optimize("t", vectors[0], 30, ())
    assert choice is not None
    assert choice.trust == Trust.STATIC
    assert choice.arm.effort >= 30


def test_a_smaller_k_with_evidence_of_its_own_does_not_pay_for_a_larger(learned: TemplatePolicy) -> None:
    cheap = number("ef=20")
    contexts = {**learned.contexts, "3": ContextPolicy(cheap, 0.99, 200)}
    optimizer = serve(msgspec.structs.replace(learned, contexts=contexts))
    vector = np.ones(learned.query.dimensions if learned.query else 0, dtype=np.float32)
    for k, trust in ((1, Trust.STATIC), (3, Trust.STATIC), (5, Trust.QUERY), (10, Trust.QUERY)):
        choice = optimizer.optimize(learned.template, vector, k, ())
        assert choice is not None
        if trust is Trust.STATIC:
            assert choice.arm == learned.arms[cheap]
            assert choice.trust is Trust.STATIC
        else:
            assert "measured with k=3" not in choice.reason


def test_a_malformed_per_query_part_is_served_without_it(learned: TemplatePolicy) -> None:
    assert learned.query is not None
    damaged = [
        msgspec.structs.replace(learned.query, extra={}),
        msgspec.structs.replace(learned.query, extra=learned.query.extra | {"points": b"123"}),
        msgspec.structs.replace(learned.query, curves=b""),
    ]
    for query in damaged:
        broken = msgspec.structs.replace(learned, query=query)
        vectors, _ = queries(1, 54)
        choice = serve(broken).optimize("t", vectors[0], 10, ())
        assert choice is not None
        assert choice.arm == learned.arms[learned.contexts["10"].arm]


def test_a_context_whose_arm_does_not_exist_is_left_alone() -> None:
    assert serve(static(len(ARMS))).optimize("t", None, 10, ()) is None


def test_a_snapshot_survives_the_wire(learned: TemplatePolicy) -> None:
    snapshot = Snapshot(3, 1.0, {"t": learned})
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=Snapshot)
    assert again == snapshot
    vectors, _ = queries(20, 55)
    one, two = SearchOptimizer(snapshot), SearchOptimizer(again)
    assert [one.optimize("t", v, 10, ()) for v in vectors] == [two.optimize("t", v, 10, ()) for v in vectors]


def test_indexes_of_unchanged_templates_are_taken_over(learned: TemplatePolicy) -> None:
    first = serve(learned)
    second = SearchOptimizer(Snapshot(8, 1.0, {"t": learned}), previous=first)
    assert second._templates["t"].lookup is first._templates["t"].lookup
    changed = distill(T, facts(sketch=table_rows(2000, 1)), ARMS, mixed_labels(500, 9), {"10": 1}, FREE)
    third = SearchOptimizer(Snapshot(9, 2.0, {"t": changed}), previous=second)
    assert third._templates["t"].lookup is not second._templates["t"].lookup
    assert list(third._sketches.values()) == list(second._sketches.values())
    assert SearchOptimizer(Snapshot(10, 3.0, {}), previous=third)._sketches == {}


def test_iterative_scans_are_not_bound_by_their_effort() -> None:
    strict = Arm("strict", (("hnsw.iterative_scan", "strict_order"), ("hnsw.ef_search", "100")), "hnsw", 100)
    policy = msgspec.structs.replace(
        static(0), arms=(strict,), fallback=0, contexts={"10": ContextPolicy(0, 1.0, 9)}
    )
    choice = serve(policy).optimize("t", None, 500, ())
    assert choice is not None
    assert choice.arm == strict


def test_a_lookup_takes_microseconds(learned: TemplatePolicy) -> None:
    """A bound far above what was measured (docs/learning.md), to notice an accident and not a busy machine."""
    optimizer = serve(learned)
    vectors, _ = queries(300, 56)
    took = []
    gc.disable()
    try:
        for vector in vectors:
            start = time.perf_counter()
            optimizer.optimize("t", vector, 10, ())
            took.append(time.perf_counter() - start)
    finally:
        gc.enable()
    assert np.median(took) < 1e-3
