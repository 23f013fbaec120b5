"""A guard that ends a child process when this process is gone, however it went: SIGKILL included.

A shell waits for the end of a pipe that only this process holds; then it signals the child, waits for it and
removes temporary directories.  The shell has a session of its own, so that Ctrl-C does not end it early.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# $1 = signal, $2 = process id, $3... = directories to remove.
_SCRIPT = """
trap '' HUP INT TERM
cat >/dev/null
signal=$1 pid=$2 n=0
shift 2
kill -s "$signal" "$pid" 2>/dev/null
while kill -0 "$pid" 2>/dev/null && [ $n -lt 300 ]; do sleep 0.1; n=$((n + 1)); done
[ $# -eq 0 ] || rm -rf "$@"
"""


class Guard:
    """Watches over the child `pid`; `release` it before the child is waited for: the number may be reused.

    `identity` holds ``subprocess.Popen``'s arguments user, group and extra_groups.
    """

    def __init__(
        self, pid: int, signal: str, remove: Sequence[Path] = (), identity: dict[str, Any] | None = None
    ) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "guard", signal, str(pid), *map(str, remove)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            **(identity or {}),
        )

    def release(self) -> None:
        """End the guard without any effect on the child.  Idempotent."""
        self._shell.kill()  # before its pipe ends
        self._shell.wait()
        assert self._shell.stdin is not None
        self._shell.stdin.close()
