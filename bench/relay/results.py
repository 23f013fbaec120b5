"""Figures of one run: by group, case, measure and way, a number for each round.

The load generator, the server and the hop share the machine's cores, so that absolute numbers differ from
machine to machine and from minute to minute.  What is compared is always of one round, in which the ways take
turns; reported is the median over rounds of that round's ratio or difference.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

DIRECT, PGBOUNCER, PROXY, TWO_WORKERS = "direct", "pgbouncer", "proxy", "proxy, 2 workers"
FORWARDER = "forwarder"
"""A Python process that passes bytes on and looks at none: the floor under the proxy."""
ORDER = (DIRECT, PGBOUNCER, FORWARDER, PROXY, TWO_WORKERS)


class Key(NamedTuple):
    """What a row of figures is about."""

    group: str
    case: str
    measure: str
    way: str


@dataclass
class Results:
    """What was measured so far, and on what."""

    figures: dict[Key, list[float]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)  # machine, versions, protocol

    def add(self, group: str, case: str, way: str, **measures: float) -> None:
        """Note one round's figures."""
        for measure, value in measures.items():
            self.figures.setdefault(Key(group, case, measure, way), []).append(value)

    def get(self, group: str, case: str, measure: str, way: str) -> list[float]:
        """Return the rounds; none where it was not measured."""
        return self.figures.get(Key(group, case, measure, way), [])

    def cases(self, group: str) -> list[str]:
        """Return the cases of a group, in the order in which they were measured first."""
        return list(dict.fromkeys(key.case for key in self.figures if key.group == group))

    def ways(self, group: str, case: str) -> Iterator[str]:
        """Yield the ways for which a case was measured."""
        known = {key.way for key in self.figures if key.group == group and key.case == case}
        yield from (way for way in ORDER if way in known)
        yield from sorted(known - set(ORDER))

    def ratio(self, group: str, case: str, measure: str, way: str, to: str) -> float | None:
        """Return the median over rounds of one way's figure over another's; None where one is missing."""
        pairs = list(
            zip(self.get(group, case, measure, way), self.get(group, case, measure, to), strict=False)
        )
        return statistics.median(a / b for a, b in pairs) if pairs else None

    def added(self, group: str, case: str, measure: str, way: str, to: str = DIRECT) -> list[float]:
        """Return, round by round, how much more one way's figure is than another's."""
        return [
            a - b
            for a, b in zip(
                self.get(group, case, measure, way), self.get(group, case, measure, to), strict=False
            )
        ]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        figures = [{**key._asdict(), "rounds": rounds} for key, rounds in self.figures.items()]
        path.write_text(json.dumps({"facts": self.facts, "figures": figures}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote."""
        stored = json.loads(path.read_text())
        results = cls(facts=stored["facts"])
        for row in stored["figures"]:
            key = Key(row["group"], row["case"], row["measure"], row["way"])
            results.figures[key] = row["rounds"]
        return results
