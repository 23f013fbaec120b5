"""One measurement at a time: ask the server about templates, choose a query, label it, as the budget allows.

The order of work: templates that the server has to be asked about, samples of tables, then queries, audits
and targeted ones in turn.  Trouble with one template stays with that template; a server that cannot be
reached stops everything here and changes no policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable

import asyncpg
import msgspec
import numpy as np

from config.schema import Config
from learning import density
from learning.answering import table_view
from learning.audit import Audit
from learning.binding import BindingError
from learning.budget import Pace, TokenBucket
from learning.canary import Canaries, Trial
from learning.channel import Rated
from learning.choosing import Chooser, Chosen
from learning.dialects import AS_IS
from learning.distillation import Options
from learning.drift import Change, Kind, safe_arm
from learning.feedback import FeedbackLog
from learning.inventory import Confirmed, confirm, look
from learning.labelling import Labeller
from learning.metrics import LearnerMetrics
from learning.optimizer import SearchOptimizer
from learning.policy import NO_LEARNING
from learning.probe import Measured, snapshot
from learning.ratings import judge_rating
from learning.records import Label, Snapshot, Trajectory, Trust
from learning.registry import Phase, Registry, TemplateState
from learning.schedule import LabelPlan
from learning.sqlite_file import StoredTemplate
from learning.store import Store
from learning.tablestats import sketch
from learning.trajectory import filter_values
from learning.upstream import DISCONNECTED, Session, UnavailableError, Upstream, words_of
from learning.verdict import Expectation, VerdictEngine
from learning.watch import URGENT, Holding

log = logging.getLogger(__name__)

_IDLE = 0.1  # seconds between looks for work where there is none
_SESSIONS_EVERY = 2.0
_SKETCH_AFTER = 50  # labels: a template that lives long enough to be worth a sample of its table
_LOOK_EVERY = 1.0  # seconds between looks into the catalogs, while there is traffic
_GRANT_EVERY = 30.0  # seconds between grants of credit for changes
_RATINGS, _RATING_WAITS = 1000, 5.0  # ratings that may wait, and for how many seconds
_ONLY_WHAT_WAS_SERVED = LabelPlan(thorough=False, warm=False, leave_out=lambda arm, exact_ms: True)
_GIVE_UP_AFTER = 3  # failed measurements in a row, before the server is asked about the template again


class News:
    """What was learned since it was last written to the disk."""

    def __init__(self) -> None:
        self.templates: dict[str, StoredTemplate] = {}
        self.labels: list[Label] = []
        self.notes: dict[str, bytes] = {}  # see Store.save
        self.trajectories: list[Trajectory] = []
        self.void: dict[str, float] = {}  # template -> Unix time before which labels do not count
        self.forgotten: list[str] = []

    def forget(self, template: str) -> None:
        """Drop what is known of a template."""
        self.forgotten.append(template)
        self.void.pop(template, None)
        self.templates.pop(template, None)
        for kind in ("world", "view"):
            self.notes.pop(f"{kind}:{template}", None)
        self.labels = [label for label in self.labels if label.template != template]
        self.trajectories = [t for t in self.trajectories if t.template != template]


class Measuring:
    """Spends the budget; `loop` is the task, `wake` tells it that there are new queries."""

    def __init__(self, config: Config, registry: Registry, store: Store, metrics: LearnerMetrics) -> None:
        if config.learner.dsn is None:
            raise ValueError("the learner needs learner.dsn")
        self.config = config
        self._registry = registry
        self._store = store
        self._metrics = metrics
        self._upstream = Upstream(
            config.learner.dsn.get_secret_value(), connect_timeout=config.limits.connect_timeout
        )
        replica = config.learner.replica_dsn
        self._replica = (
            Upstream(replica.get_secret_value(), connect_timeout=config.limits.connect_timeout)
            if replica is not None
            else None
        )
        self._used = self._upstream  # by the work under way
        self._bucket = TokenBucket(config.learner.budget, config.learner.starting_credit, time.monotonic())
        self._pace = Pace(os.cpu_count() or 1)
        rng = np.random.default_rng()
        self._chooser = Chooser(registry, rng)
        self._labeller = Labeller(config, self._chooser, rng, self._measuring_session, self._spent)
        self._work = asyncio.Event()
        self._busy = asyncio.Lock()  # the side connection does one thing at a time
        self._sessions = (0.0, 0)  # when counted, active sessions
        self._granted = -math.inf  # when credit was last granted for a change
        self._rated: deque[tuple[Rated, float]] = deque(maxlen=_RATINGS)  # with when they are given up
        self.ratings = FeedbackLog()
        self.verdicts = VerdictEngine()
        self.audit = Audit()
        self.news = News()
        self.active = True  # False: another replica measures
        self._rivals: tuple[Trial, list[SearchOptimizer]] | None = None  # of the trial audited last
        self.canaries = Canaries(config.learning.canary_share, config.learning.canary_seconds)
        self.paused: Callable[[], bool] = bool  # tells whether nothing may be measured now
        self.unreachable_since: float | None = None  # monotonic; of the server, as far as was tried

    def configure(self, config: Config) -> None:
        """Go on with other options: those of tables, or any that a running proxy takes."""
        self.config = config
        self._labeller.configure(config)
        self._bucket.set_rate(config.learner.budget, time.monotonic())
        self.canaries.share, self.canaries.longest = (
            config.learning.canary_share,
            config.learning.canary_seconds,
        )

    def wake(self) -> None:
        """There are new queries."""
        self._work.set()

    def rated(self, rating: Rated) -> None:
        """A user rated a query; its trajectory may still be on its way."""
        self._rated.append((rating, time.monotonic() + _RATING_WAITS))
        self._work.set()

    def gauges(self) -> None:
        """Bring the gauges up to date."""
        for table, audited in self.audit.tables().items():
            self._metrics.audited_recall.labels(table=table).set(audited.recall)
            self._metrics.audited_queries.labels(table=table).set(audited.queries)
        holding = Counter({state.table: 0 for state in self._registry if state.confirmed is not None})
        holding.update(state.table for state in self._registry if state.watch.holding is not None)
        for table, count in holding.items():
            self._metrics.holding.labels(table=table).set(count)
        for table in {state.table for state in self._registry if state.confirmed is not None}:
            self._metrics.target.labels(table=table).set(self.target(table))
        self._metrics.credit.set(self._bucket.credit(time.monotonic()))
        self._metrics.pace.set(self._pace.pace)

    async def close(self) -> None:
        """Close the side connections."""
        await self._upstream.close()
        if self._replica is not None:
            await self._replica.close()

    async def switch_off(self, state: TemplateState, table: str) -> None:
        """The configuration wants nothing of this table: nothing about it stays, in memory or on the disk."""
        state.leave_alone(NO_LEARNING, table, time.monotonic(), forever=True)
        self.news.forget(state.template.key)
        await self._store.forget(state.template.key)
        if table:
            self.ratings.forget(table)
            self.news.notes[f"feedback:{table}"] = b""

    async def loop(self) -> None:
        """Measure until cancelled."""
        while True:
            self._work.clear()
            rest = await self._step()
            if rest is None:
                with contextlib.suppress(TimeoutError):
                    # Not wait_for: before Python 3.12 it loses a cancellation that comes as the event does.
                    async with asyncio.timeout(_IDLE):
                        await self._work.wait()
            await self._rest(rest or 0.0)

    async def _rest(self, seconds: float) -> None:
        """Rest, on a busy server for many seconds; a suspicion ends it."""
        until = time.monotonic() + seconds
        await asyncio.sleep(min(seconds, _IDLE))
        while (left := until - time.monotonic()) > 0.0 and self._suspect() is None:  # noqa: ASYNC110
            await asyncio.sleep(min(left, _IDLE))

    async def _step(self) -> float | None:
        """Do one piece of work and return the seconds to rest; None: there was nothing to do."""
        if not self.active or self.paused():
            return None
        now = time.monotonic()
        state = next((state for state in self._registry if state.due(now)), None)
        if state is not None and await self._guarded(state, self._confirm):
            return 0.0
        state = next((state for state in self._registry if self._wants_look(state, now)), None)
        if state is not None and await self._guarded(state, self._look):
            return 0.0
        if self._rated and await self._rate(now):
            return 0.0
        for suspicious in self._registry:
            if suspicious.suspicious:
                suspicious.suspicious = False
                log.info("%s: the queries have become others; auditing the latest", suspicious.table)
                self._bucket.grant(URGENT * suspicious.label_seconds, now)
        if self._bucket.wait(now) > 0:
            return None
        tried = self._on_trial()
        if tried is not None and await self._guarded(tried, self._audit_trial):
            return 0.0  # a few in all
        suspect = self._suspect()
        if suspect is not None and await self._guarded(suspect, self._audit_quickly):
            return 0.0  # thirty in all, which is soon over
        state = next((state for state in self._registry if self._wants_sketch(state)), None)
        if state is not None and await self._guarded(state, self._sketch):
            return 0.0
        chosen = self._chooser.choose()
        if chosen is None:
            return None
        started = time.perf_counter()
        if not await self._guarded(chosen.state, lambda state: self._label(chosen)):
            return _IDLE
        return self._pace.pace * (time.perf_counter() - started)

    async def measure_now(self, state: TemplateState, trajectory: Trajectory) -> bool:
        """Measure a query because a client asks for it; what it costs is not taken from the credit."""
        if state.confirmed is None or state.tracker is None:
            return False
        known, started = len(state.labelled), time.perf_counter()
        await self._guarded(state, lambda state: self._label(Chosen(state, trajectory, False)))
        elapsed = time.perf_counter() - started
        self._bucket.grant(elapsed, time.monotonic())
        await asyncio.sleep(self._pace.pace * elapsed)
        return len(state.labelled) > known

    async def reaches_upstream(self) -> bool:
        """Find out whether the server can be reached, by a connection for this alone."""
        try:
            await self._upstream.try_out()
        except UnavailableError:
            return False
        self.unreachable_since = None
        return True

    async def _guarded(self, state: TemplateState, work: Callable[[TemplateState], Awaitable[None]]) -> bool:
        """Do something on the server for one template, and deal with trouble.  False: not possible now."""
        async with self._busy:
            return await self._done(state, work)

    async def _done(self, state: TemplateState, work: Callable[[TemplateState], Awaitable[None]]) -> bool:
        database = state.template.database
        self._used = self._upstream
        try:
            await work(state)
            self.unreachable_since = None
        except UnavailableError:
            if self.unreachable_since is None:
                self.unreachable_since = time.monotonic()
            state.recheck_at = max(state.recheck_at, time.monotonic() + 0.5)
            return False
        except (*DISCONNECTED, asyncpg.PostgresError, asyncpg.InterfaceError, BindingError) as error:
            if not isinstance(error, BindingError) and self._used.is_lost(database, error):
                await self._used.lost(database, error)
                return False
            self._used.forget_statements(database, state.template.key)
            if isinstance(error, asyncpg.LockNotAvailableError) and state.confirmed is not None:
                state.recheck_at = max(state.recheck_at, time.monotonic() + 1.0)
                return False  # somebody alters the table; what is known of it stays
            self._failed(state, words_of(error))
        except Exception:  # one template must not take the others with it
            log.exception(
                "learning about %s failed; its queries are left alone", state.table or state.template.relation
            )
            state.leave_alone("the learner failed; see its log", state.table, time.monotonic())
        return True

    async def _measuring_session(self, database: str) -> Session:
        """Return a session for exact searches: on the replica, where there is one that can be reached."""
        if self._replica is not None:
            self._used = self._replica
            try:
                return await self._replica.session(database)
            except UnavailableError:
                self._used = self._upstream
        return await self._upstream.session(database)

    def _failed(self, state: TemplateState, words: str) -> None:
        state.failures += 1
        state.recheck_at = max(state.recheck_at, time.monotonic() + 1.0)
        self._metrics.label_errors.labels(table=state.table).inc()
        if state.failures >= _GIVE_UP_AFTER:
            log.warning("%s cannot be measured (%s); asking the server again", state.table, words)
            state.failures = 0
            state.leave_alone(f"it cannot be measured: {words}", state.table, time.monotonic())

    def _wants_look(self, state: TemplateState, now: float) -> bool:
        return state.confirmed is not None and state.seen > state.pulsed and now - state.pulsed >= _LOOK_EVERY

    async def _look(self, state: TemplateState) -> None:
        """Ask the catalogs whether the table or its indexes have changed."""
        assert state.confirmed is not None
        state.pulsed = time.monotonic()
        session = await self._upstream.session(state.template.database)
        started = time.perf_counter()
        world = await look(session, state.confirmed.relation)
        self._spent(time.perf_counter() - started)
        before = state.watch.world
        change = state.watch.looked(world, time.time())
        if state.watch.world is not before:
            self.news.notes[f"world:{state.template.key}"] = msgspec.msgpack.encode(world)
        if change is not None:
            state.recheck_at = 0.0  # the arms, the statistics and the sketch are asked for anew
            state.sketched_rows = None
            await self._changed(state, change)

    async def _rate(self, now: float) -> bool:
        """Deal with the rating that has waited longest; False: it has to wait for its query."""
        rating, until = self._rated.popleft()
        for state in self._registry:
            if state.tracker is None or state.confirmed is None:
                continue
            trajectory = state.tracker.find(rating.query_id)
            if trajectory is not None:
                work = functools.partial(self._count, trajectory=trajectory, rating=rating)
                return await self._guarded(state, work)
        if now < until:
            self._rated.append((rating, until))
            return False
        self._metrics.rated.labels(table="", outcome="unknown").inc()
        return True

    async def _count(self, state: TemplateState, trajectory: Trajectory, rating: Rated) -> None:
        assert state.confirmed is not None
        session = await self._upstream.session(state.template.database)
        started = time.perf_counter()
        try:
            feedback = await judge_rating(session, state.template, state.confirmed, trajectory, rating)
        except (asyncpg.PostgresError, BindingError) as error:
            log.warning("a rating of %s cannot be used: %s", state.table, words_of(error))
            self._metrics.rated.labels(table=state.table, outcome="failed").inc()
            return
        finally:
            self._spent(time.perf_counter() - started)
        before = self.ratings[state.table]
        ratings = self.ratings.rated(state.table, feedback)
        verdict = self.verdicts.judge(trajectory, feedback=feedback)
        log.debug("%s: rated %s, verdict %s", state.table, feedback, verdict)
        self._metrics.rated.labels(table=state.table, outcome="missed" if feedback.missed else "good").inc()
        name, note = self.ratings.note(state.table)
        self.news.notes[name] = note
        if ratings.strictness != before.strictness:
            for other in self._registry:
                other.unpublished += other.table == state.table

    def target(self, table: str) -> float:
        """Return the recall to aim at for a table: as configured, or more where users reported misses."""
        return self.ratings[table].target(self.config.table(table).target_recall)

    async def _changed(self, state: TemplateState, change: Change) -> None:
        """Forget what no longer holds, hold a safe arm, and grant the credit for measuring anew."""
        assert state.confirmed is not None
        now = time.monotonic()
        table = self.config.table(state.table)
        by_recall = change.kind in (Kind.MIX, Kind.RECALL)
        arm = safe_arm(
            state.confirmed.arms,
            tuple(state.labels),
            target=table.target_recall,
            max_exact_ms=Options().max_exact_ms,
            filtered=bool(state.confirmed.facts.filter_slots),
            strongest=by_recall and state.watch.holding is not None,
        )
        name = state.confirmed.arms[arm].name
        log.warning(
            "%s: %s; %s serves until it is measured anew: %s",
            state.table,
            change.words,
            name,
            state.template.sql,
        )
        served = state.policy is not None and state.policy.trust is not Trust.OBSERVE
        kept = state.begin_anew(change.since if by_recall else None)
        self.news.labels = [x for x in self.news.labels if x.template != state.template.key] + kept
        await self._store.forget_labels(state.template.key)
        self.news.void[state.template.key] = change.since if by_recall else time.time()
        if served:  # a template that runs as it came goes on as it came
            state.watch.hold(Holding(name, change.words, now))
        self._metrics.drifts.labels(table=state.table, kind=change.kind.value).inc()
        state.watch.events.append((time.time(), change.kind.value, change.words))
        if now - self._granted >= _GRANT_EVERY:
            self._granted = now
            self._bucket.grant(self.config.learner.starting_credit / 2, now)

    @property
    def spending(self) -> dict[str, float]:
        """What measuring may take: budget (a share), credit (seconds), rest between measurements (pace)."""
        credit = self._bucket.credit(time.monotonic())
        return {"budget": self.config.learner.budget, "credit_seconds": credit, "pace": self._pace.pace}

    def derived(self, state: TemplateState) -> None:
        """A policy was derived: note where it rests on new measurements again."""
        holding = state.watch.holding
        if holding is None or state.policy is None or state.policy.reason.startswith(holding.words):
            return
        state.watch.recovered()
        state.watch.urgent = True
        seconds = time.monotonic() - holding.began
        self._metrics.recovery.labels(table=state.table).set(seconds)
        log.info("%s: measured anew %.1f s after %s", state.table, seconds, holding.words)

    async def _confirm(self, state: TemplateState) -> None:
        assert state.sample is not None
        if state.confirmed is not None and state.recheck_at:
            await self._look(state)
        session = await self._upstream.session(state.template.database)
        started = time.perf_counter()
        answer = await confirm(
            session,
            state.template,
            state.sample,
            max_k=state.max_k,
            min_k=state.min_k,
            witnesses=state.witnesses(),
        )
        self._spent(time.perf_counter() - started)
        now = time.monotonic()
        if state.phase is Phase.OFF:  # while the server was asked
            return
        if isinstance(answer, Confirmed) and not self.config.table(answer.facts.table).learning:
            await self.switch_off(state, answer.facts.table)
        elif isinstance(answer, Confirmed):
            if state.phase is not Phase.CONFIRMED:
                log.info("learning about %s: %s", answer.facts.table, state.template.sql)
                self.news.templates[state.template.key] = StoredTemplate(
                    state.template, table=answer.facts.table
                )
            known = state.confirmed.facts if state.confirmed is not None else None
            state.confirm(answer.with_sketch(known.sketch if known is not None else None), now)
            self.news.notes[f"view:{state.template.key}"] = msgspec.msgpack.encode(table_view(state))
            backlog = tuple(state.backlog)
            state.backlog.clear()
            for trajectory in backlog:
                state.record(trajectory, self.config.table(answer.facts.table).trajectory_window, now)
        else:
            if state.policy is None or state.policy.reason != answer.reason:
                log.warning("queries are left alone because %s: %s", answer.reason, state.template.sql)
            state.leave_alone(answer.reason, answer.table, now)

    def _wants_sketch(self, state: TemplateState) -> bool:
        if state.confirmed is None or len(state.labels) < _SKETCH_AFTER:
            return False
        if self.config.learning.anonymize or not self.config.learning.sketch_rows:
            return False
        if state.confirmed.facts.filter_slots or state.template.operator not in density.OPERATORS:
            return False
        rows, then = state.confirmed.facts.rows, state.sketched_rows
        return then is None or abs(rows - then) > 0.2 * then

    async def _sketch(self, state: TemplateState) -> None:
        assert state.confirmed is not None
        confirmed = state.confirmed
        state.sketched_rows = confirmed.facts.rows  # whatever comes of it, once is enough
        session = await self._measuring_session(state.template.database)
        started = time.perf_counter()
        async with snapshot(session, ()):
            vectors = await sketch(
                session,
                confirmed.relation,
                state.template.column,
                confirmed.facts.rows,
                self.config.learning.sketch_rows,
            )
        self._spent(time.perf_counter() - started)
        if vectors is None:
            return
        euclidean = density.is_euclidean(state.template.operator)
        data = await asyncio.to_thread(density.prepare, vectors, euclidean=euclidean)
        if state.confirmed is confirmed:
            state.confirmed = confirmed.with_sketch(data)
            state.unpublished += 1  # what is known may lead to another policy now

    def _suspect(self) -> TemplateState | None:
        """Return a template whose queries seem to have become others, and that has some to audit."""
        return next((s for s in self._registry if s.watch.audits_due and s.tracker and s.confirmed), None)

    def _on_trial(self) -> TemplateState | None:
        """Return a template whose new policy is on trial and wants audits, and that has queries to audit."""
        trials = self.canaries.trials.items()
        wanting = (self._registry.get(key) for key, trial in trials if trial.wants_audits)
        return next((state for state in wanting if state and state.tracker and state.confirmed), None)

    async def _audit_trial(self, state: TemplateState) -> None:
        """Measure what the two policies of a trial give one of the latest queries."""
        key = state.template.key
        trial, trajectory = self.canaries.get(key), self._chooser.latest(state)
        if trial is None or trajectory is None or trajectory.vector is None:
            return
        if self._rivals is None or self._rivals[0] is not trial:
            both = [Snapshot(0, 0.0, {key: each}) for each in (trial.old, trial.new)]
            self._rivals = trial, [await asyncio.to_thread(SearchOptimizer, each) for each in both]
        vector = np.frombuffer(trajectory.vector, dtype="<f4")
        values = filter_values(trajectory, trial.new.filter_slots, trial.new.value_types)
        chosen = [
            optimizer.optimize(key, vector, trajectory.k + trajectory.offset, values)
            for optimizer in self._rivals[1]
        ]
        names = [choice.arm.name if choice is not None else AS_IS.name for choice in chosen]
        plan = LabelPlan(warm=False, leave_out=lambda arm, exact_ms: arm.name not in names)
        measured = await self._labeller.measure(state, trajectory, plan, uniform=True)
        if measured is None:
            return
        results = [measured.label.results.get(name) for name in names]
        if results[0] is not None and results[1] is not None:
            trial.compared(results[0].recall, results[1].recall)

    async def _audit_quickly(self, state: TemplateState) -> None:
        """Audit one of the latest queries without measuring other arms: it is to be known soon."""
        trajectory = self._chooser.latest(state)
        if trajectory is None:
            state.watch.audits_due = 0
            return
        assert state.confirmed is not None
        measured = await self._labeller.measure(state, trajectory, _ONLY_WHAT_WAS_SERVED, uniform=True)
        if measured is None:
            return
        self.audit.record(state.table, measured.label)
        await self._audited(state, measured.label, trajectory)

    async def _audited(self, state: TemplateState, label: Label, trajectory: Trajectory) -> None:
        due = state.watch.audits_due
        change = state.watch.audited(label, trajectory, state.policy, self.target(state.table))
        if state.watch.audits_due > due:
            state.suspicious = True  # they have left it open: more of them, which want credit too
        if change is not None:
            await self._changed(state, change)

    async def _label(self, chosen: Chosen) -> None:
        """Measure a query; where exact searches are dear, several of its template together."""
        state = chosen.state
        confirmed = state.confirmed
        labels = await self._labeller.label(chosen)
        for each, measured in labels:
            if state.confirmed is not confirmed:  # the world has changed meanwhile
                return
            await self._keep(each, measured)
        if labels:
            key = state.template.key + ("" if len(labels) == 1 else " together")
            took = labels[0][1].exact_ms if len(labels) == 1 else 1e3 * labels[0][1].seconds
            self._pace.observe(key, took, await self._active_sessions(state))

    async def _keep(self, chosen: Chosen, measured: Measured) -> None:
        """Take note of a label."""
        state = chosen.state
        state.add_label(measured.label, chosen.trajectory)
        state.label_seconds += 0.1 * (measured.seconds - state.label_seconds)
        self.audit.record(state.table, measured.label)
        self._judge(state, chosen.trajectory, measured.label)
        self._metrics.labels.labels(table=state.table).inc()
        self.news.labels.append(measured.label)
        self.news.trajectories.append(chosen.trajectory)
        if chosen.uniform:
            await self._audited(state, measured.label, chosen.trajectory)

    def _judge(self, state: TemplateState, trajectory: Trajectory, label: Label) -> None:
        """Count the verdict on a measured query, and what it recommends."""
        expectation = Expectation(target_recall=self.target(state.table))
        verdict = self.verdicts.judge(trajectory, label, expectation)
        word = "success" if verdict.success else "failure"
        self._metrics.verdicts.labels(table=state.table, verdict=word).inc()
        for recommendation in verdict.recommendations:
            name = recommendation.name.lower()
            self._metrics.recommendations.labels(table=state.table, recommendation=name).inc()

    async def _active_sessions(self, state: TemplateState) -> int:
        """Count the sessions at work on the server, every few seconds."""
        counted_at, count = self._sessions
        if time.monotonic() - counted_at > _SESSIONS_EVERY:
            session = await self._upstream.session(state.template.database)
            count = await session.active_sessions()
            self._sessions = (time.monotonic(), count)
        return count

    def _spent(self, seconds: float) -> None:
        self._bucket.spend(seconds, time.monotonic())
        self._metrics.probe_seconds.inc(seconds)
