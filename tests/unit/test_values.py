"""The same value leads to the same canonical text, whichever format and width a driver sends it in."""

from __future__ import annotations

import struct
import uuid

import pytest

from learning import values
from learning.values import canonical

TOKEN = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("oid", "text", "binaries", "expected"),
    [
        (values.INT4, b"007", [struct.pack("!h", 7), struct.pack("!i", 7), struct.pack("!q", 7)], "7"),
        (values.INT8, b"-5", [struct.pack("!q", -5), struct.pack("!h", -5)], "-5"),
        (values.FLOAT8, b"1.50", [struct.pack("!d", 1.5), struct.pack("!f", 1.5)], "1.5"),
        (values.BOOL, b"t", [b"\1"], "true"),
        (values.BOOL, b"off", [b"\0"], "false"),
        (values.TEXT, "é".encode(), ["é".encode()], "é"),
        (values.UUID, str(TOKEN).upper().encode(), [TOKEN.bytes], str(TOKEN)),
    ],
)
def test_text_and_binary_agree(oid: int, text: bytes, binaries: list[bytes], expected: str) -> None:
    assert canonical(oid, 0, text) == expected
    for binary in binaries:
        assert canonical(oid, 1, binary) == expected


@pytest.mark.parametrize(
    ("oid", "format_code", "data"),
    [
        (values.INT4, 1, b"123"),
        (values.INT4, 0, b"seven"),
        (values.FLOAT8, 1, b""),
        (values.UUID, 1, b"short"),
        (values.TEXT, 0, b"\xff\xfe"),
        (1184, 1, bytes(8)),  # timestamptz: not decoded
    ],
)
def test_what_cannot_be_told_is_none(oid: int, format_code: int, data: bytes) -> None:
    assert canonical(oid, format_code, data) is None
