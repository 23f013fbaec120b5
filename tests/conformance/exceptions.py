"""Differences that are known and no fault: few, each with its reason, all shown in docs/conformance.md.

What belongs here: a test that looks at what docs/wire.md says a client could notice.  What does not: anything
that an application could meet and that the proxy could do better.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tests.conformance.harness import Difference, Way


class KnownException(NamedTuple):
    """One test whose outcome may differ in some ways of running it."""

    suite: str
    test: str
    ways: frozenset[Way]
    reason: str


_FORCED = frozenset({Way.FORCED})

KNOWN: Final = (
    KnownException(
        "regress",
        "guc",
        _FORCED,
        "lists `pg_prepared_statements`, where the proxy's own statements appear",
    ),
    KnownException(
        "regress",
        "psql",
        _FORCED,
        "lists `pg_prepared_statements`, where the proxy's own statements appear",
    ),
    KnownException(
        "regress",
        "subscription",
        _FORCED,
        "calls a function that alters a subscription, which is refused either way; with `SET LOCAL` in front "
        "the text is an implicit transaction block, and the server names that reason first",
    ),
    KnownException(
        "isolation",
        "partition-drop-index-locking",
        _FORCED,
        "shows other sessions' statements from `pg_stat_activity`, where simple queries carry their settings",
    ),
)


def known_exception(suite: str, difference: Difference) -> KnownException | None:
    """Return the exception that covers a difference, if there is one."""
    for exception in KNOWN:
        if (exception.suite, exception.test) == (
            suite,
            difference.test,
        ) and difference.ways <= exception.ways:
            return exception
    return None
