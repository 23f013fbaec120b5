"""Decoding of vectors and counts, checked against pgvector's own Python types where those exist."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import pytest
from pgvector import HalfVector, SparseVector, Vector

from learning.records import Value
from proxy.sql.vectors import decode_limit, decode_vector

NUMBERS = np.array([1.5, -2.25, 3e-5, 0.0], dtype=np.float32)


def decoded(format_code: int, data: bytes | memoryview) -> npt.NDArray[np.float32]:
    vector = decode_vector(format_code, data)
    assert vector is not None
    assert vector.dtype == np.dtype(np.float32)
    return vector


@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_text_and_binary_vectors_are_decoded(wrap: type) -> None:
    vector = Vector(NUMBERS)
    np.testing.assert_array_equal(decoded(0, wrap(vector.to_text().encode())), NUMBERS)
    np.testing.assert_array_equal(decoded(1, wrap(vector.to_binary())), NUMBERS)


def test_binary_half_vectors_are_told_apart_by_their_length() -> None:
    half = NUMBERS.astype(np.float16)
    np.testing.assert_array_equal(decoded(1, HalfVector(half).to_binary()), half.astype(np.float32))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (b"[1,2,3]", [1, 2, 3]),
        (b"  [1, 2 ,\t3] ", [1, 2, 3]),
        (b"[.5,+1,1.,-1e-3]", [0.5, 1, 1, -1e-3]),
        (b"[1E2]", [100]),
        (b"[1e-60]", [0]),
    ],
)
def test_what_postgres_accepts_as_text_is_accepted(text: bytes, numbers: list[float]) -> None:
    np.testing.assert_array_equal(decoded(0, text), np.array(numbers, dtype=np.float32))


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"[", b"]", b"[1,", b"[1,]", b"[1 2]", b"[a]", b"1,2", b"{1:1}/3", b"101", b"[nan]", b"[1e39]",
        b"[1e999]", b"[Infinity]", b"[1_0]", b"[[1]]", b"[null]", b"[true]", b'["1"]', b"\xff", b"[1]]",
        b"[[1],[2]]", b"[1,[2]]", b"[1,{}]", b"[1] [2]",
        b"[" + b"1," * 16_000 + b"1]",
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_malformed_text_gives_none(text: bytes) -> None:
    assert decode_vector(0, text) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\3",
        struct.pack("!hh", 0, 0),
        struct.pack("!hh", 2, 0) + bytes(7),
        struct.pack("!hh", 2, 1) + bytes(8),
        struct.pack("!hh", -1, 0),
        struct.pack("!hhf", 1, 0, float("nan")),
        struct.pack("!hhf", 1, 0, float("inf")),
        SparseVector([0, 1, 0]).to_binary(),
        struct.pack("!i", 3) + b"\xa0",  # bit(3)
    ],
)
def test_malformed_or_other_binary_gives_none(data: bytes) -> None:
    assert decode_vector(1, data) is None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (Value(0, b"10"), 10),
        (Value(0, b" 7 "), 7),
        (Value(0, b"-1"), -1),
        (Value(1, struct.pack("!h", 300)), 300),
        (Value(1, struct.pack("!i", 70_000)), 70_000),
        (Value(1, struct.pack("!q", 1 << 40)), 1 << 40),
        (Value(0, None), None),
        (Value(1, None), None),
        (Value(0, b""), None),
        (Value(0, b"1.5"), None),
        (Value(0, b"1_0"), None),
        (Value(0, "٣".encode()), None),
        (Value(0, b"9" * 5000), None),
        (Value(1, b"\0\0\0"), None),
    ],
)
def test_counts_are_decoded(value: Value, number: int | None) -> None:
    assert decode_limit(value) == number
