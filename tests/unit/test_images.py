"""Dockerfile and compose example, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.loader import load

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
COMPOSE = ROOT / "examples" / "compose"


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"])


def test_hadolint_accepts_the_dockerfile() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed (make charts)")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_is_copied_is_there_and_in_the_build_context() -> None:
    copied = [
        source
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == allowed
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_final_image_has_no_compiler_and_does_not_run_as_root() -> None:
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert not re.search(r"\b(g\+\+|gcc|build-essential)\b", final)
    assert re.search(r"^USER 10001$", final, re.MULTILINE)


def test_the_variables_of_the_image_are_options() -> None:
    given = dict(re.findall(r"\b(RUVECTOR_\w+)=(\S+)", DOCKERFILE))
    assert len(given) == 3
    assert load(None, given).store.path == Path("/var/lib/ruvector-proxy")


@pytest.mark.parametrize("service", compose())
def test_every_file_that_the_compose_example_mounts_is_there(service: str) -> None:
    for volume in compose()[service].get("volumes", ()):
        source = volume.split(":")[0]
        assert not source.startswith(".") or (COMPOSE / source).is_file()


def test_the_proxy_of_the_compose_example_is_configured_for_its_server() -> None:
    proxy = compose()["proxy"]
    config = load(None, proxy["environment"])
    assert (config.upstream.host, config.upstream.port) == ("postgres", 5432)
    assert (COMPOSE / proxy["build"]).resolve() == ROOT
    assert int(proxy["stop_grace_period"].removesuffix("s")) > config.limits.drain_timeout + 15
    assert f"--port={config.listen.port}" in compose()["application"]["command"]


def health_check() -> list[str]:
    """Return the image's own command."""
    (command,) = re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return list(json.loads(command))


def test_the_health_check_fails_where_nothing_answers() -> None:
    command = [sys.executable, *health_check()[1:]]
    done = subprocess.run(command, env={"RUVECTOR_ADMIN_PORT": "1"}, capture_output=True, timeout=60)
    assert done.returncode != 0
    assert b"Connection refused" in done.stderr
