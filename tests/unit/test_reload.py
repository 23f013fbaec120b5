"""What differs between two configurations, when a running proxy takes it, and what SQL has set over it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from config.changes import changes
from config.loader import load
from config.schema import Config
from learning.options import Layers
from proxy.configuration import LOOK_SECONDS, Reloader, read

DSN = "postgresql://me:{}@h/db"


def words(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [str(change) for change in changes(Config.model_validate(before), Config.model_validate(after))]


def test_changes_are_named_as_in_the_file() -> None:
    assert words({}, {}) == []
    assert words({"tables": {"a.b": {}}}, {"tables": {}}) == []  # nothing but defaults
    assert words(
        {"learner": {"budget": 0.02}, "tables": {"a.b": {"target_recall": 0.9}}},
        {"learner": {"budget": 0.5}, "tables": {"a.b": {}, "c.d": {"adaptive_search": False}}},
    ) == [
        "learner.budget = 0.5 (was 0.02)",
        'tables."a.b".target_recall = not set (was 0.9)',
        'tables."c.d".adaptive_search = false (was true)',
    ]


def test_no_secret_is_shown() -> None:
    before = {"learner": {"dsn": DSN.format("hunter2")}, "admin": {"token": "0123456789abcdef"}}
    after = {"learner": {"dsn": DSN.format("hunter3")}, "admin": {"token": "fedcba9876543210"}}
    shown = words(before, after)
    assert [each.split(" ")[0] for each in shown] == ["admin.token", "learner.dsn"]
    assert all("another" in each for each in shown)
    assert not any(secret in "".join(shown) for secret in ("hunter", "0123", "3210"))


class Kept:
    """A file, what follows it, and what was put in force."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.write_text("")
        self.taken: list[Config] = []
        self.reloader = Reloader(load(file, {}), file, lambda: read(file, {}), self.taken.append)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "proxy.toml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[learner]\nbudget = 0.5\nbudgt = 1\n", "did you mean learner.budget?"),
        (
            "[learner]\nbudget = 0.5\n[listen]\nport = 1\n",
            "a restart is needed for listen.port = 1 (was 6432)",
        ),
        (
            "[learner]\nbudget = 0.5\n[upstream]\nsslrootcert = 'no.crt'\nsslmode = 'verify-ca'\n",
            "no.crt cannot",
        ),
        ("[learner]\nbudget = 0.5\n[auth]\nmode = 'scram'\nusers_file = 'no.txt'\n", "no.txt"),
        ("[learner", "is not TOML"),
        (None, "cannot be read"),
    ],
)
def test_the_whole_file_or_nothing(
    kept: Kept, text: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept.file.unlink() if text is None else kept.file.write_text(text)
    for _ in range(2):
        asyncio.run(kept.reloader.reload())
    assert kept.taken == []
    assert reason in kept.reloader.refused
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1  # once for the same mistake
    assert "the one in force stays as it is" in errors[0]
    kept.file.write_text("[learner]\nbudget = 0.5\n")
    asyncio.run(kept.reloader.reload())
    assert [config.learner.budget for config in kept.taken] == [0.5]
    assert kept.reloader.refused == ""


def test_who_asks_gets_an_answer(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asyncio.run(kept.reloader.reload(asked=True))
    assert "nothing has changed" in caplog.text
    kept.file.write_text("[learner]\nbudget = 0.5\n")
    asyncio.run(kept.reloader.reload(asked=True))
    assert "configuration reloaded: learner.budget = 0.5 (was 0.02)" in caplog.text


def test_the_file_is_followed_but_not_while_it_is_written(kept: Kept) -> None:
    async def scenario() -> None:
        watching = asyncio.create_task(kept.reloader.watch())
        kept.file.write_text("[learner]\nbudget = 0.5\n")
        async with asyncio.timeout(60):
            while not kept.taken:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for number in range(8):  # written in place, piece by piece: each look finds it changed
            kept.file.write_text("[learner]\nbudget = 0.7\n" + "#" * number)
            await asyncio.sleep(LOOK_SECONDS / 5)
        async with asyncio.timeout(60):
            while len(kept.taken) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        watching.cancel()

    asyncio.run(scenario())
    assert [config.learner.budget for config in kept.taken] == [0.5, 0.7]


def config(**options: object) -> Config:
    return Config.model_validate({"tables": {"public.items": options}})


def test_what_sql_has_set_wins_and_other_keys_follow_the_file(caplog: pytest.LogCaptureFixture) -> None:
    layers = Layers(config(target_recall=0.9))
    name, note = layers.override("public.items", {"min_samples": 50, "learning": True})
    layers.configure(config(target_recall=0.8, min_samples=70, adaptive_search=False))
    found = layers.config.table("public.items")
    assert (found.target_recall, found.min_samples, found.adaptive_search) == (0.8, 50, False)
    assert [record.message for record in caplog.records] == [
        'tables."public.items".min_samples has no effect: 50 was set from SQL, which wins'
    ]
    other = Layers(config())
    other.restore({name: note, "sql:public.broken": b"\x00", "world:x": b""})
    assert other.config.table("public.items").min_samples == 50
    with pytest.raises(ValueError, match="target_recall"):
        other.override("public.items", {"target_recall": 2.0})
    assert other.config.table("public.items").target_recall == 0.98
