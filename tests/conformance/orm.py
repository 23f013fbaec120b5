"""Applications on SQLAlchemy and on Django, each with pgvector-python, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.harness import Command, Outcomes, Suite, Target, call
from tests.conformance.junit import read_junit
from tests.conformance.packages import python_environment

_APPLICATIONS = Path(__file__).parent / "applications"
_COMMON = ("pgvector==0.5.1", "psycopg[binary]==3.3.9", "pytest==9.2.0", "pytest-timeout==2.4.0")


def _suite(name: str, title: str, packages: tuple[str, ...], adapted_at_least: int) -> Suite:
    def environment() -> Path:
        return python_environment(name, [*packages, *_COMMON])

    def prepare() -> str:
        environment()
        return packages[0].replace("==", " ")

    def run(target: Target) -> Outcomes:
        report = target.directory / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "--timeout=120", "-c", "/dev/null", f"--junitxml={report}"]
        command: Command = [
            environment(),
            "-m",
            "pytest",
            *options,
            "--noconftest",
            f"--rootdir={_APPLICATIONS}",
        ]
        log = target.directory / "output.txt"
        call([*command, _APPLICATIONS / f"{name}_app.py"], environment=target.environment, log=log)
        return read_junit(report)

    return Suite(name=name, title=title, prepare=prepare, run=run, adapted_at_least=adapted_at_least)


sqlalchemy = _suite(
    "sqlalchemy",
    "an application on SQLAlchemy and pgvector-python, with psycopg and with asyncpg underneath",
    ("sqlalchemy==2.1.9", "asyncpg==0.32.0", "greenlet"),
    150,
)
django = _suite(
    "django",
    "an application on Django and pgvector-python, parameters bound by the client and by the server",
    ("django==5.2.19",),
    50,
)
