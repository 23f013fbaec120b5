"""Canonical text of a parameter value, whichever format the driver sent it in.

psycopg sends ``5`` as text, asyncpg the four bytes ``00 00 00 05``: the same filter value must lead to the
same context.  Only types that people filter by are decoded; for any other binary value the answer is None
("cannot tell"), and the query falls back to what is known without it.

Formats: PostgreSQL documentation, "Formats and Format Codes" (53.1.3) and each type's ``*_send`` function.
"""

from __future__ import annotations

import struct
import uuid

BOOL, INT8, INT2, INT4, TEXT, OID, FLOAT4, FLOAT8 = 16, 20, 21, 23, 25, 26, 700, 701
CHAR, NAME, BPCHAR, VARCHAR, UUID, UNKNOWN = 18, 19, 1042, 1043, 2950, 705

_TEXTUAL = frozenset({TEXT, VARCHAR, BPCHAR, NAME, CHAR, UNKNOWN})
_INTEGERS = frozenset({INT2, INT4, INT8, OID})
_FLOATS = frozenset({FLOAT4, FLOAT8})
# By length: a driver may declare a narrower type than the column's (psycopg sends small numbers as int2).
_INTEGER = {2: struct.Struct("!h"), 4: struct.Struct("!i"), 8: struct.Struct("!q")}
_FLOAT = {4: struct.Struct("!f"), 8: struct.Struct("!d")}
_TRUE = frozenset({"t", "true", "y", "yes", "on", "1"})


def canonical(type_oid: int, format_code: int, data: bytes) -> str | None:
    """Return the canonical text of a non-NULL value, or None where it cannot be told.

    `type_oid` 0 means unknown: text is taken as it stands, binary cannot be told.  Numbers lose leading
    zeros and spaces, booleans become ``true``/``false``, UUIDs their hyphenated form.  Malformed bytes give
    None.
    """
    try:
        if format_code == 0:
            return _canonical_text(type_oid, data.decode())
        return _canonical_binary(type_oid, data)
    except (ValueError, struct.error):
        return None


def _canonical_text(type_oid: int, text: str) -> str:
    if type_oid in _INTEGERS:
        return str(int(text))
    if type_oid in _FLOATS:
        return repr(float(text))
    if type_oid == BOOL:
        return "true" if text.strip().lower() in _TRUE else "false"
    if type_oid == UUID:
        return str(uuid.UUID(text))
    return text


def _canonical_binary(type_oid: int, data: bytes) -> str | None:
    if type_oid in _INTEGERS:
        integer = _INTEGER.get(len(data))
        return None if integer is None else str(integer.unpack(data)[0])
    if type_oid in _FLOATS:
        real = _FLOAT.get(len(data))
        return None if real is None else repr(real.unpack(data)[0])
    if type_oid in _TEXTUAL:
        return data.decode()
    if type_oid == BOOL:
        return "true" if data != b"\0" else "false"
    if type_oid == UUID:
        return str(uuid.UUID(bytes=data))
    return None
