"""A few hundred random pipelines; ``make differential`` runs ten thousand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from bench.embedded import EmbeddedPostgres
from tests.differential import notation
from tests.differential.comparison import differences, differs, shrink
from tests.differential.generator import Generator
from tests.differential.world import Server, World, world

pytestmark = [pytest.mark.integration, pytest.mark.slow]

COUNT = 200


@pytest.fixture(scope="module")
def there(postgres: EmbeddedPostgres) -> Iterator[World]:
    with world(Server(postgres.host, postgres.port, postgres.user), "random_scripts") as there:
        yield there


@pytest.mark.timeout(600)
def test_random_pipelines_do_not_differ(there: World) -> None:
    for seed in range(1, COUNT + 1):
        script = Generator(seed).script()
        for way, words in differences(there, script).items():
            pytest.fail(f"seed {seed}, {way}: {words}\n{shrink(script, partial(differs, there, way))}")
    for proxy in (there.normal, there.forced):
        assert sum(proxy.counters.adapted.values()) > COUNT / 2
        assert not proxy.connections


def test_the_generator_is_repeatable_and_its_scripts_can_be_read() -> None:
    words: set[str] = set()
    for seed in range(300):
        script = Generator(seed).script()
        assert script == Generator(seed).script()
        words.update(step.word for step in notation.read(script))
    assert words >= {"Query", "Parse", "Bind", "Describe", "Execute", "Close", "Sync", "Flush", "CopyData"}
    assert words >= {"CopyDone", "CopyFail", "FunctionCall", "Terminate", "settle", "pause", "portions"}


def test_shrinking_keeps_what_matters_and_nothing_else() -> None:
    script = "\n".join(f"Query SELECT {i}" for i in range(40))
    assert shrink(script, lambda text: "SELECT 17" in text and "SELECT 31" in text) == (
        "Query SELECT 17\nQuery SELECT 31\n"
    )
