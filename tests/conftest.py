"""One embedded server for the whole test session, and a fresh database for each test that asks for one.

The server listens on a unix socket and on TCP, has the vector extension in template1, and knows three roles
for tests of authentication; everybody else is trusted.  Tests that stop, kill or reconfigure a server start
their own `EmbeddedPostgres`.
"""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import settings

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres

# Machines that run tests are shared: the time of one example proves nothing.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

# A shell that runs something in the background has it ignore SIGINT, and all its children; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PASSWORD_ROLES = {"auth_password": "password", "auth_md5": "md5", "auth_scram": "scram-sha-256"}
"""Role name to the authentication method that the server asks of it; each one's password is its own name."""

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """Give the root logger back as it was: a command under test configures it for a stream that is closed."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """Return a running server with fast, unsafe settings; shared, so leave it as it was."""
    hba = [
        f"{kind} all {role} {address} {method}"
        for role, method in PASSWORD_ROLES.items()
        for kind, address in (("local", ""), ("host", "127.0.0.1/32"))
    ]
    settings = {**FAST_SETTINGS, "shared_buffers": "256MB", "max_connections": "200"}
    with EmbeddedPostgres(settings=settings, listen=True, hba=hba) as server:
        with psycopg.connect(server.dsn("template1"), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            for role, method in PASSWORD_ROLES.items():
                encryption = "md5" if method == "md5" else "scram-sha-256"
                connection.execute(f"SET password_encryption = '{encryption}'")
                connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{role}'")
        yield server


@pytest.fixture
def database(postgres: EmbeddedPostgres) -> Iterator[str]:
    """Return the name of an empty database with the vector extension; dropped after the test."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} STRATEGY file_copy")
    yield name
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
