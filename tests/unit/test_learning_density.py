"""The sketch of a table, and what a lookup in it costs."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from learning import density, tolls
from learning.calibration import level_of
from learning.distillation import Options, distill
from learning.lookup import QueryLookup
from learning.records import QueryPolicy, Trust
from tests.unit.learning_labels import ARMS, facts, mixed_labels, queries, table_rows, template

FREE = Options(repeat_ms=0.0, lookup_ms=0.0, sketch_ms=-10.0)


def test_what_is_seen_around_a_query_is_nearly_what_there_is() -> None:
    data = density.prepare(table_rows(4000, 1), euclidean=False)
    assert data is not None
    sketch = density.Sketch(data)
    points, residues = sketch.projection.many(queries(200, 3)[0])
    rows = np.frombuffer(data.codes, dtype=np.int8).reshape(-1, sketch.projection.components) * data.scale
    squares = ((points[:, None] - rows) ** 2).sum(axis=2)
    true = np.sort(squares, axis=1)[:, : density.NEIGHBOURS]
    seen = sketch.look_around(points, residues)
    assert (seen[:, : density.NEIGHBOURS] >= true - 1e-4).all()  # rows may be missed, never invented
    assert np.median(seen[:, 0] / true[:, 0]) == pytest.approx(1.0, abs=0.01)
    assert np.median(seen[:, density.NEIGHBOURS - 1] / true[:, -1]) < 1.2
    assert (np.diff(seen[:, : density.NEIGHBOURS], axis=1) >= 0.0).all()
    assert seen[:, density.NEIGHBOURS] == pytest.approx(residues, abs=1e-5)


def test_one_query_has_the_features_that_many_have() -> None:
    data = density.prepare(table_rows(2000, 1), euclidean=False)
    assert data is not None
    sketch = density.Sketch(data)
    seen = sketch.look_around(*sketch.projection.many(queries(50, 3)[0]))
    floor = density.noise_floor(seen)
    each = [density.feature_list(one.tolist(), floor) for one in seen]
    assert np.array(each) == pytest.approx(density.features(seen, floor))


def test_cells_that_hold_fewer_rows_than_are_looked_at_are_enough() -> None:
    data = density.prepare(table_rows(600, 1), euclidean=False)
    assert data is not None
    lonely = replace(data, cells=np.ones(600, dtype="<i4").tobytes())
    seen = density.Sketch(lonely).look_around(np.zeros((1, 16), dtype=np.float32), np.zeros(1))
    assert seen.shape == (1, density.NEIGHBOURS + 1)
    assert np.isfinite(seen).all()


@pytest.mark.parametrize("cells", [[600, 1], [601, -1], [0, 600], []])
def test_cells_that_do_not_fit_the_rows_are_refused(cells: list[int]) -> None:
    data = density.prepare(table_rows(600, 1), euclidean=False)
    assert data is not None
    with pytest.raises(ValueError, match="cells of"):
        density.Sketch(replace(data, cells=np.array(cells, dtype="<i4").tobytes()))


def test_rows_that_are_all_the_same_make_a_sketch() -> None:
    data = density.prepare(np.ones((700, 8), dtype=np.float32), euclidean=True)
    assert data is not None
    assert np.frombuffer(data.cells, dtype="<i4").sum() == 700
    density.Sketch(data)


def test_the_sketch_of_the_policy_in_use_serves_until_rows_are_fetched_again() -> None:
    labels = mixed_labels(500, 0)
    before = distill(template(), facts(sketch=table_rows(2000, 1)), ARMS, labels, {"10": 1}, FREE)
    after = distill(template(), facts(sketch=None), ARMS, labels, {"10": 1}, FREE, previous=before)
    assert before.query is not None
    assert after.query is not None
    assert after.query.extra["codes"] == before.query.extra["codes"]
    vectors, _ = queries(100, 77)
    one, other = QueryLookup(before.query, {}), QueryLookup(after.query, {})
    same = [one.choose(vector) == other.choose(vector) for vector in vectors]
    assert np.mean(same) > 0.9  # the rows are rounded in one of them


def test_a_sketch_that_is_not_wanted_any_more_or_damaged_is_not_carried_on() -> None:
    labels = mixed_labels(500, 0)
    before = distill(template(), facts(sketch=table_rows(2000, 1)), ARMS, labels, {"10": 1}, FREE)
    assert before.query is not None
    damaged = msgspec.structs.replace(
        before, query=msgspec.structs.replace(before.query, extra=before.query.extra | {"cells": b"\1\0\0\0"})
    )
    for previous, options in ((before, replace(FREE, sketch=False)), (damaged, FREE)):
        after = distill(template(), facts(sketch=None), ARMS, labels, {"10": 1}, options, previous=previous)
        assert after.query is None or "codes" not in after.query.extra


def test_the_tolls_of_every_level_are_measured() -> None:
    known = facts(sketch=table_rows(2000, 1))
    policy = distill(template(), known, ARMS, mixed_labels(500, 0), {"10": 1}, FREE)
    assert policy.query is not None
    assert "codes" in policy.query.extra
    vectors, _ = queries(10, 77)
    repeated, memory, sketch = tolls.measure(policy.query, vectors, {})
    assert 0.0 < repeated < 5.0
    assert 0.0 <= memory < 5.0
    assert 0.0 <= sketch < 5.0
    assert QueryLookup(policy.query, {}).choose(vectors[0]) is not None  # nothing was changed


STOPPED = (0.01, 0.04, 0.05)


@pytest.fixture
def density_policy(monkeypatch: pytest.MonkeyPatch) -> QueryPolicy:
    """A policy of the highest level; the stopwatch says `STOPPED` of any."""
    known = facts(sketch=table_rows(2000, 1))
    policy = distill(template(), known, ARMS, mixed_labels(500, 0), {"10": 1}, FREE).query
    assert policy is not None
    assert level_of(policy) == "density"
    monkeypatch.setattr(tolls, "measure", lambda policy, vectors, sketches: STOPPED)
    return policy


def lived(*milliseconds: float, level: str) -> tolls.Lived:
    found = tolls.Lived()
    found.stopwatch(level)
    for each in milliseconds:
        found.record(each)
    return found


def test_tolls_are_scaled_by_what_lookups_take_where_they_happen(density_policy: QueryPolicy) -> None:
    found, (vectors, _) = lived(*[0.15] * 60, *[7.0] * 20, level="memory"), queries(1, 0)
    threefold = pytest.approx((0.03, 0.12, 0.15))
    assert found.stopwatch("memory")(density_policy, vectors, {}) == threefold
    for level in ("density", None):  # of another level nothing is known yet: the scale stays
        assert found.stopwatch(level)(density_policy, vectors, {}) == threefold


@pytest.mark.parametrize(
    ("milliseconds", "level"),
    [([0.001] * 100, "memory"), ([5.0] * 100, "repeated"), ([5.0] * 10, "memory")],
    ids=["faster than the stopwatch", "nothing was chosen by vector", "too few"],
)
def test_the_stopwatch_is_believed(
    density_policy: QueryPolicy, milliseconds: list[float], level: str
) -> None:
    found, (vectors, _) = lived(*milliseconds, level=level), queries(1, 0)
    assert found.stopwatch(level)(density_policy, vectors, {}) == STOPPED


def test_lookups_of_a_level_that_the_new_policy_lacks_say_nothing(density_policy: QueryPolicy) -> None:
    found, (vectors, _) = lived(*[5.0] * 100, level="density"), queries(1, 0)
    extra = {key: data for key, data in density_policy.extra.items() if key != "codes"}
    policy = msgspec.structs.replace(density_policy, extra=extra)
    assert found.stopwatch("density")(policy, vectors, {}) == STOPPED


def test_tolls_that_were_measured_decide_and_not_the_options() -> None:
    known, seen = facts(sketch=table_rows(2000, 1)), []

    def slow(policy: object, vectors: object, sketches: object) -> tuple[float, float, float]:
        seen.append((policy, vectors, sketches))
        return 100.0, 0.0, 0.0

    policy = distill(template(), known, ARMS, mixed_labels(500, 0), {"10": 1}, FREE, stopwatch=slow)
    assert policy.trust is Trust.STATIC
    assert len(seen) == 1
