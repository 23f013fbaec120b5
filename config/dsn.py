"""Connection URIs: whether one can be right, and how to show it without its password.

Syntax: PostgreSQL documentation, "Connection URIs" (34.1.1.2):
``postgresql://user:password@host:port,.../db?key=value``.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

_HIDDEN = "***"
_SCHEMES = ("postgresql", "postgres")
_PORT = r"(?:[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5])"
_HOST_PORT = re.compile(rf"(?:\[[^]]+\]|[^:]*)(?::{_PORT}?)?")


def redact_dsn(dsn: str) -> str:
    """Return a connection URI that may be shown: its password, wherever it stands, replaced by ``***``.

    Where it cannot be told which part is the password (not a URI, or special characters in it that are not
    percent-encoded), nothing is shown.
    """
    try:
        parts = urlsplit(dsn)
    except ValueError:
        return _HIDDEN
    if parts.scheme not in _SCHEMES or "@" in parts.path + parts.query + parts.fragment:
        return _HIDDEN
    login, at, hosts = parts.netloc.rpartition("@")
    user, colon, _ = login.partition(":")
    netloc = f"{user}{colon}{_HIDDEN if colon else ''}{at}{hosts}"
    shown = [(key, _HIDDEN if "pass" in key.lower() else value) for key, value in parse_qsl(parts.query)]
    query = urlencode(shown, safe="/*:,", quote_via=quote)
    return f"{parts.scheme}://{netloc}{parts.path}{'?' if query else ''}{query}"


def check_dsn(dsn: str) -> None:
    """Raise ValueError where `dsn` cannot be a connection URI; the message shows no part of it."""
    if not dsn.startswith(tuple(f"{scheme}://" for scheme in _SCHEMES)):
        raise ValueError(
            "should be a URI that begins with postgresql://, e.g. postgresql://user@host:5432/database"
        )
    if not _is_readable(dsn):
        raise ValueError(
            "its host and port cannot be read; a port is a number from 1 to 65535, and special characters "
            "in the "
            "password are percent-encoded (/ as %2F, @ as %40, : as %3A, # as %23, ? as %3F)"
        )


def _is_readable(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
    except ValueError:
        return False
    hosts = parts.netloc.rpartition("@")[2].split(",")
    return all(map(_HOST_PORT.fullmatch, hosts)) and "@" not in parts.path + parts.query + parts.fragment
