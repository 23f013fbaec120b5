"""Lets the wall clock of the proxy's processes jump: the file that CHAOS_CLOCK names holds the seconds to add."""

import os
import time

_FILE = os.environ.get("CHAOS_CLOCK", "")
_real, _monotonic = time.time, time.monotonic
_known = [0.0, 0.0]  # offset, when it was read


def _jumping() -> float:
    if _monotonic() - _known[1] > 0.05:
        _known[1] = _monotonic()
        try:
            with open(_FILE, encoding="ascii") as file:
                _known[0] = float(file.read() or 0.0)
        except (OSError, ValueError):
            pass
    return _real() + _known[0]


if _FILE:
    time.time = _jumping
