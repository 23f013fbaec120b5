"""Programs and drivers that run SQL texts, each in its own way: psql, psycopg twice, asyncpg, JDBC twice."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import asyncpg
import psycopg
import pytest

_JAR = Path("/usr/share/java/postgresql.jar")
_PROGRAM = Path(__file__).parent / "Statements.java"
_BETWEEN = "\n---\n"

Client = Callable[[int, str, Sequence[str]], list[str]]
"""From a port, a database and texts to what came of each: "ok" or the SQLSTATE."""


def psql(port: int, database: str, texts: Sequence[str]) -> list[str]:
    program = shutil.which("psql")
    if program is None:
        pytest.skip("psql is not installed")
    script = "".join(f"{text};\n\\echo result :SQLSTATE\n" for text in texts)
    result = subprocess.run(
        [program, "-X", "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-d", database],
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("result ")]
    return ["ok" if code == "00000" else code for code in found]


def _psycopg(
    port: int,
    database: str,
    texts: Sequence[str],
    cursors: type[psycopg.Cursor],
    *,
    prepare: bool | None = None,
    binary: bool = False,
) -> list[str]:
    found = []
    with psycopg.connect(
        host="127.0.0.1",
        port=port,
        user="postgres",
        dbname=database,
        autocommit=True,
        cursor_factory=cursors,
    ) as connection:
        for text in texts:
            try:
                cursor = connection.execute(text, prepare=prepare, binary=binary)
                if cursor.description:
                    cursor.fetchall()
                found.append("ok")
            except psycopg.Error as error:
                found.append(error.sqlstate or "?")
    return found


def psycopg_simple(port: int, database: str, texts: Sequence[str]) -> list[str]:
    return _psycopg(port, database, texts, psycopg.ClientCursor)


def psycopg_extended(port: int, database: str, texts: Sequence[str]) -> list[str]:
    return _psycopg(port, database, texts, psycopg.RawCursor)


def psycopg_prepared(port: int, database: str, texts: Sequence[str]) -> list[str]:
    return _psycopg(port, database, texts, psycopg.Cursor, prepare=True, binary=True)


def with_asyncpg(port: int, database: str, texts: Sequence[str]) -> list[str]:
    async def run() -> list[str]:
        connection = await asyncpg.connect(host="127.0.0.1", port=port, user="postgres", database=database)
        found = []
        try:
            for text in texts:
                try:
                    await connection.fetch(text)
                    found.append("ok")
                except asyncpg.PostgresError as error:
                    found.append(error.sqlstate)
        finally:
            await connection.close()
        return found

    return asyncio.run(run())


def _jdbc(port: int, database: str, texts: Sequence[str], mode: str) -> list[str]:
    java = shutil.which("java")
    if java is None or shutil.which("javac") is None:
        pytest.skip("java with its compiler is not installed")
    if not _JAR.exists():
        pytest.skip("the JDBC driver is not installed (Debian: libpostgresql-jdbc-java)")
    url = f"jdbc:postgresql://127.0.0.1:{port}/{database}?user=postgres&preferQueryMode={mode}&prepareThreshold=1"
    result = subprocess.run(
        [java, "-cp", str(_JAR), str(_PROGRAM), url],
        input=_BETWEEN.join(texts),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def jdbc_extended(port: int, database: str, texts: Sequence[str]) -> list[str]:
    return _jdbc(port, database, texts, "extended")


def jdbc_simple(port: int, database: str, texts: Sequence[str]) -> list[str]:
    return _jdbc(port, database, texts, "simple")


CLIENTS: dict[str, Client] = {
    "psql": psql,
    "psycopg-simple": psycopg_simple,
    "psycopg-extended": psycopg_extended,
    "psycopg-prepared": psycopg_prepared,
    "asyncpg": with_asyncpg,
    "jdbc-extended": jdbc_extended,
    "jdbc-simple": jdbc_simple,
}
