"""Confirmation: what the server says about a template before any of its queries is touched.

The SQL text tells what a query looks like; only the server knows what it means.  On a side connection, under
the template's own search_path and its role's settings, `confirm` finds out

- which relation is searched, and that it is an ordinary table or a materialized view;
- that no row-level security applies to anything that the plan reads, and no volatile function is called;
- which valid vector indexes on the column serve the query's operator;
- the types of the parameters, and the table's statistics on the filtered column;
- which arms do what they are meant to do, by EXPLAIN for several queries of the template (small and large k,
  different filter values): an index arm uses an index of its method, the exact arm none.  Where two indexes
  compete, the planner is steered in the way (`dialects.STEERINGS`) that gets most arms what they want.

The answer is `Confirmed` or `Rejected`; a rejection carries its reason in words, for people to read.  With a
filter the plan depends on the value, and an index arm whose plan uses no vector index at all is still a fair
arm (the planner found something exact); without a filter it would be an exact search under a false name, and
is dropped.

Catalogs: PostgreSQL documentation, chapter "System Catalogs" (pg_index, pg_opclass, pg_amop, pg_proc,
pg_class, pg_db_role_setting).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import asyncpg

from learning.binding import BindingError, Bound, ParameterType, parameter_types
from learning.density import SketchData
from learning.dialects import STEERINGS, IndexInfo, is_contested, ladder
from learning.distillation import TableFacts
from learning.drift import World
from learning.plans import Plan
from learning.probe import apply, snapshot
from learning.records import Arm, Settings, SlotRole, Template, Trajectory
from learning.tablestats import selectivity, unindexed, usual_settings
from learning.upstream import DISCONNECTED, TRANSIENT, Session, words_of

VECTOR_METHODS = (
    "hnsw", "ivfflat", "diskann", "ruhnsw", "ruivfflat", "vchordrq", "vchordg", "lantern_hnsw", "scann",
)  # fmt: skip

_KINDS = {"v": "a view", "p": "a partitioned table", "f": "a foreign table", "S": "a sequence", "c": "a type"}


@dataclass(frozen=True, slots=True)
class Rejected:
    """The template is left alone."""

    reason: str
    table: str = ""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The template may be measured."""

    facts: TableFacts
    indexes: tuple[IndexInfo, ...]
    arms: tuple[Arm, ...]
    types: tuple[ParameterType, ...]  # of the probe's parameters
    settings: Settings  # of the application's session: its role's settings, then the search_path
    relation: int  # OID
    used: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Arm.name -> vector indexes that its plan scanned in some query, for people to read."""
    usual: Mapping[str, str] = field(default_factory=dict)  # search settings without the proxy
    unindexed: tuple[str, ...] = ()  # filter columns that no ordinary index begins with

    def with_sketch(self, sketch: SketchData | None) -> Confirmed:
        """Return the same with a sketch of the table's vectors."""
        return replace(self, facts=replace(self.facts, sketch=sketch))


@dataclass(frozen=True, slots=True)
class _Relation:
    oid: int
    schema: str
    name: str
    kind: str
    rows: float
    inherited: bool
    column: int
    type: str = ""  # of the column

    @property
    def qualified(self) -> str:
        return f"{self.schema}.{self.name}"


class _RejectError(Exception):
    """Carries a reason out of the depths of `confirm`."""


async def confirm(
    session: Session,
    template: Template,
    sample: Trajectory,
    *,
    max_k: int,
    min_k: int | None = None,
    witnesses: Sequence[Trajectory] = (),
) -> Confirmed | Rejected:
    """Ask the server about a template.

    Parameters
    ----------
    sample
        A recent query of the template; EXPLAIN gets its values.
    max_k, min_k
        The largest and smallest (default: the largest) LIMIT + OFFSET for which the arms are to be fit.
    witnesses
        Further recent queries, of other k or filter values: an arm must do what it should for each.

    Raises
    ------
    asyncpg.PostgresError, OSError
        Only errors that may be gone in a moment: a lost connection, a lock, a timeout.
    """
    table = ""
    try:
        settings = await application_settings(session, template)
        async with snapshot(session, settings):
            relation = await _relation(session, template)
            table = relation.qualified
            await _reject_functions(session, template)
            statement = await session.connection.prepare(template.probe_sql)
            types = parameter_types(statement)
            await session.binder.declare(types)
            arguments = await session.binder.bind(template, types, sample)
            plan = await explain(session, template, arguments)  # also makes the server load the extension
            await _reject_protected(session, plan, relation)
            indexes = await _indexes(session, template, relation)
            seen = [arguments]
            seen += [await session.binder.bind(template, types, witness) for witness in witnesses]
            ks = (max_k if min_k is None else min_k, max_k)
            arms, used = await _Arms(session, template, relation.schema, indexes, seen).confirm(ks)
            facts = await _facts(session, template, relation, types)
            filters = [slot.column for slot in template.slots if slot.role is SlotRole.FILTER and slot.column]
            missing = await unindexed(session, relation.oid, filters) if filters else ()
            usual = await usual_settings(session)
    except (*DISCONNECTED, *TRANSIENT):
        raise
    except (_RejectError, BindingError) as error:
        return Rejected(str(error), table)
    except asyncpg.PostgresError as error:
        return Rejected(f"the learner's role cannot measure it: {words_of(error)}", table)
    usual |= {name: value for name, value in settings if name in usual}
    return Confirmed(
        facts, tuple(indexes), arms, types, settings, relation.oid, used, usual=usual, unindexed=missing
    )


async def explain(session: Session, template: Template, arguments: Sequence[Bound]) -> Plan:
    """Return the plan of the template's probe for these arguments under the settings in force."""
    row = await session.connection.fetchrow(
        "EXPLAIN (FORMAT JSON, VERBOSE) " + template.probe_sql, *arguments
    )
    return Plan.parse(json.loads(row[0]))


async def look(session: Session, relation: int) -> World:
    """Return what the catalogs say of a table now: a query of half a millisecond.

    Rows are estimated as the planner does, density at the last ANALYZE times pages now, less the share of
    dead ones by the server's running counts.  (Its count of live rows alone is no good: an ANALYZE soon after
    a load in the same session counts the load twice.)
    """
    rows_found = await session.catalog(_WORLD, str(relation), list(VECTOR_METHODS))
    if not rows_found:
        return World((), 0.0)  # the table is gone
    found = rows_found[0]
    indexes = tuple((x["name"], int(x["file"] or 0)) for x in found["indexes"] or ())
    live, dead = float(found["live"] or 0.0), float(found["dead"] or 0.0)
    if found["pages_then"] and found["estimate"] > 0:
        rows = found["estimate"] * found["pages_now"] / found["pages_then"]
        rows *= live / (live + dead) if live + dead else 1.0
    else:  # never analyzed
        rows = live
    return World(indexes, float(rows))


async def application_settings(session: Session, template: Template) -> Settings:
    """Return the planner's settings of the application's role (ALTER ROLE, ALTER DATABASE) and search_path.

    The side connection has another role; without this "as is" would be measured under the wrong settings.
    """
    rows = await session.catalog(_ROLE_SETTINGS, template.user)
    own = dict(row["setting"].split("=", 1) for row in rows)  # the most specific comes last and wins
    known = await session.catalog(_PLANNER_SETTINGS, list(own))
    settings = {row["name"]: own[row["name"]] for row in known}
    path = template.search_path if template.search_path is not None else own.get("search_path")
    settings["search_path"] = expand_user(session.default_path if path is None else path, template.user)
    return tuple(settings.items())


def expand_user(search_path: str, user: str) -> str:
    """Replace ``"$user"`` in a search_path by the application's role, quoted."""
    quoted = '"' + user.replace('"', '""') + '"'
    elements = re.findall(r'"(?:[^"]|"")*"|[^,\s]+', search_path)
    return ", ".join(quoted if element in ('"$user"', "$user") else element for element in elements)


async def _relation(session: Session, template: Template) -> _Relation:
    (named,) = await session.rows(_NAMED, template.relation)
    rows = await session.catalog(_RELATION, named["oid"] or "0", template.column)
    if not rows:
        raise _RejectError(f"the relation {template.relation} does not exist on its search_path")
    relation = _Relation(**rows[0])
    if relation.kind not in ("r", "m"):
        raise _RejectError(
            f"{relation.qualified} is {_KINDS.get(relation.kind, 'no table')}: not adapted yet"
        )
    if relation.inherited:
        raise _RejectError(f"{relation.qualified} has child tables: not adapted yet")
    if not relation.column:
        raise _RejectError(f"{relation.qualified} has no column {template.column}")
    return relation


async def _reject_functions(session: Session, template: Template) -> None:
    """Reject functions that a second run, with the learner's rights, should not call."""
    names = [name.rpartition(".")[2].strip('"') for name in template.functions]
    found = await session.catalog(_FUNCTIONS, names)
    if not found:
        (path,) = await session.rows("SELECT pg_catalog.current_schemas(true) AS schemas")
        found = await session.catalog(_OPERATORS, template.probe_sql, path["schemas"])
    if found and found[0]["volatile"]:
        raise _RejectError(
            f"the {found[0]['what']} is volatile: a second run of the query might have effects"
        )
    if found:
        what, owner = found[0]["what"], found[0]["owner"]
        raise _RejectError(
            f"the {what} belongs to {owner}, and the learner's role is a superuser: "
            "give the learner a role that may only read"
        )


async def _reject_protected(session: Session, plan: Plan, relation: _Relation) -> None:
    if plan.foreign:
        raise _RejectError("it reads a foreign table: not adapted yet")
    read = sorted(plan.relations | {(relation.schema, relation.name)})
    protected = await session.catalog(_PROTECTED, [s for s, _ in read], [n for _, n in read])
    if protected:
        name = protected[0]["name"]
        raise _RejectError(
            f"row-level security is enabled on {name}: the learner cannot see what the application sees"
        )


async def _indexes(session: Session, template: Template, relation: _Relation) -> list[IndexInfo]:
    rows = await session.catalog(_INDEXES, str(relation.oid), str(relation.column), list(VECTOR_METHODS))
    named = f"{template.column} {relation.type}".strip()
    if not rows:
        raise _RejectError(f"there is no vector index on {relation.qualified} ({named})")
    if not any(row["valid"] for row in rows):
        raise _RejectError(f"the vector index on {relation.qualified} ({named}) is not valid yet")
    found = [_index(row) for row in rows if row["valid"] and template.operator in row["operators"]]
    if not found:
        offered = ", ".join(sorted({name for row in rows for name in row["operators"]}))
        raise _RejectError(
            f"no vector index on {relation.qualified} ({named}) serves {template.operator}; "
            f"those there serve {offered}"
        )
    return found


def _index(row: Mapping[str, Any]) -> IndexInfo:
    options = dict(option.split("=", 1) for option in row["options"])
    numbers = {name: int(options[name]) for name in ("lists", "m", "ef_construction") if name in options}
    return IndexInfo(
        name=row["name"],
        method=row["method"],
        opclass_operator=", ".join(row["operators"]),
        definition=row["definition"],
        lists=numbers.get("lists", 100 if row["method"] == "ivfflat" else None),  # pgvector's default
        m=numbers.get("m"),
        ef_construction=numbers.get("ef_construction"),
        oid=row["oid"],
        filenode=row["filenode"],
    )


class _Arms:
    """The arms of one template, tried by EXPLAIN with the arguments of several queries."""

    def __init__(
        self,
        session: Session,
        template: Template,
        schema: str,
        indexes: Sequence[IndexInfo],
        queries: Sequence[Sequence[Bound]],
    ) -> None:
        self._session = session
        self._template = template
        self._indexes = indexes
        self._queries = queries
        self._mine = {(schema, index.name) for index in indexes}
        self._filtered = any(slot.role is SlotRole.FILTER for slot in template.slots)
        self._methods: dict[tuple[str, str], str] = {}

    async def confirm(self, ks: tuple[int, int]) -> tuple[tuple[Arm, ...], dict[str, tuple[str, ...]]]:
        """Return the arms that come out as intended, and the indexes that each was seen to use."""
        rows = await self._session.catalog(_VECTOR_INDEXES, list(VECTOR_METHODS))
        self._methods = {(row["schema"], row["name"]): row["method"] for row in rows}
        ranges = await self._session.catalog(_RANGES)
        available = {
            r["name"]: (_bound(r["min_val"], -math.inf), _bound(r["max_val"], math.inf)) for r in ranges
        }
        best: dict[Arm, tuple[str, ...]] = {}
        for steering in STEERINGS if is_contested(self._indexes) else STEERINGS[:1]:
            wanted = ladder(
                self._indexes,
                filtered=self._filtered,
                min_k=ks[0],
                max_k=ks[1],
                available=available,
                steering=steering,
            )
            good = await self._as_intended(wanted)
            if len(good) > len(best):
                best = good
            if len(good) == len(wanted):
                break
        if not any(arm.kind == "exact" for arm in best):
            raise _RejectError(
                "the exact search cannot be had: the plan uses a vector index even with "
                "enable_indexscan = off"
            )
        if len(best) <= 2:
            raise _RejectError("the plan does not use the vector index under any setting")
        return tuple(best), {arm.name: names for arm, names in best.items()}

    async def _as_intended(self, arms: Sequence[Arm]) -> dict[Arm, tuple[str, ...]]:
        """Return the arms that do what they should for every query, with the indexes used."""
        good: dict[Arm, tuple[str, ...]] = {}
        for arm in arms:
            seen = [await self._indexes_used(arguments, arm.settings) for arguments in self._queries]
            if all(
                _as_intended(arm, self._mine, used, self._methods, filtered=self._filtered) for used in seen
            ):
                good[arm] = tuple(sorted({name for used in seen for _, name in used}))
        return good

    async def _indexes_used(self, arguments: Sequence[Bound], settings: Settings) -> set[tuple[str, str]]:
        """Return the vector indexes that the plan under `settings` scans; the settings do not stay."""
        savepoint = self._session.connection.transaction()
        await savepoint.start()
        await apply(self._session, settings)
        plan = await explain(self._session, self._template, arguments)
        await savepoint.rollback()
        return {index for index in plan.indexes if index in self._methods}


def _as_intended(
    arm: Arm,
    mine: set[tuple[str, str]],
    used: set[tuple[str, str]],
    methods: Mapping[tuple[str, str], str],
    *,
    filtered: bool,
) -> bool:
    """Tell whether a plan is what its arm is called; see the module's docstring."""
    if arm.kind == "as-is":
        return True
    if arm.kind == "exact":
        return not used
    if not used:
        return filtered
    return used <= mine and all(arm.kind in methods[index] for index in used)


def _bound(text: str | None, missing: float) -> float:
    try:
        return float(text) if text is not None else missing
    except ValueError:
        return missing


async def _facts(
    session: Session, template: Template, relation: _Relation, types: Sequence[ParameterType]
) -> TableFacts:
    by_slot = dict(zip(template.probe_slots, types, strict=True))
    value_types = tuple(by_slot[i].oid if i in by_slot else 0 for i in range(len(template.slots)))
    filters = [i for i, slot in enumerate(template.slots) if slot.role is SlotRole.FILTER and i in by_slot]
    equal = [i for i in filters if template.slots[i].operator == "="]
    chosen = tuple(equal or filters)  # ranges make contexts only where there is nothing better
    shares: Mapping[str, float] = {}
    rare = 0.0
    column = template.slots[chosen[0]].column if len(chosen) == 1 and equal else None
    if column is not None:
        shares, rare = await selectivity(
            session, relation.schema, relation.name, column, value_types[chosen[0]]
        )
    return TableFacts(
        table=relation.qualified,
        value_types=value_types,
        filter_slots=chosen,
        selectivity=shares,
        rare_selectivity=rare,
        rows=max(0.0, relation.rows),
    )


_ROLE_SETTINGS = """
SELECT unnest(s.setconfig) AS setting FROM pg_db_role_setting s
WHERE s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
  AND s.setrole IN (0, coalesce((SELECT oid FROM pg_roles WHERE rolname = $1::text), 0))
ORDER BY s.setrole <> 0, s.setdatabase <> 0
"""
_PLANNER_SETTINGS = """
SELECT n AS name FROM unnest($1::text[]) AS n LEFT JOIN pg_settings s ON s.name = n
WHERE s.category LIKE 'Query Tuning%' OR n IN ('work_mem', 'hash_mem_multiplier')
   OR n ~ '^(hnsw|ivfflat|ruvector|diskann|vchordrq|vchordg|lantern_hnsw|scann)\\.'
"""
_RELATION = """
SELECT c.oid::int8 AS oid, n.nspname AS schema, c.relname AS name, c.relkind AS kind, c.reltuples AS rows,
       c.relhassubclass AS inherited, coalesce(a.attnum, 0) AS "column", coalesce(t.typname, '') AS type
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = $2::text AND a.attnum > 0
  AND NOT a.attisdropped
LEFT JOIN pg_type t ON t.oid = a.atttypid WHERE c.oid = $1::text::oid
"""
_NAMED = "SELECT pg_catalog.to_regclass($1::pg_catalog.text)::pg_catalog.oid::pg_catalog.text AS oid"
# A superuser must not run what somebody else has written; other roles risk no more than what they may read.
_FUNCTIONS = """
SELECT 'function ' || p.proname AS what, p.provolatile = 'v' AS volatile, o.rolname AS owner
FROM pg_proc p JOIN pg_roles o ON o.oid = p.proowner
WHERE p.proname = ANY ($1::text[]) AND (p.provolatile = 'v' OR NOT o.rolsuper AND EXISTS (
      SELECT FROM pg_roles l WHERE l.rolname = current_user AND l.rolsuper))
ORDER BY p.provolatile = 'v' DESC LIMIT 1
"""
# Which operator of that name it is depends on types; all are taken that the query may mean.
_OPERATORS = """
SELECT 'operator ' || x.oprname AS what, p.provolatile = 'v' AS volatile, o.rolname AS owner
FROM pg_operator x JOIN pg_namespace n ON n.oid = x.oprnamespace JOIN pg_proc p ON p.oid = x.oprcode
JOIN pg_roles o ON o.oid = p.proowner
WHERE strpos($1::text, x.oprname::text) > 0 AND n.nspname <> 'pg_catalog'
  AND (n.nspname = ANY ($2::text[]) OR strpos($1::text, n.nspname::text) > 0)
  AND (p.provolatile = 'v' OR NOT o.rolsuper AND EXISTS (
      SELECT FROM pg_roles l WHERE l.rolname = current_user AND l.rolsuper))
ORDER BY p.provolatile = 'v' DESC LIMIT 1
"""
_PROTECTED = """
SELECT n.nspname || '.' || c.relname AS name FROM unnest($1::text[], $2::text[]) AS r(s, t)
JOIN pg_namespace n ON n.nspname = r.s JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = r.t
WHERE c.relrowsecurity LIMIT 1
"""
_INDEXES = """
SELECT c.oid::int8 AS oid, coalesce(pg_relation_filenode(c.oid), 0)::int8 AS filenode, c.relname AS name,
       m.amname AS method, i.indisvalid AND i.indisready AS valid,
       coalesce(c.reloptions, '{}') AS options, pg_get_indexdef(c.oid) AS definition,
       ARRAY(SELECT DISTINCT p.oprname FROM pg_opclass k JOIN pg_amop o ON o.amopfamily = k.opcfamily
             JOIN pg_operator p ON p.oid = o.amopopr
             WHERE k.oid = i.indclass[0] AND o.amoppurpose = 'o' ORDER BY 1) AS operators
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
WHERE i.indrelid = $1::text::oid AND m.amname = ANY ($3::text[])
  AND (i.indkey[0] = $2::text::int2 OR i.indkey[0] = 0 AND EXISTS (
       SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid
         AND d.refclassid = 'pg_class'::regclass AND d.refobjid = $1::text::oid
         AND d.refobjsubid = $2::text::int4))
ORDER BY c.relname
"""
_WORLD = """
SELECT t.reltuples AS estimate, t.relpages AS pages_then, s.n_live_tup AS live, s.n_dead_tup AS dead,
       pg_relation_size(t.oid) / current_setting('block_size')::int8 AS pages_now,
       (SELECT json_agg(json_build_object('name', c.relname, 'file', pg_relation_filenode(c.oid)::int8)
                        ORDER BY c.relname)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
        WHERE i.indrelid = t.oid AND i.indisvalid AND i.indisready AND m.amname = ANY ($2::text[])) AS indexes
FROM pg_class t LEFT JOIN pg_stat_all_tables s ON s.relid = t.oid WHERE t.oid = $1::text::oid
"""
_VECTOR_INDEXES = """
SELECT n.nspname AS schema, c.relname AS name, m.amname AS method FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am m ON m.oid = c.relam
WHERE c.relkind = 'i' AND m.amname = ANY ($1::text[])
"""
_RANGES = "SELECT name, min_val, max_val FROM pg_settings WHERE strpos(name, '.') > 0"
