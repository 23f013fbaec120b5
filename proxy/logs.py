"""The log: lines on standard error, for people or as JSON, the same in all processes.

Supervisor, workers and learner write to the same standard error, one complete line per write.  Every line
names its process.  What a record carries as ``extra={"fields": {...}}`` is shown in JSON only; its message
says the same in words.

No line holds a password, a query vector or a filter value: whoever logs leaves them out.  As a last line of
defence a password in a connection URI and whatever looks like a vector are masked in all that is logged,
stack traces and third-party messages included.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time

from config.schema import Log

_URI_PASSWORD = re.compile(r"(\bpostgres(?:ql)?://[^:/@\s]*:)[^@\s]*@")

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_VECTOR = re.compile(rf"\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER}){{2,}}\s*(?:\]|\.\.\.|$)")


def set_up(options: Log, process: str) -> None:
    """Send the log of this process, called `process` in it, to standard error as configured."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if options.format == "json" else HumanFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(options.level.upper())
    logging.captureWarnings(True)


def mask(text: str) -> str:
    """Replace the passwords of connection URIs, and vectors of three numbers or more, in `text`."""
    return _VECTOR.sub("[...]", _URI_PASSWORD.sub(r"\1***@", text))


class HumanFormatter(logging.Formatter):
    """``2026-01-31 12:00:00.123 INFO    worker 1 [4711] message``, local time; stack traces follow."""

    def __init__(self, process: str) -> None:
        super().__init__(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {process.replace('%', '%%')} [%(process)d] %(message)s",
            datefmt="%Y-%m-%d %H:%M:%S",
        )

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, masked."""
        return mask(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC, RFC 3339), level, process, pid, logger, message, exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, masked."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": os.getpid(),
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = mask(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)
