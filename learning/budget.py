"""How much measuring is allowed: a token bucket of database time, and a pace that gives way under load.

The bucket holds *credit*.  It starts full of `starting` seconds, so that a new table is tuned within minutes,
and then gains `rate` seconds per second: in the long run measuring uses that share of one connection.  A
measurement is admitted while there is any credit at all and charged afterwards, because its duration is not
known before; the bucket may thus go below zero by one measurement, and waits until that is paid back.

The pace answers a server that is busy with real work.  It is a multiple: after a measurement of t seconds the
learner rests for ``pace * t``.  Signs of a busy server double the pace (up to 1/16 of the time measuring),
quiet ones halve it.  It never stops altogether: a server that is always busy has the most to gain.

Nothing here reads a clock: the time, in seconds of any steady clock, is an argument.
"""

from __future__ import annotations

import statistics
from collections import deque

_SLOW = 3.0  # times the usual duration: the server has other things to do
_REMEMBERED = 50
_RECENT = 3
_MAX_PACE = 15.0


class TokenBucket:
    """Credit for measuring, in seconds of database time.

    Parameters
    ----------
    rate
        Seconds gained per second; 0 means that only the starting credit is ever spent.
    starting
        Seconds at the beginning, and the most that can be saved up (at least one second).
    """

    def __init__(self, rate: float, starting: float, now: float) -> None:
        if rate < 0 or starting < 0:
            raise ValueError(f"rate and starting credit cannot be negative: {rate}, {starting}")
        self._rate = rate
        self._capacity = max(starting, 1.0)
        self._credit = starting
        self._updated = now

    def set_rate(self, rate: float, now: float) -> None:
        """Gain `rate` seconds per second from now on."""
        self.credit(now)
        self._rate = rate

    def credit(self, now: float) -> float:
        """Return the seconds that may be spent; negative while a long measurement is being paid back."""
        gained = self._rate * max(0.0, now - self._updated)
        self._credit = max(self._credit, min(self._capacity, self._credit + gained))
        self._updated = max(now, self._updated)
        return self._credit

    def grant(self, seconds: float, now: float) -> None:
        """Add credit out of turn, because what was known has to be measured anew; never above the most."""
        self._credit = max(self.credit(now), min(self._capacity, max(0.0, self._credit) + seconds))

    def spend(self, seconds: float, now: float) -> None:
        """Charge a measurement that has been made."""
        self.credit(now)
        self._credit -= seconds

    def wait(self, now: float) -> float:
        """Return the seconds until a measurement is admitted: 0 now, infinity never."""
        credit = self.credit(now)
        if credit > 0:
            return 0.0
        return (1e-3 - credit) / self._rate if self._rate else float("inf")


class Pace:
    """The rest between two measurements, as a multiple of the time that the last one took.

    Two signs of a busy server are used: measurements of the same template that take much longer than usual,
    and more sessions at work than there are processors.
    """

    def __init__(self, processors: int) -> None:
        self._processors = max(1, processors)
        self._durations: dict[str, deque[float]] = {}
        self.pace = 0.0

    def observe(self, template: str, milliseconds: float, active_sessions: int) -> float:
        """Note one measurement (the milliseconds of its exact search) and return the new pace."""
        busy = self._slow(template, milliseconds) or active_sessions > 2 * self._processors
        self.pace = (
            min(_MAX_PACE, 2 * self.pace + 0.5) if busy else self.pace / 2 - (0.01 if self.pace < 0.1 else 0)
        )
        self.pace = max(0.0, self.pace)
        return self.pace

    def forget(self, template: str) -> None:
        """Drop what is known of a template."""
        self._durations.pop(template, None)

    def _slow(self, template: str, milliseconds: float) -> bool:
        seen = self._durations.setdefault(template, deque(maxlen=_REMEMBERED))
        seen.append(milliseconds)
        if len(seen) < 10:
            return False
        recent = statistics.median(list(seen)[-_RECENT:])
        return recent > _SLOW * statistics.median(seen)
