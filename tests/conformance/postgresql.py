"""PostgreSQL's own tests: the regression suite, isolation tests and libpq's pipeline mode."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.conformance import sources
from tests.conformance.harness import FAIL, PASS, Command, Outcome, Outcomes, Suite, Target, call

_RESULT = re.compile(r"^(ok|not ok) +\d+ +[-+] (\S+)", re.MULTILINE)
_REGRESS = "src/test/regress"
_UNSTEADY = {"encoding"}
"""Tests whose text differs from run to run: an older server reads beyond a string there."""
_UUID = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_OID = re.compile(r"OID \d+")
_NOTICE = re.compile(r"^\w+: NOTICE:")
_PIPELINE_ROWS = "700"
_CRASHES = {"hash_part", "sqljson"}
"""Tests of a bug that ends the whole server, in servers older than the source: the embedded one is."""


def _tests_of(
    program: Path, target: Target, inputs: Path, schedule: str, canonical: Callable[[str], str]
) -> Outcomes:
    """Run ``pg_regress`` or its sister for isolation tests; a test's text is its output file.

    `canonical` takes out of a text what no two runs share.  A test whose output is one of those expected but
    for that has passed, whatever the runner says.
    """
    outputs = target.directory / "out"
    outputs.mkdir()
    (outputs / "results").mkdir()
    (outputs / "results").chmod(0o777)  # for COPY on the server, which runs as another user
    scheduled = outputs / "schedule"
    scheduled.write_text(without_crashes((inputs / schedule).read_text()))
    top = sources.installation()
    command: Command = [
        program,
        f"--bindir={top / 'bin'}",
        f"--inputdir={inputs}",
        f"--outputdir={outputs}",
        f"--dlpath={sources.SETTINGS['dynamic_library_path'].rpartition(':')[2]}",
        f"--host={target.host}",
        f"--port={target.port}",
        f"--user={target.server.user}",
        f"--schedule={scheduled}",
        "--max-concurrent-tests=20",
    ]
    log = target.directory / "output.txt"
    result = call(command, environment=target.environment, log=log, timeout=1200)
    outcomes: Outcomes = {}
    for verdict, name in _RESULT.findall(result.stdout):
        output = outputs / "results" / f"{name}.out"
        text = canonical(_read(output)).replace(str(outputs), "...") if output.exists() else ""
        expected = [*inputs.glob(f"expected/{name}.out"), *inputs.glob(f"expected/{name}_[0-9].out")]
        passed = verdict == "ok" or text in (canonical(_read(path)) for path in expected)
        outcomes[name] = Outcome("pass" if passed else "fail", "" if name in _UNSTEADY else text)
    return outcomes


def _read(path: Path) -> str:
    return path.read_text(errors="backslashreplace")


def without_crashes(schedule: str) -> str:
    """Take the tests that crash the server out of a schedule, whose lines are ``test: name name ...``."""
    lines = [[word for word in line.split() if word not in _CRASHES] for line in schedule.splitlines()]
    return "".join(" ".join(words) + "\n" for words in lines if words and words != ["test:"])


# -- regression ------------------------------------------------------------------------------------------


def _prepare_regress() -> str:
    sources.build_extensions()
    sources.build_regress()
    return f"PostgreSQL {sources.version()}"


def _run_regress(target: Target) -> Outcomes:
    return _tests_of(
        sources.build_regress(), target, sources.source() / _REGRESS, "parallel_schedule", _without_uuids
    )


def _without_uuids(text: str) -> str:
    return _UUID.sub("...", text)


regress = Suite(
    name="regress",
    title="PostgreSQL's regression suite (`make installcheck-parallel`)",
    prepare=_prepare_regress,
    run=_run_regress,
    adapted_at_least=10_000,
    settings=sources.SETTINGS,
)


# -- isolation -------------------------------------------------------------------------------------------


def _prepare_isolation() -> str:
    sources.build_isolation()
    return f"PostgreSQL {sources.version()}"


def _run_isolation(target: Target) -> Outcomes:
    program = sources.build_isolation()
    inputs = sources.source() / "src/test/isolation"
    return _tests_of(program, target, inputs, "isolation_schedule", notices_last)


def notices_last(text: str) -> str:
    """Put notices behind everything else, in order of session.

    When a session that had to wait says something, and when another session's step is reported as done, are
    two sockets' affairs: their order is not the server's doing, nor the proxy's.
    """
    lines = _OID.sub("OID ...", text).splitlines()
    notices = [line for line in lines if _NOTICE.match(line)]
    return "\n".join([line for line in lines if line not in set(notices)] + sorted(notices))


isolation = Suite(
    name="isolation",
    title="PostgreSQL's isolation tests: interleaved transactions of several sessions",
    prepare=_prepare_isolation,
    run=_run_isolation,
    adapted_at_least=500,
)


# -- libpq's pipeline mode -------------------------------------------------------------------------------


def _prepare_pipeline() -> str:
    sources.build_libpq_pipeline()
    return f"libpq {sources.version()}"


def _run_pipeline(target: Target) -> Outcomes:
    program = sources.build_libpq_pipeline()
    outcomes: Outcomes = {}
    for protocol in ("3.0", "latest"):
        for test in call([program, "tests"]).stdout.split():
            trace = target.directory / f"{test}-{protocol}.trace"
            command: Command = [program, "-r", _PIPELINE_ROWS, "-t", trace, test]
            connection = f"{target.dsn} max_protocol_version={protocol}"
            result = call([*command, connection], log=trace.with_suffix(".log"), timeout=60)
            outcomes[f"{test}, protocol {protocol}"] = PASS if result.returncode == 0 else FAIL
    return outcomes


pipeline = Suite(
    name="libpq-pipeline",
    title="libpq's own test of pipeline mode",
    prepare=_prepare_pipeline,
    run=_run_pipeline,
    adapted_at_least=10,
)
