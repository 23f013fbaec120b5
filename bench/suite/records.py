"""What a run found, as data: written to JSON, drawn by `plots`, told by `report`, compared by `compare`.

Latencies are milliseconds, recall is a share, an interval holds 95 % of the bootstrap (`statistics`).  A
record holds all that its picture and its words need: both are made from the file alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Verdict = Literal["pass", "falls short", "too noisy to say"]
PASS: Verdict = "pass"  # noqa: S105
SHORT: Verdict = "falls short"
NOISY: Verdict = "too noisy to say"
Style = Literal["line", "points", "star", "hollow", "bars"]


class Interval(msgspec.Struct, frozen=True):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


class Claim(msgspec.Struct, frozen=True):
    """Something that a scenario has to show, and what it shows."""

    text: str
    wanted: str
    found: Interval
    verdict: Verdict


class Line(msgspec.Struct, frozen=True):
    """One way to run the queries, over all test queries of a scenario."""

    name: str
    kind: str  # one of `systems.KINDS`
    queries: int
    recall: Interval
    mean_ms: float
    p50_ms: float
    p99_ms: float
    short: int  # queries that returned fewer rows than there are


class Series(msgspec.Struct, frozen=True):
    """Points of one plot."""

    name: str
    x: list[float]
    y: list[float]
    style: Style = "line"
    labels: list[str] = []


class Panel(msgspec.Struct, frozen=True):
    """One pair of axes."""

    title: str
    x: str
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    target: float | None = None  # a horizontal line


class Ratio(msgspec.Struct, frozen=True):
    """What the proxy costs beside the best static setting at the recall that the proxy reached."""

    name: str
    target: float
    found: Interval
    own_time: str = ""  # of the mean latency


class Result(msgspec.Struct):
    """What one scenario gave; `error` is set where it failed."""

    scenario: str
    title: str
    question: str
    facts: dict[str, str] = {}
    lines: list[Line] = []
    claims: list[Claim] = []
    ratios: list[Ratio] = []
    panels: list[Panel] = []
    notes: list[str] = []
    noise: float | None = None  # how far two identical systems differ, as a share
    seconds: float = 0.0
    error: str = ""


class Report(msgspec.Struct):
    """A whole run."""

    environment: dict[str, str]
    results: list[Result]
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(rounded(self)), indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote."""
        return msgspec.json.decode(path.read_bytes(), type=cls)


def rounded(report: Report) -> Report:
    """Return the same with five significant digits, which is more than was measured, and no NumPy in it."""

    def shorten(found: object) -> object:
        if isinstance(found, float):
            return float(f"{found:.5g}")
        if isinstance(found, dict):
            return {key: shorten(value) for key, value in found.items()}
        if isinstance(found, list):
            return [shorten(value) for value in found]
        return found

    return msgspec.convert(shorten(msgspec.to_builtins(report, enc_hook=float)), Report)
