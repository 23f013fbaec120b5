"""What the log says of queries, and what it never says: passwords, vectors, values."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.learner_kit import DIMENSIONS, create_items, text
from tests.integration.test_serve import Served, serving, until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(400)]

CANARY = "canary-4711"  # a value, a password, a literal
NUMBER = 0.7318274
VECTOR = "[" + ", ".join([str(NUMBER)] * DIMENSIONS) + "]"
SHORT = f"[{NUMBER}, {NUMBER}, {NUMBER}]"
PATIENCE = 90.0


def records(served: Served) -> list[dict[str, Any]]:
    return [json.loads(line) for line in served.log.splitlines()[:-1]]


def messages(served: Served, part: str) -> list[str]:
    return [record["message"] for record in records(served) if part in record["message"]]


def ask_in_every_way(served: Served, database: str) -> int:
    """Send what holds a canary, and what fails with one; return the number of connections."""
    search = "SELECT id FROM items WHERE note = %s ORDER BY embedding <-> %s::vector LIMIT 10"
    with served.connect(database, autocommit=True, cursor_factory=psycopg.ClientCursor) as simple:
        for number in range(20):
            simple.execute(search, [CANARY, VECTOR.replace("[0", f"[{number}")])
    with served.connect(database, autocommit=True) as extended:
        extended.execute("SELECT %s::text", [CANARY])
        for sql, values in (
            (search, [CANARY, SHORT]),  # another number of dimensions
            (search, [CANARY, f"[{CANARY}]"]),
            ("SELECT %s::int", [CANARY]),
            (f"SELECT '{CANARY}' FROM nowhere", []),
            ("SELECT * FROM ruvector_get_search_params('items', %s)", [f"[{CANARY}]"]),
            ("SELECT ruvector_record_feedback('items', %s, ARRAY[1], ARRAY[2])", [VECTOR]),
            (f"SET ruvector.target_recall = '{CANARY}'", []),
        ):
            with contextlib.suppress(psycopg.Error):
                extended.execute(sql, values)
        for number in range(60):
            extended.execute(search, [CANARY, VECTOR.replace("[0", f"[{number}")], prepare=True)
            extended.execute("SELECT id FROM items ORDER BY embedding <-> %s::vector LIMIT 10", [VECTOR])
    with contextlib.suppress(psycopg.OperationalError):
        served.connect(database, password=CANARY, options=f"-c nonsense.{CANARY}=").close()
    return 3


def test_no_secret_no_vector_no_value(postgres: EmbeddedPostgres, database: str, tmp_path: Path) -> None:
    create_items(postgres.dsn(database), rows=500)
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute(
            f"ALTER TABLE items ADD note text; UPDATE items SET note = '{CANARY}' WHERE id < 300"
        )
        connection.execute("ANALYZE items")
    options = (
        '[log]\nlevel = "debug"\nformat = "json"\nslow_query = 0.0\n[admin]\ntoken = "canary-4711-canary"\n'
    )
    dsn = postgres.uri().replace("postgresql://postgres@", f"postgresql://postgres:{CANARY}@")
    assert CANARY in dsn
    with serving(tmp_path, ("127.0.0.1", postgres.port), options, dsn) as served:
        served.wait_ready()
        connections = ask_in_every_way(served, database)
        until(lambda: len(messages(served, "learning about")) >= 2, PATIENCE)
        until(lambda: len(messages(served, "policy")) >= 2, PATIENCE)
        until(lambda: len(messages(served, f'to database "{database}" ended')) >= connections, PATIENCE)
        until(lambda: len(messages(served, "slow query: ")) >= 100, PATIENCE)
        found = records(served)
        log = served.log
    assert "canary" not in log
    assert str(NUMBER)[2:] not in log
    # One line for each connection, and each slow query with the reason.
    assert (
        len([each for each in found if f'to database "{database}" ended' in each["message"]]) == connections
    )
    slow = [each["slow_query"] for each in found if "slow_query" in each]
    with_filter = next(each for each in slow if each["filters"])
    assert with_filter["filters"] == ["note ="]
    assert with_filter["rows"] == 10
    assert with_filter["ms"] >= with_filter["first_byte_ms"] > 0.0
    assert with_filter["table"] in ("items", "public.items")
    assert with_filter["why"]
    assert "$1" in with_filter["statement"]
    assert {each["error"] for each in slow} >= {None, "22000"}  # different vector dimensions


def test_slow_queries_are_logged_from_the_moment_the_file_says_so(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    vectors = create_items(postgres.dsn(database), rows=500)
    with serving(tmp_path, ("127.0.0.1", postgres.port)) as served:
        served.wait_ready()
        file = tmp_path / "proxy.toml"
        with served.connect(database, autocommit=True) as connection:

            def asked() -> bool:
                sql = "SELECT id FROM items ORDER BY embedding <-> %s::vector LIMIT 10"
                connection.execute(sql, [text(vectors[0])])
                return "slow query: " in served.log

            assert not asked()
            file.write_text(file.read_text() + "[log]\nslow_query = 0.0\n")
            until(asked, PATIENCE)
        assert "10 rows, k=10 on items; got as is because: no policy yet" in served.log
