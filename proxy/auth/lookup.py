"""Where users are looked up: the users file first, then a query on the server.

The file is read again, in a thread, when it has changed; one that cannot be used leaves the old users in
force and is reported.  Passwords in plain text are turned into keys at that time (1 to 2 ms each), so that a
login costs the same whatever the file holds.

The query runs on side connections of its own, a few at most, with a search_path that nobody but us sets
(pgbouncer's CVE-2025-12819: a client's search_path reached the query there).  Answers, "no such user"
included, are kept for seconds, and forgotten when a login with them fails: a changed password works at the
second attempt, or a second later.  Several clients that ask for the same user share one query.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import stat
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg

from proxy.auth.users import MAX_BYTES, User, UsersFileError, parse
from proxy.auth.verifier import ITERATIONS, Keys, StandIns, Verifier

log = logging.getLogger(__name__)

WATCH_SECONDS: Final = 1.0
_MAX_CACHED: Final = 10_000  # users
_LEAST_AGE_SECONDS: Final = 1.0  # for which an answer is good even where logins fail
_IDLE_SECONDS: Final = 60.0  # after which a side connection is closed
_SECRET_BYTES: Final = 32
_SETTINGS: Final = {"search_path": "pg_catalog, pg_temp", "application_name": "ruvector-proxy auth"}


class LookupFailed(Exception):  # noqa: N818 - it is about the lookup, not about the user
    """Nobody can be looked up at the moment; the message is for the log."""


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a lookup.

    Attributes
    ----------
    user
        None where there is no such user, or none that could log in.
    verifier
        The user's; without one a stand-in.
    why
        Why a user that exists cannot log in; for the log.
    """

    user: User | None
    verifier: Verifier
    why: str | None = None


def read_users(path: Path) -> dict[bytes, User]:
    """Return the users in a file.

    Raises
    ------
    UsersFileError
        It cannot be read, or not be used.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsersFileError([f"is larger than {MAX_BYTES >> 20} MiB"])
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsersFileError([f"cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise UsersFileError(["is not UTF-8 text"]) from error


def lasting_secret(directory: Path) -> bytes:
    """Return the secret behind the stand-ins: kept in the state directory, made where it is missing.

    Where it cannot be kept it lasts as long as this process.
    """
    path = directory / "auth-secret"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            own = path.with_name(f".auth-secret.{os.getpid()}")
            with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_SECRET_BYTES))
            try:
                os.link(own, path)  # of several processes the first one wins
            except FileExistsError:
                pass
            finally:
                own.unlink()
        secret = path.read_bytes()
        if len(secret) == _SECRET_BYTES:
            return secret
        log.warning("%s does not hold %d bytes; remove it", path, _SECRET_BYTES)
    except OSError as error:
        log.warning("cannot keep %s: %s", path, error.strerror)
    log.warning(
        "salts of unknown users change with every start: they can be told from real ones (store.path)"
    )
    return secrets.token_bytes(_SECRET_BYTES)


class UsersFile:
    """The users of a file, as it was when it was last in order."""

    def __init__(self, path: Path, stand_ins: StandIns) -> None:
        self._path = path
        self._stand_ins = stand_ins
        self._users: dict[bytes, tuple[User, Verifier]] = {}
        self._seen: tuple[int, ...] = ()
        self.usual_iterations = ITERATIONS

    def get(self, name: bytes) -> tuple[User, Verifier] | None:
        """Return a user and its verifier."""
        return self._users.get(name)

    def refresh(self) -> None:
        """Read the file if it has changed; blocks."""
        try:
            status = self._path.stat()
            seen: tuple[int, ...] = (status.st_mtime_ns, status.st_size, status.st_ino)
        except OSError as error:
            seen = (error.errno or 0,)
        if seen == self._seen:
            return
        first, self._seen = not self._seen, seen
        if len(seen) > 1 and status.st_mode & stat.S_IROTH:
            log.warning("auth.users_file %s can be read by everybody: chmod o-r", self._path)
        try:
            users = read_users(self._path)
        except UsersFileError as error:
            kept = (
                "nobody in it can log in" if first else f"the {len(self._users)} users before stay in force"
            )
            log.error("auth.users_file %s: %s; %s", self._path, error, kept)
            return
        self._users = {name: (user, self._verifier(name, user)) for name, user in users.items()}
        counts = Counter(verifier.iterations for _, verifier in self._users.values())
        self.usual_iterations = counts.most_common(1)[0][0] if counts else ITERATIONS
        log.info("auth.users_file %s: %d users", self._path, len(users))

    def _verifier(self, name: bytes, user: User) -> Verifier:
        if user.verifier is not None:
            return user.verifier
        assert user.password is not None
        before = self._users.get(name)
        if before is not None and before[0] == user:
            return before[1]
        salt = self._stand_ins.salt(name)
        return Keys.derive(user.password, salt, ITERATIONS).verifier(salt, ITERATIONS)

    async def watch(self) -> None:
        """Keep it up to date until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await asyncio.to_thread(self.refresh)


class AuthQuery:
    """Verifiers by a query on the server.

    Parameters
    ----------
    dsn, sql
        Where and what: `sql` gets the user's name as ``$1`` and returns no row, or one of name and verifier.
    connections
        Side connections at the same time.
    timeout
        Seconds for one lookup, connecting and waiting for a free connection included.
    max_age
        Seconds for which an answer is good.
    """

    def __init__(self, dsn: str, sql: str, *, connections: int, timeout: float, max_age: float) -> None:
        self._dsn = dsn
        self._sql = sql
        self._connections = connections
        self._timeout = timeout
        self._max_age = max_age
        self._pool: asyncpg.Pool | None = None
        self._answers: OrderedDict[bytes, tuple[float, User | None, str | None]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[tuple[User | None, str | None]]] = {}
        self.usual_iterations = ITERATIONS

    async def find(self, name: bytes) -> tuple[User | None, str | None]:
        """Return a user, and why it cannot log in.

        Raises
        ------
        LookupFailed
            The server cannot be asked, or its answer not be understood.
        """
        known = self._answers.get(name)
        if known is not None and time.monotonic() - known[0] < self._max_age:
            return known[1:]
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.create_task(self._ask(name))
            task.add_done_callback(lambda done: self._asked(name, done))
        return await asyncio.shield(task)

    def _asked(self, name: bytes, task: asyncio.Task[tuple[User | None, str | None]]) -> None:
        self._asking.pop(name, None)
        if task.cancelled() or task.exception() is not None:
            return
        self._answers[name] = (time.monotonic(), *task.result())
        self._answers.move_to_end(name)
        if len(self._answers) > _MAX_CACHED:
            self._answers.popitem(last=False)

    def forget(self, name: bytes) -> None:
        """Ask again the next time: the answer has not led to a login.

        Not sooner than a second after the last question, so that guessing does not load the server.
        """
        known = self._answers.get(name)
        if known is not None and time.monotonic() - known[0] >= _LEAST_AGE_SECONDS:
            del self._answers[name]

    async def _ask(self, name: bytes) -> tuple[User | None, str | None]:
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return None, None  # a name that no database in UTF-8 could hold
        try:
            async with asyncio.timeout(self._timeout):
                rows = await self._fetch(text)
        except TimeoutError:
            raise LookupFailed(f"no answer within {self._timeout:g} s (auth.query_timeout)") from None
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
            raise LookupFailed(str(error) or type(error).__name__) from error
        if not rows:
            return None, None
        if len(rows) > 1 or len(rows[0]) != 2 or rows[0][0] != text:
            raise LookupFailed(
                "auth.query should return one row at most: the user's name as asked, and its verifier"
            )
        return self._read(rows[0][1])

    def _read(self, secret: object) -> tuple[User | None, str | None]:
        if secret is None:
            return None, "it has no password"
        if isinstance(secret, str) and secret.startswith("md5"):
            return None, "it has an md5 password; set it anew with password_encryption = 'scram-sha-256'"
        try:
            verifier = Verifier.parse(str(secret))
        except ValueError as error:
            return None, f"what auth.query returns for it {error}"
        self.usual_iterations = verifier.iterations
        return User(verifier=verifier), None

    async def _fetch(self, name: str) -> list[asyncpg.Record]:
        if self._pool is None:
            self._pool = asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._connections,
                max_inactive_connection_lifetime=_IDLE_SECONDS,
                timeout=self._timeout,
                statement_cache_size=0,  # behind a pooler in transaction mode, too
                server_settings=_SETTINGS,
            )
        await self._pool  # initialises it once; makes no connection
        async with self._pool.acquire() as connection:
            rows: list[asyncpg.Record] = await connection.fetch(self._sql, name)
            return rows

    async def close(self) -> None:
        """Close the side connections."""
        if self._pool is not None:
            self._pool.terminate()


class Directory:
    """All that is known of users: the file first, then the query."""

    def __init__(self, stand_ins: StandIns, file: UsersFile | None, query: AuthQuery | None) -> None:
        self._stand_ins = stand_ins
        self._file = file
        self._query = query

    async def find(self, name: bytes) -> Found:
        """Return what is known of a user, or a stand-in.

        Raises
        ------
        LookupFailed
            It cannot be told at the moment.
        """
        iterations = ITERATIONS
        if self._file is not None:
            known = self._file.get(name)
            if known is not None:
                return Found(*known)
            iterations = self._file.usual_iterations
        why = None
        if self._query is not None:
            user, why = await self._query.find(name)
            if user is not None and user.verifier is not None:
                return Found(user, user.verifier)
            iterations = self._query.usual_iterations
        return Found(None, self._stand_ins.verifier(name, iterations), why)

    def forget(self, name: bytes) -> None:
        """Ask the server again for this user the next time."""
        if self._query is not None:
            self._query.forget(name)

    async def watch(self) -> None:
        """Keep up with the file until cancelled; then close the side connections."""
        try:
            if self._file is not None:
                await self._file.watch()
            await asyncio.Event().wait()
        finally:
            if self._query is not None:
                await self._query.close()
