"""psql scripts: what a person at a terminal sees must be the same, byte by byte.

Each ``psql/*.sql`` is one test with a database of its own (a copy of one with vectors in it).  Its output is
everything that psql prints, errors included; what no two runs share (process ids, the time of day) is
masked.  A script fails where psql ends with another status than its first line says, ``-- status: 3``.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.conformance import sources
from tests.conformance.harness import Command, Outcome, Outcomes, Suite, Target, call

_SCRIPTS = Path(__file__).parent / "psql"
_STATUS = re.compile(r"-- status: (\d)")
_MASKS = (
    (re.compile(r"process with PID \d+"), "process with PID ..."),
    (re.compile(r"^\w{3} \w{3} +\d+ [\d:]+ \d{4} (?=\(every )", re.MULTILINE), ""),  # of \\watch
)
_ITEMS = """
    CREATE TABLE items (id int PRIMARY KEY, section text, body text, embedding vector(3));
    INSERT INTO items
    SELECT i, 'section ' || i % 4, 'body ' || i, ARRAY[i, i / 2.0, 1]::vector FROM generate_series(1, 300) i;
    CREATE INDEX items_hnsw ON items USING hnsw (embedding vector_l2_ops);
    CREATE TABLE größen (maß text, wert int);
    ANALYZE;
"""


def _program() -> Path:
    return sources.installation() / "bin/psql"


def _prepare() -> str:
    version = re.search(r"\d+\.\d+", call([_program(), "--version"]).stdout)
    assert version is not None
    return f"psql {version.group()}"


def _run(target: Target) -> Outcomes:
    for statement in filter(str.strip, _ITEMS.split(";")):
        target.admin(statement, target.dbname)
    outcomes: Outcomes = {}
    for script in sorted(_SCRIPTS.glob("*.sql")):
        database = f"psql_{script.stem}"
        target.admin(f"CREATE DATABASE {database} TEMPLATE {target.dbname} STRATEGY file_copy")
        environment = target.environment | {"PGDATABASE": database, "PGCLIENTENCODING": "UTF8", "PAGER": ""}
        command: Command = [_program(), "--no-psqlrc", "--echo-all", "--file", script]
        log = target.directory / f"{script.stem}.out"
        result = call(command, cwd=target.directory, environment=environment, log=log, timeout=120)
        status = _STATUS.match(script.read_text())
        expected = int(status.group(1)) if status else 0
        outcomes[script.stem] = Outcome(
            "pass" if result.returncode == expected else "fail", masked(result.stdout)
        )
    return outcomes


def masked(text: str) -> str:
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


psql = Suite(
    name="psql",
    title="psql scripts, their output compared byte by byte",
    prepare=_prepare,
    run=_run,
    adapted_at_least=60,
)
