"""The learner: listens to the workers, measures a sample of their queries, publishes what follows.

One process, one event loop, a handful of tasks:

    serve     frames from the workers: templates, trajectories, refused settings   (server, intake)
    measure   one measurement at a time, as the budget allows                      (measuring)
    distil    labels become policies, in a thread; changed policies go out         (policy, publishing)
    keep      every second: news go to the disk, gauges are brought up to date     (store, metrics)

Rules
-----
- The learner may be killed at any moment.  Workers go on with the policy they have; a new learner publishes
  the stored one before it asks the server anything.
- Trouble with one template stays with that template; trouble with the server keeps every policy as it is.
- `stop` ends everything cleanly: statements under way are cancelled, what was learned is written.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from config.schema import Config
from learning.answering import Answering
from learning.answers import with_outlook
from learning.channel import Ask, InjectionFailed, Publish, Rated, encode
from learning.drift import World
from learning.exchange import Document, ExchangeError, decode, evidence, export
from learning.exchange import encode as encode_document
from learning.functions import Functions
from learning.intake import Intake
from learning.measuring import Measuring, News
from learning.metrics import LearnerMetrics
from learning.options import Layers
from learning.outbox import Called, Forwarded, HandedIn, Labelled, Mail, Noted, Outbox
from learning.overview import Overviews
from learning.patterns import TakenIn, known, take_in
from learning.policy import (
    ENOUGH_NEW,
    NO_LEARNING,
    allowed,
    derivation,
    permitted,
    settled,
    summary,
    wants_rows,
)
from learning.publishing import Publisher
from learning.records import Snapshot, Template, TemplatePolicy, Trust
from learning.registry import Phase, Registry, TemplateState
from learning.server import ChannelServer
from learning.service import Service
from learning.shared import SharedStore
from learning.sharing import YIELD_AFTER, Sharing
from learning.sqlite_file import Kept, StoredTemplate
from learning.store import Store

log = logging.getLogger(__name__)

_KEEP_EVERY = 1.0  # seconds
_DISTIL_EVERY = 0.25
_SETTLE = 10.0  # seconds after taking over in which traffic is gathered before policies are derived anew
_REST = 5  # a distillation rests for that many times its duration before the next one of the template


async def run(
    config: Config,
    socket_path: Path,
    stop: asyncio.Event,
    *,
    metrics: LearnerMetrics | None = None,
    paused: Callable[[], bool] = bool,
    configs: asyncio.Queue[Config] | None = None,
) -> None:
    """Run the learner until `stop` is set.

    Parameters
    ----------
    config
        Needs ``learner.dsn``.
    socket_path
        Where workers connect; created, and removed at the end.
    metrics
        Series to write to; by default a new set that is in no registry, which is right in multiprocess mode.
    paused
        Tells whether nothing may be measured at the moment: the kill switch is thrown.
    configs
        Configurations to take, in their order; they differ in options that a running proxy can take.

    Raises
    ------
    ValueError
        The configuration has no ``learner.dsn``.
    OSError
        The socket cannot be created.
    """
    learner = Learner(config, socket_path, metrics or LearnerMetrics())
    learner.measuring.paused = paused
    await learner.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(loop) for loop in (*learner.loops(), learner.follow_configs(configs))]
            await stop.wait()
            for task in loops:
                task.cancel()
    finally:
        await learner.close()


class Learner:
    """The learner's state and its tasks; see the module's docstring."""

    def __init__(self, config: Config, socket_path: Path, metrics: LearnerMetrics) -> None:
        self._options = Layers(config)
        self._config = config  # what they come to
        self._metrics = metrics
        self._registry = Registry()
        self._store = Store(
            config.store.path,
            anonymize=config.learning.anonymize,
            max_age=config.store.max_age,
            max_size=config.store.max_size * 1e6,
        )
        self._measuring = Measuring(config, self._registry, self._store, metrics)
        self._service = Service(Functions(self).handlers(), config.sql.max_measurements)
        self._sharing = self._shared() if config.store.kind == "postgres" else None
        self._publisher = Publisher(self._registry, self._measuring, metrics, self._put_out)
        self._void: dict[str, float] = {}  # template -> Unix time before which labels do not count
        self._cleared: dict[str, bytes] = {}  # template -> the occasion on which it was last cleared
        self._measuring.active = self._sharing is None
        answering = Answering(
            self._registry,
            lambda: self._publisher.version,
            str(config.store.path.absolute()),
            Overviews(self).get,
        )
        self._intake = Intake(
            self._registry, self._measuring, self._service, answering, metrics, self._window, self._sharing
        )
        self._server = ChannelServer(socket_path, self._intake.receive, self._service.gone)

    async def start(self) -> None:
        """Read what is kept, begin to listen, publish the stored policy."""
        kept = await self._store.open()
        self._publisher.version = kept.version
        for name, note in kept.notes.items():
            if name.startswith("cleared:"):
                self._cleared[name.removeprefix("cleared:")] = note
        await self._restore(kept)
        await self._server.start()
        if kept.snapshot is not None:
            restored = await self._put_in_force(kept.snapshot)
            if restored != kept.snapshot:
                await self._store.save(snapshot=restored)
            log.info("policy %d for %d templates restored", restored.version, len(restored.templates))

    async def _restore(self, kept: Kept) -> None:
        """Add what was kept, here or by all, to what is known."""
        now = time.monotonic()
        self._measuring.ratings.restore(kept.notes)
        self._restore_options(kept.notes)
        for name, note in kept.notes.items():
            if name.startswith("void:"):
                key = name.removeprefix("void:")
                since = msgspec.msgpack.decode(note, type=float)
                self._void[key] = max(since, self._void.get(key, 0.0))
        for stored in kept.templates:
            key = stored.template.key
            if stored.table and not self._config.table(stored.table).learning:
                self._measuring.news.forgotten.append(key)
                await self._store.forget(key)
                continue
            state = self._registry.add(stored.template, now)
            if state is None:
                continue
            if stored.off is not None and state.phase is not Phase.OFF:
                state.leave_alone(stored.off, stored.table, now, forever=True)
            state.hashed = self._hashed if self._store.anonymizer is not None else None
            world = kept.notes.get(f"world:{key}")
            if world is not None:
                state.watch.world = msgspec.msgpack.decode(world, type=World)
            state.merge_labels(kept.labels.get(key, ()), self._void.get(key, 0.0))
            for trajectory in kept.trajectories.get(key, ()):
                state.record(trajectory, self._window(state), now)

    def _hashed(self, context: str) -> str:
        anonymizer = self._store.anonymizer
        return context if anonymizer is None else anonymizer.context(context)

    async def _put_in_force(self, snapshot: Snapshot) -> Snapshot:
        """Give the workers a snapshot that was published before, or elsewhere; return what they get."""
        permitted_ones = permitted(snapshot, self._config)
        for key, policy in snapshot.templates.items():
            state = self._registry.get(key)
            if state is not None and state.phase is not Phase.OFF:
                state.table = policy.table
                self._decide(state, policy)
                if self._measuring.active and not self._config.table(policy.table).learning:
                    await self._measuring.switch_off(state, policy.table)
        self._publisher.restore(permitted_ones)
        await self._give(permitted_ones)
        return permitted_ones

    async def _give(self, snapshot: Snapshot) -> None:
        """Give a snapshot to the workers."""
        anonymizer = self._store.anonymizer
        given = snapshot if anonymizer is None else anonymizer.serving(snapshot)
        await self._server.publish(await asyncio.to_thread(lambda: encode(Publish(given))))

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Return the tasks' coroutines; each runs until it is cancelled."""
        loops = [self._measuring.loop(), self._distil_loop(), self._keep_loop()]
        return loops if self._sharing is None else [*loops, self._sharing.loop()]

    async def close(self) -> None:
        """Stop listening, cancel what is under way on the server, write what is new."""
        self._intake.close()
        await self._server.close()
        await self._service.close()
        await self._measuring.close()
        await self._save()
        if self._sharing is not None:
            await self._sharing.close()
        await self._store.close()

    # --- what clients ask for ---

    async def override(self, table: str, changes: Mapping[str, object]) -> None:
        """Put other options of a table in force, and keep them; they win over the configuration file.

        Raises
        ------
        ValueError
            A value is out of its range.
        """
        name, note = self._options.override(table, changes)
        self._measuring.news.notes[name] = note
        await self._put_options_in_force()

    async def configure(self, config: Config) -> None:
        """Put another configuration in force: what it says of tables, targets and the budget."""
        self._options.configure(config)
        await self._put_options_in_force()

    async def follow_configs(self, configs: asyncio.Queue[Config] | None) -> None:
        """Put configurations in force as they come, until cancelled."""
        while configs is not None:
            await self.configure(await configs.get())

    async def _put_options_in_force(self) -> None:
        """Have the queries of every table whose options are others now get what they say, at once."""
        before, config = self._config, self._options.config
        self._config = config
        self._measuring.configure(config)
        for state in self._registry:
            options = config.table(state.table)
            if not state.table or options == before.table(state.table):
                continue
            state.unpublished += 1
            self._measuring.canaries.waive(state.template.key, time.monotonic())
            if not options.learning:
                await self._measuring.switch_off(state, state.table)
            elif state.policy is not None and state.policy.reason == NO_LEARNING:
                state.wake_up()
            elif state.policy is not None:
                self._decide(state, state.shelved or state.policy)
        if self.leads:
            await self._publisher.publish()

    def _decide(self, state: TemplateState, policy: TemplatePolicy) -> None:
        """Put a policy in force, or on the shelf where the table's queries are to run as they came."""
        state.policy = allowed(policy, self._config)
        state.shelved = policy if state.policy is not policy else None

    def _restore_options(self, notes: Mapping[str, bytes]) -> None:
        self._options.restore(notes)
        self._config = self._options.config
        self._measuring.configure(self._config)

    async def clear(self, state: TemplateState, token: bytes | None = None) -> None:
        """Forget what was learned about a template; it is learned about anew.

        `token` names the occasion, so that each replica forgets once what it has of its own; where it is
        given, another replica has cleared the shared store.
        """
        key, news = state.template.key, self._measuring.news
        state.begin_anew(None)
        state.forget_traffic()
        state.policy = state.shelved = None
        news.forget(key)
        if token is not None:
            news.forgotten.remove(key)
        await self._store.forget(key)
        news.templates[key] = StoredTemplate(state.template, table=state.table)
        self._cleared[key] = news.notes[f"cleared:{key}"] = token or uuid.uuid4().bytes

    async def heed(self, notes: Mapping[str, bytes]) -> None:
        """Forget what others have cleared since it was last heard."""
        for name, token in notes.items():
            kind, _, key = name.partition(":")
            state = self._registry.get(key)
            if kind == "cleared" and state is not None and self._cleared.get(key) != token:
                await self.clear(state, token)

    def tell_leader(self, ask: Ask) -> None:
        """Have the replica that leads carry out a client's call."""
        assert self._sharing is not None
        self._sharing.outbox.receive(Called(ask))

    def hand_in(self, document: Document) -> None:
        """Have the replica that leads take a document in."""
        assert self._sharing is not None
        if self._store.anonymizer is not None:
            document = export(evidence(document), anonymize=True)
        self._sharing.outbox.receive(HandedIn(encode_document(document)))

    async def derive(self, states: Sequence[TemplateState]) -> None:
        """Derive the policies of some templates now, and publish them."""
        for state in states:
            if state.confirmed is not None and state.labels:
                self._measuring.canaries.waive(state.template.key, time.monotonic())
                await self._distil(state)
        if self.leads:
            await self._publisher.publish()

    # --- exchange ---

    def export_patterns(self, table: str | None = None) -> Document:
        """Return what is known, of one table (resolved name) or of all; see `learning.exchange`."""
        return known(self._registry, tables=None if table is None else {table})

    def import_patterns(self, document: Document) -> TakenIn:
        """Take a document in; what is new is kept and counts like what was measured here."""
        taken = take_in(
            self._registry, document, lambda table: self._config.table(table).learning, time.monotonic()
        )
        news = self._measuring.news
        news.templates.update({stored.template.key: stored for stored in taken.templates})
        news.labels += taken.labels
        log.info("%d measured queries of %d kinds imported", len(taken.labels), len(taken.templates))
        for words in taken.left_out:
            log.warning("not imported: %s", words)
        return taken

    # --- other replicas (learning.sharing) ---

    def _shared(self) -> Sharing:
        options = self._config.store
        if options.dsn is None:
            raise ValueError("the shared store needs store.dsn")
        shared = SharedStore(
            options.dsn.get_secret_value(),
            schema=options.db_schema,
            group=options.group,
            connect_timeout=self._config.limits.connect_timeout,
        )
        outbox = Outbox(self._may_tell, anonymize=self._config.learning.anonymize)
        return Sharing(shared, self._store, self, outbox, self._metrics, options)

    @property
    def leads(self) -> bool:
        """Whether this learner measures and publishes; alone, it always does."""
        return self._sharing is None or self._sharing.leading

    async def lead(self, kept: Kept) -> None:
        """Begin to measure and publish for all replicas, on the ground of what all have learned."""
        await self.heed(kept.notes)
        await self._restore(kept)
        self._publisher.version = max(self._publisher.version, kept.version)
        self._measuring.active = True
        if kept.snapshot is not None:
            await self._store.save(snapshot=await self._put_in_force(kept.snapshot))
            self._publisher.restore(kept.snapshot)  # as it stands in the store: what is off has to leave it
            self._publisher.orphans = {
                key: policy
                for key, policy in permitted(kept.snapshot, self._config).templates.items()
                if self._registry.get(key) is None and policy.trust is not Trust.OBSERVE
            }
        now = time.monotonic()
        for state in self._registry:
            if state.policy is not None and state.policy.trust is not Trust.OBSERVE:
                state.settled_at = now + _SETTLE
        self._measuring.wake()

    def follow(self) -> None:
        """Stop measuring: another replica does."""
        self._measuring.active = False
        self._publisher.orphans = {}

    def lacks_upstream(self) -> bool:
        """Tell whether measuring has failed for a while for want of the upstream."""
        since = self._measuring.unreachable_since
        return since is not None and time.monotonic() - since > YIELD_AFTER

    async def reaches_upstream(self) -> bool:
        """Find out whether the upstream can be reached."""
        return await self._measuring.reaches_upstream()

    async def adopt(self, snapshot: Snapshot) -> None:
        """Put in force what another replica has published, and keep it for a start without the store."""
        for state in self._registry:
            if state.template.key not in snapshot.templates and state.phase is not Phase.OFF:
                state.policy = state.shelved = None
        adopted = await self._put_in_force(snapshot)
        await self._store.save(snapshot=adopted)
        self._metrics.version.set(snapshot.version)
        log.info("policy %d of another replica in force: %s", adopted.version, summary(adopted))

    def template(self, key: str) -> Template | None:
        """Return a known template."""
        state = self._registry.get(key)
        return state.template if state is not None else None

    def receive_mail(self, mail: Mail) -> None:
        """Take what another replica has told: its workers' frames, or labels."""
        match mail:
            case Forwarded():
                assert self._sharing is not None
                self._sharing.thinning.count(mail.seen, mail.size)
                for template in mail.templates:
                    self._intake.template_seen(template)
                self._intake.record(mail.trajectories)
            case Labelled():
                for template in mail.templates:
                    self._intake.template_seen(template)
                for key in {label.template for label in mail.labels}:
                    state = self._registry.get(key)
                    if state is not None:
                        labels = [label for label in mail.labels if label.template == key]
                        state.merge_labels(labels, self._void.get(key, 0.0))
            case HandedIn(document):
                self._handed_in(document)
            case Noted(name, body):
                self._measuring.news.notes[name] = body
                self._restore_options({name: body})
                for state in self._registry:
                    state.unpublished += state.table == name.partition(":")[2]
            case Rated():
                self._measuring.rated(mail)
            case Called(ask):
                self._service.carry_out(ask)
            case InjectionFailed():
                self._intake.injection_failed(mail)

    def _may_tell(self, template: Template) -> bool:
        """Tell whether other replicas may hear of a template; in doubt not."""
        policy = self._publisher.policies.get(template.key)
        if policy is not None and policy.reason == NO_LEARNING:
            return False  # the leader's, where a client has switched it off there
        if policy is not None and policy.table:
            return self._config.table(policy.table).learning
        relation = template.relation.lower()
        off = [name for name in self._config.tables if not self._config.table(name).learning]
        return self._config.learning.enabled and not any(
            name.partition(".")[2].lower() in relation for name in off
        )

    # --- serve ---

    @property
    def registry(self) -> Registry:
        """The templates."""
        return self._registry

    @property
    def measuring(self) -> Measuring:
        """What measures."""
        return self._measuring

    @property
    def dsn(self) -> str:
        """Where side connections go."""
        assert self._config.learner.dsn is not None
        return self._config.learner.dsn.get_secret_value()

    @property
    def version(self) -> int:
        """Version of the policy that was published last."""
        return self._publisher.version

    def _window(self, state: TemplateState) -> int:
        return self._config.table(state.table or state.template.relation).trajectory_window

    # --- distil ---

    async def _distil_loop(self) -> None:
        while True:
            for state in self._registry if self.leads else ():
                if not state.labels and state.template.key in self._publisher.orphans:
                    continue  # what was learned before serves on
                if distil_due(state, time.monotonic(), self._config.learning.pattern_consolidation_interval):
                    await self._distil(state)
            if self.leads:
                await self._publisher.publish()
            await asyncio.sleep(_DISTIL_EVERY)

    async def _distil(self, state: TemplateState) -> None:
        confirmed, epoch = state.confirmed, state.watch.epoch
        state.unpublished = 0
        started = time.monotonic()
        try:
            ratings = self._measuring.ratings[state.table]
            policy = await asyncio.to_thread(derivation(state, self._config, ratings))
            policy = with_outlook(policy, tuple(state.labels))
        except Exception:  # the policy in force stays; the others go on
            log.exception("deriving the policy of %s failed", state.table)
            return
        finally:
            state.distilled_at = time.monotonic()
            state.distil_seconds = state.distilled_at - started
            self._metrics.distill_seconds.inc(state.distil_seconds)
        if self.leads and state.confirmed is confirmed and state.watch.epoch == epoch:
            self._decide(state, policy)
            self._measuring.derived(state)

    async def _put_out(self, snapshot: Snapshot) -> None:
        """Give a snapshot to the workers and to the other replicas, and keep it."""
        await self._give(snapshot)
        if self._sharing is not None:
            self._sharing.publish(settled(snapshot))
        await self._store.save(snapshot=settled(snapshot))

    # --- keep ---

    async def _keep_loop(self) -> None:
        while True:
            await self._save()
            self._gauges()
            await asyncio.sleep(_KEEP_EVERY)

    async def _save(self) -> None:
        for document in await self._store.handed_in():
            self._handed_in(document)
        news, self._measuring.news = self._measuring.news, News()
        if news.void:
            self._void.update(news.void)
            news.notes |= {f"void:{key}": msgspec.msgpack.encode(at) for key, at in news.void.items()}
        if news.templates or news.labels or news.trajectories or news.notes:
            await self._store.save(
                templates=tuple(news.templates.values()),
                labels=news.labels,
                trajectories=news.trajectories,
                notes=news.notes,
            )
        if self._sharing is not None and not self.leads:
            for name, body in news.notes.items():
                if name.startswith("sql:"):  # options set by a client of this replica hold for all
                    self._sharing.outbox.receive(Noted(name, body))
        elif self._sharing is not None:
            self._sharing.add(
                templates=news.templates, notes=news.notes, void=news.void, forgotten=news.forgotten
            )

    def _handed_in(self, data: bytes) -> None:
        if not self.leads:
            assert self._sharing is not None
            self._sharing.outbox.receive(HandedIn(data))
            return
        try:
            self.import_patterns(decode(data))
        except ExchangeError as error:
            log.error("a document of patterns was handed in and cannot be used: %s", error)

    def _gauges(self) -> None:
        self._measuring.gauges()
        self._metrics.version.set(self._publisher.version)
        on_trial = Counter(trial.new.table for trial in self._measuring.canaries.trials.values())
        for table in {state.table for state in self._registry if state.table}:
            self._metrics.on_trial.labels(table=table).set(on_trial[table])
        self._metrics.workers.set(self._server.workers)
        self._metrics.trust(
            (s.table, Trust.OBSERVE if s.policy is None else s.policy.trust) for s in self._registry
        )


def distil_due(state: TemplateState, now: float, consolidate_after: float) -> bool:
    """Tell whether there are new labels and the last distillation was long enough ago.

    Without new labels the traffic still changes, and with it what patterns are worth: after
    `consolidate_after` seconds they are weighed, merged and pruned anew.  Without any, there is something to
    tell only where queries get fewer rows than they ask for.
    """
    if state.confirmed is None:
        return False
    if state.unpublished and state.watch.urgent:
        return True
    if now < state.settled_at:
        return False
    if not state.labels:
        return bool(state.unpublished) and wants_rows(state)
    if not state.unpublished:
        return now - state.distilled_at >= consolidate_after
    wait = _DISTIL_EVERY if state.unpublished >= ENOUGH_NEW else 1.0
    return now - state.distilled_at >= max(wait, _REST * state.distil_seconds)
