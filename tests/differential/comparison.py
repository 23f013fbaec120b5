"""Plays a script directly and through the proxy, tells the first difference, and shrinks what differs."""

from __future__ import annotations

from collections.abc import Callable

from tests.differential import notation
from tests.differential.conversation import Message, Transcript
from tests.differential.world import Result, World

WAYS = ("normal", "forced")
_SHOWN = 300  # bytes of a message that are shown


def difference(world: World, script: str, way: str) -> str | None:
    """Return in words how the proxied way differs from the direct one; None where it does not."""
    steps = notation.read(script)
    direct = world.play(steps, "direct")
    proxied = world.play(steps, way, direct.seen.settled)
    return between(direct, proxied)


def differences(world: World, script: str) -> dict[str, str]:
    """Return the differences of all proxied ways from one direct run, by way."""
    steps = notation.read(script)
    direct = world.play(steps, "direct")
    found = {way: between(direct, world.play(steps, way, direct.seen.settled)) for way in WAYS}
    return {way: words for way, words in found.items() if words is not None}


def differs(there: World, way: str, script: str) -> bool:
    """Tell whether a script differs."""
    return difference(there, script, way) is not None


def between(direct: Result, proxied: Result) -> str | None:
    """Return the first difference between two results."""
    one, other = direct.seen, proxied.seen
    for i, (a, b) in enumerate(zip(one.messages, other.messages, strict=False)):
        if a != b and not is_known(a, b):
            return f"message {i}: direct {_shown(a)}, proxied {_shown(b)}\n{_context(one, other, i)}"
    if len(one.messages) != len(other.messages):
        i = min(len(one.messages), len(other.messages))
        who, longer = ("direct", one) if len(one.messages) > i else ("proxied", other)
        return f"only {who} has message {i}: {_shown(longer.messages[i])}\n{_context(one, other, i)}"
    if one.closed != other.closed:
        return f"closed: direct {one.closed}, proxied {other.closed}"
    if one.problem != other.problem:
        return f"problem: direct {one.problem}, proxied {other.problem}"
    if direct.rows != proxied.rows:
        return f"table: direct {direct.rows}, proxied {proxied.rows}"
    return None


def is_known(direct: Message, proxied: Message) -> bool:
    """Tell whether this is the one difference that is documented (docs/wire.md).

    In a pipeline whose transaction has failed the proxy's own message can be the first to be refused with
    25P02, where the client's would have been, at another line of the server's code, or with 26000.
    """
    if direct[0] != "E" or proxied[0] != "E" or b"\0C25P02\0" not in proxied[1]:
        return False
    return b"\0C26000\0" in direct[1] or b"\0C25P02\0" in direct[1]


def shrink(script: str, differs: Callable[[str], bool], attempts: int = 400) -> str:
    """Return a shorter script that still differs: leave out lines, larger runs of them first (ddmin)."""
    lines = [line for line in script.splitlines() if line.strip() and not line.startswith("#")]
    size = max(1, len(lines) // 2)
    while attempts > 0:
        start = 0
        shorter = False
        while start < len(lines) and attempts > 0:
            tried = lines[:start] + lines[start + size :]
            attempts -= 1
            if tried and differs("\n".join(tried)):
                lines = tried
                shorter = True
            else:
                start += size
        if size == 1 and not shorter:
            break
        size = size if shorter and size == 1 else max(1, size // 2)
    return "\n".join(lines) + "\n"


def _shown(message: Message) -> str:
    tag, body = message
    return f"{tag} {body[:_SHOWN]!r}"


def _context(one: Transcript, other: Transcript, i: int) -> str:
    head = max(0, i - 6)
    return "\n".join(
        f"  {name}: ... {' '.join(tag for tag, _ in seen.messages[head : i + 4])}"
        for name, seen in (("direct ", one), ("proxied", other))
    )
