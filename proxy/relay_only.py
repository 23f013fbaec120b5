"""The kill switch: thrown, the proxy is a pure relay at once; thrown back, it goes on where it was.

While it is thrown nothing is recognised, put in force, recorded or measured.  Statements reach the server
byte for byte, except for those that call the proxy by its name (`ruvector_...()`): they ask for it, and one
of them is this switch.

    configuration   learning.relay_only          holds it, whatever else is said
    signal          SIGUSR1 throws it, SIGUSR2 throws it back, to the supervisor
    HTTP            POST /relay-only             needs admin.token
    SQL             ruvector_relay_only(true)    a superuser, or a member of sql.manager

Rules
-----
- The supervisor knows; workers and learner are told, and told again when they start.
- What was thrown by hand survives a restart: it is noted in a file of the state directory, not in the
  configuration.  A file that cannot be written is no reason not to throw it.
- Nothing waits for it: a worker does not ask, it has an attribute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

FILE = "relay-only"
"""In the state directory, while the switch is thrown; holds by whom."""


class Follower:
    """A child's end: `on` is how it is; `told` hears of each change, `tell` passes a client's wish on."""

    def __init__(self, tell: Callable[[bool, str], None] = lambda on, by: None) -> None:
        self.on = False
        self.tell = tell
        self.told: Callable[[bool], None] = lambda on: None

    def put(self, on: bool) -> None:
        """The supervisor has said how it is."""
        self.on = on
        self.told(on)


class KillSwitch:
    """The supervisor's knowledge of it; `told` is called with each change of what holds."""

    def __init__(self, state: Path, *, configured: bool, told: Callable[[bool], None]) -> None:
        self._file = state / FILE
        self._configured = configured
        self._told = told
        self._by = _read(self._file)
        if self.on:
            logger.warning("the proxy is a pure relay: %s", self.why)

    @property
    def on(self) -> bool:
        """Whether the proxy is a pure relay."""
        return self._configured or self._by is not None

    @property
    def why(self) -> str:
        """Who wants it so, in words; empty where nobody does."""
        if self._by is not None:
            return self._by
        return "learning.relay_only in the configuration" if self._configured else ""

    def configure(self, wanted: bool) -> None:
        """The configuration says something else now."""
        before, self._configured = self.on, wanted
        self._tell(before)

    def throw(self, wanted: bool, by: str) -> None:
        """Throw it, or throw it back; `by` says who, for people."""
        before = self.on
        self._by = by if wanted else None
        try:
            if wanted:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._file.write_text(by, encoding="utf-8")
            else:
                self._file.unlink(missing_ok=True)
        except OSError as error:
            logger.error("a restart will not know of the kill switch: %s", error)
        if not wanted and self._configured:
            logger.warning("the kill switch stays thrown: learning.relay_only in the configuration holds it")
        self._tell(before, by)

    def _tell(self, before: bool, by: str = "the configuration") -> None:
        if self.on is before:
            return
        if self.on:
            logger.warning("the proxy is a pure relay from now on: %s", by)
        else:
            logger.warning("the proxy recognises, adapts and learns again: %s", by)
        self._told(self.on)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace") or "a file without words"
    except OSError:
        return None
