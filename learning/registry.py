"""The templates that the learner knows, and what it knows of each.  No I/O; the time is an argument.

A template is first *new*: it waits for its first trajectory, because the server is asked with real values.
Then it is either *confirmed* (measured from now on) or *left alone* with a reason in words, and asked again
later: indexes get built, rights get granted.  *Off* is for good: the server once refused a setting that the
proxy had injected.

Nothing is remembered of the queries of a template that is left alone, save the last one where the server will
be asked again; of a table whose configuration says so, nothing at all.

Memory is bounded: `MAX_TEMPLATES` templates, each with at most `LABEL_BYTES` of labelled vectors and
`WINDOW_BYTES` of recent ones.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from learning.dialects import AS_IS, IndexInfo
from learning.exchange import label_id
from learning.inventory import Confirmed
from learning.records import Arm, Label, Template, TemplatePolicy, Trajectory, Trust
from learning.schedule import ArmLedger, Traffic
from learning.tolls import Lived
from learning.trajectory import TrajectoryTracker, identity
from learning.watch import Watch

MAX_TEMPLATES = 128
LABEL_BYTES, WINDOW_BYTES = 8 << 20, 2 << 20
MAX_LABELS, MIN_LABELS = 3000, 300
MAX_K = 10_000  # LIMIT + OFFSET; above, a label would cost more than it tells
IDLE = 3600.0  # seconds after which a template may make room for another

BACKLOG = 100  # queries kept of a new template until the server was asked about it

_FIRST_RECHECK, _LAST_RECHECK = 2.0, 600.0
_RECHECK_CONFIRMED = 300.0
_PRIOR = 10.0  # labels at which a context is believed by half
_COMMON = 0.05  # share of the traffic from which a k counts
_WITNESSES, _LOOKED_AT = 4, 200  # queries shown to EXPLAIN, out of the latest


class Phase(enum.Enum):
    """How far the learner has got with a template."""

    NEW = "new"
    CONFIRMED = "confirmed"
    LEFT_ALONE = "left alone"
    OFF = "off"


@dataclass(slots=True)
class TemplateState:
    """One template: what the server said, the recent traffic, the labels, the policy."""

    template: Template
    phase: Phase = Phase.NEW
    table: str = ""
    confirmed: Confirmed | None = None
    sample: Trajectory | None = None  # the last query, as long as the server still has to be asked
    tracker: TrajectoryTracker | None = None
    traffic: Traffic = field(default_factory=Traffic)
    ledger: ArmLedger = field(default_factory=ArmLedger)
    labels: deque[Label] = field(default_factory=lambda: deque(maxlen=MAX_LABELS))
    label_counts: Counter[str] = field(default_factory=Counter)  # by context
    labelled: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # identities of measured queries
    ks: Counter[int] = field(default_factory=Counter)  # LIMIT + OFFSET -> queries
    policy: TemplatePolicy | None = None
    shelved: TemplatePolicy | None = None  # in its place once adaptive search is switched on again
    unpublished: int = 0  # labels since the last distillation
    hashed: Callable[[str], str] | None = None  # context -> its hash, where labels were read from hashes
    distilled_at: float = 0.0
    settled_at: float = 0.0  # after taking over, the traffic is to be known before a policy is derived
    distil_seconds: float = 0.0
    failures: int = 0  # measurements that failed, in a row
    seen: float = 0.0
    recheck_at: float = 0.0
    recheck_after: float = _FIRST_RECHECK
    unaudited: int = 0  # queries that may still be audited: without traffic there is nothing to audit
    label_seconds: float = 0.05  # that a label takes, a running mean
    exact_alone: deque[float] = field(default_factory=lambda: deque(maxlen=9))  # milliseconds, one at a time
    sketched_rows: float | None = None
    indexes: tuple[IndexInfo, ...] | None = None  # those that the labels are about
    watch: Watch = field(default_factory=Watch)
    lived: Lived = field(default_factory=Lived)
    pulsed: float = 0.0  # when the catalogs were last looked at
    suspicious: bool = False  # the queries have become others; the audits for it have no credit yet
    backlog: deque[Trajectory] = field(
        default_factory=lambda: deque(maxlen=BACKLOG)
    )  # until the server was asked

    @property
    def common_ks(self) -> list[int]:
        """Every LIMIT + OFFSET with a share in the traffic worth mentioning."""
        total = sum(self.ks.values())
        return [k for k, count in self.ks.items() if count >= _COMMON * total]

    @property
    def max_k(self) -> int:
        """The largest LIMIT + OFFSET with a share in the traffic worth mentioning."""
        return max(self.common_ks, default=self.sample.k + self.sample.offset if self.sample else 1)

    @property
    def min_k(self) -> int:
        """The smallest LIMIT + OFFSET with such a share, never above `max_k`."""
        return min(self.common_ks, default=self.max_k)

    def witnesses(self) -> list[Trajectory]:
        """Return a few recent queries as different as can be, for EXPLAIN: by k, then by filter values."""
        recent = list(self.backlog) if self.tracker is None else self.tracker.get_recent(_LOOKED_AT)
        found: dict[object, Trajectory] = {}
        for trajectory in recent:
            found[trajectory.k + trajectory.offset, trajectory.values] = trajectory
        ordered = sorted(found.values(), key=lambda t: t.k + t.offset)
        if len(ordered) <= _WITNESSES:
            return ordered
        step = (len(ordered) - 1) / (_WITNESSES - 1)
        return [ordered[round(i * step)] for i in range(_WITNESSES)]

    def due(self, now: float) -> bool:
        """Tell whether the server should be asked (again) about the template."""
        return self.phase is not Phase.OFF and self.sample is not None and now >= self.recheck_at

    def record(self, trajectory: Trajectory, window: int, now: float) -> None:
        """Take note of one query."""
        self.seen = now
        k = trajectory.k + trajectory.offset
        if trajectory.vector is None or trajectory.error is not None or not 0 < k <= MAX_K:
            return  # nothing that could be measured
        if self.phase is not Phase.OFF:
            self.sample = trajectory
        if self.phase is Phase.NEW:
            self.backlog.append(trajectory)
        if self.confirmed is None:
            return
        if self.tracker is None:
            facts = self.confirmed.facts
            window = max(1, min(window, max(50, WINDOW_BYTES // max(1, len(trajectory.vector)))))
            self.tracker = TrajectoryTracker(
                window, filter_slots=facts.filter_slots, value_types=facts.value_types
            )
        self.tracker.record(trajectory)
        if trajectory.lookup_ms is not None:
            self.lived.record(trajectory.lookup_ms)
        self.suspicious = self.watch.asked(trajectory) or self.suspicious
        context = self.tracker.context(trajectory)
        self._recognise_hash(context)
        self.traffic.record(context, trajectory, now)
        self.unaudited = min(len(self.tracker), self.unaudited + 1)
        self._note_k(k, now)

    def _recognise_hash(self, context: str) -> None:
        """Labels from an anonymized store know their context by its hash, until the traffic names it."""
        if self.hashed is not None:
            hashed = self.hashed(context)
            if hashed != context and self.label_counts.get(hashed):
                self.rename_context(hashed, context)

    def _note_k(self, k: int, now: float) -> None:
        before = self.min_k, self.max_k
        self.ks[k] += 1
        if len(self.ks) > 64:
            self.ks = Counter({k: count // 2 for k, count in self.ks.items() if count > 1})
        if (self.max_k > before[1] or self.min_k < before[0]) and self.confirmed is not None:
            self.recheck_at = min(self.recheck_at, now + 1.0)  # the ladder has to reach from one to the other

    def add_label(self, label: Label, trajectory: Trajectory) -> None:
        """Take note of one measured query."""
        self.keep_labels([label])
        self.unpublished += 1
        self.failures = 0
        self.labelled[identity(trajectory)] = None
        while len(self.labelled) > 2 * MAX_LABELS:
            self.labelled.popitem(last=False)

    def keep_labels(self, labels: Iterable[Label]) -> None:
        """Append labels, the oldest first; what does not fit pushes out the oldest."""
        for label in labels:
            if label.vector is not None and self.labels.maxlen == MAX_LABELS:
                fitting = min(MAX_LABELS, max(MIN_LABELS, LABEL_BYTES // max(1, len(label.vector))))
                if fitting != MAX_LABELS:
                    self.labels = deque(self.labels, maxlen=fitting)
            if len(self.labels) == self.labels.maxlen:
                oldest = self.labels[0]
                self.label_counts[oldest.context] -= 1
                self.label_counts += Counter()  # drops what has fallen to zero
            self.labels.append(label)
            self.label_counts[label.context] += 1
            if self.confirmed is not None:
                self.ledger.record(label)

    def merge_labels(self, labels: Iterable[Label], since: float = 0.0) -> list[Label]:
        """Add labels that others have measured, each once; return the new ones.

        `since`: Unix time before which no label counts, whosever it is.
        """
        names = {label_id(label) for label in self.labels}
        new = [label for label in labels if label.timestamp >= since and label_id(label) not in names]
        if new or any(label.timestamp < since for label in self.labels):
            everything = [label for label in (*self.labels, *new) if label.timestamp >= since]
            self.drop_labels()
            self.keep_labels(sorted(everything, key=lambda label: (label.timestamp, label_id(label))))
            self.unpublished += len(new)
        return new

    def rename_context(self, old: str, new: str) -> None:
        """Give the labels of one context another name (a hash its value, once the traffic has told it)."""
        labels = [msgspec.structs.replace(x, context=new) if x.context == old else x for x in self.labels]
        self.drop_labels()
        self.keep_labels(labels)
        self.unpublished += 1

    def drop_labels(self) -> None:
        """Forget all measurements: they are about an index that is gone."""
        self.labels.clear()
        self.label_counts.clear()
        self.labelled.clear()
        self.exact_alone.clear()
        self.ledger = ArmLedger(self.arms)

    def begin_anew(self, since: float | None) -> list[Label]:
        """Forget measurements and queries from before a change; return the labels that are left.

        `since` is the Unix time from which they still count; None: none does, but the queries are the same.
        """
        kept = [label for label in self.labels if since is not None and label.timestamp >= since]
        self.drop_labels()
        self.keep_labels(kept)
        self.unpublished += 1
        if since is not None and self.tracker is not None:
            recent = [t for t in self.tracker.get_recent(len(self.tracker)) if t.timestamp >= since]
            self.tracker = self.tracker.emptied()
            self.traffic = Traffic()
            for trajectory in recent:
                self.tracker.record(trajectory)
                self.traffic.record(self.tracker.context(trajectory), trajectory, self.seen)
            self.unaudited = min(self.unaudited, len(recent))
        return kept

    def confirm(self, confirmed: Confirmed, now: float) -> None:
        """The server knows the template; measurements of other indexes are dropped."""
        if self.indexes is not None and self.indexes != confirmed.indexes:
            self.drop_labels()
        self.confirmed, self.indexes = confirmed, confirmed.indexes
        self.ledger = ArmLedger(confirmed.arms)
        for label in self.labels:
            self.ledger.record(label)
        self.phase, self.table = Phase.CONFIRMED, confirmed.facts.table
        self.recheck_after = _FIRST_RECHECK
        self.recheck_at = now + _RECHECK_CONFIRMED
        self.failures = 0
        self.unpublished += 1  # what is known may lead to another policy now

    def forget_traffic(self) -> None:
        """Forget the queries seen so far."""
        if self.tracker is not None:
            self.tracker = self.tracker.emptied()
        self.traffic = Traffic()
        self.backlog.clear()
        self.unaudited = 0

    def wake_up(self) -> None:
        """Ask the server about the template again, with its next query, though it was switched off."""
        self.phase = Phase.NEW
        self.policy = self.shelved = None
        self.recheck_at, self.recheck_after = 0.0, _FIRST_RECHECK

    def prune(self, least: int, confidence: float) -> None:
        """Forget the labels of contexts with fewer than `least`, or with less confidence n / (n + 10)."""
        kept = [
            label
            for label in self.labels
            if (n := self.label_counts[label.context]) >= least and n / (n + _PRIOR) >= confidence
        ]
        if len(kept) < len(self.labels):
            self.drop_labels()
            self.keep_labels(kept)
            self.unpublished += 1

    def leave_alone(self, reason: str, table: str, now: float, *, forever: bool = False) -> None:
        """Set the policy that leaves queries as they came, and drop what is known of them."""
        self.phase = Phase.OFF if forever else Phase.LEFT_ALONE
        self.table = table or self.table
        self.policy, self.shelved = observe(self.template, self.table, reason), None
        self.confirmed = self.tracker = None
        self.backlog.clear()
        self.traffic = Traffic()
        self.ks.clear()
        self.unaudited = 0
        if forever:
            self.sample = None
            self.drop_labels()
        self.recheck_at = now + self.recheck_after
        self.recheck_after = min(_LAST_RECHECK, 2 * self.recheck_after)

    @property
    def filtered(self) -> bool:
        """Whether filter values make contexts of it."""
        return self.policy is not None and bool(self.policy.filter_slots)

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms in use, none before confirmation."""
        return self.confirmed.arms if self.confirmed is not None else ()


def observe(template: Template, table: str, reason: str) -> TemplatePolicy:
    """Return the policy that leaves the template's queries alone."""
    return TemplatePolicy(
        template=template.key,
        table=table or template.relation,
        trust=Trust.OBSERVE,
        reason=reason,
        target_recall=0.0,
        arms=(AS_IS,),
        value_types=(),
        filter_slots=(),
        fallback=0,
        contexts={},
    )


class Registry:
    """All templates, the one not seen for longest first."""

    def __init__(self) -> None:
        self._states: OrderedDict[str, TemplateState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[TemplateState]:
        return iter(tuple(self._states.values()))

    def get(self, key: str) -> TemplateState | None:
        """Return the state of a template, or None."""
        return self._states.get(key)

    def touch(self, key: str) -> None:
        """Note that a template is in use."""
        self._states.move_to_end(key)

    def add(self, template: Template, now: float) -> TemplateState | None:
        """Return the template's state, a new one where it was not known; None where there is no room."""
        state = self._states.get(template.key)
        if state is None:
            if len(self._states) >= MAX_TEMPLATES:
                oldest = next(iter(self._states.values()))
                if now - oldest.seen < IDLE:
                    return None
                del self._states[oldest.template.key]
            state = self._states[template.key] = TemplateState(template, seen=now)
        return state
