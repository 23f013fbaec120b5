"""Options that are right each by itself and cannot hold together.

`conflicts` finds what certainly cannot work, and the loader reports it with all other mistakes.  Each names a
key and says what to do.
"""

from __future__ import annotations

from config.schema import AUTH_QUERY, Config


def conflicts(config: Config) -> list[tuple[str, str]]:
    """Return key and reason of each conflict."""
    return _users(config)


def _users(config: Config) -> list[tuple[str, str]]:
    auth = config.auth
    found = []
    if auth.mode == "scram" and auth.users_file is None and auth.query_dsn is None:
        reason = '"scram" needs to know the users: set auth.users_file or auth.query_dsn, or use "relay"'
        found.append(("auth.mode", reason))
    if auth.query != AUTH_QUERY and auth.query_dsn is None:
        found.append(("auth.query", "has no effect without auth.query_dsn: say where to ask"))
    return found
