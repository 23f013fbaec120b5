"""Options that are right each by itself and cannot hold together.

`conflicts` finds what certainly cannot work, and the loader reports it with all other mistakes.  Each names a
key and says what to do.
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
    return [*_listen(config), *_upstream(config), *_users(config)]


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
