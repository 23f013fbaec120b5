"""The small immutable records in which the proxy and the learner meet.

The worker sends `Template` and `Trajectory` records to the learner; the learner sends a `Snapshot` back.  A
record holds facts, never behaviour, and is encoded with msgpack (never pickle), so that a frame from
another version or from a hostile peer can at worst be rejected.  Unknown fields are ignored on decoding and
every new field has a default: two versions can talk during a rolling update.

Terms
-----
template    a vector query with every literal and parameter replaced by a numbered *slot*.
slot        the place of one argument in a template: the query vector, LIMIT, OFFSET, a filter value.
arm         one choice of settings, for instance ``{"hnsw.ef_search": "96"}``; the exact search is an arm too.
label       one query measured: its exact answer and, for every arm, recall and latency.
context     what an arm is chosen for: (template, k, filter values).
"""

from __future__ import annotations

import enum
import hashlib

import msgspec

Settings = tuple[tuple[str, str], ...]
"""Server settings in the order in which they are to be set: ``(("hnsw.ef_search", "96"),)``."""


class SlotRole(enum.StrEnum):
    """What an argument of a template is used for."""

    VECTOR = "vector"
    LIMIT = "limit"
    OFFSET = "offset"
    FILTER = "filter"
    OTHER = "other"


class Slot(msgspec.Struct, frozen=True):
    """The place of one argument; slot ``i`` is written ``$(i+1)`` in `Template.sql`."""

    role: SlotRole
    column: str | None = None  # for FILTER: the column it is compared with, as written, without qualifier
    operator: str | None = None  # for FILTER: "=", "<", "IN", ...


class Template(msgspec.Struct, frozen=True):
    """A recognised vector query without its arguments.

    `sql` is the canonical text.  `probe_sql` is the same query with its select list replaced by the one
    column ``distance`` (the ORDER BY expression); its parameter ``$(j+1)`` is slot ``probe_slots[j]``.
    """

    key: str  # stable hash of (database, user, search_path, sql)
    database: str
    user: str
    search_path: str | None  # None: the role's own default
    sql: str
    probe_sql: str
    probe_slots: tuple[int, ...]
    slots: tuple[Slot, ...]
    relation: str  # as written in FROM: "items", "public.items", '"My Table"'
    column: str  # the ordered column, unquoted
    operator: str  # "<->", "<=>", "<#>", "<+>", "<~>", "<%>"
    whole: bool = True  # the search is the whole statement, not a CTE or a subquery of a larger one
    functions: tuple[str, ...] = ()  # names of functions called, for the learner to check their volatility
    scan_sql: str = ""  # the probe without order and limit, where the vector is its only parameter, as $1
    sample_sql: str = ""  # the probe of some pages of the table; two more parameters: percentage, seed


class Value(msgspec.Struct, frozen=True, array_like=True):
    """One argument as it came over the wire: format 0 = text, 1 = binary; ``data is None`` = NULL."""

    format: int
    data: bytes | None


class Arm(msgspec.Struct, frozen=True):
    """One choice of settings.  An empty `settings` means: leave the query as it came."""

    name: str  # short and stable, for people and metrics: "ef=96", "exact", "strict ef=100", "as is"
    settings: Settings
    kind: str = "hnsw"  # "hnsw" | "ivfflat" | "exact" | "as-is"
    effort: int = 0  # ef_search or probes; 0 where it has no meaning


class Trust(enum.StrEnum):
    """How far the product goes for a template: each step is taken only on evidence."""

    OBSERVE = "observe"  # the query runs as it came
    STATIC = "static"  # one measured arm for the whole template
    CONTEXT = "context"  # an arm per (k, filter values)
    QUERY = "query"  # an arm per query vector, from the ReasoningBank


class Trajectory(msgspec.Struct, frozen=True):
    """One vector query as the proxy saw it."""

    query_id: bytes  # UUID, 16 bytes
    template: str  # Template.key
    timestamp: float  # Unix time, seconds
    vector: bytes | None  # float32, little endian; None if it could not be decoded
    k: int  # LIMIT; the index must find k + offset rows
    offset: int
    values: tuple[Value | None, ...]  # by slot; None for the vector slot
    arm: str  # Arm.name in force; "as is" where nothing was injected
    settings: Settings
    trust: Trust
    policy_version: int
    rows: int  # rows returned; -1 unknown
    first_byte_ms: float
    latency_ms: float
    error: str | None = None  # SQLSTATE
    recall_estimate: float | None = None
    lookup_ms: float | None = None  # that choosing took; None: not chosen for this vector, or known by heart


class ArmResult(msgspec.Struct, frozen=True, array_like=True):
    """What one arm gave for one query: recall in [0, 1], rows returned, server-side milliseconds."""

    recall: float
    rows: int
    ms: float
    distinct: int = -1  # rows with a distance of their own; -1 unknown


class Label(msgspec.Struct, frozen=True):
    """One measured query.  Arms that were not run (dominated, or implied) are missing from `results`."""

    template: str
    context: str  # context_key(k, values)
    timestamp: float
    vector: bytes | None  # float32, little endian
    k: int  # LIMIT + OFFSET
    found: int  # rows that exist: min(k, matching rows), from the exact search
    results: dict[str, ArmResult]  # by Arm.name; the exact arm is always present
    served_arm: str  # what the live query got
    uniform: bool  # drawn uniformly from the traffic: may be used for audited claims
    smaller: dict[
        int, dict[str, float]
    ] = {}  # smaller k -> Arm.name -> recall of the first k of the same rows
    sampled: float = 0.0  # share of the table's rows that recall was measured by; 0: all of them


class ContextPolicy(msgspec.Struct, frozen=True):
    """The arm for one context, and the evidence."""

    arm: int  # index into TemplatePolicy.arms
    expected_recall: float
    labels: int


class QueryPolicy(msgspec.Struct, frozen=True):
    """The ReasoningBank's patterns of one template, ready for lookup (see learning.optimizer)."""

    dimensions: int
    centroids: bytes  # float32 [n, dimensions], normalised, little endian
    curves: bytes  # float32 [n, len(arms)]: expected recall of each arm
    weights: bytes  # float32 [n]: confidence, labels behind the pattern
    costs: tuple[float, ...]  # expected milliseconds of each arm
    prior: tuple[float, ...]  # global recall curve
    prior_weight: float  # pseudo-counts of the prior
    sharpness: float  # weight of a neighbour = exp(sharpness * cosine similarity)
    neighbours: int
    price: float  # the Lagrangian: recall that one millisecond is worth
    min_similarity: float  # a query farther than this from every pattern gets the fallback
    extra: dict[str, bytes] = {}  # room for further evidence (density sketch), by name


class ArmEstimate(msgspec.Struct, frozen=True, array_like=True):
    """What is known of one arm over all queries of a template; `recall` is negative where nothing is."""

    recall: float
    error: float  # standard error of the recall
    ms: float


class Lowered(msgspec.Struct, frozen=True):
    """The choices of a filtered template under a lower target, for clients that ask for one."""

    target_recall: float
    contexts: dict[str, ContextPolicy]
    buckets: dict[int, ContextPolicy] = {}


class TemplatePolicy(msgspec.Struct, frozen=True):
    """Everything a worker needs in order to choose an arm for a query of one template."""

    template: str
    table: str  # resolved: "public.items"
    trust: Trust
    reason: str  # in words: why this trust, or why the template is left alone
    target_recall: float
    arms: tuple[Arm, ...]
    value_types: tuple[int, ...]  # type OID by slot, 0 where unknown or not needed
    filter_slots: tuple[int, ...]  # slots whose values make the context
    fallback: int  # arm for a context without evidence of its own
    contexts: dict[str, ContextPolicy]
    selectivity: dict[str, float] = {}  # context value -> estimated share of rows (most common values)
    rare_selectivity: float = 0.0  # estimated share of a value that is not in `selectivity`
    buckets: dict[int, ContextPolicy] = {}  # floor(log2(selectivity)) -> arm, for values without a context
    query: QueryPolicy | None = None
    min_k: int = 1  # evidence covers k in [min_k, max_k]; outside, effort is raised to at least k
    max_k: int = 1 << 30
    outlook: tuple[ArmEstimate, ...] = ()  # by arm; for clients that ask for another target
    lowered: tuple[Lowered, ...] = ()  # the least target first
    floors: tuple[tuple[int, int], ...] = ()  # rows that an arm returns at least, its number; "as is" first

    @property
    def serves(self) -> bool:
        """Whether some query may get settings under this policy."""
        return self.trust is not Trust.OBSERVE or bool(self.floors)


class Snapshot(msgspec.Struct, frozen=True):
    """An immutable, versioned policy; a worker swaps one reference."""

    version: int
    created_at: float
    templates: dict[str, TemplatePolicy]
    format: int = 1
    salt: bytes = b""  # with which values in contexts were hashed; empty: none were (learning.anonymizer)
    baselines: dict[str, TemplatePolicy] = {}  # templates on trial (learning.canary): the policy before
    baseline_versions: dict[str, int] = {}  # under which it serves
    canary_share: float = 0.0  # of the queries of a template on trial that get the new policy


class Choice(msgspec.Struct, frozen=True):
    """What a query gets, and why."""

    arm: Arm
    trust: Trust
    expected_recall: float | None
    reason: str


def context_key(k: int, values: tuple[str | None, ...]) -> str:
    """Name a context by its k (LIMIT + OFFSET) and canonical filter values.

    Values are joined with the ASCII unit separator, which no canonical value contains unescaped; NULL is
    written as the record separator.  The result is a dictionary key, not something to show to people.
    """
    if not values:
        return str(k)
    return "\x1f".join((str(k), *("\x1e" if v is None else v for v in values)))


HASHED = "\x1f#"
"""In a context key: its values were replaced by a salted hash."""


def is_hashed(context: str) -> bool:
    """Tell whether the filter values of a context key were hashed."""
    return HASHED in context


def template_key(database: str, user: str, search_path: str | None, sql: str) -> str:
    """Name a template: the same text means the same only in the same database, for the same role and path."""
    path = "" if search_path is None else "=" + search_path
    text = "\0".join((database, user, path, sql))
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()
