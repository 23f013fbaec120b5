"""Every script of raw messages gives the same replies through the proxy, as it is and with injection forced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.embedded import EmbeddedPostgres
from tests.differential import notation
from tests.differential.comparison import WAYS, between, difference
from tests.differential.world import Server, World, world

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
SCRIPTS = sorted([*HERE.glob("scripts/*.script"), *HERE.glob("regressions/*.script")])


@pytest.fixture(scope="module")
def there(postgres: EmbeddedPostgres) -> Iterator[World]:
    with world(Server(postgres.host, postgres.port, postgres.user), "scripts") as there:
        yield there


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_difference(there: World, path: Path, way: str) -> None:
    found = difference(there, path.read_text(), way)
    assert found is None, found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_server_does_what_the_script_says(there: World, path: Path) -> None:
    """Else two equal failures would count as no difference.

    On a busy machine a server that is slow is taken for one that has settled, and the script goes on too early.
    """
    steps = notation.read(path.read_text())
    problems = (there.play(steps, "direct").seen.problem for _ in range(5))
    assert any(problem is None for problem in problems)


def test_both_proxies_were_at_work(there: World) -> None:
    for proxy in (there.normal, there.forced):
        assert sum(proxy.counters.adapted.values()) > 50
        assert proxy.counters.injection_errors == 0


def test_a_difference_is_found(there: World) -> None:
    """The runner itself: a setting that leaks, a reply too many, a row that was not written."""
    shown = "Query SHOW hnsw.ef_search\n<< T D C Z\n"
    direct = there.play(notation.read(shown), "direct")
    assert difference(there, "connect options=-c~hnsw.ef_search=54\n" + shown, "normal") is None
    for other in (
        "connect options=-c~hnsw.ef_search=54\n" + shown,
        shown + "Sync\n<< Z\n",
        "Query INSERT INTO t VALUES (1, 'x')\n<< C Z\n",
    ):
        assert between(direct, there.play(notation.read(other), "normal")) is not None
