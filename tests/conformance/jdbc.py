"""pgjdbc: a smoke suite of our own in Java, one source file, with Debian's package of the driver."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.conformance.harness import FAIL, PASS, NotRunError, Outcomes, Suite, Target, call

_SOURCE = Path(__file__).parent / "jdbc" / "Smoke.java"
_JAR = Path("/usr/share/java/postgresql.jar")
_RESULT = re.compile(r"^(ok|not ok) ([^:\n]+)", re.MULTILINE)


def _prepare() -> str:
    if shutil.which("java") is None:
        raise NotRunError("java is not installed")
    if not _JAR.exists():
        raise NotRunError("the driver is not installed (Debian: libpostgresql-jdbc-java)")
    version = re.search(r"\d+(\.\d+)+", call(["java", "-jar", _JAR]).stdout)
    return f"pgjdbc {version.group() if version else 'of an unknown version'}"


def _run(target: Target) -> Outcomes:
    url = f"jdbc:postgresql://{target.host}:{target.port}/{target.dbname}?user={target.server.user}"
    log = target.directory / "output.txt"
    result = call(["java", "-cp", _JAR, _SOURCE, url], environment=target.environment, log=log)
    return {name: PASS if verdict == "ok" else FAIL for verdict, name in _RESULT.findall(result.stdout)}


jdbc = Suite(
    name="jdbc",
    title="pgjdbc: a smoke suite of every query mode, prepared statements, cursors, batches, COPY",
    prepare=_prepare,
    run=_run,
    adapted_at_least=200,
)
