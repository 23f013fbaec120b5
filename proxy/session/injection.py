"""The bytes that put settings in force for one statement, and those that take them back.

Theory
------
In the extended protocol a named ``SELECT set_config(name, value, true)`` is bound and executed immediately
before the client's Bind, without a Sync of its own: planning and the start of the scan see the setting, no
round trip is added, and in autocommit it ends with the client's own Sync.  Where a transaction block is
open, or may be, the setting would outlive the statement; so the same SELECT first *saves* each old value in
a placeholder setting of the proxy's own, local to the transaction, and a second SELECT can *restore* it.
Saving on the server needs no reply to be read, and so it works in a pipeline, too.

In the simple protocol the text itself gets a prefix: ``SET LOCAL`` in autocommit, where the texts of one
Query message form an implicit transaction; the saving SELECT in an open block.

Rules
-----
* Portals and prepared statements are named: an unnamed Bind would destroy the client's unnamed portal.
* The portal is closed at once: in a transaction block it would live on, and the next Bind of it fail (42P03).
* Function names are qualified: a client's search_path must not redirect them.
* Names and values come from the learner; `valid_settings` refuses what is not plainly a name or a value.
* Replies are counted in *completions* (see proxy.session.replies).
* A pooler such as pgbouncer may give every transaction another server, on which nothing is prepared.  It is
  known by the process id, which is not the one that it has told the client; then the statement is prepared
  anew with each use.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

from learning.records import Settings

PORTAL = b"_ruvector\0"
_NAME = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)?")
_VALUE = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
MAX_SETTINGS = 6

SYNC = b"S\0\0\0\4"


def valid_settings(settings: Settings) -> bool:
    """Tell whether every name and value is safe to send, in SQL text as well."""
    return len(settings) <= MAX_SETTINGS and all(
        _NAME.fullmatch(name) is not None and _VALUE.fullmatch(value) is not None for name, value in settings
    )


class Batch:
    """Messages ready to be sent, and how many completions the server will answer them with."""

    __slots__ = ("completions", "data")

    def __init__(self, data: bytes, completions: int) -> None:
        self.data = data
        self.completions = completions


def _message(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack("!I", len(body) + 4) + body


def query_message(text: bytes) -> bytes:
    """Return a Query message."""
    return _message(b"Q", text + b"\0")


def _statement_name(kind: str, count: int) -> bytes:
    return f"_ruvector_{kind}_{count}\0".encode()


def _inject_sql(count: int) -> str:
    """SELECT that saves the old value of each setting and then sets it; $1, $2 = first name and value.

    Its first column tells which server process has answered.
    """
    columns = ["pg_catalog.pg_backend_pid()"]
    for i in range(count):
        name, value = f"${2 * i + 1}", f"${2 * i + 2}"
        columns.append(
            f"pg_catalog.set_config('ruvector_proxy.saved_{i}', "
            f"coalesce(pg_catalog.current_setting({name}, true), ''), true), "
            f"pg_catalog.set_config({name}, {value}, true)"
        )
    return "SELECT " + ", ".join(columns)


def _restore_sql(count: int) -> str:
    """SELECT that gives each setting its saved value back; NULL, for one unknown before, resets it."""
    return "SELECT " + ", ".join(
        f"pg_catalog.set_config(${i + 1}, "
        f"nullif(pg_catalog.current_setting('ruvector_proxy.saved_{i}', true), ''), true)"
        for i in range(count)
    )


def _prepare(name: bytes, sql: str, parameters: int) -> bytes:
    """Close and Parse: closing a statement that does not exist is no error, so this can be repeated."""
    types = struct.pack(f"!H{parameters}I", parameters, *([25] * parameters))  # 25 = text
    return _message(b"C", b"S" + name) + _message(b"P", name + sql.encode() + b"\0" + types)


def _execute(name: bytes, arguments: list[str]) -> bytes:
    """Bind, Execute and Close of the proxy's portal with text arguments; results in text."""
    values = b"".join(struct.pack("!I", len(a)) + a for a in (argument.encode() for argument in arguments))
    bind = PORTAL + name + b"\0\0" + struct.pack("!H", len(arguments)) + values + b"\0\0"
    return _message(b"B", bind) + _message(b"E", PORTAL + b"\0\0\0\0") + _message(b"C", b"P" + PORTAL)


PREPARE_COMPLETIONS = 2  # CloseComplete, ParseComplete
EXECUTE_COMPLETIONS = 3  # BindComplete, CommandComplete, CloseComplete


@lru_cache(maxsize=64)
def preparation(kind: str, count: int) -> Batch:
    """Messages that prepare the ``inject`` or ``restore`` statement for `count` settings."""
    name = _statement_name(kind, count)
    if kind == "inject":
        return Batch(_prepare(name, _inject_sql(count), 2 * count), PREPARE_COMPLETIONS)
    return Batch(_prepare(name, _restore_sql(count), count), PREPARE_COMPLETIONS)


@lru_cache(maxsize=4096)
def injection(settings: Settings) -> Batch:
    """Messages that save the old values and put `settings` in force until the transaction ends."""
    arguments = [text for pair in settings for text in pair]
    return Batch(_execute(_statement_name("inject", len(settings)), arguments), EXECUTE_COMPLETIONS)


@lru_cache(maxsize=4096)
def restoration(settings: Settings) -> Batch:
    """Messages that give each setting in `settings` its saved value back."""
    names = [name for name, _ in settings]
    return Batch(_execute(_statement_name("restore", len(settings)), names), EXECUTE_COMPLETIONS)


@lru_cache(maxsize=4096)
def text_set_local(settings: Settings) -> Batch:
    """SQL prefix for a simple query in autocommit: one ``SET LOCAL`` per setting, one completion each."""
    text = "".join(f"SET LOCAL {name}='{value}';" for name, value in settings)
    return Batch(text.encode(), len(settings))


@lru_cache(maxsize=4096)
def text_save_and_set(settings: Settings) -> Batch:
    """SQL prefix for a simple query where the old values must come back: one SELECT, two completions."""
    sql = _inject_sql(len(settings))
    # Highest parameter first: $1 is a prefix of $10.
    for i in range(len(settings) - 1, -1, -1):
        name, value = settings[i]
        sql = sql.replace(f"${2 * i + 2}", f"'{value}'").replace(f"${2 * i + 1}", f"'{name}'")
    return Batch(sql.encode() + b";", 2)


@lru_cache(maxsize=4096)
def text_restore(settings: Settings) -> Batch:
    """SQL suffix for a simple query: gives the saved values back; one SELECT, two completions."""
    sql = _restore_sql(len(settings))
    for i in range(len(settings) - 1, -1, -1):
        sql = sql.replace(f"${i + 1}", f"'{settings[i][0]}'")
    return Batch(b";" + sql.encode(), 2)
