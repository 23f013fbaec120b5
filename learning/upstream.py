"""The learner's side connections: one per database, reopened with back-off, logged once per change of state.

Rules
-----
- At most one connection per database and `MAX_CONNECTIONS` in all; the one unused longest is closed first.
- A server that is down, starting up or refuses the role is an ordinary state: `UnavailableError` is raised at
  once while the back-off runs, nothing waits inside.  The log has one line when the state changes, none per
  attempt.
- Side connections can do no harm: read only by default, no lock stronger than AccessShare is ever asked for,
  and `lock_timeout` keeps them from queueing behind somebody's ALTER TABLE (and others from queueing behind
  them).
- Names in the learner's own SQL mean what the server's catalogs say (learning.names).
- A password appears in no message: errors are those of the server, which do not repeat it.
"""

from __future__ import annotations

import json
import logging
import re
import statistics
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from learning.binding import Binder
from learning.names import OWN_PATH, NamesConnection

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
APPLICATION_NAME = "ruvector-proxy learner"
_FIRST_BACKOFF, _LAST_BACKOFF = 0.5, 30.0  # seconds
_TRY_OUT = 3.0  # seconds for a connection that is only to show that there is a server

SESSION_SETTINGS = {
    "application_name": APPLICATION_NAME,
    "default_transaction_read_only": "on",
    "lock_timeout": "100ms",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "10s",
}

DISCONNECTED = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InternalClientError,
)
"""Errors that say that the server or the connection, not a statement, is the trouble.

asyncpg raises ``InternalClientError`` for the next statement after one that the server ended the connection
with while nothing was asked of it (``idle_in_transaction_session_timeout``, ``pg_terminate_backend``).
"""

TRANSIENT = (asyncpg.LockNotAvailableError, asyncpg.QueryCanceledError, asyncpg.InsufficientResourcesError)
"""Errors of a statement that may succeed in a moment."""


def words_of(error: BaseException) -> str:
    """Return an error for people and the log, without values of queries: what stands in quotation marks.

    PostgreSQL repeats in errors about data what it could not read (``invalid input syntax for type vector:
    "[...]"``); in others quotation marks hold names.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, asyncpg.DataError) or not isinstance(error, asyncpg.PostgresError):
        text = re.sub(r'"[^"]*"', '"..."', re.sub(r"'[^']*'", "'...'", text))
    return text


class UnavailableError(Exception):
    """The database cannot be reached now; try again later."""


_ACTIVE_SESSIONS = """
SELECT count(*) AS sessions FROM pg_stat_activity
WHERE state = 'active' AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""

_PATH_OF_ROLE = """
SELECT 1 AS set FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole
WHERE r.rolname = session_user AND s.setdatabase IN (0, (
      SELECT oid FROM pg_database WHERE datname = current_database()))
  AND EXISTS (SELECT FROM unnest(s.setconfig) AS c WHERE c LIKE 'search_path=%') LIMIT 1
"""


@dataclass(slots=True)
class Session:
    """One open side connection and what is remembered of it."""

    connection: Any
    binder: Binder
    statements: OrderedDict[tuple[str, str], Any] = field(
        default_factory=OrderedDict
    )  # prepared, by (template, what for)
    round_trips: deque[float] = field(
        default_factory=lambda: deque(maxlen=15)
    )  # milliseconds, of an empty statement
    ping: Any = None
    default_path: str = '"$user", public'  # search_path of a session whose role sets none

    @property
    def round_trip_ms(self) -> float:
        """The median time of a statement that does nothing: the part of a measurement that is not work."""
        return statistics.median(self.round_trips) if self.round_trips else 0.0

    async def catalog(self, sql: str, *parameters: str | list[str]) -> list[dict[str, Any]]:
        """Return the rows of a catalog query as dictionaries of JSON values; parameters are text or text[].

        Result and parameters travel as text, because the binder replaces asyncpg's conversions of other
        types.  Names mean what the catalogs say, whatever search_path is in force.
        """
        async with self.connection.own():
            return await self.rows(sql, *parameters)

    async def rows(self, sql: str, *parameters: str | list[str]) -> list[dict[str, Any]]:
        """The same under the search_path in force: for what has to be looked up there.

        Everything else in the text bears the name of its schema.
        """
        # The text is one of the learner's own constants; values travel as parameters.
        rows_as_json = "coalesce(pg_catalog.json_agg(q), '[]'::pg_catalog.json)::pg_catalog.text"
        wrapped = f"SELECT {rows_as_json} FROM ({sql}) AS q"  # noqa: S608
        rows: list[dict[str, Any]] = json.loads(await self.connection.fetchval(wrapped, *parameters))
        return rows

    async def active_sessions(self) -> int:
        """Count the other sessions at work on the server (those of other roles show only to pg_monitor)."""
        return int((await self.catalog(_ACTIVE_SESSIONS))[0]["sessions"])

    async def measure_round_trip(self) -> None:
        """Time one empty statement."""
        started = time.perf_counter()
        await self.ping.fetch()
        self.round_trips.append((time.perf_counter() - started) * 1e3)


@dataclass(slots=True)
class _Database:
    session: Session | None = None
    up: bool | None = None
    retry_at: float = 0.0
    backoff: float = _FIRST_BACKOFF


class Upstream:
    """Opens, keeps and closes the side connections."""

    def __init__(self, dsn: str, *, connect_timeout: float = 10.0) -> None:
        self._dsn = dsn
        self._timeout = connect_timeout
        self._databases: OrderedDict[str, _Database] = OrderedDict()

    async def session(self, database: str) -> Session:
        """Return the open connection to a database, opening it where necessary.

        Raises
        ------
        UnavailableError
            The database cannot be reached, or was found unreachable a moment ago.
        """
        entry = self._databases.setdefault(database, _Database())
        self._databases.move_to_end(database)
        if entry.session is not None and not entry.session.connection.is_closed():
            return entry.session
        entry.session = None
        if time.monotonic() < entry.retry_at:
            raise UnavailableError(database)
        try:
            entry.session = await self._open(database)
        except (*DISCONNECTED, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            self._failed(database, entry, error)
            raise UnavailableError(str(error)) from error
        if entry.up is not True:
            log.info('learner connected to database "%s"', database)
        entry.up, entry.backoff = True, _FIRST_BACKOFF
        await self._close_surplus()
        return entry.session

    async def try_out(self) -> None:
        """Connect to the database of the DSN, and hang up.

        Raises
        ------
        UnavailableError
            It cannot be reached.
        """
        try:
            connection = await asyncpg.connect(self._dsn, timeout=min(self._timeout, _TRY_OUT))
        except (*DISCONNECTED, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            raise UnavailableError(str(error)) from error
        connection.terminate()

    async def lost(self, database: str, error: BaseException) -> None:
        """Note that the connection broke; the next call of `session` opens another, after the back-off."""
        entry = self._databases.setdefault(database, _Database())
        if entry.session is not None:
            entry.session.connection.terminate()
            entry.session = None
        self._failed(database, entry, error)

    def is_lost(self, database: str, error: BaseException) -> bool:
        """Tell whether an error means that the connection is of no more use."""
        entry = self._databases.get(database)
        if isinstance(error, DISCONNECTED) or entry is None or entry.session is None:
            return True
        return bool(entry.session.connection.is_closed())

    def forget_statements(self, database: str, template: str) -> None:
        """Drop the prepared statements of a template: what they refer to may have changed."""
        entry = self._databases.get(database)
        if entry is not None and entry.session is not None:
            for key in [key for key in entry.session.statements if key[0] == template]:
                del entry.session.statements[key]

    async def close(self) -> None:
        """Close everything; statements under way are cancelled."""
        for entry in self._databases.values():
            if entry.session is not None:
                entry.session.connection.terminate()
        self._databases.clear()

    def _failed(self, database: str, entry: _Database, error: BaseException) -> None:
        if entry.up is not False:
            words = str(error) or type(error).__name__
            if isinstance(error, asyncpg.InternalClientError):
                words = "the server has ended the connection"  # asyncpg's own words are about its states
            log.warning(
                'learner cannot use database "%s": %s; queries keep their settings, retrying', database, words
            )
        entry.up = False
        entry.retry_at = time.monotonic() + entry.backoff
        entry.backoff = min(_LAST_BACKOFF, entry.backoff * 2)

    async def _open(self, database: str) -> Session:
        connection = await asyncpg.connect(
            self._dsn,
            database=database,
            timeout=self._timeout,
            statement_cache_size=0,  # statements are prepared explicitly, under the settings that they need
            connection_class=NamesConnection,
            server_settings=SESSION_SETTINGS,
        )
        try:
            return await self._prepared(connection)
        except BaseException:  # cancelled, too: nobody else knows of the connection
            connection.terminate()
            raise

    async def _prepared(self, connection: Any) -> Session:
        """Return the session of a connection that has just been opened."""
        connection.add_log_listener(_ignore_notice)
        session = Session(connection, Binder(connection))
        session.default_path = await connection.fetchval("SHOW search_path")
        await connection.execute(f"SET search_path = {OWN_PATH}")
        if await session.catalog(_PATH_OF_ROLE):
            # The application has another role, to which this one's setting does not apply.
            session.default_path = '"$user", public'
        session.ping = await connection.prepare("SELECT")
        for _ in range(3):
            await session.measure_round_trip()
        return session

    async def _close_surplus(self) -> None:
        open_ones = [entry for entry in self._databases.values() if entry.session is not None]
        for entry in open_ones[: max(0, len(open_ones) - MAX_CONNECTIONS)]:
            assert entry.session is not None
            entry.session.connection.terminate()
            entry.session = None


def _ignore_notice(connection: Any, message: Any) -> None:
    """Notices of probes (such as "hnsw graph not repaired") concern nobody."""
