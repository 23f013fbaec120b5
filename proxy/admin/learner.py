"""What the learner knows, for the dashboard: asked at most once a second, however many pages are open."""

from __future__ import annotations

import asyncio
import time

from proxy.admin.asking import Ask

QUESTION = b'{"kind": "overview"}'

_MAX_AGE = 1.0  # seconds


class LearnerOverview:
    """Asks through `ask`, and remembers the answer for a second."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._answer = b""

    async def get(self) -> bytes:
        """Return a JSON object (`learning.overview`).

        Raises
        ------
        NoAnswerError
            The learner does not answer.
        """
        async with self._lock:
            if time.monotonic() - self._asked_at > _MAX_AGE:
                self._answer = await self._ask(QUESTION)
                self._asked_at = time.monotonic()
            return self._answer
