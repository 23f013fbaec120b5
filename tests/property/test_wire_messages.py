"""What the codec promises for every message: exact round trips, exact boundaries, and one kind of error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire import (
    ProtocolViolation,
    authentication,
    backend,
    copying,
    diagnostics,
    framing,
    frontend,
    startup,
)
from proxy.wire.backend import decode_backend
from proxy.wire.body import BackendMessage, Message
from proxy.wire.frontend import decode_frontend
from proxy.wire.startup import StartupPacket, decode_startup

text = st.binary(max_size=20).map(lambda raw: raw.replace(b"\0", b"\1"))
name = text.filter(bool)
data = st.binary(max_size=40)
value = st.none() | data
values = st.lists(value, max_size=5).map(tuple)
uint32 = st.integers(0, 2**32 - 1)
int32 = st.integers(-(2**31), 2**31 - 1)
int16 = st.integers(-(2**15), 2**15 - 1)
int16s = st.lists(int16, max_size=5).map(tuple)
uint32s = st.lists(uint32, max_size=5).map(tuple)
key = st.binary(min_size=4, max_size=256)
kind = st.sampled_from([framing.STATEMENT, framing.PORTAL])
status = st.sampled_from([framing.IDLE, framing.IN_TRANSACTION, framing.FAILED_TRANSACTION])
version = st.integers(0, 0xFFFF).map(lambda minor: 3 << 16 | minor)
fields = st.lists(st.tuples(st.integers(1, 255), text), max_size=6).map(tuple)
column = st.builds(backend.FieldDescription, text, uint32, int16, uint32, int16, int32, int16)


@st.composite
def formatted(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[bytes | None, ...]]:
    """Values with no format code, one for all, or one for each."""
    items = draw(values)
    count = draw(st.sampled_from([0, 1, len(items)]))
    return tuple(draw(int16) for _ in range(count)), items


Contents = dict[type[Any], tuple[st.SearchStrategy[Any], ...]]

MESSAGES: Contents = {
    authentication.AuthenticationOk: (),
    authentication.AuthenticationKerberosV5: (),
    authentication.AuthenticationCleartextPassword: (),
    authentication.AuthenticationMD5Password: (st.binary(min_size=4, max_size=4),),
    authentication.AuthenticationGSS: (),
    authentication.AuthenticationGSSContinue: (data,),
    authentication.AuthenticationSSPI: (),
    authentication.AuthenticationSASL: (st.lists(name, max_size=4).map(tuple),),
    authentication.AuthenticationSASLContinue: (data,),
    authentication.AuthenticationSASLFinal: (data,),
    authentication.AuthenticationResponse: (data,),
    authentication.GSSResponse: (data,),
    authentication.SASLResponse: (data,),
    authentication.SASLInitialResponse: (text, value),
    authentication.PasswordMessage: (text,),
    backend.BackendKeyData: (uint32, key),
    backend.BindComplete: (),
    backend.CloseComplete: (),
    backend.CommandComplete: (text,),
    backend.DataRow: (values,),
    backend.EmptyQueryResponse: (),
    backend.FunctionCallResponse: (value,),
    backend.NegotiateProtocolVersion: (uint32, st.lists(text, max_size=4).map(tuple)),
    backend.NoData: (),
    backend.NotificationResponse: (uint32, text, text),
    backend.ParameterDescription: (uint32s,),
    backend.ParameterStatus: (text, text),
    backend.ParseComplete: (),
    backend.PortalSuspended: (),
    backend.ReadyForQuery: (status,),
    backend.RowDescription: (st.lists(column, max_size=4).map(tuple),),
    copying.CopyBothResponse: (st.integers(0, 255), int16s),
    copying.CopyData: (data,),
    copying.CopyDone: (),
    copying.CopyFail: (text,),
    copying.CopyInResponse: (st.integers(0, 255), int16s),
    copying.CopyOutResponse: (st.integers(0, 255), int16s),
    diagnostics.ErrorResponse: (fields,),
    diagnostics.NoticeResponse: (fields,),
    frontend.Close: (kind, text),
    frontend.Describe: (kind, text),
    frontend.Execute: (text, int32),
    frontend.Flush: (),
    frontend.Parse: (text, text, uint32s),
    frontend.Query: (text,),
    frontend.Sync: (),
    frontend.Terminate: (),
}
"""Contents by field for messages with a tag.  Fields that depend on each other: see `binds` and `calls`."""

PACKETS: Contents = {
    startup.CancelRequest: (uint32, key),
    startup.GSSENCRequest: (),
    startup.SSLRequest: (),
    startup.StartupMessage: (version, st.lists(st.tuples(name, text), max_size=5).map(tuple)),
}

CODES = tuple(packet.CODE for packet in (startup.CancelRequest, startup.GSSENCRequest, startup.SSLRequest))

TO_THE_END = (
    authentication.AuthenticationGSSContinue,
    authentication.AuthenticationResponse,
    authentication.AuthenticationSASLContinue,
    authentication.AuthenticationSASLFinal,
    authentication.GSSResponse,
    authentication.SASLResponse,
    backend.BackendKeyData,
    copying.CopyData,
    startup.CancelRequest,
)
"""Their last field ends where the body ends: more or fewer bytes can be another message of the kind."""


@st.composite
def binds(draw: st.DrawFn) -> frontend.Bind:
    formats, parameters = draw(formatted())
    return frontend.Bind(draw(text), draw(text), formats, parameters, draw(int16s))


@st.composite
def calls(draw: st.DrawFn) -> frontend.FunctionCall:
    formats, arguments = draw(formatted())
    return frontend.FunctionCall(draw(uint32), formats, arguments, draw(int16))


messages: st.SearchStrategy[Message] = st.one_of(
    binds(), calls(), *(st.builds(kind, *contents) for kind, contents in MESSAGES.items())
)
packets: st.SearchStrategy[StartupPacket] = st.one_of(
    *(st.builds(kind, *contents) for kind, contents in PACKETS.items())
)
KINDS: list[type[Any]] = [*MESSAGES, *PACKETS, frontend.Bind, frontend.FunctionCall]


def header_size(message: Message | StartupPacket) -> int:
    return 5 if isinstance(message, Message) else 4


anything = st.one_of(messages, packets)


@given(anything)
def test_a_decoded_message_equals_the_encoded_one(message: Message | StartupPacket) -> None:
    encoded = message.encode()
    decoded = type(message).decode(encoded[header_size(message) :])
    assert decoded == message
    assert decoded.encode() == encoded


@given(anything)
def test_the_length_field_counts_itself_and_the_body(message: Message | StartupPacket) -> None:
    encoded = message.encode()
    start = header_size(message) - 4
    assert int.from_bytes(encoded[start : start + 4], "big") == len(encoded) - start


@given(anything)
def test_a_decoded_message_does_not_refer_to_the_buffer(message: Message | StartupPacket) -> None:
    buffer = bytearray(message.encode()[header_size(message) :])
    with memoryview(buffer) as view:
        decoded = type(message).decode(view)
    buffer[:] = bytes(len(buffer))
    buffer.clear()
    assert decoded == message


@given(anything)
def test_a_body_cut_short_is_a_violation(message: Message | StartupPacket) -> None:
    body = message.encode()[header_size(message) :]
    for size in range(len(body)):
        if isinstance(message, TO_THE_END):
            try:
                assert type(message).decode(body[:size]) != message
            except ProtocolViolation:
                continue
        else:
            with pytest.raises(ProtocolViolation):
                type(message).decode(body[:size])


@given(
    anything.filter(lambda message: not isinstance(message, TO_THE_END)), st.binary(min_size=1, max_size=8)
)
def test_trailing_bytes_are_a_violation(message: Message | StartupPacket, trailing: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        type(message).decode(message.encode()[header_size(message) :] + trailing)


@given(st.lists(messages, max_size=6), st.binary(max_size=4))
def test_a_stream_is_cut_alike_whole_and_byte_by_byte(sent: list[Message], tail: bytes) -> None:
    stream = b"".join(message.encode() for message in sent) + tail
    expected = [(message.TAG, message.encode()[5:]) for message in sent]
    whole = [(tag, stream[start + 5 : end]) for tag, start, end in framing.frames(stream)]
    buffer = bytearray()
    pieces = []
    for octet in stream:
        buffer.append(octet)
        for tag, start, end in list(framing.frames(buffer)):
            pieces.append((tag, bytes(buffer[start + 5 : end])))
            del buffer[:end]
    assert whole == pieces == expected
    assert buffer == tail


@given(messages)
def test_dispatch_by_tag_finds_the_message(message: Message) -> None:
    encoded = message.encode()
    decode = decode_backend if isinstance(message, BackendMessage) else decode_frontend
    decoded = decode(encoded[0], encoded[5:])
    if encoded[0] == framing.PASSWORD:
        assert isinstance(decoded, authentication.AuthenticationResponse)
        assert type(message).decode(decoded.data) == message
    else:
        assert decoded == message


@given(st.one_of(st.builds(copying.CopyDone), st.builds(copying.CopyData, data)))
def test_copy_data_and_copy_done_go_both_ways(message: Message) -> None:
    body = message.encode()[5:]
    assert decode_backend(message.TAG, body) == decode_frontend(message.TAG, body) == message


@given(packets)
def test_dispatch_by_code_finds_the_packet(packet: StartupPacket) -> None:
    encoded = packet.encode()
    assert framing.cut_startup(encoded) == len(encoded)
    assert decode_startup(encoded[4:]) == packet
    for size in range(4, len(encoded)):
        assert framing.cut_startup(encoded[:size]) == len(encoded)


@given(st.sampled_from(KINDS), st.binary(max_size=60))
def test_random_bytes_are_a_message_or_a_violation(kind: type[Message], body: bytes) -> None:
    try:
        message = kind.decode(body)
    except ProtocolViolation:
        return
    assert message.encode().endswith(body)


@given(anything, st.data())
def test_damaged_bytes_are_a_violation_or_exactly_what_they_decode_to(
    message: Message | StartupPacket, choose: st.DataObject
) -> None:
    encoded = bytearray(message.encode())
    header = header_size(message)
    for _ in range(choose.draw(st.integers(1, 3))):
        if len(encoded) > header:
            encoded[choose.draw(st.integers(header, len(encoded) - 1))] = choose.draw(st.integers(0, 255))
    try:
        decoded = type(message).decode(bytes(encoded[header:]))
    except ProtocolViolation:
        return
    assert decoded.encode() == encoded


def violation_of(decode: Callable[[], Message | StartupPacket], encoded: bytes) -> ProtocolViolation | None:
    """What `decode` raises; where it raises nothing, the result must stand for exactly `encoded`."""
    try:
        message = decode()
    except ProtocolViolation as violation:
        return violation
    assert message.encode() == encoded
    return None


@given(st.integers(0, 255), st.binary(max_size=60))
def test_any_tag_with_random_bytes_only_ever_raises_a_violation(tag: int, body: bytes) -> None:
    encoded = bytes((tag,)) + (len(body) + 4).to_bytes(4, "big") + body
    from_client = violation_of(lambda: decode_frontend(tag, body), encoded)
    from_server = violation_of(lambda: decode_backend(tag, body), encoded)
    assert from_client is None or from_client.sender == "frontend"
    assert from_server is None or from_server.sender == "backend"


@given(st.sampled_from([0, startup.PROTOCOL_3_0, *CODES]), st.binary(max_size=60))
def test_a_random_startup_packet_only_ever_raises_a_violation(code: int, rest: bytes) -> None:
    body = code.to_bytes(4, "big") + rest if code else rest
    violation = violation_of(lambda: decode_startup(body), (len(body) + 4).to_bytes(4, "big") + body)
    assert violation is None or violation.sender == "frontend"
