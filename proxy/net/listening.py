"""The unix socket on which clients are accepted: never one that somebody uses, and gone at the end.

Beside the socket stands ``.s.PGSQL.<port>.lock``, as beside PostgreSQL's own.  It is locked (flock) for as
long as this process lives, which no crash can leave behind, and holds its process id, which keeps a
PostgreSQL server that is started later away.

    somebody accepts on the socket              -> refused
    another process holds the lock              -> refused
    a socket is there and nobody accepts        -> left over from a crash: replaced
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import IO

_NOBODY = (errno.ECONNREFUSED, errno.ENOENT)


class SocketInUseError(OSError):
    """Somebody else has the socket."""


class UnixListener:
    """A listening socket at `path`, with `mode` as its rights.

    Raises
    ------
    SocketInUseError
        Somebody else has it.
    OSError
        It cannot be made.
    """

    def __init__(self, path: Path, mode: int, backlog: int) -> None:
        self.path = path
        _refuse_live(path)
        self._lock = _locked(_lock_of(path))
        try:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self.socket = _bound(path, mode, backlog)
        except BaseException:
            self._release()
            raise

    @classmethod
    def adopt(cls, path: Path, listening: socket.socket, lock: int) -> UnixListener:
        """Return the listener that an earlier program of this process has made; `lock` is a descriptor."""
        os.set_inheritable(lock, False)
        listener = cls.__new__(cls)
        listener.path, listener.socket = path, listening
        listener._lock = os.fdopen(lock, "a+", encoding="ascii")
        return listener

    def descriptors(self) -> tuple[int, int]:
        """Return those of the socket and of its lock."""
        return self.socket.fileno(), self._lock.fileno()

    def close(self) -> None:
        """Stop accepting here and remove the files; workers have to close their own copies."""
        self.socket.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._release()

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(_lock_of(self.path))  # while it is locked: who waits for it sees that it is gone
        self._lock.close()


def _refuse_live(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):  # connecting to it would look like nobody accepts
            raise OSError(errno.ENOTSOCK, "there is a file of that name that is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno in _NOBODY:
                return
            raise SocketInUseError(errno.EADDRINUSE, f"it is in use ({error.strerror or error})") from None
    raise SocketInUseError(errno.EADDRINUSE, "another server accepts connections there")


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _locked(path: Path) -> IO[str]:
    """Return the lock file, locked by this process."""
    while True:
        file = path.open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise SocketInUseError(errno.EADDRINUSE, f"another process holds the lock file {path}") from None
        if _is_at(file, path):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()  # its owner has removed it meanwhile


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _bound(path: Path, mode: int, backlog: int) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX)
    try:
        previous = os.umask(0o177)  # nobody else before its rights are set
        try:
            bound.bind(str(path))
        finally:
            os.umask(previous)
        path.chmod(mode)
        bound.listen(backlog)
    except BaseException:
        bound.close()
        raise
    return bound
