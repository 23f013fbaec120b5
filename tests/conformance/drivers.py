"""Suites that Python drivers bring along in their source packages: asyncpg, psycopg2 (libpq), pg8000.

The tests come from the source package, what they test from the wheel of the same version: the package's own
directory is taken away, or it would be imported instead.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.conformance import sources
from tests.conformance.harness import CACHE, Command, Outcomes, Suite, Target, call
from tests.conformance.junit import read_junit
from tests.conformance.packages import python_environment, python_source

ASYNCPG = "0.32.0"
PSYCOPG2 = "2.9.13"
PG8000 = "1.31.6"
_PYTEST = ("pytest==9.2.0", "pytest-timeout==2.4.0")


def _pytest(
    python: Path,
    source: Path,
    target: Target,
    *tests: str,
    environment: dict[str, str] | None = None,
    options: Sequence[str] = (),
) -> Outcomes:
    """Run tests of a source package in the Python environment where the package is installed."""
    report = target.directory / "report.xml"
    command: Command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout=120",
        f"--junitxml={report}",
    ]
    log = target.directory / "output.txt"
    variables = target.environment | (environment or {})
    call([*command, *options, *tests], cwd=source, environment=variables, log=log, timeout=1200)
    return read_junit(report)


# -- asyncpg ---------------------------------------------------------------------------------------------


def _prepare_asyncpg() -> str:
    source = python_source("asyncpg", ASYNCPG, build_with=["cython"])
    shutil.rmtree(source / "asyncpg", ignore_errors=True)
    sources.build_extensions()
    _asyncpg_python()
    return f"asyncpg {ASYNCPG}"


def _asyncpg_python() -> Path:
    return python_environment("asyncpg", [f"asyncpg=={ASYNCPG}", "distro==1.9.0", "uvloop==0.23.0", *_PYTEST])


def _run_asyncpg(target: Target) -> Outcomes:
    source = CACHE / "asyncpg" / f"asyncpg-{ASYNCPG}"
    # Not about this server: the style of asyncpg's source, the environment it was built in, and tests that
    # start servers of their own.
    left_out = [
        "--ignore=tests/test__sourcecode.py",
        "--ignore=tests/test__environment.py",
        "--deselect=tests/test_connect.py::TestConnectionAttributes",
    ]
    return _pytest(_asyncpg_python(), source, target, "tests", options=left_out)


asyncpg = Suite(
    name="asyncpg",
    title="asyncpg's own test-suite, from its source package",
    prepare=_prepare_asyncpg,
    run=_run_asyncpg,
    adapted_at_least=1000,
    settings=sources.SETTINGS,
)


# -- psycopg2 --------------------------------------------------------------------------------------------


def _prepare_psycopg2() -> str:
    python_source("psycopg2", PSYCOPG2, build_with=[])
    sources.build_extensions()
    _psycopg2_python()
    return f"psycopg2 {PSYCOPG2}"


def _psycopg2_python() -> Path:
    return python_environment("psycopg2", [f"psycopg2-binary=={PSYCOPG2}", *_PYTEST])


def _run_psycopg2(target: Target) -> Outcomes:
    source = CACHE / "psycopg2" / f"psycopg2-{PSYCOPG2}"
    target.admin("CREATE EXTENSION hstore", target.dbname)
    names = {"PSYCOPG2_TESTDB": target.dbname, "PSYCOPG2_TEST_REPL_DSN": ""}  # replication: the same server
    options = ["--import-mode=append", "-W", "ignore"]
    return _pytest(_psycopg2_python(), source, target, "tests", environment=names, options=options)


psycopg2 = Suite(
    name="psycopg2",
    title="psycopg2's own test-suite (libpq, asynchronous and replication connections included)",
    prepare=_prepare_psycopg2,
    run=_run_psycopg2,
    adapted_at_least=500,
    settings={
        **sources.SETTINGS,
        "wal_level": "logical",
        "max_wal_senders": "10",
        "max_prepared_transactions": "10",
    },
)


# -- pg8000 ----------------------------------------------------------------------------------------------


def _prepare_pg8000() -> str:
    source = python_source("pg8000", PG8000, build_with=["hatchling", "versioningit"])
    for path in source.glob("src/pg8000"):
        shutil.rmtree(path)
    sources.build_extensions()
    _pg8000_python()
    return f"pg8000 {PG8000}"


def _pg8000_python() -> Path:
    return python_environment("pg8000", [f"pg8000=={PG8000}", "pytz", *_PYTEST])


def _run_pg8000(target: Target) -> Outcomes:
    source = CACHE / "pg8000" / f"pg8000-{PG8000}"
    # Not about this server: the manual's examples (they need a server with passwords), authentication that
    # the server is not set up for, and timings.
    left_out = ["--ignore=test/test_readme.py", "--ignore-glob=*/auth/*", "--ignore-glob=*/*benchmarks.py"]
    return _pytest(_pg8000_python(), source, target, "test", options=[*left_out, "--import-mode=append"])


pg8000 = Suite(
    name="pg8000",
    title="pg8000's own test-suite: a driver in pure Python with a protocol of its own making",
    prepare=_prepare_pg8000,
    run=_run_pg8000,
    adapted_at_least=200,
    settings={**sources.SETTINGS, "max_prepared_transactions": "10"},
)
