"""Scripts of raw messages as text: one message or instruction a line.

Messages begin with a capital; ``-`` is the unnamed statement or portal::

    Query SELECT 1; SELECT 2
    Parse s1 SELECT $1::int              Parse s1(23,25) SELECT $1, $2        types by OID
    Bind p1 s1 ('7', None)               Bind - s1 in=1 out=1 (int4(7),)      format codes; values are Python
    Describe S s1       Describe P -     Execute p1 0       Close P p1        Flush       Sync
    CopyData '1\\tone\\n'                  CopyDone           CopyFail reason   Terminate
    FunctionCall 177 ('1', '2')          Raw b'\\x00'

Instructions; whatever messages stand between two of them go out in one write::

    << T D*3 C Z     read exactly these messages (both ways; a script says what the server does)
    ready 2          read up to the second ReadyForQuery from here
    settle           read until the server has nothing more to say for now
    pause 5          wait 5 milliseconds
    portions 7       from here on send in portions of 7 bytes; 0: whole
    elsewhere SQL    run a statement on another, direct connection
    cancel           send a CancelRequest and wait until it is closed
    half-close       end our side of the stream
    reset            close with RST; the script is over
    end              read until the server closes
    connect k=v ...  startup parameters (first line only; protocol=3.2 for the version)

In texts ``\\n`` is a line feed, and ``{x*1000}`` stands for a thousand x.  ``#`` begins a comment line.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, Final

from tests.integration import raw

_REPEAT: Final = re.compile(r"\{(.)\*(\d+)\}")
_PARSE: Final = re.compile(r"(\S+?)(?:\(([\d,]*)\))?(?: (.*))?", re.DOTALL)
_BIND: Final = re.compile(r"(\S+) (\S+)(?: in=(\S+))?(?: out=(\S+))? (\(.*\))", re.DOTALL)
_INSTRUCTIONS: Final = frozenset(
    {
        "<<",
        "ready",
        "settle",
        "pause",
        "portions",
        "elsewhere",
        "cancel",
        "half-close",
        "reset",
        "end",
        "connect",
    }
)


@dataclass(frozen=True, slots=True)
class Step:
    """One line: an instruction with its argument, or a message's bytes."""

    word: str
    argument: str = ""
    data: bytes = b""

    @property
    def is_message(self) -> bool:
        return not self.word or self.word not in _INSTRUCTIONS


def vector(*components: float) -> bytes:
    """pgvector's binary form."""
    return struct.pack(f"!HH{len(components)}f", len(components), 0, *components)


def int4(value: int) -> bytes:
    return struct.pack("!i", value)


_VALUES: Final[dict[str, Any]] = {"__builtins__": {}, "vector": vector, "int4": int4}


def read(text: str) -> list[Step]:
    """Return the steps of a script; ValueError where a line is none."""
    steps = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            steps.append(step(line))
        except Exception as error:
            raise ValueError(f"line {number}: {line[:200]}: {error}") from error
    return steps


def step(line: str) -> Step:
    """Return the step that a line means."""
    word, _, rest = _REPEAT.sub(lambda m: m.group(1) * int(m.group(2)), line).partition(" ")
    if word in _INSTRUCTIONS:
        return Step(word, rest.strip())
    return Step(word, "", _MESSAGES[word](rest.replace("\\n", "\n") if word in _TEXTS else rest))


def expected_tags(argument: str) -> list[str]:
    """Return the message types that a ``<<`` line names."""
    tags: list[str] = []
    for item in argument.split():
        tag, _, count = item.partition("*")
        tags.extend([tag] * int(count or 1))
    return tags


# -- messages ----------------------------------------------------------------------------------------------------------


def _name(text: str) -> str:
    return "" if text == "-" else text


def _values(text: str) -> list[bytes | None]:
    """Evaluate a tuple of strings, bytes and None; scripts are our own."""
    values = eval(text, _VALUES)
    return [value.encode() if isinstance(value, str) else value for value in values]


def _codes(text: str | None) -> tuple[int, ...]:
    return tuple(int(code) for code in text.split(",")) if text else ()


def _parse(rest: str) -> bytes:
    found = _PARSE.fullmatch(rest)
    assert found is not None
    return raw.parse(found[3] or "", _name(found[1]), _codes(found[2]))


def _bind(rest: str) -> bytes:
    found = _BIND.fullmatch(rest)
    assert found is not None
    values = _values(found[5])
    formats, results = _codes(found[3]), _codes(found[4])
    body = raw.bind(*values, name=_name(found[2]), portal=_name(found[1]), formats=formats)[5:-2]
    return raw.message("B", body + struct.pack(f"!H{len(results)}H", len(results), *results))


def _function_call(rest: str) -> bytes:
    oid, _, values = rest.partition(" ")
    arguments = _values(values)
    body = struct.pack("!IHH", int(oid), 0, len(arguments))
    for value in arguments:
        body += b"\xff\xff\xff\xff" if value is None else struct.pack("!I", len(value)) + value
    return raw.message("F", body + b"\0\0")


def _literal(rest: str) -> bytes:
    value = eval(rest, _VALUES)
    return value.encode() if isinstance(value, str) else bytes(value)


def _execute(rest: str) -> bytes:
    portal, _, limit = rest.partition(" ")
    return raw.execute(_name(portal), int(limit or 0))


def _kind_and_name(tag: str, rest: str) -> bytes:
    kind, _, name = rest.partition(" ")
    return raw.message(tag, kind.encode() + _name(name).encode() + b"\0")


_TEXTS: Final = frozenset({"Query", "Parse"})
_MESSAGES: Final = {
    "Query": raw.query,
    "Parse": _parse,
    "Bind": _bind,
    "Describe": lambda rest: _kind_and_name("D", rest),
    "Execute": _execute,
    "Close": lambda rest: _kind_and_name("C", rest),
    "Flush": lambda _: raw.FLUSH,
    "Sync": lambda _: raw.SYNC,
    "CopyData": lambda rest: raw.message("d", _literal(rest)),
    "CopyDone": lambda _: raw.message("c"),
    "CopyFail": lambda rest: raw.message("f", rest.encode() + b"\0"),
    "FunctionCall": _function_call,
    "Terminate": lambda _: raw.message("X"),
    "Raw": _literal,
}
