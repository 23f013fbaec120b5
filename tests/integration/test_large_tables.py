"""Tables on which an exact search is dear: several queries share one pass, or a sample of the rows has to do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bench.embedded import EmbeddedPostgres
from learning import labelling
from learning.probe import Measured, measure_together
from learning.records import Label
from learning.sqlite_file import read
from tests.integration.learner_kit import (
    UNFILTERED,
    clustered,
    configuration,
    create_items,
    learner,
    query,
    template,
)

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

QUERIES = clustered(300) + 0.3


def learned(
    postgres: EmbeddedPostgres, database: str, state: Path, socket: Path, **sections: Any
) -> list[Label]:
    """Let a learner arrive at a policy; return the labels that it keeps."""
    found = template(UNFILTERED, database)

    async def scenario() -> None:
        async with learner(configuration(postgres, state, **sections), socket) as worker:
            await worker.announce(found, [query(found, vector) for vector in QUERIES])
            policy = await worker.policy(found)
            assert policy.contexts["10"].expected_recall >= 0.95
            await asyncio.sleep(1.5)

    asyncio.run(scenario())
    return read(state).labels[found.key]


def test_queries_share_a_pass_where_an_exact_search_is_dear_and_audits_go_on(
    postgres: EmbeddedPostgres,
    database: str,
    tmp_path: Path,
    socket_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create_items(postgres.dsn(database))
    passes: list[int] = []

    async def counted(*arguments: Any, **options: Any) -> list[Measured]:
        measured = await measure_together(*arguments, **options)
        passes.append(len(measured))
        return measured

    monkeypatch.setattr(labelling, "_TOGETHER_FROM", 0.0)
    monkeypatch.setattr(labelling, "measure_together", counted)
    dsn = {"dsn": postgres.uri()}
    labels = learned(postgres, database, tmp_path, socket_path, learner={**dsn, "batch": 6})
    assert max(passes) == 6
    assert sum(passes) >= 0.6 * len(labels)  # the others were thorough, or the first
    first = labels[:80]  # later there are no new queries to audit: those that are targeted go on alone
    assert 0.35 < sum(label.uniform for label in first) / len(first) < 0.65
    assert all(label.sampled == 0.0 for label in labels)


def test_a_table_that_is_too_large_is_learned_about_by_a_sample_of_its_rows(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path, socket_path: Path
) -> None:
    create_items(postgres.dsn(database), rows=20_000)
    dsn = {"dsn": postgres.uri()}
    labels = learned(postgres, database, tmp_path, socket_path, learner={**dsn, "exact_rows": 10_000})
    assert all(0.4 < label.sampled < 0.6 for label in labels)
    assert {label.results["exact"].recall for label in labels} == {1.0}
    ladder = [label.results["ef=40"].recall for label in labels if "ef=40" in label.results]
    assert len(ladder) >= 40
    assert 0.3 < sum(ladder) / len(ladder) < 1.0
