"""Options that are right each by itself and cannot hold together.

`conflicts` finds what certainly cannot work, and the loader reports it with all other mistakes; `warnings`
finds what may not, depending on the server and on clients that nobody knows yet.  Each names a key and says
what to do.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from config.schema import AUTH_QUERY, SYSTEM, Config

MAX_SOCKET_PATH: Final = 107 if sys.platform == "linux" else 103
"""Bytes in the path of a unix socket."""

_CHECKED: Final = ("require", "verify-ca", "verify-full")


def conflicts(config: Config) -> list[tuple[str, str]]:
    """Return key and reason of each conflict."""
    return [*_listen(config), *_upstream(config), *_users(config), *_relayed_scram(config), *_store(config)]


def _listen(config: Config) -> list[tuple[str, str]]:
    listen = config.listen
    found = []
    mode = listen.effective_tls_mode
    if mode != "disable" and listen.tls_cert is None:
        found.append(
            ("listen.tls_mode", f'"{mode}" needs a certificate: set listen.tls_cert and listen.tls_key')
        )
    if listen.tls_key is not None and listen.tls_cert is None:
        found.append(("listen.tls_key", "has no effect without its certificate: set listen.tls_cert"))
    if listen.checks_client_certificates and listen.tls_ca is None:
        reason = f'"{mode}" needs to know whose signature to trust: set listen.tls_ca, or use "require"'
        found.append(("listen.tls_mode", reason))
    if listen.tls_ca is not None and not listen.checks_client_certificates:
        reason = f'is not used with listen.tls_mode "{mode}": use "verify-ca" or "verify-full", or remove it'
        found.append(("listen.tls_ca", reason))
    if listen.unix_socket is not None:
        length = len(os.fsencode(listen.unix_socket / f".s.PGSQL.{listen.port or 65535}"))
        if length > MAX_SOCKET_PATH:
            reason = (
                f"the socket's path would have {length} bytes, {MAX_SOCKET_PATH} are possible: shorten it"
            )
            found.append(("listen.unix_socket", reason))
    return found


def _upstream(config: Config) -> list[tuple[str, str]]:
    upstream = config.upstream
    found = []
    if upstream.socket_path is not None:
        if upstream.sslmode in _CHECKED:
            reason = (
                "over a unix socket there is no TLS: leave it out, or give upstream.host a name or address"
            )
            found.append(("upstream.sslmode", reason))
        return found
    mode = upstream.effective_sslmode
    if upstream.sslrootcert == SYSTEM and mode != "verify-full":
        reason = (
            f'"{mode}" is too weak for upstream.sslrootcert = "system": leave it out, or use "verify-full"'
        )
        found.append(("upstream.sslmode", reason))
    if mode in ("verify-ca", "verify-full") and upstream.sslrootcert is None:
        reason = (
            f'"{mode}" needs to know whose signature to trust: set upstream.sslrootcert (a file, "system")'
        )
        found.append(("upstream.sslmode", reason))
    if upstream.sslkey is not None and upstream.sslcert is None:
        found.append(("upstream.sslkey", "has no effect without its certificate: set upstream.sslcert"))
    if mode == "disable":
        found += [
            (f"upstream.{key}", 'has no effect with upstream.sslmode = "disable": remove one of them')
            for key in ("sslrootcert", "sslcert")
            if getattr(upstream, key) is not None
        ]
    if upstream.sslnegotiation == "direct" and mode not in _CHECKED:
        reason = f'"direct" needs upstream.sslmode "require" or stronger, it is "{mode}"'
        found.append(("upstream.sslnegotiation", reason))
    return found


def _users(config: Config) -> list[tuple[str, str]]:
    auth = config.auth
    found = []
    if auth.mode == "scram" and auth.users_file is None and auth.query_dsn is None:
        reason = '"scram" needs to know the users: set auth.users_file or auth.query_dsn, or use "relay"'
        found.append(("auth.mode", reason))
    if auth.query != AUTH_QUERY and auth.query_dsn is None:
        found.append(("auth.query", "has no effect without auth.query_dsn: say where to ask"))
    return found


def _store(config: Config) -> list[tuple[str, str]]:
    if config.store.kind == "postgres" and config.store.dsn is None:
        return [("store.kind", '"postgres" needs a database: set store.dsn, or use "sqlite"')]
    return []


def _relayed_scram(config: Config) -> list[tuple[str, str]]:
    """SCRAM cannot be relayed between two encrypted connections: docs/authentication.md says why."""
    listen, auth = config.listen, config.auth
    certain = (
        listen.requires_tls and listen.unix_socket is None and config.upstream.effective_sslmode in _CHECKED
    )
    if auth.mode != "relay" or auth.relay_over_tls or not certain:
        return []
    reason = f'"relay" {_between(config)}: {_REMEDY}'
    return [("auth.mode", reason)]


def warnings(config: Config) -> list[str]:
    """Return what may not work, in words."""
    possible = (
        config.listen.effective_tls_mode != "disable" and config.upstream.effective_sslmode != "disable"
    )
    if config.auth.mode != "relay" or config.auth.relay_over_tls or not possible:
        return []
    return [
        f'auth.mode = "relay" {_between(config)}, which happens where the client chooses TLS and the server '
        f"offers it, and such a client gets an error: {_REMEDY}"
    ]


def _between(config: Config) -> str:
    here, there = config.listen.effective_tls_mode, config.upstream.effective_sslmode
    return (
        "cannot pass SCRAM on to clients that support channel binding between two encrypted connections "
        f'(listen.tls_mode = "{here}", upstream.sslmode = "{there}")'
    )


_REMEDY: Final = (
    'set auth.mode = "scram" with auth.users_file or auth.query_dsn, or set listen.tls_mode or '
    'upstream.sslmode to "disable"; if the server asks for something else than SCRAM, or no client uses '
    "channel binding, set auth.relay_over_tls = true"
)
