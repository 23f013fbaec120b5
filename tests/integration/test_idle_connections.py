"""What an idle connection costs: the small form of ``python -m bench.relay.idle``."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.relay import idle
from bench.relay.results import PROXY, Results
from bench.relay.ways import proxy

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

CONNECTIONS = 1_500
MOST_KILOBYTES = 30.0


def test_an_idle_connection_takes_little_and_is_still_served(tmp_path: Path) -> None:
    results = Results()
    size = min(CONNECTIONS, idle.allow_files())
    with idle.stub() as port, proxy(PROXY, "127.0.0.1", port, tmp_path) as way:
        idle.measure(way, size, results)  # asks every one of them again at the end
    each = results.get(idle.GROUP, f"{size:,} connections", "kilobytes", PROXY)
    assert 0.5 < each[0] <= MOST_KILOBYTES
