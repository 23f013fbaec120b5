"""What a worker counts: plain integers, raised on the hot path, read once a second by the metrics.

Nothing here is locked or thread-safe; one event loop owns it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Totals since the worker started."""

    connections_opened: int = 0
    connections_closed: int = 0
    connections_refused: int = 0  # upstream unreachable, startup garbage
    limits_hit: Counter[str] = field(default_factory=Counter)  # by limit, see proxy.net.admission
    logins_failed: Counter[str] = field(default_factory=Counter)  # by cause
    statements: int = 0  # Query messages and Executes
    recognised: Counter[str] = field(default_factory=Counter)  # by table
    adapted: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (table, arm)
    left_alone: Counter[str] = field(default_factory=Counter)  # recognised, not adapted, by reason
    injection_errors: int = 0
    trajectories_sent: int = 0
    trajectories_dropped: int = 0
    policy_version: int = 0
    learner_connected: int = 0  # 1 or 0
