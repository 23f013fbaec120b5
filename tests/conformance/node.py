"""node-postgres: a smoke suite of our own in JavaScript, run by node's test runner."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conformance.harness import CACHE, Outcomes, Suite, Target, call
from tests.conformance.junit import read_junit
from tests.conformance.packages import node_packages

_HERE = Path(__file__).parent / "node"


def _prepare() -> str:
    node_packages(_HERE)
    versions = json.loads((_HERE / "package.json").read_text())["dependencies"]
    return f"pg {versions['pg']}"


def _run(target: Target) -> Outcomes:
    report = target.directory / "report.xml"
    command = ["node", "--test", "--test-reporter=junit", f"--test-reporter-destination={report}"]
    log = target.directory / "output.txt"
    call([*command, "smoke.test.js"], cwd=CACHE / _HERE.name, environment=target.environment, log=log)
    return read_junit(report)


node_postgres = Suite(
    name="node-postgres",
    title="node-postgres with pg-cursor, pg-query-stream, pg-copy-streams and pgvector: a smoke suite",
    prepare=_prepare,
    run=_run,
    adapted_at_least=300,
)
