"""The store keeps what it was given, stays bounded and private, and never stands in the way."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from learning import sqlite_file
from learning import store as module
from learning.records import (
    Arm,
    ArmResult,
    ContextPolicy,
    Label,
    QueryPolicy,
    Snapshot,
    Template,
    TemplatePolicy,
    Trajectory,
    Trust,
    Value,
    is_hashed,
)
from learning.sqlite_file import FILE, SCHEMA_VERSION, Kept, StoredTemplate, hand_in, open_file
from learning.store import Store

VECTOR = b"\x00\x00\x80?" * 8
SECRET = b"Entenhausen"
TEMPLATE = Template("k1", "db", "u", None, "SELECT 1", "SELECT 1", (), (), "items", "embedding", "<->")
ARM = Arm("as is", (), "as-is")


def label(context: str = f"10\x1f{SECRET.decode()}", template: str = "k1", timestamp: float = 1.0) -> Label:
    results = {"exact": ArmResult(1.0, 10, 2.5)}
    return Label(template, context, timestamp, VECTOR, 10, 10, results, "as is", True)


def trajectory(template: str = "k1") -> Trajectory:
    return Trajectory(
        b"q" * 16,
        template,
        2.0,
        VECTOR,
        10,
        0,
        (None, Value(0, SECRET)),
        "as is",
        (),
        Trust.OBSERVE,
        0,
        10,
        1.0,
        2.0,
    )


def snapshot(version: int = 7) -> Snapshot:
    query = QueryPolicy(8, VECTOR, b"", b"", (), (), 1.0, 8.0, 20, 0.1, 0.5)
    contexts = {"10": ContextPolicy(0, 1.0, 5), f"10\x1f{SECRET.decode()}": ContextPolicy(0, 1.0, 5)}
    policy = TemplatePolicy(
        "k1", "public.items", Trust.CONTEXT, "r", 0.98, (ARM,), (0, 25), (1,), 0, contexts,
        selectivity={SECRET.decode(): 0.5}, query=query,
    )  # fmt: skip
    return Snapshot(version, 3.0, {"k1": policy})


async def written(directory: Path, *, anonymize: bool = False, **records: object) -> Kept:
    """Write into a new store, close it, and return what another one reads."""
    store = Store(directory, anonymize=anonymize)
    await store.open()
    await store.save(**records)  # type: ignore[arg-type]
    await store.close()
    return await read(directory, anonymize=anonymize)


async def read(directory: Path, *, anonymize: bool = False) -> Kept:
    store = Store(directory, anonymize=anonymize)
    kept = await store.open()
    await store.close()
    return kept


def content(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.iterdir())


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    kept = asyncio.run(
        written(
            tmp_path / "a" / "b",
            templates=[StoredTemplate(TEMPLATE, "refused")],
            labels=[label(), label("10\x1fother")],
            trajectories=[trajectory()],
            snapshot=snapshot(),
        )
    )
    assert kept.templates == [StoredTemplate(TEMPLATE, "refused")]
    assert kept.labels == {"k1": [label(), label("10\x1fother")]}
    assert kept.trajectories == {"k1": [trajectory()]}
    assert (kept.snapshot, kept.version) == (snapshot(), 7)


def test_committed_records_survive_without_close(tmp_path: Path) -> None:
    async def scenario() -> Kept:
        store = Store(tmp_path)
        await store.open()
        await store.save(labels=[label()])
        kept = await read(tmp_path)  # as after kill -9: the first connection was never closed
        await store.close()
        return kept

    assert asyncio.run(scenario()).labels == {"k1": [label()]}


def test_files_are_private(tmp_path: Path) -> None:
    async def scenario() -> list[int]:
        store = Store(tmp_path / "state")
        await store.open()
        await store.save(labels=[label()])
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()]
        await store.close()
        return modes

    modes = asyncio.run(scenario())
    assert len(modes) >= 2  # the database and its write-ahead log
    assert set(modes) == {0o600}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage", [b"not a database at all, but long enough to be read as one" * 40, b"SQLite format 3\0xx"]
)
def test_damaged_file_is_set_aside_and_learning_starts_anew(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(damage)
    kept = asyncio.run(written(tmp_path, labels=[label()]))
    assert kept.labels == {"k1": [label()]}
    (aside,) = [path for path in tmp_path.iterdir() if ".aside-" in path.name]
    assert aside.read_bytes() == damage
    assert "learning starts anew" in caplog.text
    assert aside.name in caplog.text


def test_file_of_another_schema_version_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(written(tmp_path, labels=[label()]))
    database = sqlite3.connect(tmp_path / FILE)
    database.execute("PRAGMA user_version = 99")
    database.close()
    assert asyncio.run(read(tmp_path)) == Kept()
    assert "schema version 99" in caplog.text


FIRST_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE templates (key TEXT PRIMARY KEY, seen REAL NOT NULL, off TEXT, body BLOB NOT NULL);
CREATE TABLE labels (id INTEGER PRIMARY KEY, template TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX labels_template ON labels (template, id);
CREATE TABLE trajectories (id INTEGER PRIMARY KEY, template TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX trajectories_template ON trajectories (template, id);
CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, body BLOB NOT NULL);
PRAGMA user_version = 1;
"""
"""As version 0.1 of the program made it."""


def test_file_of_the_first_schema_is_brought_up_to_date_with_all_it_holds(tmp_path: Path) -> None:
    pack = msgspec.msgpack.encode
    database = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    database.executescript(FIRST_SCHEMA)
    database.execute("INSERT INTO templates VALUES ('k1', 1, NULL, ?)", (pack(TEMPLATE),))
    for one in (label(timestamp=1.0), label(timestamp=2.0), label(timestamp=2.0)):
        database.execute("INSERT INTO labels (template, body) VALUES ('k1', ?)", (pack(one),))
    database.execute("INSERT INTO labels (template, body) VALUES ('k1', x'c1')")
    database.execute("INSERT INTO trajectories (template, body) VALUES ('k1', ?)", (pack(trajectory()),))
    database.execute("INSERT INTO snapshot VALUES (1, 7, ?)", (pack(snapshot()),))
    database.execute("INSERT INTO meta VALUES ('note:world:k1', x'01')")
    database.close()
    (tmp_path / FILE).chmod(0o644)

    kept = asyncio.run(read(tmp_path))
    assert kept.templates == [StoredTemplate(TEMPLATE)]
    assert kept.labels == {"k1": [label(timestamp=1.0), label(timestamp=2.0)]}  # the same one twice is one
    assert kept.trajectories == {"k1": [trajectory()]}
    assert (kept.snapshot, kept.notes) == (snapshot(), {"world:k1": b"\x01"})
    assert asyncio.run(read(tmp_path)) == kept  # and it stays so
    database = sqlite3.connect(tmp_path / FILE)
    assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    database.close()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    assert not [path for path in tmp_path.iterdir() if ".aside-" in path.name]


def test_step_that_is_interrupted_leaves_the_older_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    database.executescript(FIRST_SCHEMA)
    database.execute(
        "INSERT INTO labels (template, body) VALUES ('k1', ?)", (msgspec.msgpack.encode(label()),)
    )
    database.close()
    monkeypatch.setattr(sqlite_file, "label_id", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        open_file(tmp_path / FILE)
    monkeypatch.undo()
    assert asyncio.run(read(tmp_path)).labels == {"k1": [label()]}


class Interrupted:
    def __call__(self, label: Label) -> bytes:
        raise KeyboardInterrupt


def test_old_labels_and_trajectories_are_deleted(tmp_path: Path) -> None:
    now = time.time()
    recent = [label(timestamp=now - n) for n in range(3)]

    async def scenario() -> Kept:
        store = Store(tmp_path)
        await store.open()
        await store.save(labels=[*recent, label(timestamp=now - 7200)], trajectories=[trajectory()])
        await store.close()
        store = Store(tmp_path, max_age=3600.0)
        kept = await store.open()
        await store.close()
        return kept

    kept = asyncio.run(scenario())
    assert kept.labels == {"k1": recent}
    assert not kept.trajectories


def test_store_that_is_too_large_loses_its_oldest_labels_and_the_file_becomes_smaller(tmp_path: Path) -> None:
    many = [msgspec.structs.replace(label(timestamp=float(n)), vector=bytes(2000)) for n in range(2000)]

    async def scenario() -> tuple[int, Kept]:
        store = Store(tmp_path)
        await store.open()
        await store.save(labels=many)
        await store.close()
        before = (tmp_path / FILE).stat().st_size
        store = Store(tmp_path, max_size=1e6)
        kept = await store.open()
        await store.close()
        return before, kept

    before, kept = asyncio.run(scenario())
    after = (tmp_path / FILE).stat().st_size
    assert before > 4e6
    assert after <= 1.01e6
    left = kept.labels["k1"]
    assert left == many[-len(left) :]
    assert len(left) >= 200  # the oldest go in steps of 200


def test_what_is_forgotten_is_not_in_any_file_afterwards(tmp_path: Path) -> None:
    async def scenario() -> bytes:
        store = Store(tmp_path)
        await store.open()
        await store.save(labels=[label(), label(timestamp=2.0)], trajectories=[trajectory()])
        assert SECRET in content(tmp_path)
        await store.forget("k1")
        found = content(tmp_path)
        await store.close()
        return found

    found = asyncio.run(scenario())
    assert SECRET not in found
    assert VECTOR not in found


def test_labels_are_handed_to_a_shared_store_once_and_documents_taken_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = Store(tmp_path)
        await store.open()
        await store.save(labels=[label(timestamp=float(n)) for n in range(3)])
        first = await store.unsent(2)
        assert [found.timestamp for _, found in first] == [0.0, 1.0]
        await store.sent([number for number, _ in first])
        assert [found.timestamp for _, found in await store.unsent(9)] == [2.0]
        await asyncio.to_thread(hand_in, tmp_path, b"document")  # another process, meanwhile
        assert await store.handed_in() == [b"document"]
        assert await store.handed_in() == []
        await store.close()

    asyncio.run(scenario())


WRITER = """
import asyncio, sys
from pathlib import Path
from learning.store import Store
from tests.unit.test_store import label, snapshot

async def write() -> None:
    store = Store(Path(sys.argv[1]))
    await store.open()
    for number in range(10_000):
        await store.save(labels=[label(timestamp=float(number))], snapshot=snapshot(number))
        print(number, flush=True)

asyncio.run(write())
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(7)
    for number in range(6):
        directory = tmp_path / str(number)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(rng.random() * 0.3)
            writer.kill()
            acknowledged = int((writer.stdout.read().split() or [b"0"])[-1])
        kept = asyncio.run(read(directory))
        times = [found.timestamp for found in kept.labels["k1"]]
        assert times == [float(n) for n in range(len(times))][-module.LABELS :]
        assert times[-1] in (acknowledged, acknowledged + 1)
        assert kept.snapshot is not None
        assert kept.snapshot.version == times[-1]  # of the same transaction


def test_record_that_does_not_decode_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(written(tmp_path, labels=[label()], snapshot=snapshot()))
    database = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    database.execute("INSERT INTO labels (template, at, body) VALUES ('k1', 1e12, x'c1')")
    database.execute("UPDATE snapshot SET body = x'c1'")
    database.close()
    kept = asyncio.run(read(tmp_path))
    assert kept.labels == {"k1": [label()]}
    assert (kept.snapshot, kept.version) == (None, 7)  # versions go on growing all the same
    assert "a stored Label cannot be read" in caplog.text


def test_store_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LABELS", 5)
    monkeypatch.setattr(module, "TRAJECTORIES", 3)
    monkeypatch.setattr(module, "TEMPLATES", 2)
    many = [label(timestamp=float(i)) for i in range(9)]
    kept = asyncio.run(
        written(tmp_path, labels=[*many, label(template="k2")], trajectories=[trajectory()] * 9)
    )
    assert kept.labels == {"k1": many[-5:], "k2": [label(template="k2")]}
    assert len(kept.trajectories["k1"]) == 3

    async def too_many_templates() -> Kept:
        store = Store(tmp_path)
        await store.open()
        for key in ("k1", "k2", "k3"):
            template = Template(key, "db", "u", None, "", "", (), (), "t", "c", "<->")
            await store.save(templates=[StoredTemplate(template)])
            time.sleep(0.001)  # noqa: ASYNC251  the oldest goes; the clock has to move
        await store.close()
        return await read(tmp_path)

    kept = asyncio.run(too_many_templates())
    assert [stored.template.key for stored in kept.templates] == ["k2", "k3"]
    assert set(kept.labels) == {"k2"}


def test_forget_leaves_nothing_of_a_template(tmp_path: Path) -> None:
    async def scenario() -> Kept:
        store = Store(tmp_path)
        await store.open()
        await store.save(
            templates=[StoredTemplate(TEMPLATE)],
            labels=[label(), label(template="k2")],
            trajectories=[trajectory()],
        )
        await store.forget("k1")
        await store.close()
        return await read(tmp_path)

    kept = asyncio.run(scenario())
    assert not kept.templates
    assert not kept.trajectories
    assert set(kept.labels) == {"k2"}


def test_anonymized_store_holds_no_vector_and_no_value(tmp_path: Path) -> None:
    records = {
        "labels": [label(), label(timestamp=2.0), label("10")],
        "trajectories": [trajectory()],
        "snapshot": snapshot(),
    }
    kept = asyncio.run(written(tmp_path, anonymize=True, **records))
    assert SECRET not in content(tmp_path)
    assert VECTOR not in content(tmp_path)
    first, second, plain = kept.labels["k1"]
    assert first.context == second.context != label().context  # equal values stay equal
    assert plain.context == "10"
    assert first.vector is None
    assert first.results == label().results
    assert kept.snapshot is not None
    contexts = kept.snapshot.templates["k1"].contexts
    assert {"10"} == {context for context in contexts if not is_hashed(context)}
    assert first.context in contexts  # so that the value's own settings are found by its hash


def test_switching_to_anonymize_hashes_what_is_there_already(tmp_path: Path) -> None:
    asyncio.run(written(tmp_path, labels=[label()], trajectories=[trajectory()], snapshot=snapshot()))
    assert SECRET in content(tmp_path)
    kept = asyncio.run(read(tmp_path, anonymize=True))
    assert SECRET not in content(tmp_path)
    assert VECTOR not in content(tmp_path)
    (hashed,) = kept.labels["k1"]
    assert hashed.vector is None
    assert SECRET.decode() not in hashed.context


def test_hashes_differ_between_installations(tmp_path: Path) -> None:
    one = asyncio.run(written(tmp_path / "1", anonymize=True, labels=[label()]))
    two = asyncio.run(written(tmp_path / "2", anonymize=True, labels=[label()]))
    assert one.labels["k1"][0].context != two.labels["k1"][0].context


def test_unusable_directory_is_reported_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")

    async def scenario() -> Kept:
        store = Store(tmp_path / "file" / "state")
        kept = await store.open()
        await store.save(labels=[label()])
        await store.forget("k1")
        await store.close()
        return kept

    assert asyncio.run(scenario()) == Kept()
    assert len([r for r in caplog.records if "learning goes on in memory" in r.message]) == 1
