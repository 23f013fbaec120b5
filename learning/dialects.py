"""What can be set for a vector search, extension by extension, and the arms worth measuring.

An *arm* is one choice of settings.  Which settings exist depends on the extension, so they stand in one
table, `DIALECTS`; nothing in it is believed until the live server's ``pg_settings`` has confirmed name and
range (`available`).  pgvector is the dialect that is tested against a real server; the others are data.

`ladder` builds the arms of a template:

- "as is" comes first and sets nothing: what the user has is measured like everything else.
- One ordered ladder per index: ``ef_search`` (HNSW) or ``probes`` (IVFFlat) in geometric steps.  Recall
  grows with effort, and a step of about a quarter costs at most a quarter too much.  An HNSW scan returns
  at most ``ef_search`` rows, so no rung lies below the smallest k, and the largest k is a rung itself; the
  optimizer raises what is too little for a query's own k.
- Filtered templates get fewer rungs and iterative scans, strict and relaxed, which go on until k rows pass.
  Unfiltered ones get them where they can matter: with IVFFlat, whose lists may hold fewer than k rows, and
  for a k above the range of ``ef_search``.
- With both kinds of index each arm also carries what steers the planner to its own.  `STEERINGS` are two:
  "soft" makes the other index look dear and leaves the planner its exact plans; "firm" also takes these
  away (without a sort only an index in the right order is left), for small tables and high efforts, where
  the planner would rather sort.  Which one is needed, EXPLAIN says.
- "exact" comes last: without index scans the planner is left with a bitmap or sequential scan and a sort.

Plans and settings: the server may keep a *generic* plan for a prepared statement, and then a setting that
should change the plan does nothing.  With a filter every arm can change the plan (HNSW's estimated cost
grows with ``ef_search``), so every arm of a filtered template carries ``plan_cache_mode =
force_custom_plan``, and the exact arm carries it always.

Sources: pgvector README ("Query Options", "Iterative Index Scans"), and the manuals of ruvector-postgres,
pgvectorscale, VectorChord, Azure pg_diskann, Lantern and AlloyDB ScaNN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from learning.records import Arm, Settings


@dataclass(frozen=True, slots=True)
class Setting:
    """One server setting: numeric range (None for a choice of words), default, and what it does."""

    name: str
    minimum: float | None
    maximum: float | None
    default: str
    words: tuple[str, ...]
    effect: str


def _number(name: str, minimum: float, maximum: float, default: float, effect: str) -> Setting:
    return Setting(name, minimum, maximum, f"{default:g}", (), effect)


def _words(name: str, words: tuple[str, ...], effect: str) -> Setting:
    return Setting(name, None, None, words[0], words, effect)


DIALECTS: Mapping[str, tuple[Setting, ...]] = {
    "pgvector": (
        _number("hnsw.ef_search", 1, 1000, 40, "candidates of an HNSW scan, and its most rows"),
        _words("hnsw.iterative_scan", ("off", "relaxed_order", "strict_order"), "go on until k rows pass"),
        _number("hnsw.max_scan_tuples", 1, 2**31 - 1, 20000, "where an iterative HNSW scan gives up"),
        _number("hnsw.scan_mem_multiplier", 1, 1000, 1, "memory of an iterative scan, times work_mem"),
        _number("ivfflat.probes", 1, 32768, 1, "lists that an IVFFlat scan reads"),
        _words("ivfflat.iterative_scan", ("off", "relaxed_order"), "read more lists until enough rows pass"),
        _number("ivfflat.max_probes", 1, 32768, 32768, "where an iterative IVFFlat scan gives up"),
    ),
    "ruvector": (
        _number("ruvector.ef_search", 1, 1000, 40, "candidates kept by an HNSW scan"),
        _number("ruvector.probes", 1, 10000, 1, "lists that an IVFFlat scan reads"),
    ),
    "pgvectorscale": (
        _number("diskann.query_search_list_size", 1, 10000, 100, "candidates kept by the graph search"),
        _number("diskann.query_rescore", 0, 1000, 50, "rows whose exact distance is computed"),
    ),
    "vectorchord": (
        Setting("vchordrq.probes", None, None, "", (), "lists read per level, a comma-separated list"),
        _number("vchordrq.epsilon", 0, 4, 1.9, "safety margin of the quantised distances"),
        _number("vchordg.ef_search", 1, 65535, 64, "candidates kept by the graph search"),
    ),
    "pg_diskann": (
        _number("diskann.l_value_is", 1, 10000, 100, "candidates kept by the graph search"),
        _words("diskann.iterative_search", ("off", "relaxed_order", "strict_order"), "until k rows pass"),
    ),
    "lantern": (
        _number("lantern_hnsw.ef", 1, 400, 64, "candidates kept by an HNSW scan"),
        _number("lantern_hnsw.init_k", 1, 1000, 10, "rows fetched in the first batch"),
    ),
    "scann": (
        _number("scann.num_leaves_to_search", 1, 2**31 - 1, 1, "leaves read"),
        _number("scann.pre_reordering_num_neighbors", -1, 2**31 - 1, -1, "candidates measured exactly"),
    ),
}  # fmt: skip

_EFFORT: Mapping[str, tuple[str, str]] = {
    # access method -> (the setting that is its effort, kind of arm)
    "hnsw": ("hnsw.ef_search", "hnsw"),
    "ivfflat": ("ivfflat.probes", "ivfflat"),
    "ruhnsw": ("ruvector.ef_search", "hnsw"),
    "ruivfflat": ("ruvector.probes", "ivfflat"),
}

_STEERING: Mapping[str, tuple[str, int]] = {
    # access method -> what makes the *other* index look dear to the planner
    "hnsw": ("ivfflat.probes", 32768),
    "ivfflat": ("hnsw.ef_search", 1000),
}

AS_IS = Arm("as is", (), "as-is")
"""The user's own settings."""

STEERINGS = ("soft", "firm")
"""Ways to make the planner take an arm's index rather than the other one, the gentlest first."""

_CUSTOM_PLAN: Settings = (("plan_cache_mode", "force_custom_plan"),)
_ITERATIVE = ".iterative_scan"
_EF_RUNGS = (10, 14, 20, 28, 40, 50, 64, 80, 100, 128, 160, 200, 256, 320, 400, 512, 640, 800, 1000)
_ITERATIVE_EF = (40, 100, 200)
_MANY_ROWS_EF = (200, 400, 1000)  # of an iterative scan for a k above the range of ef_search
_FILTERED_EF = (40, 100, 200, 400, 800)


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """A valid vector index on the ordered column whose operator class serves the query's operator."""

    name: str
    method: str  # access method: "hnsw" | "ivfflat" | ...
    opclass_operator: str = ""
    definition: str = ""
    oid: int = 0
    filenode: int = 0  # of the file on disk: REINDEX and TRUNCATE change it
    lists: int | None = None  # IVFFlat only
    m: int | None = None  # HNSW only
    ef_construction: int | None = None  # HNSW only


def ladder(
    indexes: Sequence[IndexInfo],
    *,
    filtered: bool,
    max_k: int,
    min_k: int | None = None,
    available: Mapping[str, tuple[float, float]] | None = None,
    steering: str = "soft",
) -> tuple[Arm, ...]:
    """Return the arms worth measuring, "as is" first and "exact" last.

    Parameters
    ----------
    indexes
        The vector indexes that can serve the query.  Without one only "as is" and "exact" remain.
    filtered
        The template has filter slots.
    max_k, min_k
        The largest and the smallest LIMIT + OFFSET seen (by default the same): no HNSW rung lies below the
        smallest.
    available
        Live ``pg_settings``: name -> (min, max).  Arms that need an absent setting are left out and rungs
        outside a range are dropped.  A setting that takes words may carry any range.  None: pgvector's
        documented ranges.
    steering
        One of `STEERINGS`; without a choice between indexes it does not matter.
    """
    arms = [AS_IS]
    methods = sorted({index.method for index in indexes})
    least = max_k if min_k is None else min(min_k, max_k)
    for method in methods:
        of_method = [index for index in indexes if index.method == method]
        plan = _CUSTOM_PLAN if filtered else ()
        if is_contested(indexes) and method in _STEERING:
            plan = (*_CUSTOM_PLAN, *_steering(method, available, firm=steering == "firm"))
        arms += _index_arms(of_method, method, plan, filtered, (least, max_k), available)
    arms.append(Arm("exact", (*_CUSTOM_PLAN, ("enable_indexscan", "off")), "exact"))
    return tuple(arms)


def is_contested(indexes: Sequence[IndexInfo]) -> bool:
    """Tell whether the planner has a choice between indexes that settings can turn."""
    return set(_STEERING) <= {index.method for index in indexes}


def effort_setting(arm: Arm) -> str | None:
    """Return the name of the setting that carries the arm's effort, or None."""
    names = {name for name, kind in _EFFORT.values() if kind == arm.kind}
    return next((name for name, _ in arm.settings if name in names), None)


def row_limit(arm: Arm) -> int | None:
    """Return the most rows that the arm's index scan returns, or None where there is no such limit.

    A plain HNSW scan returns at most ef_search rows; an iterative one goes on.
    """
    if arm.kind != "hnsw" or any(name.endswith(_ITERATIVE) for name, _ in arm.settings):
        return None
    return arm.effort or None


def _steering(method: str, available: Mapping[str, tuple[float, float]] | None, *, firm: bool) -> Settings:
    """Return the settings by which the planner prefers this method's index to the other's.

    HNSW's estimated cost grows with ef_search and IVFFlat's with probes, so the other index is made dear.
    """
    name, value = _STEERING[method]
    low, high = _range(name, available)
    if low > high:
        return ()
    other = (name, str(round(min(value, high))))
    return (other, ("enable_sort", "off")) if firm else (other,)


def _index_arms(
    indexes: Sequence[IndexInfo],
    method: str,
    plan: Settings,
    filtered: bool,
    ks: tuple[int, int],
    available: Mapping[str, tuple[float, float]] | None,
) -> list[Arm]:
    if method not in _EFFORT:
        return []
    setting, kind = _EFFORT[method]
    low, high = _range(setting, available)
    iterative: Sequence[int]
    if kind == "hnsw":
        rungs, prefix = _ef_rungs(*ks, filtered=filtered), "ef"
        iterative = _ITERATIVE_EF if filtered else _MANY_ROWS_EF if ks[1] > high else ()
    else:
        lists = max((index.lists for index in indexes if index.lists), default=None)
        rungs, prefix = _probe_rungs(lists), "probes"
        if filtered:
            rungs = rungs[::2]
        iterative = (rungs[0], rungs[len(rungs) // 2])
    arms = [
        Arm(f"{prefix}={rung}", (*plan, (setting, str(rung))), kind, rung)
        for rung in rungs
        if low <= rung <= high
    ]
    efforts = [effort for effort in iterative if low <= effort <= high]
    return arms + _iterative_arms(setting, kind, prefix, plan, efforts, available)


def _iterative_arms(
    setting: str,
    kind: str,
    prefix: str,
    plan: Settings,
    efforts: Sequence[int],
    available: Mapping[str, tuple[float, float]] | None,
) -> list[Arm]:
    mode_setting = setting.partition(".")[0] + _ITERATIVE
    if _range(mode_setting, available) == _ABSENT:
        return []
    modes = ("strict", "relaxed") if kind == "hnsw" else ("relaxed",)
    return [
        Arm(
            f"{mode} {prefix}={effort}",
            (*plan, (mode_setting, f"{mode}_order"), (setting, str(effort))),
            kind,
            effort,
        )
        for mode in modes
        for effort in efforts
    ]


_ABSENT = (math.inf, -math.inf)


def _range(setting: str, available: Mapping[str, tuple[float, float]] | None) -> tuple[float, float]:
    """Return the live range of a setting (documented if `available` is None), `_ABSENT` if it is missing."""
    if available is not None:
        return available.get(setting, _ABSENT)
    for dialect in DIALECTS.values():
        for known in dialect:
            if known.name == setting:
                low = -math.inf if known.minimum is None else known.minimum
                high = math.inf if known.maximum is None else known.maximum
                return low, high
    return _ABSENT


def _ef_rungs(min_k: int, max_k: int, *, filtered: bool) -> list[int]:
    """Return increasing ef_search values from min_k on; min_k and max_k are rungs where the next is far."""
    rungs = _FILTERED_EF if filtered else _EF_RUNGS
    kept = {ef for ef in rungs if ef >= min_k}
    for k in (min_k, max_k):
        if k >= rungs[0] and not any(k <= ef <= 1.1 * k for ef in kept):
            kept.add(k)
    return sorted(kept)


def _probe_rungs(lists: int | None) -> list[int]:
    """Return increasing probes in half-octave steps up to all lists (1,024 where their number is unknown)."""
    top = lists if lists else 1024
    steps = {min(top, round(2 ** (half / 2))) for half in range(2 * max(1, math.ceil(math.log2(top))) + 1)}
    return sorted(steps)
