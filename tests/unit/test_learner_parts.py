"""The learner's small pure parts: recall by distance, array values, plans, audits, publication, the registry."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import Config
from learning import registry as registry_module
from learning.audit import Audit
from learning.binding import BindingError, split_array, unpack_array, vector_text
from learning.dialects import IndexInfo, ladder
from learning.distillation import TableFacts
from learning.inventory import Confirmed, expand_user
from learning.plans import Plan
from learning.policy import NO_LEARNING, NOT_ADAPTIVE, REFRESH, Publication, permitted
from learning.probe import number, recall
from learning.records import (
    ArmResult,
    ContextPolicy,
    Label,
    Snapshot,
    Template,
    TemplatePolicy,
    Trajectory,
    Trust,
)
from learning.registry import Phase, Registry, TemplateState, observe
from learning.tablestats import unpack_vectors
from learning.worker import distil_due

INDEX = IndexInfo("i", "hnsw", "<->")
ARMS = ladder([INDEX], filtered=False, max_k=10)
TEMPLATE = Template("k", "db", "u", None, "q", "q", (), (), "items", "e", "<->")


# --- recall -------------------------------------------------------------------------------------------------------


def test_ties_are_hits_and_missing_rows_are_misses() -> None:
    assert recall([1.0, 2.0, 2.0], [1.0, 2.0, 2.0], 3) == 1.0
    assert recall([1.0, 2.0, 3.0], [1.0, 3.0], 3) == pytest.approx(2 / 3)
    assert recall([1.0, 2.0, 3.0], [1.0, 2.0, 9.0], 3) == pytest.approx(2 / 3)
    assert recall([1.0, 2.0], [1.0, 2.0], 10) == 1.0  # no more rows exist
    assert recall([], [], 10) == 1.0


def test_nan_distance_sorts_last_and_is_no_miss_where_it_is_the_truth() -> None:
    truth = [1.0, number("NaN")]
    assert truth[1] == math.inf
    assert recall(truth, [1.0, math.inf], 2) == 1.0
    assert recall([1.0, 2.0], [1.0, math.inf], 2) == 0.5


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.integers(1, 20), st.randoms())
def test_recall_is_one_for_the_truth_and_never_leaves_the_unit_interval(
    distances: list[float], k: int, random: object
) -> None:
    truth = sorted(distances)[:k]
    assert recall(truth, truth, k) == 1.0
    assert 0.0 <= recall(truth, distances, k) <= 1.0
    assert recall(truth, truth[:-1], k) == pytest.approx((len(truth) - 1) / len(truth))


# --- values -------------------------------------------------------------------------------------------------------


@given(st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=8))
def test_array_literal_is_taken_apart_into_what_was_put_in(elements: list[str | None]) -> None:
    quoted = [
        "NULL" if e is None else '"' + e.replace("\\", "\\\\").replace('"', '\\"') + '"' for e in elements
    ]
    assert split_array("{" + ",".join(quoted) + "}") == elements


def test_plain_array_literal() -> None:
    assert split_array("{1, 2,null}") == ["1", "2", None]
    assert split_array(" {} ") == []


@pytest.mark.parametrize("text", ["", "1,2", "{1,{2}}", "{{1},{2}}", '{"open}', "{1} x"])
def test_array_literal_that_is_malformed_or_nested_is_refused(text: str) -> None:
    with pytest.raises(BindingError):
        split_array(text)


@given(st.lists(st.none() | st.binary(max_size=10), max_size=8))
def test_binary_array_is_taken_apart_into_what_was_put_in(elements: list[bytes | None]) -> None:
    body = b"".join(struct.pack("!i", -1) if e is None else struct.pack("!i", len(e)) + e for e in elements)
    data = struct.pack("!iiIii", 1, 0, 25, len(elements), 1) + body
    assert unpack_array(data) == (25, elements)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_an_array_or_refused(data: bytes) -> None:
    try:
        oid, elements = unpack_array(data)
    except BindingError:
        return
    assert oid >= 0
    assert all(e is None or len(e) <= len(data) for e in elements)


def test_vector_text_keeps_every_bit() -> None:
    vector = np.random.default_rng(0).normal(size=50).astype("<f4")
    assert np.array_equal(np.array(vector_text(vector.tobytes())[1:-1].split(","), dtype="<f4"), vector)
    with pytest.raises(BindingError):
        vector_text(None)


def test_copied_vectors_are_unpacked_without_nulls_and_strangers() -> None:
    def row(values: list[float]) -> bytes:
        body = struct.pack(f"!HH{len(values)}f", len(values), 0, *values)
        return struct.pack("!hi", 1, len(body)) + body

    data = b"PGCOPY\n\xff\r\n\0" + bytes(8) + row([1, 2]) + struct.pack("!hi", 1, -1) + row([3]) + row([4, 5])
    vectors = unpack_vectors(data + struct.pack("!h", -1), np.dtype(">f4"))
    assert vectors is not None
    assert vectors.tolist() == [[1, 2], [4, 5]]
    assert unpack_vectors(data[:19] + struct.pack("!h", -1), np.dtype(">f4")) is None


def test_user_in_the_search_path_becomes_the_applications_role() -> None:
    assert expand_user('"$user", public', 'o"k') == '"o""k", public'
    assert expand_user("$user,app", "u") == '"u", app'
    assert expand_user('"a$user"', "u") == '"a$user"'


# --- plans and audits ---------------------------------------------------------------------------------------------


def test_plan_names_relations_and_indexes_of_all_nodes() -> None:
    inner = {"Node Type": "Index Scan", "Schema": "s", "Relation Name": "t", "Index Name": "i"}
    bitmap = {"Node Type": "Bitmap Index Scan", "Index Name": "b"}
    heap = {"Node Type": "Bitmap Heap Scan", "Schema": "s", "Relation Name": "u", "Plans": [bitmap]}
    plan = Plan.parse([{"Plan": {"Node Type": "Limit", "Plans": [inner, heap]}}])
    assert plan.relations == {("s", "t"), ("s", "u")}
    assert plan.indexes == {("s", "i")}
    assert not plan.foreign
    assert Plan.parse([{"Plan": {"Node Type": "Foreign Scan"}}]).foreign


def test_only_uniform_labels_are_audits_and_the_served_arm_counts() -> None:
    results = {"as is": ArmResult(0.5, 5, 1.0), "exact": ArmResult(1.0, 10, 9.0)}
    label = Label("k", "10", 0.0, None, 10, 10, results, "as is", True)
    audit = Audit(window=2)
    audit.record("t", msgspec.structs.replace(label, uniform=False))
    audit.record("t", msgspec.structs.replace(label, served_arm="gone"))
    assert audit.tables() == {}
    for served in ("as is", "as is", "exact"):
        audit.record("t", msgspec.structs.replace(label, served_arm=served))
    assert audit.tables()["t"].recall == 0.75
    assert audit.tables()["t"].queries == 2


# --- publication --------------------------------------------------------------------------------------------------


def policy(
    arm: int = 1, recall: float = 0.99, *, reason: str = "r", trust: Trust = Trust.STATIC
) -> TemplatePolicy:
    contexts = {"10": ContextPolicy(arm, recall, 20)}
    return TemplatePolicy("k", "public.items", trust, reason, 0.98, ARMS, (), (), arm, contexts)


def test_snapshot_goes_out_when_a_query_would_get_another_arm() -> None:
    publication = Publication(version=41)
    first = publication.next({"k": policy(1)}, 1000.0)
    assert first is not None
    assert first.version == 42
    assert publication.next({"k": policy(1, 0.98, reason="more labels")}, 1001.0) is None
    assert publication.next({"k": policy(2)}, 1000.5) is None  # arms may settle for a moment
    second = publication.next({"k": policy(2)}, 1002.0)
    assert second is not None
    assert second.version == 43


def test_figures_alone_wait() -> None:
    publication = Publication()
    publication.next({"k": policy()}, 1000.0)
    later = {"k": policy(recall=0.97)}
    assert publication.next(later, 1000.0 + REFRESH / 2) is None
    assert publication.next(later, 1001.0 + REFRESH) is not None
    assert publication.next(later, 1002.0 + 2 * REFRESH) is None  # nothing new at all


def test_new_reason_for_leaving_a_template_alone_goes_out_and_progress_does_not() -> None:
    publication = Publication()
    publication.next({"k": observe(TEMPLATE, "t", "no index")}, 1000.0)
    assert publication.next({"k": observe(TEMPLATE, "t", "no index")}, 1001.0) is None
    assert publication.next({"k": observe(TEMPLATE, "t", "row-level security")}, 1002.0) is not None
    assert publication.next({"k": policy(trust=Trust.OBSERVE, reason="1 label")}, 1003.0) is None
    assert publication.next({"k": policy()}, 1003.1) is not None
    assert publication.next({"k": observe(TEMPLATE, "t", "refused")}, 1003.2) is not None  # at once


@pytest.mark.parametrize(
    ("option", "reason"), [({"adaptive_search": False}, NOT_ADAPTIVE), ({"learning": False}, NO_LEARNING)]
)
def test_restored_policy_of_a_table_switched_off_meanwhile_is_not_served(
    option: dict[str, bool], reason: str
) -> None:
    snapshot = Snapshot(3, 0.0, {"k": policy()})
    config = Config.model_validate({"tables": {"public.items": option}})
    assert permitted(snapshot, Config()) == snapshot
    found = permitted(snapshot, config).templates["k"]
    assert (found.trust, found.reason, found.contexts) == (Trust.OBSERVE, reason, {})


# --- registry -----------------------------------------------------------------------------------------------------


def confirmed(*indexes: IndexInfo) -> Confirmed:
    facts = TableFacts("public.items", (), ())
    return Confirmed(facts, indexes or (INDEX,), ARMS, (), (), 1)


def trajectory(k: int = 10, vector: bytes | None = b"\0" * 16, error: str | None = None) -> Trajectory:
    return Trajectory(b"q", "k", 0.0, vector, k, 0, (), "as is", (), Trust.OBSERVE, 0, 10, 1.0, 1.0, error)


def label(context: str = "10", vector: bytes | None = b"\0" * 16) -> Label:
    return Label("k", context, 0.0, vector, 10, 10, {"exact": ArmResult(1.0, 10, 9.0)}, "as is", True)


def test_new_template_waits_for_a_query_that_can_be_measured() -> None:
    state = TemplateState(TEMPLATE)
    assert not state.due(0.0)
    for useless in (
        trajectory(vector=None),
        trajectory(error="57014"),
        trajectory(k=0),
        trajectory(k=100_000),
    ):
        state.record(useless, 100, 0.0)
    assert not state.due(0.0)
    state.record(trajectory(), 100, 0.0)
    assert state.due(0.0)


def test_template_that_is_left_alone_is_asked_about_again_ever_more_rarely() -> None:
    state = TemplateState(TEMPLATE)
    state.record(trajectory(), 100, 0.0)
    waits, now = [], 0.0
    for _ in range(20):
        state.leave_alone("no index", "t", now)
        waits.append(state.recheck_at - now)
        assert not state.due(state.recheck_at - 0.1)
        now = state.recheck_at
        assert state.due(now)
    assert waits == sorted(waits)
    assert waits[-1] == 600.0
    state.leave_alone("refused", "t", now, forever=True)
    assert not state.due(1e9)
    assert state.sample is None
    assert state.phase is Phase.OFF


def test_labels_of_other_indexes_are_dropped_and_those_of_the_same_kept() -> None:
    state = TemplateState(TEMPLATE)
    state.confirm(confirmed(), 0.0)
    state.add_label(label(), trajectory())
    state.confirm(confirmed(), 300.0)
    assert len(state.labels) == 1
    state.confirm(confirmed(replace(INDEX, definition="m=32")), 600.0)
    assert len(state.labels) == 0
    assert not state.label_counts


def test_larger_k_with_a_share_in_the_traffic_brings_the_check_forward() -> None:
    state = TemplateState(TEMPLATE)
    state.confirm(confirmed(), 0.0)
    for _ in range(100):
        state.record(trajectory(10), 100, 1.0)
    state.confirm(confirmed(), 1.0)
    state.record(trajectory(200), 100, 2.0)
    assert state.max_k == 10  # one in a hundred is not common
    assert not state.due(10.0)
    for _ in range(10):
        state.record(trajectory(200), 100, 3.0)
    assert state.max_k == 200
    assert state.due(10.0)


def test_labels_are_bounded_by_bytes_and_counted_by_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "LABEL_BYTES", 16 * 400)
    state = TemplateState(TEMPLATE)
    state.keep_labels([label("10\x1fa")] * 300)
    state.keep_labels([label("10\x1fb")] * 350)
    assert len(state.labels) == 400
    assert state.label_counts == {"10\x1fa": 50, "10\x1fb": 350}
    state.rename_context("10\x1fb", "10\x1fc")
    assert state.label_counts == {"10\x1fa": 50, "10\x1fc": 350}


def test_registry_is_bounded_and_makes_room_only_for_idle_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MAX_TEMPLATES", 2)
    registry = Registry()

    def add(key: str, now: float) -> TemplateState | None:
        return registry.add(msgspec.structs.replace(TEMPLATE, key=key), now)

    one = add("1", 0.0)
    assert one is add("1", 5.0)
    assert add("2", 0.0) is not None
    assert add("3", 10.0) is None
    registry.touch("1")
    assert add("3", 4000.0) is not None
    assert registry.get("2") is None
    assert registry.get("1") is one


def test_patterns_are_weighed_anew_after_their_time_even_without_new_labels() -> None:
    state = TemplateState(TEMPLATE)
    assert not distil_due(state, 1e9, 60.0)  # nothing is known
    state.confirm(confirmed(), 0.0)
    state.add_label(label(), trajectory())
    assert distil_due(state, 10.0, 60.0)
    state.unpublished, state.distilled_at = 0, 10.0
    assert not distil_due(state, 69.0, 60.0)
    assert distil_due(state, 70.0, 60.0)
