"""The functions that the proxy answers: arguments with defaults, results, and who may call them.

This table is the one source: recognition, evaluation, authority and docs/sql.md follow it.  Types are
PostgreSQL's.  A function with one `Column` named like itself returns a value, another one rows.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final


class Access(enum.Enum):
    """Who may call a function; it is the server that knows the client's rights."""

    ANYONE = "anyone"
    READ = "SELECT on the table"
    CHANGE = "the table's owner"
    MANAGE = "a superuser, or a member of sql.manager"
    SUPERUSER = "a superuser"


@dataclass(frozen=True, slots=True)
class Argument:
    """`default` is SQL; None: the argument must be given.  `null`: NULL may be given."""

    name: str
    type: str
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a result."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Function:
    """One function; `relation` names the argument that is a table or an index."""

    name: str
    arguments: tuple[Argument, ...]
    columns: tuple[Column, ...]
    access: Access
    returns_rows: bool = False
    changes: bool = False  # has an effect: refused in a read-only transaction
    relation: str | None = None

    @property
    def usage(self) -> str:
        """Return how it is called, for people."""
        parts = [
            f"{a.name} {a.type.removeprefix('pg_catalog.')}"
            + ("" if a.default is None else f" := {a.default}")
            for a in self.arguments
        ]
        return f"{self.name}({', '.join(parts)})"


def _arguments(*written: str) -> tuple[Argument, ...]:
    found = []
    for one in written:
        declaration, _, default = one.partition(" = ")
        name, _, kind = declaration.partition(" ")
        found.append(Argument(name, f"pg_catalog.{kind}", default or None))
    return tuple(found)


def _value(name: str, kind: str, access: Access, *arguments: str, changes: bool = False) -> Function:
    taken = _arguments(*arguments)
    relation = taken[0].name if taken and taken[0].name == "table_name" else None
    return Function(
        name, taken, (Column(name, f"pg_catalog.{kind}"),), access, changes=changes, relation=relation
    )


def _rows(name: str, columns: str, access: Access, *arguments: str, changes: bool = False) -> Function:
    taken = _arguments(*arguments)
    relation = taken[0].name if taken and taken[0].name in ("table_name", "index_name") else None
    listed = [one.strip().split(" ") for one in columns.split(",")]
    return Function(
        name,
        taken,
        tuple(Column(column, f"pg_catalog.{kind}") for column, kind in listed),
        access,
        returns_rows=True,
        changes=changes,
        relation=relation,
    )


_ALL: Final = (
    _value(
        "ruvector_enable_learning", "text", Access.CHANGE,
        "table_name text", "trajectory_window int4 = NULL", "learning_rate float8 = NULL",
        "min_samples int4 = NULL", "target_recall float8 = NULL", "optimize_for text = NULL",
        "adaptive_search bool = NULL", "config jsonb = NULL", changes=True,
    ),
    _value("ruvector_disable_learning", "text", Access.CHANGE, "table_name text", changes=True),
    _value("ruvector_clear_learning", "text", Access.CHANGE, "table_name text", changes=True),
    _rows(
        "ruvector_learning_stats",
        "template text, database text, username text, phase text, trust text, reason text, "
        "trajectories int8, labels int8, audited_queries int8, recall float8, recall_low float8, "
        "recall_high float8, target_recall float8, arm text, settings jsonb, latency_before_ms float8, "
        "latency_after_ms float8, patterns int8, feedback int8, feedback_missed int8, memory_bytes int8",
        Access.READ, "table_name text",
    ),
    _rows(
        "ruvector_recommend_params", "kind text, name text, value text, reason text",
        Access.READ, "table_name text",
    ),
    _rows(
        "ruvector_auto_tune",
        "template text, k int4, arm text, settings jsonb, recall float8, latency_ms float8, measured int8, "
        "target_recall float8, chosen bool",
        Access.CHANGE, "index_name text", "optimize_for text = 'balanced'", "sample_queries int4 = 1000",
        changes=True,
    ),
    _rows(
        "ruvector_get_search_params",
        "template text, k int4, arm text, settings jsonb, ef_search int4, probes int4, "
        "expected_recall float8, target_recall float8, trust text, reason text",
        Access.READ, "table_name text", "query text", "k int4 = NULL",
    ),
    _value(
        "ruvector_record_feedback", "bool", Access.ANYONE,
        "query_id text", "relevant_ids text[] = '{}'", "irrelevant_ids text[] = '{}'", changes=True,
    ),
    _value("ruvector_last_query_id", "text", Access.ANYONE),
    _value("ruvector_relay_only", "bool", Access.MANAGE, "relay_only bool = NULL"),
    _value("ruvector_export_patterns", "jsonb", Access.SUPERUSER, "table_name text"),
    _value(
        "ruvector_import_patterns", "text", Access.SUPERUSER, "table_name text", "patterns jsonb",
        changes=True,
    ),
    _value(
        "ruvector_extract_patterns", "int8", Access.CHANGE, "table_name text", "num_clusters int4 = NULL",
        changes=True,
    ),
    _value(
        "ruvector_consolidate_patterns", "int8", Access.CHANGE,
        "table_name text", "similarity_threshold float8 = NULL", changes=True,
    ),
    _value(
        "ruvector_prune_patterns", "int8", Access.CHANGE,
        "table_name text", "min_usage int4 = 1", "min_confidence float8 = 0.0", changes=True,
    ),
    _rows(
        "ruvector_ground_truth", "query text, k int4, distances float8[]",
        Access.READ, "table_name text", "num_queries int4 = 1000", "k int4 = 10",
    ),
    _rows(
        "ruvector_benchmark_recall",
        "settings text, queries int8, k int4, recall float8, recall_low float8, recall_high float8, "
        "mean_ms float8",
        Access.READ,
        "table_name text", "ground_truth_table text", "num_queries int4 = 1000", "k int4 = 10",
    ),
    _rows(
        "ruvector_benchmark_latency",
        "settings text, queries int8, k int4, percentile float8, latency_ms float8",
        Access.READ, "table_name text", "num_queries int4 = 1000", "k int4 = 10",
        "percentiles float8[] = '{50,90,99}'",
    ),
)  # fmt: skip

FUNCTIONS: Final = {function.name: function for function in _ALL}
"""By name, as PostgreSQL folds it."""

RATE_BY_VECTOR: Final = Function(
    "ruvector_record_feedback",
    _arguments("table_name text", "query text", "relevant_ids text[]", "irrelevant_ids text[] = '{}'"),
    (Column("ruvector_record_feedback", "pg_catalog.bool"),),
    Access.READ,
    changes=True,
    relation="table_name",
)
"""The older signature of `ruvector_record_feedback`: the query is named by its table and vector."""
