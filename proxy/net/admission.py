"""Who may come in, and how much each may take: the limits of one worker.

A client passes three points, and hears at each which limit it has met:

    it connects             too many that have not said what they want?    the oldest of those has to go
    its start-up packet     too many clients, of its user, to its database, for the files or the memory
                            that the worker may have?                      53300, 53200
    a message               longer than limits.max_message?                54000

Rules
-----
- A silent connection costs its opener nothing, so it is worth nothing here: when there are
  `limits.max_logins` of them the oldest is closed to let a new one in.  Whoever speaks at once is served,
  however many stand and stare ("slowloris").
- CancelRequests are never refused: they make room.
- Each limit that is met is counted, by its name.
- A worker never runs into the limit of open files, at which connections can neither be accepted nor refused:
  what `ulimit -n` allows is a limit on connections like the others.
"""

from __future__ import annotations

import resource
import socket
from collections import OrderedDict
from pathlib import Path
from typing import Final, Protocol

from config.schema import Limits
from proxy.net import messages
from proxy.net.places import Places
from proxy.session.counters import Counters

FILES_OF_ITS_OWN: Final = 64
"""Open files that a worker needs beside its clients: log, metrics, listener, link to the learner, lookups."""

FAREWELLS: Final = 256
"""Connections that are over and get a moment to read their last bytes; further ones do not get it."""

_TOTAL: Final = b"t"
_PAGE: Final = resource.getpagesize()


def sessions_for(files: int, max_logins: int) -> int:
    """Return how many clients a worker can serve with `files` open files; each takes two.

    Of what is left, those that log in take at most a quarter and those that leave at most an eighth.
    """
    left = max(0, files - FILES_OF_ITS_OWN)
    return (left - min(max_logins, left // 4) - min(FAREWELLS, left // 8)) // 2


def files_for(sessions: int, max_logins: int) -> int:
    """Return how many open files a worker needs for so many clients at once."""
    files = FILES_OF_ITS_OWN + 2 * sessions
    while sessions_for(files, max_logins) < sessions:
        files += max(1, sessions - sessions_for(files, max_logins))
    return files


def open_files() -> int:
    """Return how many files this process may have open."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if files == resource.RLIM_INFINITY else files


def too_few_files(limits: Limits, files: int) -> str | None:
    """Return what is to be said at the start where `files` are too few for the limits; else None."""
    possible = sessions_for(files, limits.max_logins)
    if limits.max_connections <= possible:
        return None
    needed = files_for(limits.max_connections, limits.max_logins)
    return (
        f"limits.max_connections = {limits.max_connections} needs {needed} open files in each worker, and "
        f"{files} are allowed (ulimit -n): a worker refuses clients beyond {possible}. Raise the hard limit "
        "(LimitNOFILE= in systemd, --ulimit nofile= in Docker), or lower limits.max_connections"
    )


class Arriving(Protocol):
    """A connection that has not said yet what it wants."""

    def crowded_out(self) -> None:
        """Others need its place."""


class Place:
    """One session's place; `leave` gives it back, once."""

    __slots__ = ("_gate", "_names")

    def __init__(self, gate: Gate, names: tuple[bytes, ...]) -> None:
        self._gate = gate
        self._names = names

    def leave(self) -> None:
        """The session is over."""
        names, self._names = self._names, ()
        if names:
            self._gate.left(names)


class Gate:
    """The limits of one worker; `places` are shared with the others, `files` is its limit of open files."""

    def __init__(
        self, limits: Limits, counters: Counters, places: Places | None = None, *, files: int | None = None
    ) -> None:
        files = open_files() if files is None else files
        self.limits = limits
        self._counters = counters
        self._places = places or Places.alone()
        self._arriving: OrderedDict[Arriving, None] = OrderedDict()
        left = max(0, files - FILES_OF_ITS_OWN)
        self._max_arriving = max(1, min(limits.max_logins, left // 4))
        self._max_here = sessions_for(files, limits.max_logins)
        self._files = files
        self._here = 0
        self.farewells = min(FAREWELLS, left // 8)
        self._memory_full = False

    # -- before the start-up packet ------------------------------------------------------------------

    def arrived(self, connection: Arriving) -> None:
        """A connection is there that has said nothing yet."""
        self._arriving[connection] = None
        if len(self._arriving) > self._max_arriving:
            oldest, _ = self._arriving.popitem(last=False)
            self._hit("logins")
            oldest.crowded_out()

    def spoke(self, connection: Arriving) -> None:
        """It has said what it wants, or is gone."""
        self._arriving.pop(connection, None)

    # -- the start-up packet -------------------------------------------------------------------------

    def admit(self, user: bytes, database: bytes) -> Place | bytes:
        """Return a place for a session, or the error for the client; `database` is empty where left out."""
        if self._memory_full:
            self._hit("memory")
            return messages.out_of_memory(self.limits.max_memory)
        if self._here >= self._max_here:
            self._hit("files")
            return messages.out_of_files(self._files, self._max_here)
        self._here += 1
        names: list[bytes] = []
        for name, most, error, limit in self._bounds(user, database or user):
            names.append(name)
            if self._places.enter(name) > most:
                self.left(tuple(names))
                self._hit(limit)
                return error
        return Place(self, tuple(names) or (b"",))

    def _bounds(self, user: bytes, database: bytes) -> list[tuple[bytes, int, bytes, str]]:
        limits = self.limits
        bounds = []
        if limits.max_connections:
            error = messages.too_many_clients(limits.max_connections)
            bounds.append((_TOTAL, limits.max_connections, error, "connections"))
        if limits.max_connections_per_user:
            most = limits.max_connections_per_user
            bounds.append((b"u" + user, most, messages.too_many_of_user(user, most), "user"))
        if limits.max_connections_per_database:
            most = limits.max_connections_per_database
            bounds.append((b"d" + database, most, messages.too_many_to_database(database, most), "database"))
        return bounds

    def left(self, names: tuple[bytes, ...]) -> None:
        """A session is over that was counted under these names."""
        self._here -= 1
        for name in names:
            self._places.leave(name)

    # -- memory --------------------------------------------------------------------------------------

    def look_at_memory(self) -> None:
        """Compare this process's memory with its limit; to be called every second or so."""
        most = self.limits.max_memory
        self._memory_full = bool(most) and resident() > most * 1e6

    # -- sockets -------------------------------------------------------------------------------------

    def tune(self, sock: socket.socket | None) -> None:
        """Find out about peers that vanish without a word, and let no small message wait.

        asyncio does the latter only for sockets that name their protocol, and uvloop always.
        """
        if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limits = self.limits
        if not limits.keepalive_idle:
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
        for option, value in (
            (idle, limits.keepalive_idle),
            ("TCP_KEEPINTVL", limits.keepalive_interval),
            ("TCP_KEEPCNT", limits.keepalive_count),
        ):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def hit_message(self) -> None:
        """Count a message that was too long."""
        self._hit("message")

    def _hit(self, limit: str) -> None:
        self._counters.limits_hit[limit] += 1
        self._counters.connections_refused += 1


def resident() -> int:
    """Return the memory of this process in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0
