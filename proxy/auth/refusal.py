"""Why a login ends without success: what the client is told, and what is counted.

Words and SQLSTATEs are PostgreSQL's own where it has some for the case; what only a proxy can meet begins
with ``ruvector-proxy:`` and says what to do.
"""

from __future__ import annotations

import enum

from proxy.wire.diagnostics import ErrorResponse


class Cause(enum.StrEnum):
    """Label of the metric."""

    PASSWORD = "password"  # noqa: S105 - unknown user or wrong password: the two are not told apart
    PROTOCOL = "protocol"  # the client's messages were wrong
    BINDING = "channel binding"  # somebody between client and proxy, or a client that was misled
    TIMEOUT = "timeout"
    LOOKUP = "lookup"  # users could not be looked up
    UPSTREAM = "upstream"  # the client was right, and the server refused or could not be logged in to


class Refusal(Exception):  # noqa: N818 - it is one
    """The login is over.  `response` is for the client; `log`, if given, is for the log only."""

    def __init__(self, cause: Cause, response: ErrorResponse, log: str | None = None) -> None:
        self.cause = cause
        self.response = response
        message = (response.message or b"").decode(errors="replace")
        super().__init__(f"{message} ({log})" if log else message)


def _fatal(code: bytes, message: bytes, detail: str | None = None, hint: str | None = None) -> ErrorResponse:
    return ErrorResponse.create(
        b"FATAL",
        code,
        message,
        detail=detail.encode() if detail else None,
        hint=hint.encode() if hint else None,
    )


def wrong_password(user: bytes, log: str | None = None) -> Refusal:
    """Return the answer to a wrong password, and to everything that must look like one."""
    message = b'password authentication failed for user "' + user + b'"'
    return Refusal(Cause.PASSWORD, _fatal(b"28P01", message), log)


def no_user() -> Refusal:
    """Return the answer to a start-up packet that names no user."""
    message = b"no PostgreSQL user name specified in startup packet"
    return Refusal(Cause.PROTOCOL, _fatal(b"28000", message))


def malformed(detail: str) -> Refusal:
    """Return the answer to a SCRAM message that is none."""
    return violation("malformed SCRAM message", detail)


def violation(message: str, detail: str | None = None) -> Refusal:
    """Return the answer to messages that break the protocol."""
    return Refusal(Cause.PROTOCOL, _fatal(b"08P01", message.encode(), detail))


def unsupported(message: str) -> Refusal:
    """Return the answer to what PostgreSQL does not support either."""
    return Refusal(Cause.PROTOCOL, _fatal(b"0A000", message.encode()))


def binding(message: str, detail: str | None = None) -> Refusal:
    """Return the answer to a channel binding that does not hold."""
    return Refusal(Cause.BINDING, _fatal(b"28000", message.encode(), detail))


def timeout() -> Refusal:
    """Return the answer to a client or server that takes too long."""
    return Refusal(Cause.TIMEOUT, _fatal(b"57014", b"canceling authentication due to timeout"))


def lookup(log: str) -> Refusal:
    """Return the answer where nobody can be looked up at the moment; `log` holds the reason."""
    message = b"ruvector-proxy: passwords cannot be checked at the moment"
    hint = "The proxy's log says why (auth.query_dsn, auth.query). Connect again."
    return Refusal(Cause.LOOKUP, _fatal(b"57P03", message, hint=hint), log)


def upstream(reason: str, hint: str) -> Refusal:
    """Return the answer where the client was right and the login at the server is not possible."""
    message = f"ruvector-proxy: cannot log in to the server: {reason}"
    return Refusal(Cause.UPSTREAM, _fatal(b"28000", message.encode(), hint=hint))


def relayed_binding() -> Refusal:
    """Return the answer to a client that insists on channel binding between two legs of TLS."""
    message = (
        b"ruvector-proxy: SCRAM cannot be relayed between two encrypted connections to a client that "
        b"supports channel binding"
    )
    hint = (
        'Set auth.mode = "scram" with auth.users_file or auth.query_dsn in the proxy, or encrypt only one of '
        "the two connections (listen.tls_mode, upstream.sslmode), or connect with channel_binding=disable."
    )
    return Refusal(Cause.BINDING, _fatal(b"28000", message, hint=hint))
