"""One replica among others that share a store: who leads, what is told, which policy is in force.

Every replica has its own learner and its own workers.  One of them *leads*: it alone measures, distils and
publishes, from the queries of all.  The others forward a sample of theirs and put in force what is published.
A round takes place every `ROUND` seconds, and at once when the store says that there is something new.

::

    following --(nobody leads, the lease is got)--> leading: load all, measure, distil, publish
    leading   --(somebody else has the lease)-----> following: what was measured meanwhile is added
    either    --(the store is unreachable)--------> as before; what is new waits in the state directory

Rules
-----
- A leader that cannot reach the store goes on measuring: nobody else can be told to, and a REINDEX must not
  go unnoticed because of a store.  If others can reach it, one of them takes over after `TTL`, and two
  replicas measure until the first hears of it, each within its budget; the labels of both count.
- A leader that cannot reach the *upstream* for `YIELD_AFTER` gives the lease up, since another may reach it;
  then only a replica takes it that does.
- A leader writes only under its own term, so that one which was thought dead overwrites nothing.
- Labels are written to the state directory first, and marked when the shared store has them.  So what was
  learned with the store unreachable is added later, even after kill -9, and also what was learned before a
  store was shared at all.
- A policy that a newer version wrote in an unknown format is not put in force; the last one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from config.schema import Store as StoreOptions
from learning.metrics import LearnerMetrics
from learning.outbox import Labelled, Mail, Outbox, Thinning, decode
from learning.pieces import NewerFormatError, Pieces
from learning.records import Label, Snapshot, Template
from learning.shared import Additions, FencedError, Pulse, SharedStore
from learning.shared_schema import SchemaError
from learning.sqlite_file import Kept, StoredTemplate
from learning.store import Store
from learning.upstream import UnavailableError

log = logging.getLogger(__name__)

ROUND, TTL = 1.0, 6.0  # seconds
YIELD_AFTER = 10.0  # seconds without the upstream
_PATIENCE = 5.0  # seconds that a round may take, or a step of loading
_BACKOFF = (0.5, 5.0)
_SCHEMA_BACKOFF = 30.0
_LABELS, _MAIL = 300, 500  # per round
_RETAIN_EVERY = 300.0


class Learner(Protocol):
    """What the learner does for its replica."""

    async def lead(self, kept: Kept) -> None:
        """Begin to measure, on the ground of what all have learned."""

    def follow(self) -> None:
        """Stop measuring."""

    async def adopt(self, snapshot: Snapshot) -> None:
        """Put a policy in force."""

    async def heed(self, notes: Mapping[str, bytes]) -> None:
        """Forget what others have cleared."""

    def lacks_upstream(self) -> bool:
        """Tell whether measuring has failed for a while for want of the upstream."""

    async def reaches_upstream(self) -> bool:
        """Find out whether the upstream can be reached."""

    def receive_mail(self, mail: Mail) -> None:
        """Take what another replica has told."""

    def template(self, key: str) -> Template | None:
        """Return a known template."""


class Sharing:
    """See the module's docstring."""

    def __init__(
        self,
        shared: SharedStore,
        store: Store,
        learner: Learner,
        outbox: Outbox,
        metrics: LearnerMetrics,
        options: StoreOptions,
    ) -> None:
        self._shared, self._store, self._learner, self._metrics = shared, store, learner, metrics
        shared.wake = self.wake
        self._options = options
        self.outbox = outbox
        self.thinning = Thinning()
        self._term: int | None = None  # of the lease that this replica has
        self._prepared = False  # and it knows what all have learned: before, it would publish less than that
        self._seen_term = 0
        self._head = (0, 0)
        self._pieces = Pieces()
        self._snapshot: Snapshot | None = None  # to be published
        self._pending = Additions()
        self._awake = asyncio.Event()
        self._up: bool | None = None
        self._waited = _BACKOFF[0]
        self._began = time.monotonic()
        self._retained = time.monotonic()
        self._newer: str | None = None

    @property
    def leading(self) -> bool:
        """Whether this replica measures and publishes."""
        return self._prepared

    def wake(self) -> None:
        """There is something to look at."""
        self._awake.set()

    # --- what the learner says ---

    def publish(self, snapshot: Snapshot) -> None:
        """Have a snapshot published; a later one takes the place of one that is waiting."""
        self._snapshot = snapshot
        self._awake.set()

    def add(
        self,
        *,
        templates: Mapping[str, StoredTemplate],
        notes: Mapping[str, bytes],
        void: Mapping[str, float],
        forgotten: Sequence[str],
    ) -> None:
        """Have something written; labels are found in the state directory."""
        waiting, gone = self._pending, set(forgotten)
        kept = {t.template.key: t for t in waiting.templates if t.template.key not in gone}
        self._pending = Additions(
            templates=tuple({**kept, **templates}.values()),
            notes={**{n: b for n, b in waiting.notes.items() if n.rpartition(":")[2] not in gone}, **notes},
            void={**{key: at for key, at in waiting.void.items() if key not in gone}, **void},
            forgotten=(*waiting.forgotten, *forgotten),
        )

    # --- rounds ---

    async def loop(self) -> None:
        """Take part until cancelled."""
        while True:
            self._awake.clear()
            pause = await self._tried()
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it loses a cancellation that comes as the event does.
                async with asyncio.timeout(pause):
                    await self._awake.wait()

    async def close(self) -> None:
        """Write what is new, give the lease back, and leave."""
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._round()
                if self._term is not None:
                    await self._shared.release(self._term)
        except (UnavailableError, FencedError, TimeoutError, SchemaError) as error:
            words = str(error) or f"it did not answer within {_PATIENCE:g} s"
            log.warning("what is new could not be left in the shared store: %s", words)
        await self._shared.close()

    async def _tried(self) -> float:
        """Make a round, deal with trouble, and return the seconds until the next."""
        try:
            await self._round()
        except FencedError:
            self._step_down("another replica leads")
            return 0.0
        except SchemaError as error:
            self._trouble(str(error))
            return _SCHEMA_BACKOFF
        except (UnavailableError, TimeoutError) as error:
            self._trouble(str(error) or "it does not answer")
            self._waited = min(2 * self._waited, _BACKOFF[1])
            return self._waited * random.uniform(0.7, 1.0)
        except Exception:  # sharing is no reason to lose the learner
            log.exception("a round with the shared store failed")
            self._trouble("an internal error; see above")
            return _SCHEMA_BACKOFF
        if self._up is not True:
            log.info("the shared store is reached; this replica %s", "leads" if self.leading else "follows")
        self._up, self._waited = True, _BACKOFF[0]
        self._gauges()
        return ROUND * random.uniform(0.9, 1.1)

    def _trouble(self, words: str) -> None:
        self._shared.drop()
        if self._up is not False:
            log.error(
                "the shared store cannot be used: %s; the last policy stays in force, trying again", words
            )
        self._up = False
        self._gauges()

    def _gauges(self) -> None:
        self._metrics.store_up.set(self._up is True)
        self._metrics.leading.set(self.leading)

    async def _round(self) -> None:
        await self._shared.connect()
        if self._shared.salt and self._up is not True:
            await self._store.use_salt(self._shared.salt)
        pulse = await self._pulse()
        if self._term is not None and (pulse.term != self._term or pulse.holder != self._shared.holder):
            self._step_down("another replica leads")
        if self._term is not None and self._learner.lacks_upstream():
            await self._yield_unless_reached(self._term)
            return
        if self._term is None and pulse.left < 0.0:
            given_up = pulse.holder is None and pulse.term > 0
            if not given_up or await self._learner.reaches_upstream():
                await self._try_to_lead(pulse)
        if pulse.term != self._seen_term:
            self._seen_term = pulse.term
            self.outbox.new_leader()
        if self._term is not None:
            await self._led(self._term)
        else:
            await self._followed(pulse)

    async def _pulse(self) -> Pulse:
        async with asyncio.timeout(_PATIENCE):
            return await self._shared.pulse(self._term, TTL, self.thinning.sample)

    async def _try_to_lead(self, pulse: Pulse) -> None:
        async with asyncio.timeout(_PATIENCE):
            term = await self._shared.acquire(TTL)
        if term is None:
            return
        self._term = self._seen_term = term
        try:
            await self._send_labels(term, everything=True)
            kept = await self._shared.load(self._pulse)
            async with asyncio.timeout(_PATIENCE):
                kept.snapshot = await self._fetched()
            kept.version = pulse.head[1]
            await self._learner.lead(kept)
            self._prepared = True
        except BaseException:
            self._term = None  # the lease runs out, or is got again
            self._learner.follow()
            raise
        self._began = time.monotonic()
        self._metrics.takeovers.inc()
        log.info("this replica leads (term %d): it measures for all", term)

    async def _yield_unless_reached(self, term: int) -> None:
        """Give the lease up where the upstream cannot be reached at all: another replica may reach it."""
        if await self._learner.reaches_upstream():
            return  # it is one database that is away, or all is well again
        await self._led(term)  # what was learned until now is written
        async with asyncio.timeout(_PATIENCE):
            await self._shared.release(term, useless=True)
        self._step_down("it cannot reach the upstream server")

    def _step_down(self, why: str) -> None:
        if self._term is not None:
            log.warning("this replica no longer leads: %s", why)
            self._term = None
            self._prepared = False
            self._snapshot = None
            self._pending = Additions()
            self._head = (0, 0)
            self._learner.follow()

    # --- leading ---

    async def _led(self, term: int) -> None:
        now = time.monotonic()
        self.thinning.round(now - self._began)
        self._began = now
        while True:
            async with asyncio.timeout(_PATIENCE):
                mail = await self._shared.take_mail(term, _MAIL)
            for body in mail:
                message = decode(body)
                if message is not None:
                    self._learner.receive_mail(message)
            if len(mail) < _MAIL:
                break
            await self._pulse()
        pending, self._pending = self._pending, Additions()
        try:
            async with asyncio.timeout(_PATIENCE):
                if pending:
                    await self._shared.add(term, pending)
        except BaseException:
            later, self._pending = self._pending, pending
            self.add(
                templates={t.template.key: t for t in later.templates},
                notes=later.notes,
                void=later.void,
                forgotten=later.forgotten,
            )
            raise
        await self._send_labels(term)
        snapshot = self._snapshot
        if snapshot is not None:
            async with asyncio.timeout(_PATIENCE):
                await self._shared.publish(term, self._hidden(snapshot), self._pieces)
            self._head = (term, snapshot.version)
            if self._snapshot is snapshot:
                self._snapshot = None
        if now - self._retained > _RETAIN_EVERY:
            self._retained = now
            async with asyncio.timeout(_PATIENCE):
                oldest = time.time() - self._options.max_age
                await self._shared.retain(term, oldest, self._options.max_size * 1e6)

    def _hidden(self, snapshot: Snapshot) -> Snapshot:
        anonymizer = self._store.anonymizer
        return snapshot if anonymizer is None else anonymizer.snapshot(snapshot)

    async def _send_labels(self, term: int | None, *, everything: bool = False) -> None:
        """Give the shared store the labels that it does not have."""
        while rows := await self._store.unsent(_LABELS):
            labels = tuple(label for _, label in rows)
            mail = [] if term is not None else [self._labelled(labels)]
            async with asyncio.timeout(_PATIENCE):
                await self._shared.add(term, Additions(labels=labels), mail)
            await self._store.sent([number for number, _ in rows])
            if term is not None:
                await self._pulse()
            if not everything or len(rows) < _LABELS:
                return

    def _labelled(self, labels: tuple[Label, ...]) -> bytes:
        keys = {label.template for label in labels}
        found = [self._learner.template(key) for key in keys]
        templates = tuple(template for template in found if template is not None)
        return msgspec.msgpack.encode(Labelled(templates, labels))

    # --- following ---

    async def _followed(self, pulse: Pulse) -> None:
        self.outbox.sample = pulse.sample
        if pulse.head != self._head and pulse.head != (0, 0):
            async with asyncio.timeout(_PATIENCE):
                await self._learner.heed(await self._shared.cleared())
                snapshot = await self._fetched()
            self._head = pulse.head
            if snapshot is not None:
                await self._learner.adopt(snapshot)
        if pulse.left > 0.0:
            mail = self.outbox.take()
            if mail:
                async with asyncio.timeout(_PATIENCE):
                    await self._shared.post(mail)
            await self._send_labels(None)

    async def _fetched(self) -> Snapshot | None:
        try:
            return await self._shared.fetch(self._pieces)
        except NewerFormatError as error:
            if str(error) != self._newer:
                self._newer = str(error)
                log.error("%s", error)
            return None
