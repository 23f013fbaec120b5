"""The packets before a session, whole and in any pieces."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.net.preamble import Answer, Encrypt, Preamble, Request
from proxy.wire.errors import ProtocolViolation
from proxy.wire.startup import CancelRequest, GSSENCRequest, SSLRequest, StartupMessage

STARTUP = StartupMessage(3 << 16, ((b"user", b"me"),)).encode()
SSL, GSS = SSLRequest().encode(), GSSENCRequest().encode()


def test_in_either_order() -> None:
    preamble = Preamble(offers_tls=False)
    for request in (GSS, SSL):
        preamble.feed(request)
        assert preamble.next() == Answer(b"N")
    preamble.feed(STARTUP + b"more")
    step = preamble.next()
    assert isinstance(step, Request)
    assert step.packet == STARTUP
    assert preamble.rest() == b"more"


def test_tls_is_offered_where_there_is_a_certificate() -> None:
    preamble = Preamble(offers_tls=True)
    preamble.feed(SSL)
    assert preamble.next() == Encrypt(b"S", b"", direct=False)
    preamble.encrypted()
    preamble.feed(STARTUP)
    assert isinstance(preamble.next(), Request)


@pytest.mark.parametrize("behind", [b"x", STARTUP, b"\x16\x03\x01"])
@pytest.mark.parametrize("offers_tls", [True, False])
@pytest.mark.parametrize("request_", [SSL, GSS])
def test_nothing_may_stand_behind_a_request(request_: bytes, offers_tls: bool, behind: bytes) -> None:
    preamble = Preamble(offers_tls=offers_tls)
    preamble.feed(request_ + behind)
    with pytest.raises(ProtocolViolation, match="unencrypted data"):
        preamble.next()


@pytest.mark.parametrize("request_", [SSL, GSS])
def test_a_request_is_answered_once(request_: bytes) -> None:
    preamble = Preamble(offers_tls=False)
    preamble.feed(request_)
    assert preamble.next() == Answer(b"N")
    preamble.feed(request_)
    with pytest.raises(ProtocolViolation, match=r"unsupported frontend protocol 1234\."):
        preamble.next()


def test_direct_tls_at_the_very_beginning_only() -> None:
    preamble = Preamble(offers_tls=True)
    preamble.feed(b"\x16\x03\x01\x02")
    assert preamble.next() == Encrypt(b"", b"\x16\x03\x01\x02", direct=True)
    late = Preamble(offers_tls=True)
    late.feed(GSS)
    assert late.next() == Answer(b"N")
    late.feed(b"\x16\x03\x01\x02\x00")
    with pytest.raises(ProtocolViolation):
        late.next()


def test_direct_tls_without_a_certificate_is_no_packet() -> None:
    preamble = Preamble(offers_tls=False)
    preamble.feed(b"\x16\x03\x01\x02\x00\x01")
    with pytest.raises(ProtocolViolation):
        preamble.next()


@given(st.integers(4, 256), st.data())
def test_a_cancel_request_in_any_pieces(size: int, data: st.DataObject) -> None:
    packet = CancelRequest(7, bytes(range(256))[:size]).encode()
    assert struct.unpack_from("!I", packet)[0] == size + 12
    preamble = Preamble(offers_tls=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(packet)), max_size=5)))
    step = None
    for start, end in zip([0, *cuts], [*cuts, len(packet)], strict=True):
        assert step is None or end == len(packet)
        preamble.feed(packet[start:end])
        step = preamble.next() if end > start or step is None else step
    assert isinstance(step, Request)
    assert step.packet == packet
