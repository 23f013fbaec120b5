"""The configuration as it is read from its file, with the files that it names: at the start and at a reload.

`read` refuses what would leave a proxy without users or certificates; `Reloader` lets a running one follow
its file.  It holds to one rule: **the whole file or nothing**.  A file with a mistake in it, or with another
value for an option that takes a restart, leaves the configuration in force as it is, and says so once.

It looks at the file four times a second and waits until it has stayed the same from one look to the next: a
file that is written in place is empty for a moment, and an empty file is a valid configuration.  SIGHUP
does not wait: whoever sends it says that the file is complete.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from config.changes import changes
from config.loader import ConfigError, load
from config.schema import Auth, Config

LOOK_SECONDS: Final = 0.25

log = logging.getLogger(__name__)

Signature = tuple[int, int, int] | None
"""Inode, size and time of change (nanoseconds) of the file; None where it is not there."""

Apply = Callable[[Config], None]
"""Puts a configuration in force."""


class FilesError(Exception):
    """A file that the configuration names cannot be used; the message has a line for each mistake."""


REFUSED: Final = (ConfigError, FilesError)
"""What `read` raises."""


def read(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Return the configuration; the users and certificates that it names can be used.

    Raises
    ------
    ConfigError
        It cannot be used; the message holds every mistake.
    FilesError
        A file that it names cannot be used.
    """
    config = load(path, environment)
    _check_users_file(config.auth)
    _check_certificates(config)
    return config


def _check_users_file(auth: Auth) -> None:
    if auth.mode == "relay" or auth.users_file is None:
        return
    from proxy.auth.lookup import read_users
    from proxy.auth.users import UsersFileError

    try:
        read_users(auth.users_file)
    except UsersFileError as error:
        raise FilesError("\n  ".join([f"auth.users_file {auth.users_file}:", *error.problems])) from error


def _check_certificates(config: Config) -> None:
    if config.listen.effective_tls_mode == config.upstream.effective_sslmode == "disable":
        return
    from proxy.net.certificates import problems

    found = problems(config)
    if found:
        raise FilesError("\n  ".join(["certificates cannot be used:", *found]))


class Reloader:
    """Keeps a running proxy's configuration that of its file.

    Parameters
    ----------
    config
        In force.
    path
        The file; None: there is none, and only the environment and defaults hold.
    read
        Reads it, as `read` does.
    apply
        Puts the new one in force.
    """

    def __init__(
        self,
        config: Config,
        path: Path | None,
        read: Callable[[], Config],
        apply: Apply,
    ) -> None:
        self._config = config
        self._path = path
        self._read = read
        self._apply = apply
        self._seen = self._signature()
        self._busy = asyncio.Lock()
        self.refused = ""
        """Why the file is not in force; empty: it is."""

    async def watch(self) -> None:
        """Follow the file until cancelled."""
        changing = False
        while self._path is not None:
            await asyncio.sleep(LOOK_SECONDS)
            now = self._signature()
            if now != self._seen:
                self._seen, changing = now, True
            elif changing:
                changing = False
                await self.reload()

    async def reload(self, *, asked: bool = False) -> None:
        """Read the file and put it in force; `asked`: somebody waits for an answer, whatever it is."""
        async with self._busy:
            try:
                config = await asyncio.to_thread(self._read)
            except REFUSED as error:
                self._refuse(str(error), asked=asked)
                return
            found = changes(self._config, config)
            fixed = [change for change in found if not change.live]
            if fixed:
                words = "; ".join(map(str, fixed))
                reason = f"a restart is needed for {words} (SIGQUIT restarts without losing a connection)"
                self._refuse(reason, asked=asked)
                return
            self.refused = ""
            if found:
                log.info("configuration reloaded: %s", "; ".join(map(str, found)))
                self._config = config
                self._apply(config)
            elif asked:
                log.info("configuration read again: nothing has changed")

    def _refuse(self, reason: str, *, asked: bool) -> None:
        if reason != self.refused or asked:
            log.error("configuration not reloaded, the one in force stays as it is: %s", reason)
        self.refused = reason

    def _signature(self) -> Signature:
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns
