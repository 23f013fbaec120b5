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
* What the server has not accepted yet is tried first: a ``DO`` block catches the error, so that the client's
  statement, transaction and pipeline go on.  It reports a refusal as an INFO message (the one severity that
  no setting of the client's suppresses) with an SQLSTATE of its own.
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
REFUSED = b"RVPXY"
"""SQLSTATE of the message that says that a first try was refused."""


@lru_cache(maxsize=4096)
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


def message(tag: bytes, body: bytes) -> bytes:
    """Return a message of the extended protocol."""
    return tag + struct.pack("!I", len(body) + 4) + body


def query_message(text: bytes) -> bytes:
    """Return a Query message."""
    return message(b"Q", text + b"\0")


def _statement_name(kind: str, count: int) -> bytes:
    return f"_ruvector_{kind}_{count}\0".encode()


def _save(i: int, name: str) -> str:
    return (
        f"pg_catalog.set_config('ruvector_proxy.saved_{i}', "
        f"coalesce(pg_catalog.current_setting({name}, true), ''), true)"
    )


def _set(name: str, value: str) -> str:
    return f"pg_catalog.set_config({name}, {value}, true)"


def _saved(i: int) -> str:
    """The saved value of a setting; NULL, for one unknown before, resets it."""
    return f"nullif(pg_catalog.current_setting('ruvector_proxy.saved_{i}', true), '')"


def _inject_sql(names_and_values: list[tuple[str, str]]) -> str:
    """SELECT that saves the old value of each setting and then sets it.

    Its first column tells which server process has answered.
    """
    columns = [f"{_save(i, name)}, {_set(name, value)}" for i, (name, value) in enumerate(names_and_values)]
    return ", ".join(["SELECT pg_catalog.pg_backend_pid()", *columns])


def _restore_sql(names: list[str]) -> str:
    """SELECT that gives each setting its saved value back."""
    return "SELECT " + ", ".join(_set(name, _saved(i)) for i, name in enumerate(names))


def _literals(settings: Settings) -> list[tuple[str, str]]:
    return [(f"'{name}'", f"'{value}'") for name, value in settings]


def _try_sql(settings: Settings) -> str:
    """DO block that saves the old values and sets the new ones, or reports why it cannot."""
    pairs = _literals(settings)
    saves = ", ".join(_save(i, name) for i, (name, _) in enumerate(pairs))
    sets = ", ".join(_set(name, value) for name, value in pairs)
    return (
        f"DO $ruvector$ BEGIN PERFORM {saves}; BEGIN PERFORM {sets}; EXCEPTION WHEN OTHERS THEN "
        f"RAISE INFO USING ERRCODE = '{REFUSED.decode()}', "
        "MESSAGE = pg_catalog.concat(SQLSTATE, ' ', SQLERRM); END; END $ruvector$"
    )


def _try_restore_sql(settings: Settings) -> str:
    """DO block that gives the saved values back; where the settings were refused there is nothing to do."""
    sets = ", ".join(_set(f"'{name}'", _saved(i)) for i, (name, _) in enumerate(settings))
    return f"DO $ruvector$ BEGIN PERFORM {sets}; EXCEPTION WHEN OTHERS THEN NULL; END $ruvector$"


def _prepare(name: bytes, sql: str, parameters: int) -> bytes:
    """Close and Parse: closing a statement that does not exist is no error, so this can be repeated."""
    types = struct.pack(f"!H{parameters}I", parameters, *([25] * parameters))  # 25 = text
    return message(b"C", b"S" + name) + message(b"P", name + sql.encode() + b"\0" + types)


def _execute(name: bytes, arguments: list[str]) -> bytes:
    """Bind, Execute and Close of the proxy's portal with text arguments; results in text."""
    values = b"".join(struct.pack("!I", len(a)) + a for a in (argument.encode() for argument in arguments))
    bind = PORTAL + name + b"\0\0" + struct.pack("!H", len(arguments)) + values + b"\0\0"
    return message(b"B", bind) + message(b"E", PORTAL + b"\0\0\0\0") + message(b"C", b"P" + PORTAL)


PREPARE_COMPLETIONS = 2  # CloseComplete, ParseComplete
EXECUTE_COMPLETIONS = 3  # BindComplete, CommandComplete, CloseComplete


@lru_cache(maxsize=64)
def preparation(kind: str, count: int) -> Batch:
    """Messages that prepare the ``inject`` or ``restore`` statement for `count` settings."""
    name = _statement_name(kind, count)
    if kind == "inject":
        pairs = [(f"${2 * i + 1}", f"${2 * i + 2}") for i in range(count)]
        return Batch(_prepare(name, _inject_sql(pairs), 2 * count), PREPARE_COMPLETIONS)
    return Batch(
        _prepare(name, _restore_sql([f"${i + 1}" for i in range(count)]), count), PREPARE_COMPLETIONS
    )


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


def _once(sql: str) -> Batch:
    """Messages that prepare, execute and close a statement without arguments."""
    name = b"_ruvector_try\0"
    data = _prepare(name, sql, 0) + _execute(name, []) + message(b"C", b"S" + name)
    return Batch(data, PREPARE_COMPLETIONS + EXECUTE_COMPLETIONS + 1)


@lru_cache(maxsize=4096)
def trial(settings: Settings) -> Batch:
    """Messages that do the same as `injection` and cannot fail."""
    return _once(_try_sql(settings))


@lru_cache(maxsize=4096)
def trial_restoration(settings: Settings) -> Batch:
    """Messages that do the same as `restoration` and cannot fail."""
    return _once(_try_restore_sql(settings))


@lru_cache(maxsize=4096)
def text_set_local(settings: Settings) -> Batch:
    """SQL prefix for a simple query in autocommit: one ``SET LOCAL`` per setting, one completion each."""
    text = "".join(f"SET LOCAL {name}='{value}';" for name, value in settings)
    return Batch(text.encode(), len(settings))


@lru_cache(maxsize=4096)
def text_save_and_set(settings: Settings) -> Batch:
    """SQL prefix for a simple query where the old values must come back: one SELECT, two completions."""
    return Batch(f"{_inject_sql(_literals(settings))};".encode(), 2)


@lru_cache(maxsize=4096)
def text_restore(settings: Settings) -> Batch:
    """SQL suffix for a simple query: gives the saved values back; one SELECT, two completions."""
    return Batch(f";{_restore_sql([name for name, _ in _literals(settings)])}".encode(), 2)


@lru_cache(maxsize=4096)
def text_trial(settings: Settings) -> Batch:
    """SQL prefix that does the same as `text_save_and_set` and cannot fail: one completion."""
    return Batch(f"{_try_sql(settings)};".encode(), 1)


@lru_cache(maxsize=4096)
def text_trial_restore(settings: Settings) -> Batch:
    """SQL suffix that does the same as `text_restore` and cannot fail: one completion."""
    return Batch(f";{_try_restore_sql(settings)}".encode(), 1)
