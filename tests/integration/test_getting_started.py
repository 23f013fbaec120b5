"""docs/getting-started.md and docs/operations.md, done as they say, in order, against a real server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres, free_port
from tests.integration.test_serve import ROOT, until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(600)]

PAGE = ROOT / "docs" / "getting-started.md"
OPERATIONS = ROOT / "docs" / "operations.md"
NOT_RUN = "# not run by a test"
PATIENCE = 240.0


class Block(NamedTuple):
    kind: str  # "sh", "toml", "sql app"
    text: str


def blocks(page: Path) -> list[Block]:
    return [
        Block(*found) for found in re.findall(r"^```(\w[^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]


ROLE = next(block for block in blocks(PAGE) if "CREATE ROLE" in block.text)


class Reader:
    """Somebody who does what the page says, with the ports of this machine."""

    def __init__(self, server: EmbeddedPostgres, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.ports = {"5432": str(server.port), "6432": str(free_port()), "9464": str(free_port())}
        self.serving: subprocess.Popen[bytes] | None = None
        commands = directory / "bin"
        commands.mkdir()
        command = commands / "ruvector-proxy"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m proxy.main "$@"\n')
        command.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(commands), str(server.bin("psql").parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "RUVECTOR_LISTEN_PORT": self.ports["6432"],
            "RUVECTOR_ADMIN_PORT": self.ports["9464"],
        }

    def shell(self, text: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def do(self, block: Block) -> str:
        text = re.sub(r"\b(5432|6432|9464)\b", lambda found: self.ports[found[0]], block.text)
        if block.kind == "toml":
            (self.directory / "proxy.toml").write_text(text)
            return ""
        if block.kind.startswith("sql "):
            user = block.kind.removeprefix("sql ")
            with psycopg.connect(self.server.dsn("app", user=user), autocommit=True) as connection:
                connection.execute(text)
            return ""
        assert block.kind == "sh", block.kind
        text = "".join(line for line in text.splitlines(keepends=True) if NOT_RUN not in line)
        if "ruvector-proxy serve" in text:
            with (self.directory / "log").open("wb") as log:
                self.serving = subprocess.Popen(
                    ["bash", "-c", f"exec {text}"], env=self.environment, cwd=self.directory, stderr=log
                )
            until(lambda: "worker 1 is up" in (self.directory / "log").read_text(), PATIENCE)
            return ""
        return self.shell(text)

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.shell("ruvector-proxy status --config proxy.toml --json")))

    def tuned(self) -> bool:
        """Tell whether both kinds of query are known, and one is tuned: on a busy machine the other takes long."""
        kinds = [kind for table in self.status()["tables"] for kind in table["kinds"]]
        return len(kinds) == 2 and any(kind["trust"] != "observe" for kind in kinds)


@pytest.fixture
def reader(postgres: EmbeddedPostgres, tmp_path: Path) -> Iterator[Reader]:
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("CREATE ROLE app LOGIN")
        connection.execute("CREATE DATABASE app OWNER app")
    found = Reader(postgres, tmp_path)
    try:
        yield found
    finally:
        if found.serving is not None:
            found.serving.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                found.serving.wait(60)
            found.serving.kill()
            print((tmp_path / "log").read_text())
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute("DROP DATABASE app WITH (FORCE)")
            connection.execute("DROP ROLE app")
            connection.execute("DROP ROLE IF EXISTS ruvector")


def test_who_does_what_the_page_says_has_a_tuned_table(reader: Reader) -> None:
    done: list[str] = []
    for block in blocks(PAGE):
        if "status" in block.text:  # "after a minute of traffic"
            traffic = next(each for each in blocks(PAGE) if "traffic.sql" in each.text)
            until(lambda traffic=traffic: bool(reader.do(traffic) or reader.tuned()), PATIENCE)  # type: ignore[misc]
        done.append(reader.do(block))
    output = "\n".join(done)
    assert "ruvector-proxy 0." in output  # its version
    assert "public.items, target recall 0.98" in output
    assert "learner     policy" in output
    explained = done[-1]
    assert "table       public.items" in explained
    assert "category = 2" in explained
    asked = blocks(OPERATIONS)
    assert [each for each in asked if each.kind.startswith("sql")] == [ROLE], (
        "both pages name the same rights"
    )
    for block in asked:
        if block.kind == "sh":
            reader.do(block)
    assert reader.serving is not None
    reader.serving.send_signal(signal.SIGINT)
    assert reader.serving.wait(60) == 0
