"""Limits of one worker that need no sockets: open files, silent connections, memory."""

from __future__ import annotations

import pytest

from config.schema import Limits
from proxy.net import admission
from proxy.net.admission import Gate, Place, files_for, sessions_for, too_few_files
from proxy.session.counters import Counters


@pytest.mark.parametrize("sessions", [1, 10, 100, 5000, 100_000])
@pytest.mark.parametrize("logins", [1, 1000])
def test_files_that_are_needed_are_enough_and_hardly_more(sessions: int, logins: int) -> None:
    files = files_for(sessions, logins)
    assert sessions_for(files, logins) >= sessions
    assert sessions_for(files - 5, logins) < sessions


def test_too_few_open_files_are_said_with_what_to_do() -> None:
    assert too_few_files(Limits(), 100) is None  # nothing is promised
    assert too_few_files(Limits(max_connections=1000), 100_000) is None
    said = too_few_files(Limits(max_connections=10_000), 4096)
    assert said is not None
    assert "limits.max_connections = 10000" in said
    assert "LimitNOFILE" in said
    assert "4096 are allowed" in said


class Silent:
    def __init__(self) -> None:
        self.gone = False

    def crowded_out(self) -> None:
        self.gone = True


def test_the_connection_that_is_silent_for_longest_makes_room() -> None:
    counters = Counters()
    gate = Gate(Limits(max_logins=2), counters, files=10_000)
    silent = [Silent() for _ in range(4)]
    gate.arrived(silent[0])
    gate.arrived(silent[1])
    gate.spoke(silent[0])
    gate.arrived(silent[2])
    assert not any(each.gone for each in silent)
    gate.arrived(silent[3])
    assert [each.gone for each in silent] == [False, True, False, False]
    assert counters.limits_hit == {"logins": 1}


def test_a_place_is_given_back_once() -> None:
    counters = Counters()
    gate = Gate(
        Limits(max_connections=3, max_connections_per_user=2, max_connections_per_database=2),
        counters,
        files=10_000,
    )
    first = gate.admit(b"ann", b"shop")
    second = gate.admit(b"ann", b"")  # its database is called after the user
    assert isinstance(first, Place)
    assert isinstance(second, Place)
    refused = gate.admit(b"ann", b"other")
    assert isinstance(refused, bytes)
    assert b"C53300\0" in refused
    assert b'too many connections for role "ann"' in refused
    assert isinstance(gate.admit(b"bob", b"shop"), Place)
    full = gate.admit(b"eve", b"new")
    assert isinstance(full, bytes)
    assert b"sorry, too many clients already" in full
    first.leave()
    first.leave()
    assert isinstance(gate.admit(b"eve", b"new"), Place)
    assert isinstance(gate.admit(b"eve", b"newer"), bytes)
    assert counters.limits_hit == {"user": 1, "connections": 2}


def test_a_database_has_its_limit_too() -> None:
    gate = Gate(Limits(max_connections_per_database=1), Counters(), files=10_000)
    assert isinstance(gate.admit(b"ann", b"shop"), Place)
    refused = gate.admit(b"bob", b"shop")
    assert isinstance(refused, bytes)
    assert b'too many connections for database "shop"' in refused


def test_open_files_are_a_limit_like_the_others() -> None:
    gate = Gate(Limits(), Counters(), files=200)
    places = [gate.admit(b"u", b"d") for _ in range(200)]
    served = [place for place in places if isinstance(place, Place)]
    assert len(served) == sessions_for(200, 1000)
    assert 2 * len(served) + admission.FILES_OF_ITS_OWN < 200
    assert isinstance(places[-1], bytes)
    assert b"200 open files (ulimit -n)" in places[-1]


def test_a_worker_that_takes_too_much_memory_takes_no_new_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(Limits(max_memory=100), Counters(), files=10_000)
    monkeypatch.setattr(admission, "resident", lambda: 101e6)
    gate.look_at_memory()
    refused = gate.admit(b"u", b"d")
    assert isinstance(refused, bytes)
    assert b"C53200\0" in refused
    monkeypatch.setattr(admission, "resident", lambda: 99e6)
    gate.look_at_memory()
    assert isinstance(gate.admit(b"u", b"d"), Place)


def test_memory_is_measured() -> None:
    assert 5e6 < admission.resident() < 5e9
