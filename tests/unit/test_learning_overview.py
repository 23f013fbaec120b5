"""What the dashboard shows, from made-up records: time line, and the map of patterns."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from learning.overview import pattern_map, plane, timeline
from learning.records import QueryPolicy, TemplatePolicy, Trajectory, Trust


def query(at: float, arm: str, ms: float) -> Trajectory:
    return Trajectory(
        query_id=b"0" * 16,
        template="t",
        timestamp=at,
        vector=None,
        k=10,
        offset=0,
        values=(),
        arm=arm,
        settings=(),
        trust=Trust.STATIC,
        policy_version=1,
        rows=10,
        first_byte_ms=ms,
        latency_ms=ms,
    )


def test_a_time_line_counts_every_query_once_by_arm() -> None:
    found = timeline([query(at, "as is" if at < 50 else "ef=40", at) for at in range(101)])
    assert sum(bin["arms"].get("as is", 0) for bin in found) == 50
    assert sum(bin["arms"].get("ef=40", 0) for bin in found) == 51
    assert found[0]["at"] == 0
    assert found[-1]["ms"] == pytest.approx(98.0, abs=2.0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_queries_at_one_time_make_a_time_line_too(count: int) -> None:
    found = timeline([query(7.0, "exact", 2.0)] * count)
    assert sum(sum(bin["arms"].values()) for bin in found) == count


def test_the_plane_is_that_of_the_two_principal_directions() -> None:
    rng = np.random.default_rng(1)
    axes, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    spread = np.concatenate([[9.0, 4.0], np.full(62, 0.1)])
    points = ((rng.normal(size=(300, 64)) * spread) @ axes.T + 5.0).astype(np.float32)
    found = plane(points)
    _, sizes, _ = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(sizes[:2]), rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (5, 1), (5, 2)])
def test_few_points_or_dimensions_have_a_place(shape: tuple[int, int]) -> None:
    found = plane(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert found.shape == (shape[0], 2)
    assert np.isfinite(found).all()


def test_a_pattern_that_all_arms_answer_is_easy_and_one_that_none_does_is_hard() -> None:
    policy = TemplatePolicy("t", "public.items", Trust.QUERY, "", 0.98, (), (), (), 0, {})
    assert pattern_map(policy) == []
    evidence = QueryPolicy(
        dimensions=3,
        centroids=np.eye(2, 3, dtype="<f4").tobytes(),
        curves=np.array([[1, 1], [0, 0.5]], dtype="<f4").tobytes(),
        weights=np.array([3, 1], dtype="<f4").tobytes(),
        costs=(1.0, 2.0),
        prior=(0.9, 0.9),
        prior_weight=1.0,
        sharpness=8.0,
        neighbours=5,
        price=0.1,
        min_similarity=0.0,
    )
    easy, hard = pattern_map(msgspec.structs.replace(policy, query=evidence))
    assert (easy["weight"], easy["difficulty"]) == (3.0, 0.0)
    assert (hard["weight"], hard["difficulty"]) == (1.0, 0.75)
    assert abs(easy["x"] - hard["x"]) == pytest.approx(2**0.5, rel=1e-6)
