"""What is fuzzed: functions that take any bytes and raise only where a promise is broken.

The codec's promise: a decoder returns a message that encodes to exactly the bytes that it was read from, or
raises ProtocolViolation.  The recogniser's: it never raises, and places are within the text.  The session's:
nothing but ProtocolViolation, the same result for any split, and without a policy not a byte is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from learning.records import Value
from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.session.frontend import Session
from proxy.sql import Recogniser, Scope
from proxy.sql.glance import (
    is_empty,
    mentions_control,
    mentions_operator,
    mentions_set_config,
    mentions_setting,
    skip_blanks,
)
from proxy.sql.shape import shape_of
from proxy.sql.vectors import decode_limit, decode_vector
from proxy.wire import authentication, backend, copying, diagnostics, framing, frontend, startup
from proxy.wire.body import Message
from proxy.wire.errors import ProtocolViolation
from tests.forced import ForcedAdapter
from tests.integration.proxied import Dictated
from tests.integration.raw import message

Target = Callable[[bytes], None]
SCOPE: Final = Scope("d", "u", None)
GREETING: Final = message("R", b"\0\0\0\0") + message("K", b"\0\0\0\7\0\0\0\0") + message("Z", b"I")
SETTINGS: Final = (("hnsw.ef_search", "77"),)

_READERS: Final = (
    framing.query_text,
    framing.command_tag,
    framing.parse_header,
    framing.bind_header,
    framing.bind_parameters,
    framing.execute_header,
    framing.target_header,
)
_RESPONSES: Final[tuple[type[Message], ...]] = (
    authentication.AuthenticationResponse,
    authentication.GSSResponse,
    authentication.SASLResponse,
    authentication.SASLInitialResponse,
    authentication.PasswordMessage,
)
_COPYING: Final[tuple[type[Message], ...]] = (
    copying.CopyData,
    copying.CopyDone,
    copying.CopyFail,
    copying.CopyInResponse,
    copying.CopyOutResponse,
    copying.CopyBothResponse,
)


def fuzz_framing(data: bytes) -> None:
    """Cutting, and the readers of the hot path."""
    try:
        assert framing.cut_startup(data) is None or framing.cut_startup(data) == _length(data)
    except ProtocolViolation:
        pass
    try:
        position = 0
        for _, start, end in framing.frames(data):
            assert position == start < end <= len(data)
            position = end
    except ProtocolViolation:
        pass
    for read in _READERS:
        for start in (0, min(5, len(data))):
            try:
                read(data, start, len(data))
            except ProtocolViolation:
                continue


def fuzz_startup(data: bytes) -> None:
    try:
        packet = startup.decode_startup(data)
    except ProtocolViolation:
        return
    assert packet.encode()[4:] == data


def fuzz_authentication(data: bytes) -> None:
    try:
        assert authentication.decode_authentication(data).encode()[5:] == data
    except ProtocolViolation:
        pass
    for response in _RESPONSES:
        _exact(response, data)


def fuzz_frontend(data: bytes) -> None:
    _exact_by_tag(frontend.decode_frontend, data)


def fuzz_backend(data: bytes) -> None:
    _exact_by_tag(backend.decode_backend, data)


def fuzz_copying(data: bytes) -> None:
    for kind in _COPYING:
        _exact(kind, data)


def fuzz_diagnostics(data: bytes) -> None:
    for kind in (diagnostics.ErrorResponse, diagnostics.NoticeResponse):
        found = _exact(kind, data)
        if not isinstance(found, kind):
            continue
        assert isinstance(found.is_fatal, bool)
        if found.position is not None:
            moved = kind.decode(found.with_position(7).encode()[5:])
            assert moved.position == 7
            assert moved.message == found.message


def fuzz_glance(data: bytes) -> None:
    """Cheap looks at a text agree with each other, and a shape accounts for every byte."""
    assert 0 <= skip_blanks(data, 0) <= len(data)
    assert not (is_empty(data) and (mentions_operator(data) or mentions_control(data)))
    assert not mentions_set_config(data) or (mentions_control(data) and mentions_setting(data))
    shape = shape_of(data)
    if shape is not None:
        assert 0 <= shape.code_size <= len(data)
        for piece in shape.pieces:
            assert data[piece.start : piece.start + len(piece.text)] == piece.text


def fuzz_recogniser(data: bytes) -> None:
    """No text makes it raise (it would log and go on: here that counts), or differ when seen again."""
    recogniser = Recogniser()
    statement = recogniser.recognise(data, SCOPE)
    assert recogniser.recognise(data, SCOPE) == statement
    if statement.vector is not None:
        query = statement.vector
        assert 0 <= query.start < query.end <= len(data)
        assert 0 <= query.index < statement.count
        assert len(query.arguments) == len(query.template.slots)


def fuzz_vectors(data: bytes) -> None:
    for code in (0, 1):
        vector = decode_vector(code, data)
        assert vector is None or (vector.ndim == 1 and np.isfinite(vector).all())
        limit = decode_limit(Value(code, data))
        assert limit is None or isinstance(limit, int)


def fuzz_session(data: bytes) -> None:
    """Bytes from both sides, interleaved; as it is, and with a policy for every SELECT."""
    pieces = list(_pieces(data))
    _transparent(pieces)
    _never_worse_than_a_violation(pieces)
    client = b"".join(piece for from_server, piece in pieces if not from_server)
    assert _sent(client, 1 << 30) == _sent(client, 1) == _sent(client, 7)


def fuzz_planted(data: bytes) -> None:
    """Not a target: what a finding looks like, for the test of the runner."""
    assert data[:1] != b"F"


TARGETS: Final[dict[str, Target]] = {
    "framing": fuzz_framing,
    "startup": fuzz_startup,
    "authentication": fuzz_authentication,
    "frontend": fuzz_frontend,
    "backend": fuzz_backend,
    "copying": fuzz_copying,
    "diagnostics": fuzz_diagnostics,
    "glance": fuzz_glance,
    "recogniser": fuzz_recogniser,
    "vectors": fuzz_vectors,
    "session": fuzz_session,
}


# -- promises ----------------------------------------------------------------------------------------------------------


def _length(data: bytes) -> int:
    return int.from_bytes(data[:4], "big")


def _exact(kind: type[Message], data: bytes) -> Message | None:
    """Decode; a message must encode to the very bytes that it came from."""
    try:
        found = kind.decode(data)
    except ProtocolViolation:
        return None
    assert found.encode()[5:] == data
    return found


def _exact_by_tag(decode: Callable[[int, bytes], Message], data: bytes) -> None:
    if not data:
        return
    try:
        found = decode(data[0], data[1:])
    except ProtocolViolation:
        return
    assert found.encode()[5:] == data[1:]


def _pieces(data: bytes) -> Iterator[tuple[bool, bytes]]:
    """Read pieces of the two streams: a byte that says whose (the high bit) and how long, and the bytes."""
    position = 0
    while position < len(data):
        head = data[position]
        size = head & 0x7F
        yield bool(head & 0x80), data[position + 1 : position + 1 + size]
        position += 1 + size


def _session(adapter: Adapter) -> Session:
    adapter.swap(Dictated(SETTINGS if isinstance(adapter, ForcedAdapter) else ()), 1)
    session = Session(adapter, {"user": "u", "database": "d"})
    assert session.from_server(GREETING) == GREETING
    return session


def _transparent(pieces: list[tuple[bool, bytes]]) -> None:
    """Without settings to put in force what comes out is what went in, up to an incomplete message."""
    session = _session(Adapter(Counters()))
    seen = {False: (b"", b""), True: (b"", b"")}
    for from_server, piece in pieces:
        went_in, came_out = seen[from_server]
        try:
            out = session.from_server(piece) if from_server else session.from_client(piece)
        except ProtocolViolation:
            return
        seen[from_server] = (went_in + piece, came_out + out)
        assert seen[from_server][0].startswith(seen[from_server][1])
        assert not session.resend
    went_in, came_out = seen[False]
    assert came_out + session.client_ended() == went_in


def _never_worse_than_a_violation(pieces: list[tuple[bool, bytes]]) -> None:
    session = _session(ForcedAdapter(Counters()))
    try:
        for from_server, piece in pieces:
            if from_server:
                session.from_server(piece)
                session.resend = b""
            else:
                session.from_client(piece)
        session.release()
        session.client_ended()
    except ProtocolViolation:
        pass


def _sent(client: bytes, size: int) -> bytes | None:
    """Return what the server gets when the client's stream comes in portions of `size`; None: a violation."""
    session = _session(ForcedAdapter(Counters()))
    out = b""
    try:
        for i in range(0, len(client), size):
            out += session.from_client(client[i : i + size])
    except ProtocolViolation:
        return None
    return out + session.client_ended()
