"""What a replica that does not lead has to tell the one that does, between two rounds.  Pure but for chance.

The messages are those that the workers sent: the shared store is a longer cable from a worker to the learner
that measures.  Of the queries a share is forwarded that is the same for all replicas (`Pulse.sample`, set by
the leader so that `PER_SECOND` come in all), drawn at random: what the leader measures is then a uniform
sample of everybody's traffic.

Rules
-----
- Bounded: `MOST` queries and `BYTES` of them between two rounds; what does not fit is counted as dropped.
- Nothing is forwarded about a table that is switched off, and while it is not known which table a query is
  about, nothing that could be about one.
- Anonymized, no query is forwarded: the leader measures the queries of its own workers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec

from learning.channel import Ask, InjectionFailed, Rated, TemplateSeen, TrajectoryBatch
from learning.records import Label, Template, Trajectory

PER_SECOND, BYTES_PER_SECOND = 500.0, 4e6
"""Queries that come to the leader from all replicas together, in the long run."""

MOST, BYTES = 300, 4 << 20
_RATINGS = 1000


class Forwarded(msgspec.Struct, frozen=True, tag="forwarded"):
    """Queries of a replica's workers: a sample of `seen`, which take `size` bytes in all."""

    templates: tuple[Template, ...]
    trajectories: tuple[Trajectory, ...]
    seen: int
    size: int


class Labelled(msgspec.Struct, frozen=True, tag="labelled"):
    """Queries that a replica measured while it led, or thought so; the store has them already."""

    templates: tuple[Template, ...]
    labels: tuple[Label, ...]


class HandedIn(msgspec.Struct, frozen=True, tag="handed-in"):
    """A document of patterns that somebody handed in."""

    document: bytes


class Noted(msgspec.Struct, frozen=True, tag="noted"):
    """Options of a table that a client has set: a note of the store, by name."""

    name: str
    body: bytes


class Called(msgspec.Struct, frozen=True, tag="called"):
    """A client's call of a function that is for the leader to carry out; its rights were looked after."""

    ask: Ask


Mail = Forwarded | Labelled | HandedIn | Noted | Called | Rated | InjectionFailed

encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Mail] = msgspec.msgpack.Decoder(Mail)


def size_of(trajectory: Trajectory) -> int:
    """Return about how many bytes a query takes in a message."""
    return 150 + len(trajectory.vector or b"")


def decode(body: bytes) -> Mail | None:
    """Return a message; None where another version wrote something that this one does not know."""
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError:
        return None


class Outbox:
    """See the module's docstring.

    Parameters
    ----------
    may_tell
        Whether something may be said about a template at all.
    anonymize
        As configured.
    """

    def __init__(self, may_tell: Callable[[Template], bool], *, anonymize: bool = False) -> None:
        self.sample = 1.0
        self.dropped = 0
        self._may_tell, self._anonymize = may_tell, anonymize
        self._rng = random.Random()
        self._templates: dict[str, Template] = {}
        self._told: set[str] = set()
        self._queries: list[Trajectory] = []
        self._seen = self._size = self._kept = 0
        self._events: deque[Mail] = deque(maxlen=_RATINGS)

    def receive(
        self, frame: TemplateSeen | TrajectoryBatch | Rated | InjectionFailed | HandedIn | Noted | Called
    ) -> None:
        """Take a frame of a worker."""
        match frame:
            case TemplateSeen(template):
                self.know(template)
            case TrajectoryBatch():
                for trajectory in frame.trajectories:
                    self._take(trajectory)
            case Rated():
                if not self._anonymize:
                    self._events.append(frame)
            case _:
                self._events.append(frame)

    def know(self, template: Template) -> None:
        """Note a template of this replica's workers, also while it leads."""
        if len(self._templates) < _RATINGS:
            self._templates[template.key] = template

    def _take(self, trajectory: Trajectory) -> None:
        template = self._templates.get(trajectory.template)
        if template is None or not self._may_tell(template):
            return
        size = size_of(trajectory)
        self._seen += 1
        self._size += size
        if self._anonymize or self._rng.random() >= self.sample:
            return
        if len(self._queries) >= MOST or self._kept + size > BYTES:
            self.dropped += 1
            return
        self._queries.append(trajectory)
        self._kept += size

    def new_leader(self) -> None:
        """Somebody else leads, who has to be told of every template again."""
        self._told.clear()

    def take(self) -> list[bytes]:
        """Return the messages, encoded, and be empty."""
        new = [
            template
            for key, template in self._templates.items()
            if key not in self._told and self._may_tell(template)
        ]
        self._told.update(template.key for template in new)
        mail: list[bytes] = []
        if new or self._seen:
            mail.append(encode(Forwarded(tuple(new), tuple(self._queries), self._seen, self._size)))
        mail += [encode(event) for event in self._events]
        self._events.clear()
        self._queries = []
        self._seen = self._size = self._kept = 0
        return mail


class Thinning:
    """The leader's side: which share of everybody's queries is wanted."""

    def __init__(self) -> None:
        self.sample = 1.0
        self._queries = self._bytes = 0.0  # per second, a running mean
        self._rng = random.Random()
        self._counted = self._sized = 0

    def count(self, queries: int, size: int) -> None:
        """Note that so many queries were asked somewhere."""
        self._counted += queries
        self._sized += size

    def round(self, seconds: float) -> float:
        """Return the share for the next round; the last one took so long."""
        weight = min(1.0, seconds / 5.0)
        self._queries += weight * (self._counted / max(seconds, 1e-3) - self._queries)
        self._bytes += weight * (self._sized / max(seconds, 1e-3) - self._bytes)
        self._counted = self._sized = 0
        self.sample = min(
            1.0, PER_SECOND / max(self._queries, 1e-9), BYTES_PER_SECOND / max(self._bytes, 1e-9)
        )
        return self.sample

    def wanted(self) -> bool:
        """Draw whether a query of the leader's own workers is recorded, as one of another's would be."""
        return self.sample >= 1.0 or self._rng.random() < self.sample
