"""Limits, typed access, and what encoding refuses: the cases that a random generator seldom meets."""

from __future__ import annotations

import pytest

from proxy.wire import FramingViolation, ProtocolViolation, Sender, authentication, framing, frontend, startup
from proxy.wire import backend as b
from proxy.wire.body import Message
from proxy.wire.copying import CopyData, CopyDone
from proxy.wire.diagnostics import ErrorResponse, NoticeResponse
from proxy.wire.startup import StartupPacket


def header(tag: bytes, length: int) -> bytes:
    return tag + length.to_bytes(4, "big")


@pytest.mark.parametrize("length", [0, 3, 0x3FFFFFFF + 5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_an_impossible_length_is_noticed_from_the_header_alone(length: int) -> None:
    with pytest.raises(
        FramingViolation, match=f"backend sent a header with tag b'D' and a length of {length}"
    ):
        framing.cut(header(b"D", length), 0, Sender.BACKEND)
    with pytest.raises(FramingViolation):
        list(framing.frames(header(b"D", length)))


@pytest.mark.parametrize("length", [4, 0x3FFFFFFF + 4])
def test_the_smallest_and_the_largest_length_are_allowed(length: int) -> None:
    assert framing.cut(header(b"D", length)) == (framing.DATA_ROW, 1 + length)


def test_a_protocol_2_error_of_a_server_that_cannot_fork_is_a_framing_violation() -> None:
    with pytest.raises(FramingViolation, match="b'E'"):
        framing.cut(b"Ecould not fork new process for connection: Cannot allocate memory\n\0")


@pytest.mark.parametrize("length", [0, 4, 7, 10_005, 0xFFFFFFFF])
def test_a_startup_packet_of_impossible_length_is_noticed_at_once(length: int) -> None:
    with pytest.raises(FramingViolation, match=f"frontend sent a start-up packet with a length of {length}"):
        framing.cut_startup(length.to_bytes(4, "big"))


def test_a_startup_packet_may_have_the_length_that_the_server_accepts() -> None:
    room = 10_000 - 4 - len(b"user\0") - 2
    largest = startup.StartupMessage(startup.PROTOCOL_3_0, ((b"user", room * b"x"),))
    encoded = largest.encode()
    assert framing.cut_startup(encoded) == len(encoded) == 10_004
    assert startup.decode_startup(encoded[4:]) == largest
    longer = startup.StartupMessage(startup.PROTOCOL_3_0, ((b"user", (room + 1) * b"x"),))
    with pytest.raises(ValueError, match="the server accepts"):
        longer.encode()
    with pytest.raises(ProtocolViolation, match="the limit is 10000"):
        startup.decode_startup(encoded[4:-2] + b"x\0\0")


@pytest.mark.parametrize("size", [0, 3, 257])
def test_cancel_keys_have_4_to_256_bytes(size: int) -> None:
    key = size * b"k"
    for message in (startup.CancelRequest(1, key), b.BackendKeyData(1, key)):
        with pytest.raises(ValueError, match="4 to 256"):
            message.encode()
    with pytest.raises(ProtocolViolation, match="4 to 256"):
        b.BackendKeyData.decode(b"\0\0\0\1" + key)
    with pytest.raises(ProtocolViolation, match="4 to 256"):
        startup.decode_startup((80877102).to_bytes(4, "big") + b"\0\0\0\1" + key)


def test_65535_parameters_are_allowed_and_no_more() -> None:
    bind = frontend.Bind(b"", b"", (), 65_535 * (None,))
    assert frontend.Bind.decode(bind.encode()[5:]) == bind
    assert len(framing.bind_parameters(bind.encode()[5:])) == 65_535
    with pytest.raises(ValueError, match="count out of range"):
        frontend.Bind(b"", b"", (), 65_536 * (None,)).encode()


def test_a_count_without_room_for_its_items_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ProtocolViolation, match="65535 columns in 0 bytes"):
        b.DataRow.decode(b"\xff\xff")
    with pytest.raises(ProtocolViolation, match="4294967295 options in 0 bytes"):
        b.NegotiateProtocolVersion.decode(b"\0\3\0\2\xff\xff\xff\xff")


@pytest.mark.parametrize("size", [-2, -(2**31)])
def test_a_negative_length_other_than_null_is_a_violation(size: int) -> None:
    field = size.to_bytes(4, "big", signed=True)
    with pytest.raises(ProtocolViolation, match=f"backend sent a malformed DataRow: column of {size} bytes"):
        b.DataRow.decode(b"\0\1" + field)
    with pytest.raises(ProtocolViolation, match=f"parameter of {size} bytes"):
        framing.bind_parameters(b"\0\0\0\0\0\1" + field + b"\0\0")


@pytest.mark.parametrize("codes", [2, 4])
def test_format_codes_must_be_none_one_or_one_for_each(codes: int) -> None:
    formats, values = codes * (0,), 3 * (b"x",)
    body = b"\0\0" + codes.to_bytes(2, "big") + codes * b"\0\0" + b"\0\3" + 3 * b"\0\0\0\1x" + b"\0\0"
    for read in (frontend.Bind.decode, framing.bind_parameters):
        with pytest.raises(ProtocolViolation, match=f"malformed Bind: {codes} format codes for 3 parameters"):
            read(body)
    with pytest.raises(ValueError, match="3 parameters"):
        frontend.Bind(b"", b"", formats, values).encode()
    with pytest.raises(ValueError, match="3 arguments"):
        frontend.FunctionCall(1, formats, values).encode()
    with pytest.raises(ProtocolViolation, match="3 arguments"):
        frontend.FunctionCall.decode(b"\0\0\0\1" + body[2:])


@pytest.mark.parametrize(
    "message",
    [
        frontend.Query(b"SELECT 1\0; DROP"),
        frontend.Parse(b"a\0", b""),
        frontend.Close(framing.PORTAL, b"\0"),
        frontend.Close(0, b""),
        frontend.Execute(b"", 2**31),
        frontend.Parse(b"", b"", (-1,)),
        b.ReadyForQuery(0),
        b.RowDescription((b.FieldDescription(b"x", type_size=40_000),)),
        b.ParameterStatus(b"a", b"\0"),
        ErrorResponse(((0, b"x"),)),
        ErrorResponse(((256, b"x"),)),
        authentication.AuthenticationMD5Password(b"abc"),
        authentication.AuthenticationSASL((b"",)),
        startup.StartupMessage(2 << 16, ()),
        startup.StartupMessage(startup.PROTOCOL_3_0, ((b"", b"x"),)),
    ],
    ids=repr,
)
def test_what_no_message_can_carry_is_not_encoded(message: Message | StartupPacket) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the words differ from case to case
        message.encode()


def test_a_message_longer_than_the_protocol_allows_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.wire.body.MAX_LENGTH", 9)
    assert len(CopyData(b"12345").encode()) == 10
    with pytest.raises(ValueError, match="too long"):
        CopyData(b"123456").encode()


def test_error_fields_are_found_by_name() -> None:
    letters = "SVCMDHPpqWstcdnFLR"
    error = ErrorResponse(tuple((ord(letter), str(i).encode()) for i, letter in enumerate(letters)))
    assert (error.severity, error.code, error.message, error.detail, error.hint) == (
        b"1",
        b"2",
        b"3",
        b"4",
        b"5",
    )
    assert (error.position, error.internal_position, error.internal_query, error.where) == (6, 7, b"8", b"9")
    assert (error.schema_name, error.table_name, error.column_name) == (b"10", b"11", b"12")
    assert (error.data_type_name, error.constraint_name) == (b"13", b"14")
    assert (error.file, error.line, error.routine) == (b"15", 16, b"17")


def test_absent_or_odd_error_fields_are_none() -> None:
    empty = ErrorResponse(())
    assert (empty.severity, empty.code, empty.position, empty.line) == (None, None, None, None)
    for odd in (b"", b"-1", b"x", b"\xb2", 5000 * b"9"):
        assert ErrorResponse(((ord("P"), odd),)).position is None


def test_an_error_of_ones_own_is_complete_for_clients() -> None:
    error = ErrorResponse.create(b"FATAL", b"57P01", b"going away", hint=b"reconnect")
    assert error.encode() == b"E\0\0\0\x31SFATAL\0VFATAL\0C57P01\0Mgoing away\0Hreconnect\0\0"
    assert error.is_fatal
    assert (error.code, error.detail) == (b"57P01", None)


def test_fatal_is_told_from_the_untranslated_severity() -> None:
    assert ErrorResponse(((ord("S"), b"FEHLER"), (ord("V"), b"FATAL"))).is_fatal
    assert ErrorResponse(((ord("S"), b"PANIC"),)).is_fatal
    assert not ErrorResponse(((ord("S"), b"FATAL"), (ord("V"), b"ERROR"))).is_fatal


def test_a_changed_position_leaves_the_other_fields_and_their_order_alone() -> None:
    notice = NoticeResponse(((ord("M"), b"m"), (ord("P"), b"17"), (ord("z"), b"future")))
    assert notice.with_position(3).fields == ((ord("M"), b"m"), (ord("P"), b"3"), (ord("z"), b"future"))
    without = NoticeResponse(((ord("M"), b"m"),))
    assert without.with_position(3) == without


@pytest.mark.parametrize(
    ("tag", "rows"), [(b"SELECT 10", 10), (b"INSERT 0 3", 3), (b"BEGIN", None), (b"", None), (b"COPY 0", 0)]
)
def test_the_row_count_is_the_last_word_of_the_command_tag(tag: bytes, rows: int | None) -> None:
    assert b.CommandComplete(tag).rows == rows


def test_the_last_of_equal_startup_parameters_counts() -> None:
    packet = startup.StartupMessage(startup.PROTOCOL_3_0, ((b"user", b"a"), (b"user", b"b")))
    assert packet.get(b"user") == b"b"
    assert packet.get(b"database") is None


@pytest.mark.parametrize(
    "message",
    [
        authentication.PasswordMessage(b"hunter2"),
        authentication.SASLInitialResponse(b"X", b"hunter2"),
        authentication.SASLResponse(b"hunter2"),
        authentication.AuthenticationResponse(b"hunter2"),
        authentication.AuthenticationSASLContinue(b"hunter2"),
        b.BackendKeyData(1, b"hunter2"),
        startup.CancelRequest(1, b"hunter2"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_secrets_are_not_shown(message: Message | StartupPacket) -> None:
    assert "hunter2" not in repr(message)


def test_a_violation_tells_message_sender_and_problem_but_not_the_contents() -> None:
    with pytest.raises(ProtocolViolation) as caught:
        authentication.PasswordMessage.decode(b"hunter2")
    violation = caught.value
    assert (violation.message, violation.sender) == ("PasswordMessage", Sender.FRONTEND)
    assert str(violation) == "frontend sent a malformed PasswordMessage: password has no terminating NUL"
    assert violation.sqlstate == b"08P01"
    assert not isinstance(violation, FramingViolation)


def test_the_dispatcher_knows_who_sent_a_message_that_goes_both_ways() -> None:
    with pytest.raises(ProtocolViolation, match="frontend sent a malformed CopyDone: 1 bytes too many"):
        frontend.decode_frontend(framing.COPY_DONE, b"x")
    with pytest.raises(ProtocolViolation, match="backend sent a malformed CopyDone"):
        b.decode_backend(framing.COPY_DONE, b"x")
    with pytest.raises(ProtocolViolation, match="peer sent a malformed CopyDone"):
        CopyDone.decode(b"x")
