"""Pipelines that random scripts once got wrong, where only the order of two events makes the difference."""

from __future__ import annotations

import pytest

from proxy.session.frontend import Session
from proxy.wire.errors import ProtocolViolation
from tests.integration.raw import FLUSH, SYNC, bind, close, describe, execute, message, parse, query
from tests.unit.test_session_recovery import (
    BOUND,
    IDLE,
    INJECTED,
    NO_ROWS,
    PARSED,
    PREPARED,
    B,
    E,
    P,
    begin_and_search,
    make_session,
    tags_of,
)

DEALLOCATED = message("C", b"DEALLOCATE ALL\0")
COPY_IN = message("G", b"\0\0\1\0\0")


def kept(session: Session) -> bool:
    return session.keeps_bind


@pytest.fixture
def session() -> Session:
    return make_session(4711)


class TestStatementsDroppedWhileOnTheirWay:
    def test_prepared_in_front_of_a_deallocation(self, session: Session) -> None:
        """The answer to the preparation comes when the DEALLOCATE is already on its way."""
        session.from_client(P + B + E + SYNC)
        session.from_client(query("DEALLOCATE ALL"))
        session.from_server(PARSED + PREPARED + INJECTED + BOUND + NO_ROWS + IDLE)
        assert tags_of(session.from_client(P + B + E + SYNC)).startswith("PCPBEC")
        session.from_server(DEALLOCATED + IDLE)


class TestBindIsKeptUntilItIsSeenWhatBecomesOfIt:
    def test_until_its_execute(self, session: Session) -> None:
        assert tags_of(session.from_client(P + B)) == "P"
        assert tags_of(session.from_client(describe("P"))) == ""
        assert tags_of(session.from_client(E)) == "CPBECBDE"

    @pytest.mark.parametrize(
        "other", [FLUSH, SYNC, close("P"), parse("SELECT 1"), bind(name="x"), query("SELECT 1")]
    )
    def test_anything_else_behind_it_leaves_it_alone(self, session: Session, other: bytes) -> None:
        assert tags_of(session.from_client(P + B)) == "P"
        assert tags_of(session.from_client(other)) == "B" + chr(other[0])

    def test_a_limit_is_enough_with_the_sync_behind_it(self, session: Session) -> None:
        assert tags_of(session.from_client(P + B + execute("", 3))) == "P"
        assert tags_of(session.from_client(SYNC)) == "CPBECBES"

    def test_a_limit_with_something_else_behind_it_is_not(self, session: Session) -> None:
        assert tags_of(session.from_client(P + B + execute("", 3) + FLUSH)) == "PBEH"

    def test_at_the_end_of_the_stream_it_goes_as_it_is(self, session: Session) -> None:
        session.from_client(P + B)
        assert session.client_ended() == B
        assert session.client_ended() == b""

    def test_released_it_goes_as_it_is(self, session: Session) -> None:
        session.from_client(P + B)
        assert kept(session)
        assert session.release() == B
        assert not kept(session)
        assert tags_of(session.from_client(E + SYNC)) == "ES"

    def test_a_kept_bind_is_not_idleness(self, session: Session) -> None:
        session.from_client(P + B)
        assert not session.is_idle


class TestRestoredWhileItCanBe:
    def test_before_a_parse_that_may_fail(self, session: Session) -> None:
        begin_and_search(session)
        assert tags_of(session.from_client(parse("SELEC"))) == "CPBECP"

    def test_before_a_describe_that_may_fail(self, session: Session) -> None:
        begin_and_search(session)
        assert tags_of(session.from_client(describe("S", "nowhere"))) == "CPBECD"

    def test_not_for_the_next_search(self, session: Session) -> None:
        begin_and_search(session)
        assert tags_of(session.from_client(P + describe("S") + B + E + SYNC)) == "PDBES"


class TestCopyDataInAPipeline:
    def test_a_sync_amid_data_may_be_answered_or_not(self, session: Session) -> None:
        """Nothing can be counted any more, and so nothing is inserted any more."""
        session.from_client(parse("COPY t FROM STDIN") + bind() + E)
        session.from_server(PARSED + BOUND + COPY_IN)
        session.from_client(message("d", b"1\n") + SYNC)
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PBES"

    def test_an_ordinary_copy_is_followed_by_adapted_queries(self, session: Session) -> None:
        session.from_client(parse("COPY t FROM STDIN") + bind() + E + SYNC)
        session.from_server(PARSED + BOUND + COPY_IN)
        session.from_client(message("d", b"1\n") + message("c") + SYNC)
        session.from_server(message("C", b"COPY 1\0") + IDLE)
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PCPBECBES"

    def test_stray_data_does_no_harm(self, session: Session) -> None:
        session.from_client(message("d", b"1\n") + query("SELECT 1"))
        session.from_server(message("T") + NO_ROWS + IDLE)
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PCPBECBES"


@pytest.mark.parametrize("tag", "BCDEPQ")
def test_messages_without_a_body_are_the_servers_to_refuse(session: Session, tag: str) -> None:
    """Found by the fuzzer: a Close without a body."""
    begin_and_search(session)
    assert session.from_client(message(tag) + SYNC).endswith(message(tag) + SYNC)


def test_a_ready_for_query_without_a_status_is_a_violation(session: Session) -> None:
    with pytest.raises(ProtocolViolation):
        session.from_server(message("Z"))
