"""The readers of the hot path agree with the codec, wherever in a chunk the body lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire import FramingViolation, ProtocolViolation, framing, frontend
from proxy.wire.backend import CommandComplete
from proxy.wire.body import Message

text = st.binary(max_size=12).map(lambda raw: raw.replace(b"\0", b"\1"))
value = st.none() | st.binary(max_size=24)
int16 = st.integers(-(2**15), 2**15 - 1)


@st.composite
def binds(draw: st.DrawFn) -> frontend.Bind:
    parameters = tuple(draw(st.lists(value, max_size=4)))
    count = draw(st.sampled_from([0, 1, len(parameters)]))
    formats = tuple(draw(int16) for _ in range(count))
    return frontend.Bind(
        draw(text), draw(text), formats, parameters, tuple(draw(st.lists(int16, max_size=3)))
    )


def resolved(bind: frontend.Bind) -> list[tuple[int, bytes | None]]:
    """The rule for format codes, once more and otherwise written."""
    formats = bind.parameter_formats
    codes = (formats or (0,)) * (len(bind.parameters) if len(formats) < 2 else 1)
    return list(zip(codes, bind.parameters, strict=True))


def owned(parameters: list[tuple[int, memoryview | None]]) -> list[tuple[int, bytes | None]]:
    return [(code, None if item is None else bytes(item)) for code, item in parameters]


Read = Callable[[bytes, int, int], object]
Facts = Callable[[Any], object]
oids = st.lists(st.integers(0, 2**32 - 1), max_size=3).map(tuple)
kinds = st.sampled_from([framing.STATEMENT, framing.PORTAL])

READERS: list[tuple[st.SearchStrategy[Message], Read, Facts]] = [
    (st.builds(frontend.Query, text), framing.query_text, lambda m: m.sql),
    (
        st.builds(frontend.Parse, text, text, oids),
        framing.parse_header,
        lambda m: (m.statement, m.sql, m.parameter_types),
    ),
    (binds(), lambda *body: owned(framing.bind_parameters(*body)), resolved),
    (
        st.builds(frontend.Execute, text, st.integers(-1, 1000)),
        framing.execute_header,
        lambda m: (m.portal, m.max_rows),
    ),
    (st.builds(frontend.Describe, kinds, text), framing.target_header, lambda m: (m.kind, m.name)),
    (st.builds(frontend.Close, kinds, text), framing.target_header, lambda m: (m.kind, m.name)),
    (st.builds(CommandComplete, text), framing.command_tag, lambda m: m.command_tag),
]


@st.composite
def damaged(draw: st.DrawFn, body: bytes) -> bytes:
    """The body, or the same with a byte changed, cut off or with others behind, or other bytes altogether."""
    action = draw(st.sampled_from(["keep", "change", "cut", "add", "replace"]))
    if action == "change" and body:
        place = draw(st.integers(0, len(body) - 1))
        return body[:place] + bytes((draw(st.integers(0, 255)),)) + body[place + 1 :]
    if action == "cut":
        return body[: draw(st.integers(0, len(body)))]
    if action == "add":
        return body + draw(st.binary(min_size=1, max_size=4))
    return draw(st.binary(max_size=40)) if action == "replace" else body


@pytest.mark.parametrize(
    ("messages", "read", "facts"),
    READERS,
    ids=["Query", "Parse", "Bind", "Execute", "Describe", "Close", "CommandComplete"],
)
@given(choose=st.data(), before=st.binary(max_size=6), after=st.binary(max_size=6))
def test_a_reader_accepts_what_the_codec_accepts_and_finds_the_same(
    messages: st.SearchStrategy[Message],
    read: Read,
    facts: Facts,
    choose: st.DataObject,
    before: bytes,
    after: bytes,
) -> None:
    message = choose.draw(messages)
    body = choose.draw(damaged(message.encode()[5:]))
    chunk, start, end = before + body + after, len(before), len(before) + len(body)
    try:
        expected = facts(type(message).decode(body))
    except ProtocolViolation:
        with pytest.raises(ProtocolViolation):
            read(chunk, start, end)
    else:
        assert read(chunk, start, end) == expected


@given(binds(), st.binary(max_size=6), st.binary(max_size=6))
def test_bind_header_gives_the_names_without_the_parameters(
    bind: frontend.Bind, before: bytes, after: bytes
) -> None:
    body = bind.encode()[5:]
    names_end = len(bind.portal) + len(bind.statement) + 2
    for size in (len(body), names_end):
        assert framing.bind_header(before + body[:size] + after, len(before), len(before) + size) == (
            bind.portal,
            bind.statement,
        )
    with pytest.raises(ProtocolViolation):
        framing.bind_header(body, 0, names_end - 1)


@given(binds())
def test_bind_parameters_are_views_of_the_callers_buffer(bind: frontend.Bind) -> None:
    body = bind.encode()[5:]
    views = [item for _, item in framing.bind_parameters(body) if item is not None]
    assert all(view.obj is body for view in views)


@given(st.binary(max_size=12), st.integers(0, 12))
def test_cut_judges_the_header_and_nothing_else(chunk: bytes, position: int) -> None:
    header = chunk[position : position + 5]
    length = int.from_bytes(header[1:], "big")
    if len(header) < 5:
        assert framing.cut(chunk, position) is None
    elif 4 <= length <= framing.MAX_LENGTH:
        assert framing.cut(chunk, position) == (header[0], position + 1 + length)
    else:
        with pytest.raises(FramingViolation):
            framing.cut(chunk, position)


@given(st.binary(max_size=12))
def test_cut_startup_judges_the_length_and_nothing_else(chunk: bytes) -> None:
    length = int.from_bytes(chunk[:4], "big")
    if len(chunk) < 4:
        assert framing.cut_startup(chunk) is None
    elif 8 <= length <= 10_004:
        assert framing.cut_startup(chunk) == length
    else:
        with pytest.raises(FramingViolation):
            framing.cut_startup(chunk)
