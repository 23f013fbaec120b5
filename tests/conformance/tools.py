"""PostgreSQL's own programs: dump and restore, replication, pgbench.

Dumps are compared with each other, byte by byte; what cannot be compared between servers (a base backup, the
history of a pgbench run) is held against the server itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.conformance import sources
from tests.conformance.harness import FAIL, PASS, Command, Outcome, Outcomes, Suite, Target, call

_ROWS = 5000
_DATA = f"""
    CREATE TABLE items (id int PRIMARY KEY, section text, body text, embedding vector(16), half halfvec(4));
    SELECT setseed(0.5);
    INSERT INTO items
    SELECT i, 'section ' || i % 7, repeat('größe ' || i, 1 + i % 20),
           (SELECT array_agg((i * j * 7919 % 1000) / 1000.0) FROM generate_series(1, 16) j)::vector,
           ARRAY[i % 13, i % 7, i % 3, 1]::vector::halfvec
    FROM generate_series(1, {_ROWS}) i;
    CREATE INDEX items_embedding ON items USING hnsw (embedding vector_cosine_ops) WITH (m = 8);
    CREATE INDEX items_half ON items USING ivfflat (half halfvec_l2_ops) WITH (lists = 10);
    CREATE TABLE notes (id serial PRIMARY KEY, item int REFERENCES items, body jsonb);
    INSERT INTO notes (item, body) SELECT id, jsonb_build_object('id', id) FROM items WHERE id % 10 = 0;
    CREATE VIEW near AS SELECT id FROM items ORDER BY embedding <=> (SELECT embedding FROM items WHERE id = 1) LIMIT 10;
    CREATE FUNCTION double(int) RETURNS int LANGUAGE sql AS 'SELECT 2 * $1';
    SELECT lo_from_bytea(4711, repeat('\\000\\377', 100000)::bytea);
"""
_CONTENTS = """
    SELECT md5(string_agg(items::text, '|' ORDER BY id)) FROM items
    UNION ALL SELECT md5(string_agg(notes::text, '|' ORDER BY id)) FROM notes
    UNION ALL SELECT string_agg(indexdef, '|' ORDER BY indexdef) FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT md5(lo_get(4711))
    UNION ALL SELECT string_agg(id::text, '|') FROM near
"""


def _program(name: str) -> Path:
    return sources.installation() / "bin" / name


def _version() -> str:
    found = re.search(r"\d+\.\d+", call([_program("pg_dump"), "--version"]).stdout)
    assert found is not None
    return f"PostgreSQL {found.group()}"


def _statements(text: str) -> list[str]:
    return [part for part in text.split(";\n") if part.strip()]


def _fill(target: Target) -> None:
    for statement in _statements(_DATA):
        target.admin(statement, target.dbname)


# -- dump and restore ------------------------------------------------------------------------------------


def _run_dump(target: Target) -> Outcomes:
    _fill(target)
    original = target.admin(_CONTENTS, target.dbname)
    outcomes: Outcomes = {}

    def step(name: str, command: Command, text: str = "") -> None:
        log = target.directory / f"{name.replace(' ', '-')}.log"
        result = call(command, environment=target.environment, log=log)
        outcomes[name] = Outcome("pass" if result.returncode == 0 else "fail", text)

    forms = {
        "plain": [],
        "inserts": ["--inserts", "--rows-per-insert=50"],
        "custom": ["-Fc"],
        "directory": ["-Fd", "-j3"],
    }
    for form, options in forms.items():
        path = target.directory / form
        step(f"dump {form}", [_program("pg_dump"), *options, "-f", path])
        database = f"restored_{form}"
        target.admin(f"CREATE DATABASE {database} TEMPLATE template0")
        if form in ("plain", "inserts"):
            outcomes[f"dump {form} is the same"] = Outcome("pass", _digest(path))
            restore: Command = [_program("psql"), "-Xq", "-v", "ON_ERROR_STOP=1", "-d", database, "-f", path]
        else:
            listing = call([_program("pg_restore"), "-f", "-", path]).stdout
            outcomes[f"dump {form} is the same"] = Outcome("pass", _without_key(listing))
            jobs = ["-j3"] if form == "directory" else ["--single-transaction"]
            restore = [_program("pg_restore"), "--exit-on-error", *jobs, "-d", database, path]
        step(f"restore {form}", restore)
        same = target.admin(_CONTENTS, database) == original
        outcomes[f"restored {form} is the same"] = PASS if same else FAIL
    path = target.directory / "all"
    step("dump all", [_program("pg_dumpall"), "-f", path])
    outcomes["dump all is the same"] = Outcome("pass", _digest(path))
    return outcomes


def _digest(path: Path) -> str:
    return hashlib.sha256(_without_key(path.read_text()).encode()).hexdigest()


def _without_key(dump: str) -> str:
    """Take out the random key of ``\\restrict``, which no two dumps share."""
    return re.sub(r"^\\(un)?restrict \w+$", "", dump, flags=re.MULTILINE)


dump = Suite(
    name="dump",
    title="pg_dump, pg_dumpall and pg_restore of a database with vectors, in every format",
    prepare=_version,
    run=_run_dump,
    adapted_at_least=20,
)


# -- replication -----------------------------------------------------------------------------------------


def _run_replication(target: Target) -> Outcomes:
    _fill(target)
    outcomes: Outcomes = {}
    connection = ["-d", f"host={target.host} port={target.port} user={target.server.user}"]
    for method in ("fetch", "stream"):
        backup = target.directory / f"backup-{method}"
        command: Command = [_program("pg_basebackup"), "-D", backup, "-X", method, "-c", "fast"]
        options = ["--no-sync", "--manifest-checksums=SHA256", *connection]
        result = call([*command, *options], log=target.directory / f"basebackup-{method}.log")
        outcomes[f"pg_basebackup -X {method}"] = PASS if result.returncode == 0 else FAIL
        outcomes[f"the files of -X {method} are whole"] = PASS if _whole(backup) else FAIL
    outcomes["pg_receivewal"] = PASS if _received_wal(target, connection) else FAIL
    outcomes["pg_recvlogical"] = PASS if _received_changes(target) else FAIL
    return outcomes


def _whole(backup: Path) -> bool:
    """Hold every file of a base backup against the checksum that the server gave for it."""
    files = json.loads((backup / "backup_manifest").read_text())["Files"]
    sums = {entry["Path"]: entry["Checksum"] for entry in files}
    log = next((backup / "pg_wal").glob("0*"), None)
    return (
        len(sums) > 500
        and log is not None
        and all(
            hashlib.sha256((backup / path).read_bytes()).hexdigest() == checksum
            for path, checksum in sums.items()
        )
    )


def _received_wal(target: Target, connection: list[str]) -> bool:
    """Stream the write-ahead log while it is written; compare a whole segment with the server's own."""
    received = target.directory / "wal"
    received.mkdir()
    command = [str(_program("pg_receivewal")), *connection, "-D", str(received), "--no-loop", "--no-sync"]
    with (target.directory / "receivewal.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            if not _in_time(lambda: any(received.glob("*.partial"))):
                return False
            for number in range(3):
                sql = f"CREATE TABLE later_{number} AS SELECT repeat('x', 500) FROM generate_series(1, 2000)"
                target.admin(sql, target.dbname)
                target.admin("SELECT pg_switch_wal()")
            if not _in_time(lambda: len(_segments(received)) >= 3):
                return False
        finally:
            process.terminate()
            process.wait(30)
    own = target.server.data_directory / "pg_wal"
    return all(path.read_bytes() == (own / path.name).read_bytes() for path in _segments(received))


def _segments(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if not path.suffix]


def _received_changes(target: Target) -> bool:
    """Stream changes by logical decoding while they are made; every committed row must arrive."""
    received = target.directory / "changes"
    program = _program("pg_recvlogical")
    common = [str(program), "-d", target.dsn, "--slot=changes"]
    target.admin("CREATE TABLE changed (id int PRIMARY KEY, embedding vector(3))", target.dbname)
    target.admin("CREATE PUBLICATION changes FOR TABLE changed", target.dbname)
    plugin = ["-P", "pgoutput"]
    call([*common, "--create-slot", *plugin], log=target.directory / "recvlogical-slot.log")
    options = ["-o", "proto_version=1", "-o", "publication_names=changes", "-f", str(received), "--no-loop"]
    with (target.directory / "recvlogical.log").open("wb") as log:
        process = subprocess.Popen(
            [*common, "--start", *options, "-F", "0", "-s", "1"], stdout=log, stderr=log
        )
        try:
            for i in range(200):
                target.admin(f"INSERT INTO changed VALUES ({i}, '[{i},0,{i}]')", target.dbname)
            values = [f"[{i},0,{i}]".encode() for i in range(200)]
            return _in_time(lambda: _arrived(received, values))
        finally:
            process.terminate()
            process.wait(30)


def _arrived(path: Path, values: list[bytes]) -> bool:
    return path.exists() and all(value in path.read_bytes() for value in values)


def _in_time(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


replication = Suite(
    name="replication",
    title="pg_basebackup, pg_receivewal and pg_recvlogical: the replication protocol",
    prepare=_version,
    run=_run_replication,
    adapted_at_least=0,
    settings={"wal_level": "logical", "max_wal_senders": "10", "max_replication_slots": "10"},
)


# -- pgbench ---------------------------------------------------------------------------------------------

_TRANSFER = """
\\set from random(1, 20)
\\set to random(1, 20)
\\set amount random(1, 100)
BEGIN;
SELECT id FROM items ORDER BY embedding <-> '[1,1,1]' LIMIT 1;
UPDATE accounts SET balance = balance - :amount WHERE id = :from;
SELECT balance FROM accounts WHERE id = :to;
UPDATE accounts SET balance = balance + :amount WHERE id = :to;
INSERT INTO transfers (payer, payee, amount) VALUES (:from, :to, :amount);
SELECT id FROM items ORDER BY embedding <-> '[2,2,2]' LIMIT 1;
COMMIT;
"""
_ACCOUNTS = """
    CREATE TABLE items (id int PRIMARY KEY, embedding vector(3));
    INSERT INTO items SELECT i, ARRAY[i, i, i]::vector FROM generate_series(1, 50) i;
    CREATE INDEX ON items USING hnsw (embedding vector_l2_ops);
    CREATE TABLE accounts (id int PRIMARY KEY, balance bigint CHECK (balance >= 0));
    INSERT INTO accounts SELECT i, 200 FROM generate_series(1, 20) i;
    CREATE TABLE transfers (payer int, payee int, amount int);
"""
_BALANCES = """
    SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
       AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)
       AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)
       AND (SELECT count(*) FROM pgbench_history) = {count}
"""
_BOOKS = """
    SELECT (SELECT sum(balance) FROM accounts) = 20 * 200
       AND NOT EXISTS (
           SELECT FROM accounts a
           WHERE balance <> 200 - coalesce((SELECT sum(amount) FROM transfers WHERE payer = id), 0)
                                + coalesce((SELECT sum(amount) FROM transfers WHERE payee = id), 0))
"""
_TPCB = 8 * 50  # clients times transactions


def _run_pgbench(target: Target) -> Outcomes:
    for statement in _statements(_ACCOUNTS):
        target.admin(statement, target.dbname)
    script = target.directory / "transfer.sql"
    script.write_text(_TRANSFER)
    outcomes: Outcomes = {}
    done = 0

    def bench(name: str, *options: str | Path) -> bool:
        log = target.directory / f"{name.replace(' ', '-')}.log"
        command: Command = [_program("pgbench"), *options]
        return call(command, environment=target.environment, log=log).returncode == 0

    outcomes["initialise"] = PASS if bench("initialise", "-i", "-q", "-s", "1") else FAIL
    load = ("-c", "8", "-j", "2", "-t", "50", "-n")
    for mode in ("simple", "extended", "prepared"):
        for name, options in ((mode, ()), (f"{mode} with -C", ("-C",))):
            done += _TPCB
            ran = bench(name, "-M", mode, *load, *options)
            kept = target.admin(_BALANCES.format(count=done), target.dbname) == [(True,)]
            outcomes[f"{name}: balances"] = PASS if ran and kept else FAIL
        outcomes[f"{mode}, read only"] = PASS if bench(f"{mode} reads", "-S", "-M", mode, *load) else FAIL
        # Serializable transactions that fail, some for good (no money), some to be tried again.
        serializable = {"PGOPTIONS": "-c default_transaction_isolation=serializable"}
        command: Command = [_program("pgbench"), "-M", mode, *load, "--max-tries=10", "-f", script]
        log = target.directory / f"{mode}-failures.log"
        call(command, environment=target.environment | serializable, log=log)
        kept = target.admin(_BOOKS, target.dbname) == [(True,)]
        busy = target.admin("SELECT count(*) > 20 FROM transfers", target.dbname) == [(True,)]
        outcomes[f"{mode}, with failures: books"] = PASS if kept and busy else FAIL
    return outcomes


pgbench = Suite(
    name="pgbench",
    title="pgbench in every mode, with -C, with failing and repeated transactions: sums at the end",
    prepare=_version,
    run=_run_pgbench,
    adapted_at_least=1000,
)
