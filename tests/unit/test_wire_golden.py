"""Bytes written by hand from the protocol documentation, and what the codec makes of them.

Each case is read whole, byte by byte, and with bytes of another message behind it.
"""

from __future__ import annotations

import pytest

from proxy.wire import ProtocolViolation, authentication, copying, diagnostics, framing, frontend, startup
from proxy.wire import backend as b
from proxy.wire.backend import decode_backend
from proxy.wire.body import BackendMessage, FrontendMessage, Message
from proxy.wire.frontend import decode_frontend
from proxy.wire.startup import StartupPacket, decode_startup

CASES: list[tuple[Message, str]] = [
    # -- frontend
    (frontend.Query(b"SELECT 1"), "51 0000000d 53454c4543542031 00"),
    (frontend.Query(b""), "51 00000005 00"),
    (
        frontend.Parse(b"s1", b"SELECT $1", (23, 0)),
        "50 0000001b 7331 00 53454c454354202431 00 0002 00000017 00000000",
    ),
    (
        frontend.Bind(b"", b"s1", (), (b"5", None, b""), ()),
        "42 0000001b 00 7331 00 0000 0003 00000001 35 ffffffff 00000000 0000",
    ),
    (
        frontend.Bind(b"p", b"", (1,), (b"\x00\x00\x00\x05", b"\x01"), (1, 0)),
        "42 00000020 70 00 00 0001 0001 0002 00000004 00000005 00000001 01 0002 0001 0000",
    ),
    (
        frontend.Bind(b"", b"", (0, 1), (b"a", b"b"), (1,)),
        "42 0000001c 00 00 0002 0000 0001 0002 00000001 61 00000001 62 0001 0001",
    ),
    (frontend.Describe(framing.STATEMENT, b"s1"), "44 00000008 53 7331 00"),
    (frontend.Describe(framing.PORTAL, b""), "44 00000006 50 00"),
    (frontend.Close(framing.PORTAL, b"p"), "43 00000007 50 70 00"),
    (frontend.Execute(b"", 0), "45 00000009 00 00000000"),
    (frontend.Execute(b"p", 100), "45 0000000a 70 00 00000064"),
    (frontend.Flush(), "48 00000004"),
    (frontend.Sync(), "53 00000004"),
    (frontend.Terminate(), "58 00000004"),
    (
        frontend.FunctionCall(957, (1,), (b"\x00\x00\x00\x01", None), 1),
        "46 0000001c 000003bd 0001 0001 0002 00000004 00000001 ffffffff 0001",
    ),
    (authentication.PasswordMessage(b"secret"), "70 0000000b 736563726574 00"),
    (
        authentication.SASLInitialResponse(b"SCRAM-SHA-256", b"n,,n=,r=x"),
        "70 0000001f 534352414d2d5348412d323536 00 00000009 6e2c2c6e3d2c723d78",
    ),
    (authentication.SASLInitialResponse(b"X", None), "70 0000000a 58 00 ffffffff"),
    (authentication.SASLResponse(b"c=biws"), "70 0000000a 633d62697773"),
    (authentication.GSSResponse(b"\x60\x00"), "70 00000006 6000"),
    # -- COPY
    (copying.CopyData(b"1\t2\n"), "64 00000008 3109320a"),
    (copying.CopyDone(), "63 00000004"),
    (copying.CopyFail(b"no"), "66 00000007 6e6f 00"),
    (copying.CopyInResponse(0, (0, 0)), "47 0000000b 00 0002 0000 0000"),
    (copying.CopyOutResponse(1, (1,)), "48 00000009 01 0001 0001"),
    (copying.CopyBothResponse(0, ()), "57 00000007 00 0000"),
    # -- authentication
    (authentication.AuthenticationOk(), "52 00000008 00000000"),
    (authentication.AuthenticationKerberosV5(), "52 00000008 00000002"),
    (authentication.AuthenticationCleartextPassword(), "52 00000008 00000003"),
    (authentication.AuthenticationMD5Password(b"\x01\x02\x03\x04"), "52 0000000c 00000005 01020304"),
    (authentication.AuthenticationGSS(), "52 00000008 00000007"),
    (authentication.AuthenticationGSSContinue(b"\x60"), "52 00000009 00000008 60"),
    (authentication.AuthenticationSSPI(), "52 00000008 00000009"),
    (
        authentication.AuthenticationSASL((b"SCRAM-SHA-256-PLUS", b"SCRAM-SHA-256")),
        "52 0000002a 0000000a 534352414d2d5348412d3235362d504c5553 00 534352414d2d5348412d323536 00 00",
    ),
    (authentication.AuthenticationSASLContinue(b"r=x"), "52 0000000b 0000000b 723d78"),
    (authentication.AuthenticationSASLFinal(b"v=x"), "52 0000000b 0000000c 763d78"),
    # -- backend
    (b.BackendKeyData(0x1234, b"\xde\xad\xbe\xef"), "4b 0000000c 00001234 deadbeef"),
    (b.BackendKeyData(0xFFFFFFFF, bytes(32)), "4b 00000028 ffffffff" + 32 * "00"),
    (
        b.NegotiateProtocolVersion(startup.PROTOCOL_3_2, (b"_pq_.x",)),
        "76 00000013 00030002 00000001 5f70715f2e78 00",
    ),
    (b.ParameterStatus(b"TimeZone", b"UTC"), "53 00000011 54696d655a6f6e65 00 555443 00"),
    (b.NotificationResponse(7, b"ch", b""), "41 0000000c 00000007 6368 00 00"),
    (b.ReadyForQuery(framing.IDLE), "5a 00000005 49"),
    (b.ReadyForQuery(framing.IN_TRANSACTION), "5a 00000005 54"),
    (b.ReadyForQuery(framing.FAILED_TRANSACTION), "5a 00000005 45"),
    (b.ParseComplete(), "31 00000004"),
    (b.BindComplete(), "32 00000004"),
    (b.CloseComplete(), "33 00000004"),
    (b.NoData(), "6e 00000004"),
    (b.PortalSuspended(), "73 00000004"),
    (b.EmptyQueryResponse(), "49 00000004"),
    (b.ParameterDescription((23, 4294967295)), "74 0000000e 0002 00000017 ffffffff"),
    (
        b.RowDescription((b.FieldDescription(b"id", 16384, 1, 20, 8, -1, 0),)),
        "54 0000001b 0001 6964 00 00004000 0001 00000014 0008 ffffffff 0000",
    ),
    (
        b.RowDescription((b.FieldDescription(b"e", 0, 0, 16500, -1, 384, 1),)),
        "54 0000001a 0001 65 00 00000000 0000 00004074 ffff 00000180 0001",
    ),
    (b.DataRow((b"10", None, b"")), "44 00000014 0003 00000002 3130 ffffffff 00000000"),
    (b.CommandComplete(b"SELECT 10"), "43 0000000e 53454c454354203130 00"),
    (b.FunctionCallResponse(b"\x2a"), "56 00000009 00000001 2a"),
    (b.FunctionCallResponse(None), "56 00000008 ffffffff"),
    (
        diagnostics.ErrorResponse(
            ((83, b"ERROR"), (86, b"ERROR"), (67, b"42601"), (77, b"syntax error"), (80, b"8"))
        ),
        "45 0000002b 53 4552524f52 00 56 4552524f52 00 43 3432363031 00 "
        "4d 73796e746178206572726f72 00 50 38 00 00",
    ),
    (diagnostics.NoticeResponse(((77, b"hi"),)), "4e 00000009 4d 6869 00 00"),
]

PACKETS: list[tuple[StartupPacket, str]] = [
    (startup.SSLRequest(), "00000008 04d2162f"),
    (startup.GSSENCRequest(), "00000008 04d21630"),
    (startup.CancelRequest(0x1234, b"\xde\xad\xbe\xef"), "00000010 04d2162e 00001234 deadbeef"),
    (startup.CancelRequest(1, 32 * b"\xff"), "0000002c 04d2162e 00000001" + 32 * "ff"),
    (
        startup.StartupMessage(startup.PROTOCOL_3_0, ((b"user", b"app"), (b"database", b"db"))),
        "0000001e 00030000 75736572 00 617070 00 6461746162617365 00 6462 00 00",
    ),
    (startup.StartupMessage(startup.PROTOCOL_3_2, ()), "00000009 00030002 00"),
]


def ids(case: object) -> str | None:
    return type(case).__name__ if isinstance(case, Message | StartupPacket) else ""


@pytest.mark.parametrize(("message", "written"), CASES, ids=ids)
def test_a_message_is_these_bytes(message: Message, written: str) -> None:
    encoded = bytes.fromhex(written)
    assert message.encode() == encoded
    assert type(message).decode(encoded[5:]) == message
    if encoded[0] != framing.PASSWORD:
        if not isinstance(message, BackendMessage):
            assert decode_frontend(encoded[0], encoded[5:]) == message
        if not isinstance(message, FrontendMessage):
            assert decode_backend(encoded[0], encoded[5:]) == message


@pytest.mark.parametrize(("message", "written"), CASES, ids=ids)
def test_a_message_is_cut_when_its_last_byte_is_there(message: Message, written: str) -> None:
    encoded = bytes.fromhex(written)
    for size in range(len(encoded)):
        header = framing.cut(encoded[:size])
        assert header is None if size < 5 else header == (message.TAG, len(encoded))
        assert list(framing.frames(encoded[:size])) == []
    behind = encoded + b"Z\0\0\0\5I"
    assert next(framing.frames(behind)) == (message.TAG, 0, len(encoded))
    assert framing.cut(b"Z\0\0\0\5I" + encoded, 6) == (message.TAG, 6 + len(encoded))


@pytest.mark.parametrize(("packet", "written"), PACKETS, ids=ids)
def test_a_startup_packet_is_these_bytes(packet: StartupPacket, written: str) -> None:
    encoded = bytes.fromhex(written)
    assert packet.encode() == encoded
    assert decode_startup(encoded[4:]) == packet
    for size in range(len(encoded) + 3):
        assert framing.cut_startup((encoded + b"xyz")[:size]) == (None if size < 4 else len(encoded))


def test_unknown_tags_and_codes_are_violations() -> None:
    with pytest.raises(ProtocolViolation, match="frontend sent a message with unknown tag 0x5a"):
        decode_frontend(ord("Z"), b"I")
    with pytest.raises(ProtocolViolation, match="backend sent a message with unknown tag 0x00"):
        decode_backend(0, b"")
    with pytest.raises(ProtocolViolation, match="backend sent a malformed Authentication: unknown code 6"):
        decode_backend(framing.AUTHENTICATION, b"\0\0\0\6")
    with pytest.raises(ProtocolViolation, match=r"StartupMessage: unsupported protocol version 2\.0"):
        decode_startup(b"\0\2\0\0")
