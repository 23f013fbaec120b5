"""Counting connections across workers: against a plain dictionary, and at its edges."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.net import places as module
from proxy.net.places import Places

NAMES = [b"u%d" % number for number in range(6)]


def shared(path: Path, workers: int) -> list[Places]:
    Places.prepare(path, workers)
    return [Places.shared(path, number, workers) for number in range(workers)]


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(NAMES), st.booleans()), max_size=80),
)
@settings(max_examples=50, deadline=None)
def test_it_counts_as_a_dictionary_does(tmp_path_factory: pytest.TempPathFactory, steps: list) -> None:  # type: ignore[type-arg]
    workers = shared(tmp_path_factory.mktemp("places") / "p", 3)
    truth: Counter[tuple[int, bytes]] = Counter()
    for worker, name, enters in steps:
        if enters:
            truth[worker, name] += 1
            expected = sum(count for (_, other), count in truth.items() if other == name)
            assert workers[worker].enter(name) == expected
        elif truth[worker, name]:
            truth[worker, name] -= 1
            workers[worker].leave(name)


def test_names_that_share_a_slot_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hash to the same place; the first leaves, and the chain behind it stays intact."""
    monkeypatch.setattr(module, "_hash", lambda name: 7 + module.SLOTS * int(name[1:]))
    counted = Places.alone()
    assert [counted.enter(name) for name in (b"u1", b"u2", b"u3", b"u2")] == [1, 1, 1, 2]
    counted.leave(b"u1")
    assert counted.enter(b"u3") == 2
    assert counted.enter(b"u4") == 1  # takes the free entry
    assert counted.enter(b"u2") == 3


def test_what_a_crashed_worker_counted_is_gone_when_its_successor_begins(tmp_path: Path) -> None:
    first, second = shared(tmp_path / "p", 2)
    first.enter(b"u")
    assert second.enter(b"u") == 2
    Places.shared(tmp_path / "p", 0, 2)
    assert second.enter(b"u") == 2  # its own two


def test_a_full_table_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS", 4)
    monkeypatch.setattr(module, "_SIZE", 64)
    counted = Places.alone()
    assert [counted.enter(b"%d" % number) for number in range(4)] == [1, 1, 1, 1]
    assert counted.enter(b"one more") == 0
    counted.leave(b"one more")
    counted.leave(b"2")
    assert counted.enter(b"one more") == 1


def test_names_that_came_and_went_make_no_search_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hash to the same place: a search reads so many entries, whatever has been there before."""
    monkeypatch.setattr(module, "_hash", lambda name: 7 + module.SLOTS * (1 + int(name)))
    counted = Places.alone()
    for number in range(3 * module.PROBES):
        assert counted.enter(b"%d" % number) == 1
        counted.leave(b"%d" % number)
    stay = [b"%d" % number for number in range(1000, 1000 + module.PROBES)]
    assert [counted.enter(name) for name in stay] == [1] * module.PROBES
    assert counted.enter(b"5000") == 0  # not counted, and so not refused
    counted.leave(b"5000")
    counted.leave(stay[-1])
    assert counted.enter(b"5000") == 1
