"""A unix socket is taken only where nobody uses it, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from proxy.net.listening import SocketInUseError, UnixListener


@pytest.fixture
def path() -> Iterator[Path]:
    with TemporaryDirectory(prefix="rvl-") as name:  # short: a unix socket's path may have 107 bytes
        yield Path(name) / ".s.PGSQL.6432"


def listener(path: Path, mode: int = 0o777) -> UnixListener:
    return UnixListener(path, mode, 10)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o600])
def test_it_accepts_with_the_rights_asked_for_and_is_gone_afterwards(path: Path, mode: int) -> None:
    made = listener(path, mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert Path(f"{path}.lock").read_text() == f"{os.getpid()}\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    made.close()
    assert list(path.parent.iterdir()) == []


def test_a_live_socket_is_not_taken_from_anybody(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        before = path.stat()
        with pytest.raises(SocketInUseError, match="another server accepts connections there"):
            listener(path)
        assert os.path.samestat(path.stat(), before)


def test_a_lock_that_is_held_is_respected(path: Path) -> None:
    """Even where the socket is already gone, as while a proxy ends."""
    made = listener(path)
    path.unlink()
    with pytest.raises(SocketInUseError, match="another process holds the lock file"):
        listener(path)
    made.close()
    listener(path).close()


def test_what_a_crash_left_behind_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    Path(f"{path}.lock").write_text("999999\n")
    made = listener(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    made.close()
    assert list(path.parent.iterdir()) == []


def test_a_file_of_another_kind_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(OSError, match="there is a file of that name that is no socket"):
        listener(path)
    assert path.read_text() == "precious"


def test_a_directory_that_is_missing(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        listener(path.parent / "none" / path.name)
