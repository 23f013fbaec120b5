"""What the proxy says to a client in its own name: FATAL errors, each with what to do.

SQLSTATEs are chosen for what drivers do with them: 57P03 (cannot connect now) and 57P01 (admin shutdown)
are retried by pools and multi-host clients; 08006 (connection failure) and 08P01 (protocol violation) are
not blamed on the statement.
"""

from __future__ import annotations

from proxy.wire.diagnostics import ErrorResponse


def _fatal(code: bytes, message: str, hint: str | None = None) -> bytes:
    text = f"ruvector-proxy: {message}".replace("\0", " ").encode()
    return ErrorResponse.create(b"FATAL", code, text, hint=hint.encode() if hint else None).encode()


def upstream_unreachable(name: str, error: OSError) -> bytes:
    """The server cannot be reached at all."""
    reason = "timed out" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return _fatal(
        b"57P03",
        f"cannot reach the upstream server at {name}: {reason}",
        "Is the server running? The proxy connects again with the next client.",
    )


def upstream_lost(name: str) -> bytes:
    """The server closed without a word."""
    return _fatal(
        b"08006",
        f"the upstream server at {name} closed the connection unexpectedly",
        "The server's own log says why. Connect again.",
    )


def login_lost(name: str) -> bytes:
    """The server closed without a word before the client was logged in, as it does while it restarts.

    So it is said with the code of a server that is starting up or shutting down, after which a login may be
    tried again: nothing was asked yet.
    """
    return _fatal(
        b"57P03",
        f"the upstream server at {name} closed the connection before the login was complete",
        "It may be restarting; the server's own log says why. Connect again.",
    )


def protocol_violation(reason: str) -> bytes:
    """The client does not speak the protocol."""
    return _fatal(b"08P01", reason)


def shutting_down() -> bytes:
    """The proxy is being stopped."""
    return _fatal(b"57P01", "terminating connection because the proxy is shutting down", "Connect again.")


def internal_error() -> bytes:
    """The proxy itself has failed."""
    return _fatal(b"XX000", "internal error", "The proxy's log says more. Connect again.")


def upstream_without_tls(name: str, problem: str) -> bytes:
    """The server is there, but not as encrypted, or not as trustworthy, as was asked."""
    return _fatal(
        b"08001",
        f"no TLS with the upstream server at {name}: {problem}",
        "See upstream.sslmode and upstream.sslrootcert in the proxy's configuration.",
    )


def tls_required() -> bytes:
    """The client has come without TLS."""
    return _fatal(
        b"28000",
        "connections without TLS are not accepted (listen.tls_mode)",
        "Connect with sslmode=require or stronger.",
    )


def certificate_required() -> bytes:
    """The client has shown no certificate."""
    return _fatal(
        b"28000",
        "connection requires a valid client certificate (listen.tls_mode)",
        "Connect with a certificate: sslcert and sslkey in libpq.",
    )


def certificate_of_another(user: bytes) -> bytes:
    """The client has shown somebody else's certificate."""
    return _fatal(
        b"28000",
        f'certificate authentication failed for user "{user.decode(errors="replace")}"',
        "The common name (CN) of the client certificate has to be the name of the user.",
    )


def too_many_clients(most: int) -> bytes:
    """All places are taken."""
    return _fatal(
        b"53300",
        "sorry, too many clients already",
        f"limits.max_connections is {most}. Use a pool in the application, or raise it.",
    )


def too_many_of_user(user: bytes, most: int) -> bytes:
    """All places of one user are taken."""
    return _fatal(
        b"53300",
        f'too many connections for role "{user.decode(errors="replace")}"',
        f"limits.max_connections_per_user is {most}.",
    )


def too_many_to_database(database: bytes, most: int) -> bytes:
    """All places of one database are taken."""
    return _fatal(
        b"53300",
        f'too many connections for database "{database.decode(errors="replace")}"',
        f"limits.max_connections_per_database is {most}.",
    )


def out_of_files(files: int, most: int) -> bytes:
    """The operating system does not let this process have more connections."""
    return _fatal(
        b"53300",
        f"sorry, too many clients already: {files} open files (ulimit -n) are enough for {most}",
        "Raise that limit (LimitNOFILE= in systemd, --ulimit nofile= in Docker), or workers.count.",
    )


def out_of_memory(megabytes: float) -> bytes:
    """The worker has grown beyond what it may have."""
    return _fatal(
        b"53200",
        f"no new clients while this worker takes more than {megabytes:g} MB of memory",
        "limits.max_memory says how much it may take. Connect again later.",
    )


def message_too_long(reason: str) -> bytes:
    """A message is longer than limits.max_message."""
    return _fatal(b"54000", reason, "limits.max_message says how long it may be.")


def silent_server(name: str, seconds: float) -> bytes:
    """The server may have accepted the connection, and says nothing."""
    return _fatal(
        b"57P03",
        f"the upstream server at {name} did not answer within {seconds:g} s",
        "Is the server overloaded, or stopped? limits.authentication_timeout says how long a login may take.",
    )
