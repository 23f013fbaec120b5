"""Ids of queries that the application chooses itself: any text stands for one UUID.  Pure."""

from __future__ import annotations

import re
import uuid
from typing import Final
from urllib.parse import unquote

_OURS: Final = uuid.UUID("6f1d3a53-41f6-4f77-9d5e-6d9a3c1b7a55")
_COMMENT: Final = re.compile(rb"/\*(?:[^*]|\*(?!/))*?\bquery_id='([^']{1,400})'")


def query_id(text: str) -> bytes:
    """Return the id (UUID, 16 bytes) that a text stands for: the one that it is, else one derived from it."""
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        return uuid.uuid5(_OURS, text).bytes


def chosen_id(sql: bytes) -> str | None:
    """Return the id in a comment of a text, as sqlcommenter writes it: ``/*query_id='abc'*/``; or None."""
    match = _COMMENT.search(sql)
    return None if match is None else unquote(match[1].decode(errors="replace"))
