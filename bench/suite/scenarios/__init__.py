"""The scenarios of the suite, those that matter most first; each returns one record or several."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from bench.suite.records import Result
from bench.suite.scenarios import drift, filters, mixed, repeating, several, wide
from bench.suite.stage import Stage

SCENARIOS: Mapping[str, Callable[[Stage], Awaitable[list[Result]]]] = {
    "mixed": mixed.mixed,
    "categories": filters.categories,
    "zipf": repeating.exact,
    "near": repeating.near,
    "drift": drift.drift,
    "sentences": mixed.sentences,
    "selectivity": filters.selectivity,
    "tenants": filters.tenants,
    "k": several.ks,
    "indexes": several.indexes,
    "tables": several.two_tables,
    "dimensions": wide.dimensions,
}
