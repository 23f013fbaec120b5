"""A text passes byte for byte: in both protocols, alone and behind others, whole and in pieces, with a policy and without.

Texts are those of a file of psql's, cut where psql would cut them, roughly: the promise holds for any text, so a cut
in the wrong place is a text like another.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from proxy.session.adaptation import Adapter
from proxy.session.counters import Counters
from proxy.session.frontend import Session
from proxy.sql import Scope
from tests.integration.proxied import Dictated
from tests.integration.raw import SYNC, bind, execute, message

GREETING = message("R", b"\0\0\0\0") + message("K", b"\0\0\0\7\0\0\0\0") + message("Z", b"I")
DONE = message("C", b"SELECT 1\0") + message("Z", b"I")
SCOPE = Scope("d", "u", None)
SETTINGS = (("hnsw.ef_search", "77"),)

_TOKEN = re.compile(
    rb"--[^\n]*|/\*.*?\*/|\$(\w*)\$.*?\$\1\$|[eE]?'(?:[^'\\]|''|\\.)*'|\"[^\"]*\"|;|[^;'\"$/-]+|.", re.DOTALL
)


def texts(script: bytes) -> Iterator[bytes]:
    """Cut a psql script into texts."""
    script = re.sub(rb"^\\.*$", b"", script, flags=re.MULTILINE)
    current = b""
    for found in _TOKEN.finditer(script):
        current += found[0]
        if found[0] == b";":
            yield current.replace(b"\0", b"")
            current = b""
    if current.strip():
        yield current.replace(b"\0", b"")


def mutated(known: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Make texts out of known ones: cut, joined, in another case, with pieces of others, with bytes that are none."""
    dice = random.Random(seed)
    for _ in range(count):
        text = dice.choice(known)
        for _ in range(dice.randint(1, 3)):
            other = dice.choice(known)
            at, place = dice.randint(0, len(text)), dice.randint(0, len(other))
            text = dice.choice(
                (
                    text[:at],
                    text + other,
                    text.upper(),
                    text[:at] + other[place:],
                    text[:at] + bytes([dice.randint(1, 255)]) + text[at:],
                    text.replace(b"=", dice.choice((b"<->", b"<=>", b"<#>"))),
                    text.rstrip(b"; \n") + b" ORDER BY embedding <-> $1 LIMIT 10",
                    b"SET hnsw.ef_search = 50; " + text,
                    text.replace(b" ", b" /* ; ' */ "),
                )
            )[:100_000]
        yield text


class Lane:
    """A session that has logged in, with a policy that gives every vector query settings, or with none."""

    def __init__(self, adapter: Adapter) -> None:
        self.session = Session(adapter, {"user": "u", "database": "d"})
        assert self.session.from_server(GREETING) == GREETING

    def query(self, text: bytes) -> None:
        """Send a Query and answer it."""
        sent = message("Q", text + b"\0")
        assert self.session.from_client(sent) == sent
        assert self.session.from_server(DONE) == DONE


def adapters() -> tuple[Adapter, Adapter]:
    """Return an adapter without a policy, and one that adapts every vector query."""
    without, dictating = Adapter(Counters()), Adapter(Counters())
    dictating.swap(Dictated(SETTINGS), 1)
    return without, dictating


def check(text: bytes, adapter: Adapter, dice: random.Random) -> bool:
    """See that a text passes, each time in a new session; tell whether it was left out, as one for the proxy.

    Raises
    ------
    AssertionError
        It did not pass as it was.
    """
    statement = adapter.recognise(text, SCOPE)
    if statement.rewritten is not None or statement.text is not None:
        return True  # it calls the proxy by its name
    if statement.vector is not None and adapter.adapts(statement.vector):
        return True
    Lane(adapter).query(text)
    sent = message("P", b"s\0" + text + b"\0\0\0") + bind(name="s") + execute() + SYNC
    assert Lane(adapter).session.from_client(sent) == sent
    session = Lane(adapter).session
    cuts = sorted(dice.randint(0, len(sent)) for _ in range(3))
    pieces = [sent[start:end] for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    assert b"".join(session.from_client(piece) for piece in pieces) == sent
    return False
