"""One question on its way to the learner and back: clocks, progress, giving up.

Whoever asks hears of it exactly once, and never while it is still asking; after `give_up` not at all.

A client that is gone waits for nothing.  Its end of stream alone does not tell: it may have shut down one
direction and still read.  So from then on it gets a message every now and then that concerns nobody, a
ParameterStatus: the kernel of a client that is gone answers with a reset, which ends the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from proxy.interface.questions import Question
from proxy.interface.records import RefusalError
from proxy.session.adaptation import Consult
from proxy.session.calling import notice_message
from proxy.wire.backend import ParameterStatus

_PATIENCE: Final = 0.3  # seconds for an answer before the server is kept busy
_KNOCK_EVERY: Final = 1.0  # seconds
_KNOCK: Final = ParameterStatus(b"ruvector.working", b"on").encode()


class Consultation:
    """Asks one question.

    Parameters
    ----------
    write
        Takes bytes for the client: notices about progress, where it wants them.
    lose_patience
        Called when the answer takes its time.
    answered
        Called with the answer or a RefusalError.
    """

    def __init__(
        self,
        question: Question,
        write: Callable[[bytes], None],
        lose_patience: Callable[[], None],
        answered: Callable[[object], None],
    ) -> None:
        self._question = question
        self._write = write
        self._answered = answered
        self._over = False
        self._withdraw: Callable[[], None] = lambda: None
        loop = asyncio.get_running_loop()
        self._timers = [loop.call_later(_PATIENCE, lose_patience)]
        if question.timeout:
            self._timers.append(loop.call_later(question.timeout, self._too_long))

    def begin(self, consult: Consult) -> None:
        """Ask."""
        loop = asyncio.get_running_loop()
        self._withdraw = consult(
            self._question, self._told, lambda outcome: _discard(loop.call_soon(self._finish, outcome))
        )

    def give_up(self) -> None:
        """Nobody waits for the answer any more."""
        if not self._over:
            self._end()
            self._withdraw()

    def knock(self) -> None:
        """The client's stream has ended: find out whether it still reads."""
        if not self._over:
            self._write(_KNOCK)
            self._timers.append(asyncio.get_running_loop().call_later(_KNOCK_EVERY, self.knock))

    def _told(self, text: str) -> None:
        if self._question.wants_notices and not self._over:
            self._write(notice_message(text))

    def _too_long(self) -> None:
        """The client's statement_timeout is over."""
        self._withdraw()
        self._finish(RefusalError("57014", "canceling statement due to statement timeout"))

    def _finish(self, outcome: object) -> None:
        if not self._over:
            self._end()
            self._answered(outcome)

    def _end(self) -> None:
        self._over = True
        for timer in self._timers:
            timer.cancel()


def _discard(handle: asyncio.Handle) -> None:
    """The handle is not needed: what it calls looks for itself whether it is still wanted."""
