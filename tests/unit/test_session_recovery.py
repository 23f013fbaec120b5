"""What happens to the client's statement when something hits the proxy's own messages: told as scripts of bytes.

The server's side is written by hand, because a real one cannot be made to fail at these very moments.
"""

from __future__ import annotations

import struct

import pytest

from learning.records import Settings
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.session.frontend import Session
from tests.integration.proxied import Dictated
from tests.integration.raw import FLUSH, SYNC, bind, execute, message, parse, query

SETTINGS: Settings = (("hnsw.ef_search", "77"),)
VECTOR = "SELECT id FROM items ORDER BY embedding <-> $1 LIMIT 3"
P, B, E = parse(VECTOR), bind(b"[1,2]"), execute()
IDLE, OPEN, FAILED = (message("Z", status) for status in (b"I", b"T", b"E"))
PARSED, BOUND, CLOSED = message("1"), message("2"), message("3")
NO_ROWS = message("C", b"SELECT 0\0")
PID = 4711


def row(pid: int) -> bytes:
    text = str(pid).encode()
    return message("D", struct.pack("!HI", 1, len(text)) + text)


PREPARED = CLOSED + PARSED
INJECTED = BOUND + row(PID) + message("C", b"SELECT 1\0") + CLOSED
RESTORED = BOUND + message("D", b"\0\0") + message("C", b"SELECT 1\0") + CLOSED


def error(code: str, severity: str = "ERROR") -> bytes:
    return message("E", f"S{severity}\0V{severity}\0C{code}\0Mwords\0\0".encode())


@pytest.fixture
def session() -> Session:
    return make_session(PID)


def make_session(pid: int | None) -> Session:
    adapter = Adapter(Counters())
    adapter.swap(Dictated(SETTINGS), 1)
    adapter.accepted.add(SETTINGS)
    session = Session(adapter, {"user": "u", "database": "d"})
    key = b"" if pid is None else message("K", struct.pack("!II", pid, 0))
    session.from_server(message("R", b"\0\0\0\0") + key + IDLE)
    return session


def tags_of(data: bytes) -> str:
    found = ""
    position = 0
    while position < len(data):
        found += chr(data[position])
        position += 1 + struct.unpack_from("!I", data, position + 1)[0]
    return found


def begin_and_search(session: Session) -> None:
    """Leave a transaction open with settings in force."""
    session.from_client(query("BEGIN"))
    session.from_server(message("C", b"BEGIN\0") + OPEN)
    assert tags_of(session.from_client(P + B + E + SYNC)) == "PCPBECBES"
    seen = session.from_server(PARSED + PREPARED + INJECTED + BOUND + NO_ROWS + OPEN)
    assert seen == PARSED + BOUND + NO_ROWS + OPEN


class TestRestorationInFrontOfAQuery:
    """The proxy sends its own segment first; the client knows nothing of it."""

    @pytest.fixture(autouse=True)
    def restore(self, session: Session) -> None:
        begin_and_search(session)
        assert tags_of(session.from_client(query("SHOW hnsw.ef_search"))) == "CPBECSQ"

    def test_nothing_happens(self, session: Session) -> None:
        assert session.from_server(PREPARED + RESTORED + OPEN) == b""
        reply = message("T", b"\0\0") + message("C", b"SHOW\0") + OPEN
        assert session.from_server(reply) == reply

    def test_a_cancellation_that_hits_it_is_the_answer_to_the_query(self, session: Session) -> None:
        canceled = error("57014")
        assert session.from_server(PREPARED + BOUND + canceled + FAILED) == b""
        assert session.from_server(error("25P02") + FAILED) == canceled + FAILED

    def test_once(self, session: Session) -> None:
        session.from_server(PREPARED + error("57014") + FAILED)
        session.from_server(error("25P02") + FAILED)
        session.from_client(query("SELECT 1"))
        assert session.from_server(error("25P02") + FAILED) == error("25P02") + FAILED

    def test_a_query_that_ends_the_failed_transaction_wins(self, session: Session) -> None:
        session.from_server(PREPARED + error("57014") + FAILED)
        reply = message("C", b"ROLLBACK\0") + IDLE
        assert session.from_server(reply) == reply

    def test_the_servers_last_words_always_arrive(self, session: Session) -> None:
        fatal = error("57P01", "FATAL")
        assert session.from_server(PREPARED + fatal) == fatal
        assert session.fatal


class TestRefusedSettings:
    REFUSAL = error("22023")

    def test_the_clients_bytes_are_sent_again(self, session: Session) -> None:
        session.from_client(P + B + E + SYNC)
        assert session.from_server(PARSED + PREPARED + self.REFUSAL + IDLE) == PARSED
        assert session.resend == B + E + SYNC
        assert session.from_server(BOUND + NO_ROWS + IDLE) == BOUND + NO_ROWS + IDLE
        assert session.adapter.counters.injection_errors == 1

    def test_in_whatever_portions_they_came(self, session: Session) -> None:
        stream = P + B + E + SYNC
        for i in range(0, len(stream), 3):
            session.from_client(stream[i : i + 3])
        session.from_server(PARSED + PREPARED + self.REFUSAL + IDLE)
        assert session.resend == B + E + SYNC

    def test_before_the_client_has_sent_its_sync(self, session: Session) -> None:
        """The server skips everything up to a Sync: the proxy sends one of its own, and then once more."""
        session.from_client(P + B + E + FLUSH)
        assert session.from_server(PARSED + PREPARED + self.REFUSAL) == PARSED
        assert session.resend == SYNC + B + E + FLUSH
        session.resend = b""
        assert session.from_server(IDLE + BOUND + NO_ROWS) == BOUND + NO_ROWS
        assert session.from_client(SYNC) == SYNC
        assert session.from_server(IDLE) == IDLE
        assert session.is_idle

    def test_not_if_something_of_the_segment_was_bound_before(self, session: Session) -> None:
        """Sending again would not bring its portal back: the client gets the error."""
        plain = parse("SELECT 1", "s") + bind(name="s", portal="p")
        session.from_client(plain + P + B + E + execute("p") + SYNC)
        seen = session.from_server(PARSED + BOUND + PARSED + PREPARED + self.REFUSAL + IDLE)
        assert seen == PARSED + BOUND + PARSED + self.REFUSAL + IDLE
        assert session.resend == b""

    def test_not_if_the_client_has_sent_more(self, session: Session) -> None:
        session.from_client(P + B + E + SYNC + query("SELECT 1"))
        assert session.from_server(PARSED + PREPARED + self.REFUSAL + IDLE).endswith(self.REFUSAL + IDLE)
        assert session.resend == b""


class TestFirstTry:
    """Settings that this server has not accepted yet are put in force by a statement that cannot fail."""

    TRIED = PREPARED + BOUND + message("C", b"DO\0") + CLOSED + CLOSED
    INFO = message("N", b"SINFO\0VINFO\0CRVPXY\0M22023 0 is outside the valid range\0\0")

    @pytest.fixture(autouse=True)
    def forget(self, session: Session) -> None:
        session.adapter.accepted.clear()

    def test_accepted(self, session: Session) -> None:
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PCPBECCBES"
        replies = PARSED + self.TRIED + BOUND + NO_ROWS + IDLE
        assert session.from_server(replies) == PARSED + BOUND + NO_ROWS + IDLE
        assert SETTINGS in session.adapter.accepted
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PCPBECBES"

    def test_refused(self, session: Session) -> None:
        session.from_client(P + B + E + SYNC)
        replies = (
            PARSED + PREPARED + BOUND + self.INFO + self.TRIED[len(PREPARED + BOUND) :] + BOUND + NO_ROWS
        )
        assert session.from_server(replies + IDLE) == PARSED + BOUND + NO_ROWS + IDLE
        assert session.adapter.accepted == set()
        assert session.adapter.counters.injection_errors == 1
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PBES"  # switched off

    def test_refused_in_a_text(self, session: Session) -> None:
        text = VECTOR.replace("$1", "'[1]'")
        sent = session.from_client(query(text))
        assert sent.endswith(b";" + text.encode() + b"\0")
        reply = message("T", b"\0\0") + NO_ROWS + IDLE
        assert session.from_server(self.INFO + message("C", b"DO\0") + reply) == reply
        assert session.from_client(query(text)) == query(text)


class TestWhatTheServerSkipped:
    """After an error nothing of the segment happens any more, and what was noted of it must go."""

    def test_a_name_stands_for_what_it_stood_for(self, session: Session) -> None:
        session.from_client(parse("ROLLBACK TO a") + execute("none") + P + SYNC)
        session.from_server(PARSED + error("34000") + IDLE)
        assert session.from_client(bind() + E + SYNC) == bind() + E + SYNC

    def test_nobody_knows_while_the_segment_is_under_way(self, session: Session) -> None:
        """The Parse may have been skipped: the next segment's Bind is left alone until that is known."""
        first = parse("ROLLBACK TO a") + execute("none") + P + SYNC
        assert session.from_client(first + bind() + E + SYNC) == first + bind() + E + SYNC
        session.from_server(PARSED + error("34000") + IDLE + error("25P01") + IDLE)
        assert tags_of(session.from_client(P + SYNC + B + E + SYNC)) == "PSBES"
        session.from_server(PARSED + IDLE + BOUND + NO_ROWS + IDLE)
        assert tags_of(session.from_client(B + E + SYNC)) == "CPBECBES"

    def test_also_where_the_error_is_known_already(self, session: Session) -> None:
        session.from_client(parse("SELECT 1") + execute("none") + FLUSH)
        session.from_server(PARSED + error("34000"))
        session.from_client(P + SYNC)
        session.from_server(IDLE)
        assert session.from_client(bind() + E + SYNC) == bind() + E + SYNC

    def test_what_came_before_the_error_stays(self, session: Session) -> None:
        session.from_client(P + execute("none") + parse("SELECT 1") + SYNC)
        session.from_server(PARSED + error("34000") + IDLE)
        assert tags_of(session.from_client(B + E + SYNC)) == "CPBECBES"

    @pytest.mark.parametrize("error_in", ["RESET", "another statement"])
    def test_a_reset_that_was_rolled_back(self, session: Session, error_in: str) -> None:
        session.from_client(query("SET hnsw.ef_search = 55"))
        session.from_server(message("C", b"SET\0") + IDLE)
        text = "RESET hnsw.ef_search" if error_in == "RESET" else "RESET hnsw.ef_search; SELECT 1/0"
        session.from_client(query(text))
        session.from_server(error("22012") + IDLE)
        assert session.from_client(P + B + E + SYNC) == P + B + E + SYNC  # the client's own setting wins

    def test_a_reset_that_was_not(self, session: Session) -> None:
        session.from_client(query("SET hnsw.ef_search = 55"))
        session.from_server(message("C", b"SET\0") + IDLE)
        session.from_client(query("RESET hnsw.ef_search"))
        session.from_server(message("C", b"RESET\0") + IDLE)
        session.from_client(query("SELECT 1/0"))
        session.from_server(error("22012") + IDLE)
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PCPBECBES"


class TestPooler:
    """Behind a pooler another transaction may meet another server, on which nothing is prepared."""

    @pytest.mark.parametrize(("introduced", "prepares_again"), [(PID, False), (1, True), (None, True)])
    def test_is_known_by_the_process_that_answers(self, introduced: int | None, prepares_again: bool) -> None:
        session = make_session(introduced)
        assert tags_of(session.from_client(P + B + E + SYNC)) == "PCPBECBES"
        session.from_server(PARSED + PREPARED + INJECTED + BOUND + NO_ROWS + IDLE)
        again = tags_of(session.from_client(P + B + E + SYNC))
        assert again == ("PCPBECBES" if prepares_again else "PBECBES")


class TestOversize:
    def test_a_name_of_megabytes_streams_through(self, session: Session) -> None:
        """Nothing is kept of it."""
        for tag in ("C", "E"):
            long = message(tag, b"P" + b"x" * (2 << 20) + b"\0\0\0\0\0")
            sent = b"".join(session.from_client(long[i : i + 65536]) for i in range(0, len(long), 65536))
            assert sent == long
            assert len(session._client_tail) == 0
