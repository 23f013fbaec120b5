"""Settings of the proxy's own: ``ruvector.adaptive_search``, ``.target_recall`` and the others in `NAMES`.

Theory
------
To the server they are placeholders, which it keeps for whoever sets them: so SET [LOCAL], RESET, ROLLBACK,
start-up options and ALTER ROLE ... SET mean what they always mean, and nothing of that is done anew here.
The session reads them from the server when they may have changed (`proxy.session.calling`).  Two things the
server cannot do: refuse a wrong value, and SHOW one that was never set; `checked` and `shown` do these.

``ruvector.ef_search`` and ``ruvector.probes`` are settings of the ruvector extension, too.  Where it is
installed it has defined them, and they are its business: the server then lists them in pg_settings, which it
does with no placeholder.

``WITH (name := value, ...)`` behind a SELECT sets them for one statement.  It is no SQL: the server never
sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from postgast import PgQueryError
from postgast import pg_query_pb2 as pb

from proxy.interface.records import RefusalError, Rewritten
from proxy.interface.scanning import Scanned, Token
from proxy.sql.tree import Message

PREFIX: Final = "ruvector."
NAMES: Final = ("adaptive_search", "target_recall", "optimize_for", "ef_search", "probes")
EFFORTS: Final = {"ef_search": 1000, "probes": 32768}
"""Settings that fix how far a search goes, and the largest value of each."""
AUTO: Final = "auto"
PREFERENCES: Final = ("balanced", "latency", "recall")
_TRUE: Final = frozenset({"on", "true", "yes", "1", "t", "y"})
_FALSE: Final = frozenset({"off", "false", "no", "0", "f", "n"})


def _read_one(name: str) -> str:
    value = f"pg_catalog.current_setting('{PREFIX}{name}', true)"
    if name not in EFFORTS:
        return f"coalesce({value}, '')"
    listed = f"EXISTS (SELECT FROM pg_catalog.pg_settings WHERE name = '{PREFIX}{name}')"
    return f"CASE WHEN coalesce({value}, '') = '' OR {listed} THEN '' ELSE {value} END"


READ: Final = "SELECT " + " || E'\\n' || ".join(map(_read_one, NAMES))
"""One row of one column: the values, a line each; empty where never set."""


@dataclass(frozen=True, slots=True)
class Steering:
    """What a session or a statement asks for; None: what the table's policy says."""

    adaptive_search: bool | None = None
    target_recall: float | None = None
    optimize_for: str | None = None
    ef_search: int | None = None
    probes: int | None = None

    def over(self, other: Steering) -> Steering:
        """Return `other` with what is set here in its place."""
        return Steering(
            other.adaptive_search if self.adaptive_search is None else self.adaptive_search,
            other.target_recall if self.target_recall is None else self.target_recall,
            other.optimize_for if self.optimize_for is None else self.optimize_for,
            other.ef_search if self.ef_search is None else self.ef_search,
            other.probes if self.probes is None else self.probes,
        )


NOTHING: Final = Steering()


def steering(values: Mapping[str, str]) -> Steering:
    """Read values as they are set.

    Raises
    ------
    RefusalError
        A value is none of its setting.
    """
    found: dict[str, bool | float | str] = {}
    for name, text in values.items():
        if text and not (name in EFFORTS and text.strip().lower() == AUTO):
            found[name] = _read(name, text)
    return Steering(**found)  # type: ignore[arg-type]


def _read(name: str, text: str) -> bool | float | str:
    word = text.strip().lower()
    if name == "adaptive_search":
        if word in _TRUE or word in _FALSE:
            return word in _TRUE
        raise _invalid(name, text, "It is a Boolean: on or off.")
    if name == "optimize_for":
        if word in PREFERENCES:
            return word
        raise _invalid(name, text, "Available values: balanced, latency, recall.")
    if name in EFFORTS:
        if word.isascii() and word.isdigit() and 1 <= int(word) <= EFFORTS[name]:
            return int(word)
        raise _invalid(name, text, f"It is a whole number from 1 to {EFFORTS[name]}, or auto.")
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= 1.0:
        raise _invalid(name, text, "It is a share, above 0 and at most 1.")
    return number


def _invalid(name: str, text: str, hint: str) -> RefusalError:
    return RefusalError("22023", f'invalid value for parameter "{PREFIX}{name}": "{text}"', hint=hint)


def read_values(answer: bytes) -> Steering:
    """Read the server's answer to `READ`; one that came past `checked` and cannot be used counts as none."""
    found: dict[str, str] = {}
    for name, text in zip(NAMES, answer.decode(errors="replace").split("\n"), strict=False):
        try:
            steering({name: text})
        except RefusalError:
            continue
        found[name] = text
    return steering(found)


def checked(node: Message) -> None:
    """Check a SET of one of the settings.

    Raises
    ------
    RefusalError
        The value is none of the setting.
    """
    name = node.name.lower().removeprefix(PREFIX)
    if name not in NAMES or node.kind != pb.VAR_SET_VALUE or not node.name.lower().startswith(PREFIX):
        return
    text = ", ".join(_constant(argument) for argument in node.args)
    steering({name: text or " "})


def _constant(node: pb.Node) -> str:
    constant = node.a_const
    for kind in ("sval", "fval"):
        if constant.HasField(kind):
            return str(getattr(getattr(constant, kind), kind))
    if constant.HasField("boolval"):
        return "on" if constant.boolval.boolval else "off"
    return str(constant.ival.ival)


def shown(name: str, defaults: Mapping[str, str]) -> str | None:
    """Return a SELECT in place of SHOW for one of the settings; None for others."""
    short = name.lower().removeprefix(PREFIX)
    if short not in NAMES or not name.lower().startswith(PREFIX):
        return None
    default = defaults[short].replace("'", "''")
    value = f"coalesce(NULLIF(pg_catalog.current_setting('{PREFIX}{short}', true), ''), '{default}')"
    return f'SELECT {value} AS "{PREFIX}{short}"'


def without_clause(sql: bytes) -> tuple[bytes, Steering] | Rewritten | None:
    """Return a text with blanks in place of its ``WITH (name := value, ...)``; None where there is none.

    A refusal, where the clause names something else, or a value is none of its setting.
    """
    try:
        return _without_clause(sql)
    except RefusalError as refusal:
        return Rewritten(refusal=refusal)


def _without_clause(sql: bytes) -> tuple[bytes, Steering] | None:
    try:
        scanned = Scanned(sql)
    except (PgQueryError, UnicodeDecodeError):
        return None
    tokens = scanned.tokens
    for place, token in enumerate(tokens[:-4]):
        if (
            token.kind == pb.WITH
            and tokens[place + 1].kind == pb.ASCII_40
            and _word(scanned, tokens[place + 2]) in NAMES
            and tokens[place + 3].kind in (pb.COLON_EQUALS, pb.EQUALS_GREATER)
        ):
            return _cut(scanned, place)
    return None


def _cut(scanned: Scanned, place: int) -> tuple[bytes, Steering] | None:
    """Take the clause that begins at a token off."""
    sql, tokens = scanned.sql, scanned.tokens
    values: dict[str, str] = {}
    index = place + 2
    while True:
        if index + 3 >= len(tokens):
            return None
        name = _word(scanned, tokens[index])
        if name not in NAMES or tokens[index + 1].kind not in (pb.COLON_EQUALS, pb.EQUALS_GREATER):
            raise RefusalError(
                "42601",
                f'WITH (...) of a SELECT does not know "{name}"',
                hint=f"It takes {', '.join(NAMES[:-1])} and {NAMES[-1]}.",
                position=len(sql[: tokens[index].start].decode()) + 1,
            )
        values[name] = _word(scanned, tokens[index + 2]).strip("'")
        closing = tokens[index + 3]
        if closing.kind == pb.ASCII_41:
            break
        if closing.kind != pb.ASCII_44:
            return None
        index += 4
    start, end = tokens[place].start, closing.end
    return sql[:start] + b" " * (end - start) + sql[end:], steering(values)


def _word(scanned: Scanned, token: Token) -> str:
    return scanned.sql[token.start : token.end].decode(errors="replace").lower()
