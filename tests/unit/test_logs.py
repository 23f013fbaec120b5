"""The log: one line per message, in both formats, never with a password."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from config.schema import Log
from proxy import logs


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Log], io.StringIO]]:
    """Return a function that sets the log up and gives what is written; the root logger is restored."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def set_up(options: Log) -> io.StringIO:
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        logs.set_up(options, "worker 1")
        return stream

    yield set_up
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def fail_with_secret() -> None:
    try:
        raise ValueError("bad: postgresql://me:hunter2@h/db")
    except ValueError:
        logging.getLogger("some.library").exception("cannot use %s", "postgres://me:hunter2@h/db")


def test_a_human_line_tells_time_level_process_and_message(log: Callable[[Log], io.StringIO]) -> None:
    stream = log(Log())
    logging.getLogger("proxy").warning("%d sockets", 2)
    logging.getLogger("proxy").debug("not shown")
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING worker 1 \[\d+\] 2 sockets\n"
    assert re.fullmatch(line, stream.getvalue())


def test_a_json_line_is_one_object_with_the_exception_inside(log: Callable[[Log], io.StringIO]) -> None:
    stream = log(Log(level="debug", format="json"))
    logging.getLogger("proxy").debug("two\nlines")
    fail_with_secret()
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["process"], first["message"]) == ("debug", "worker 1", "two\nlines")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert (second["logger"], second["message"]) == ("some.library", "cannot use postgres://me:***@h/db")
    assert "ValueError: bad: postgresql://me:***@h/db" in second["exception"]


@pytest.mark.parametrize("format_", ["human", "json"])
def test_no_password_gets_through(
    format_: Literal["human", "json"], log: Callable[[Log], io.StringIO]
) -> None:
    stream = log(Log(format=format_))
    fail_with_secret()
    assert "hunter2" not in stream.getvalue()
    assert "cannot use postgres://me:***@h/db" in stream.getvalue()
    assert "ValueError: bad: postgresql://me:***@h/db" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('for type vector: "[0.1, -2e-5,3,4.]"', 'for type vector: "[...]"'),
        ("could not convert [1,2,3,4...", "could not convert [...]"),
        ("k in [1, 2] and [4711] stay", "k in [1, 2] and [4711] stay"),
    ],
)
def test_what_looks_like_a_vector_is_masked(text: str, shown: str) -> None:
    assert logs.mask(text) == shown
