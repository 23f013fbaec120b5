"""What a query's own path does, and what is left until its bytes are away: told as scripts of bytes."""

from __future__ import annotations

import struct

import pytest

from proxy.session.adaptation import Execution
from proxy.session.frontend import Session
from tests.integration.raw import SYNC, bind, execute, message, parse
from tests.unit.test_session_recovery import BOUND, IDLE, INJECTED, PARSED, PID, PREPARED, P, make_session

PARAMETERS = "SELECT id FROM items WHERE owner = $3 ORDER BY embedding <-> $1 LIMIT $2 OFFSET 4"
ANSWER = BOUND + message("C", b"SELECT 3\0") + IDLE


@pytest.fixture
def executions() -> list[Execution]:
    return []


@pytest.fixture
def session(executions: list[Execution]) -> Session:
    session = make_session(PID)
    session.adapter.record = executions.append
    return session


def prepare(session: Session, text: bytes) -> None:
    session.from_client(text + SYNC)
    session.from_server(PARSED + IDLE)


def ask(session: Session, *values: bytes) -> None:
    sent = session.from_client(bind(*values) + execute() + SYNC)
    session.from_server((PREPARED if sent[:1] == b"C" else b"") + INJECTED + ANSWER)


def test_what_no_client_waits_for_is_done_by_settling(session: Session, executions: list[Execution]) -> None:
    session.adapter.defers = True
    prepare(session, P)
    ask(session, b"[1,2]")
    assert not executions
    session.adapter.settle()
    session.adapter.settle()
    assert [execution.outcome.rows for execution in executions] == [3]
    assert session.last_query_id is not None


def test_every_execution_has_its_own_parameters(session: Session, executions: list[Execution]) -> None:
    prepare(session, parse(PARAMETERS))
    for owner, limit in ((b"ann", b"7"), (b"bob", b"9")):
        ask(session, b"[1,2]", limit, owner)
    found = [
        (bound.k, bound.offset, [value.data for value in bound.values if value is not None])
        for bound in (execution.bound for execution in executions)
    ]
    assert [(k, offset) for k, offset, _ in found] == [(7, 4), (9, 4)]
    assert [b"ann" in data for _, _, data in found] == [True, False]
    assert [b"bob" in data for _, _, data in found] == [False, True]


def test_a_limit_that_is_none_leaves_the_query_alone(session: Session, executions: list[Execution]) -> None:
    prepare(session, parse(PARAMETERS))
    session.from_client(bind(b"[1,2]", b"-7", b"ann") + execute() + SYNC)
    session.from_server(ANSWER)
    assert session.adapter.counters.left_alone["arguments"] == 1
    ask(session, b"[1,2]", b"7", b"ann")
    assert [execution.bound.k for execution in executions] == [7]


def test_a_parameter_that_is_missing_leaves_the_query_alone(session: Session) -> None:
    prepare(session, parse(PARAMETERS))
    session.from_client(bind(b"[1,2]") + execute() + SYNC)
    assert session.adapter.counters.left_alone["arguments"] == 1


@pytest.mark.parametrize(
    ("number", "usable"),
    [(float("nan"), False), (float("inf"), False), (-float("inf"), False), (3e38, True)],
)
def test_only_finite_vectors_are_used(
    session: Session, executions: list[Execution], number: float, usable: bool
) -> None:
    prepare(session, P)
    vector = struct.pack("!hhff", 2, 0, 1.0, number)
    session.from_client(bind(vector, formats=(1,)) + execute() + SYNC)
    session.from_server(PREPARED + INJECTED + ANSWER)
    assert [execution.bound.vector is not None for execution in executions] == [usable]
