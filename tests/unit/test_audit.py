"""What `make audit` makes of pip-audit's report."""

from __future__ import annotations

import json
from typing import Any

from tests.audit import verdict


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": list(packages), "fixes": []})


CLEAN = {"name": "rich", "version": "1", "vulns": []}
SKIPPED = {"name": "yarl", "skip_reason": "Dependency not found on PyPI"}
BAD = {"name": "aiohttp", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": []}]}


def test_only_what_was_looked_up_and_is_clean_passes() -> None:
    assert verdict(report(CLEAN)) == (0, "1 packages audited, 0 known vulnerabilities")
    assert verdict(report(CLEAN, {"name": "ruvector-proxy", "skip_reason": "not on PyPI"}))[0] == 0


def test_a_vulnerability_is_named() -> None:
    status, words = verdict(report(CLEAN, SKIPPED, BAD))
    assert status == 1
    assert "aiohttp: CVE-1" in words


def test_what_could_not_be_audited_is_no_success() -> None:
    for nothing in ("", report(), report(SKIPPED), report(CLEAN, SKIPPED)):
        status, words = verdict(nothing)
        assert status == 2
        assert "audited" in words
