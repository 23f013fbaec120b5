"""What a following replica tells: an unbiased, bounded sample, and nothing that must not be told."""

from __future__ import annotations

import msgspec
import pytest

from learning.channel import InjectionFailed, Rated, TemplateSeen, TrajectoryBatch
from learning.outbox import MOST, PER_SECOND, Forwarded, Outbox, Thinning, decode
from learning.records import Template, Trajectory
from tests.unit.test_store import TEMPLATE, trajectory

OTHER = msgspec.structs.replace(TEMPLATE, key="k2", relation="secrets")


def box(*, anonymize: bool = False) -> Outbox:
    found = Outbox(lambda template: template.relation != "secrets", anonymize=anonymize)
    found.receive(TemplateSeen(TEMPLATE))
    found.receive(TemplateSeen(OTHER))
    return found


def forwarded(outbox: Outbox) -> Forwarded:
    (found,) = [m for m in map(decode, outbox.take()) if isinstance(m, Forwarded)]
    return found


def batch(count: int, template: Template = TEMPLATE) -> TrajectoryBatch:
    return TrajectoryBatch(tuple(trajectory(template.key) for _ in range(count)))


def test_queries_are_told_with_their_template_once_per_leader() -> None:
    outbox = box()
    outbox.receive(batch(3))
    assert forwarded(outbox) == Forwarded((TEMPLATE,), (trajectory(),) * 3, 3, 3 * 182)
    outbox.receive(batch(1))
    assert forwarded(outbox).templates == ()
    assert outbox.take() == []
    outbox.new_leader()
    assert forwarded(outbox).templates == (TEMPLATE,)


def test_nothing_is_told_of_a_template_that_must_not_be_told_of() -> None:
    outbox = box()
    outbox.receive(batch(5, OTHER))
    found = forwarded(outbox)
    assert found == Forwarded((TEMPLATE,), (), 0, 0)


def test_anonymized_only_counts_and_refusals_are_told() -> None:
    outbox = box(anonymize=True)
    outbox.receive(batch(5))
    outbox.receive(Rated(b"q" * 16, ("1",)))
    outbox.receive(InjectionFailed("k1", "22023", "no"))
    first, second = map(decode, outbox.take())
    assert isinstance(first, Forwarded)
    assert (first.trajectories, first.seen) == ((), 5)
    assert second == InjectionFailed("k1", "22023", "no")


def test_what_waits_is_bounded_and_the_rest_is_counted() -> None:
    outbox = box()
    outbox.receive(batch(MOST + 7))
    assert outbox.dropped == 7
    found = forwarded(outbox)
    assert (len(found.trajectories), found.seen) == (MOST, MOST + 7)


def test_every_replica_tells_the_same_share() -> None:
    shares = []
    for count in (200, 2000):
        outbox = box()
        outbox.sample = 0.1
        told = 0
        for _ in range(10):
            outbox.receive(batch(count // 10))
            told += len(forwarded(outbox).trajectories)
        shares.append(told / count)
    assert shares == pytest.approx([0.1, 0.1], abs=0.07)


def test_the_leader_asks_for_so_many_queries_in_all() -> None:
    thinning = Thinning()
    assert thinning.wanted()
    for _ in range(40):
        thinning.count(50_000, 50_000 * 20_000)
        thinning.round(1.0)
    assert thinning.sample == pytest.approx(4e6 / (50_000 * 20_000), rel=0.01)  # bytes bind first
    for _ in range(40):
        thinning.count(50_000, 50_000 * 150)
        thinning.round(1.0)
    assert thinning.sample == pytest.approx(PER_SECOND / 50_000, rel=0.01)
    wanted = sum(thinning.wanted() for _ in range(20_000))
    assert wanted == pytest.approx(200, abs=70)
    for _ in range(100):
        thinning.round(1.0)  # quiet again
    assert thinning.sample == 1.0


def test_a_message_of_another_version_is_skipped() -> None:
    assert decode(msgspec.msgpack.encode({"type": "telepathy"})) is None
    assert decode(b"\xc1") is None


def test_an_unknown_template_is_not_told_of() -> None:
    outbox = Outbox(lambda template: True)
    query: Trajectory = trajectory()
    outbox.receive(TrajectoryBatch((query,)))
    assert outbox.take() == []
