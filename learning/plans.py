"""What an EXPLAIN (FORMAT JSON, VERBOSE) says: which relations are read, and through which indexes.  Pure.

Source: PostgreSQL documentation, "Using EXPLAIN"; field names as in ``explain.c``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Plan:
    """What matters of a plan.  Names are (schema, name); an index lives in its table's schema."""

    relations: frozenset[tuple[str, str]]
    indexes: frozenset[tuple[str, str]]  # of Index Scan nodes; a bitmap scan cannot use a vector index
    foreign: bool  # reads a foreign table

    @classmethod
    def parse(cls, document: list[Mapping[str, Any]]) -> Plan:
        """Read the decoded JSON of one EXPLAIN."""
        nodes = list(_nodes(document[0]["Plan"]))
        return cls(
            relations=frozenset((n["Schema"], n["Relation Name"]) for n in nodes if "Relation Name" in n),
            indexes=frozenset(
                (n["Schema"], n["Index Name"]) for n in nodes if "Index Name" in n and "Schema" in n
            ),
            foreign=any(n["Node Type"].startswith("Foreign") for n in nodes),
        )


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)
