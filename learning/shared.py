"""The store that several replicas share, in PostgreSQL: one connection, short transactions.

Rules
-----
- Who leads is a *lease*: a row with holder, term and expiry, by the store's own clock.  Not a session-level
  advisory lock, which a transaction-mode pooler breaks, which a half-open connection holds for hours, and
  which does not survive a failover; a lease ends by itself.  Its term is a fencing token: every write of
  the leader checks in the same transaction that the term is still its own.
- No state of a session is relied upon and every statement runs inside a transaction, so that poolers in
  transaction mode work.  LISTEN is only for speed: where it cannot work the pulse every second finds a new
  policy as well.  A pooler shows itself by another process id than the connection was opened with.
- Whatever goes wrong ends the connection and raises `UnavailableError`; nothing waits inside.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import msgspec

from learning.exchange import label_id
from learning.pieces import Manifest, Pieces
from learning.records import Label, Snapshot, Template
from learning.shared_schema import SchemaError, check, ddl, instructions
from learning.sqlite_file import Kept, StoredTemplate, decode
from learning.store import LABELS
from learning.upstream import UnavailableError

log = logging.getLogger(__name__)

APPLICATION_NAME = "ruvector-proxy store"
_TROUBLE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_pack = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class Pulse:
    """The state of the group: who leads, how many seconds still (below 0: nobody does), what is published.

    `holder` is None where nobody has ever led, and where the last leader gave up for want of the upstream.
    """

    holder: uuid.UUID | None
    term: int
    left: float
    sample: float
    head: tuple[int, int]  # term and version of the published policy; (0, 0): none


@dataclass(slots=True)
class Additions:
    """What the leader adds in one transaction."""

    templates: Sequence[StoredTemplate] = ()
    labels: Sequence[Label] = ()
    notes: Mapping[str, bytes] = field(default_factory=dict)
    void: Mapping[str, float] = field(default_factory=dict)  # template -> labels before do not count
    forgotten: Sequence[str] = ()  # templates

    def __bool__(self) -> bool:
        return bool(self.templates or self.labels or self.notes or self.void or self.forgotten)


class FencedError(Exception):
    """Somebody else leads by now."""


class SharedStore:
    """The shared store of one group of replicas.

    Parameters
    ----------
    dsn
        Connection URI.
    schema, group
        As configured (store.db_schema, store.group).

    Attributes
    ----------
    wake
        Called when another replica has done something worth looking at.
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "ruvector_proxy",
        group: str = "default",
        connect_timeout: float = 10.0,
    ) -> None:
        self._dsn, self._schema, self._group = dsn, schema, group
        self._timeout = connect_timeout
        self.wake: Callable[[], None] = lambda: None
        self._connection: Any = None
        self._pooled: bool | None = None
        name = hashlib.blake2b(f"{schema}\0{group}".encode(), digest_size=8).hexdigest()
        self.channel = f"ruvector_{name}"
        self.holder = uuid.uuid4()
        self.salt = b""

    async def connect(self) -> None:
        """Open the connection where it is not open, and create the schema where it is missing.

        Raises
        ------
        UnavailableError
            The database cannot be reached.
        SchemaError
            The schema is missing and cannot be created, or is too new.
        """
        if self._connection is not None and not self._connection.is_closed():
            return
        try:
            self._connection = await asyncpg.connect(
                self._dsn,
                timeout=self._timeout,
                statement_cache_size=0,
                server_settings={"application_name": APPLICATION_NAME},
            )
            await self._prepare()
        except SchemaError:
            self.drop()
            raise
        except (*_TROUBLE, ValueError) as error:
            self.drop()
            raise UnavailableError(str(error) or type(error).__name__) from error
        except BaseException:  # cancelled, half prepared
            self.drop()
            raise

    def drop(self) -> None:
        """Give the connection up; the next `connect` opens another."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    async def _prepare(self) -> None:
        connection, s = self._connection, self._schema
        async with connection.transaction():
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            found = await connection.fetchval("SELECT to_regclass($1)::text", f"{s}.mail")
        if found is None:
            await self._create()
        async with connection.transaction():
            row = await connection.fetchrow(f"SELECT number, readable_by FROM {s}.settings")
        check(row["number"], row["readable_by"], s)
        async with connection.transaction():
            salt = await connection.fetchval(
                f"SELECT salt FROM {s}.groups WHERE name = $1",
                self._group,
            )
            if salt is None:
                salt = await connection.fetchval(
                    f"INSERT INTO {s}.groups (name, salt) VALUES ($1, $2) "
                    "ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING salt",
                    self._group,
                    secrets.token_bytes(32),
                )
        self.salt = bytes(salt)
        await self._listen(pooled=pid != connection.get_server_pid())

    async def _create(self) -> None:
        connection = self._connection
        try:
            async with connection.transaction():
                # Held until the end of the transaction, so poolers do no harm: replicas that start together.
                await connection.execute("SELECT pg_advisory_xact_lock(7081452106)")
                await connection.execute(ddl(self._schema))
        except (asyncpg.InsufficientPrivilegeError, asyncpg.ReadOnlySQLTransactionError) as error:
            async with connection.transaction():
                role = await connection.fetchval("SELECT current_user")
            raise SchemaError(instructions(self._schema, role, str(error))) from error
        log.info("the shared store was created in schema %s", self._schema)

    async def _listen(self, *, pooled: bool) -> None:
        if pooled != self._pooled and pooled:
            log.warning(
                "store.dsn leads through a connection pooler, where LISTEN may not work: new policies are "
                "looked for every second instead. Nothing else is lost"
            )
        self._pooled = pooled
        if not pooled:
            await self._connection.add_listener(self.channel, lambda *_: self.wake())

    async def close(self) -> None:
        """Close the connection."""
        self.drop()

    def _guarded(self, **options: Any) -> _Guarded:
        if self._connection is None or self._connection.is_closed():
            raise UnavailableError("not connected")
        return _Guarded(self, options)

    # --- the lease ---

    async def pulse(self, term: int | None, ttl: float, sample: float = 1.0) -> Pulse:
        """Say what the state of the group is; the leader's lease is renewed for `ttl` seconds first."""
        async with self._guarded() as connection:
            if term is not None:
                await connection.execute(
                    f"UPDATE {self._schema}.groups SET expires = now() + make_interval(secs => $4), "
                    "sample = $5 WHERE name = $1 AND holder = $2 AND term = $3",
                    self._group,
                    self.holder,
                    term,
                    ttl,
                    sample,
                )
            row = await connection.fetchrow(
                "SELECT holder, term, sample, published_term, version, "
                "coalesce(extract(epoch FROM expires - now()), -1)::float8 AS left "
                f"FROM {self._schema}.groups WHERE name = $1",
                self._group,
            )
        if row is None:  # a failover has lost it
            self.drop()
            raise UnavailableError("the group is gone from the store; it is entered again")
        head = (row["published_term"], row["version"])
        return Pulse(row["holder"], row["term"], row["left"], row["sample"], head)

    async def acquire(self, ttl: float) -> int | None:
        """Become the leader if nobody is; return the term, or None."""
        async with self._guarded() as connection:
            term: int | None = await connection.fetchval(
                f"UPDATE {self._schema}.groups SET holder = $2, term = term + 1, "
                "expires = now() + make_interval(secs => $3) "
                "WHERE name = $1 AND (expires IS NULL OR expires < now()) RETURNING term",
                self._group,
                self.holder,
                ttl,
            )
        return term

    async def release(self, term: int, *, useless: bool = False) -> None:
        """Give the lease back, and tell the others; `useless`: for want of the upstream (`Pulse.holder`)."""
        heir = None if useless else self.holder
        async with self._guarded() as connection:
            await connection.execute(
                f"UPDATE {self._schema}.groups SET expires = NULL, holder = $2 "
                "WHERE name = $1 AND holder = $3 AND term = $4",
                self._group,
                heir,
                self.holder,
                term,
            )
            await self._notify(connection)

    async def _fence(self, connection: Any, term: int) -> None:
        found = await connection.fetchval(
            f"SELECT term FROM {self._schema}.groups "
            "WHERE name = $1 AND holder = $2 AND term = $3 FOR UPDATE",
            self._group,
            self.holder,
            term,
        )
        if found is None:
            raise FencedError

    async def _notify(self, connection: Any) -> None:
        await connection.execute("SELECT pg_notify($1, '')", self.channel)

    # --- policies ---

    async def publish(self, term: int, snapshot: Snapshot, pieces: Pieces) -> int:
        """Publish a snapshot; return the bytes that had to be written.

        Raises
        ------
        FencedError
            Somebody else leads; nothing was written.
        """
        s, group = self._schema, self._group
        body, manifest = pieces.cut(snapshot)
        needed = manifest.digests
        async with self._guarded() as connection:
            await self._fence(connection, term)
            rows = await connection.fetch(f"SELECT digest FROM {s}.pieces WHERE grp = $1", group)
            there = {bytes(row["digest"]) for row in rows}
            new = [(group, name, pieces.bodies[name]) for name in needed - there]
            await connection.executemany(
                f"INSERT INTO {s}.pieces (grp, digest, body) VALUES ($1, $2, $3)",
                new,
            )
            if stale := list(there - needed):
                await connection.execute(
                    f"DELETE FROM {s}.pieces WHERE grp = $1 AND digest = ANY ($2::bytea[])",
                    group,
                    stale,
                )
            await connection.execute(
                f"INSERT INTO {s}.manifests (grp, body) VALUES ($1, $2) "
                "ON CONFLICT (grp) DO UPDATE SET body = excluded.body",
                group,
                body,
            )
            await connection.execute(
                f"UPDATE {s}.groups SET version = $2, published_term = $3 WHERE name = $1",
                group,
                snapshot.version,
                term,
            )
            await self._notify(connection)
        return len(body) + sum(len(piece) for _, _, piece in new)

    async def fetch(self, pieces: Pieces) -> Snapshot | None:
        """Return the published snapshot, fetching only the pieces that are new; None: there is none.

        Raises
        ------
        NewerFormatError
            A newer version has published it in a way that this one would misunderstand.
        """
        s, group = self._schema, self._group
        async with self._guarded(isolation="repeatable_read", readonly=True) as connection:
            body = await connection.fetchval(f"SELECT body FROM {s}.manifests WHERE grp = $1", group)
            if body is None:
                return None
            manifest: Manifest = pieces.read(body)
            rows = await connection.fetch(
                f"SELECT digest, body FROM {s}.pieces WHERE grp = $1 AND digest = ANY ($2::bytea[])",
                group,
                list(pieces.missing(manifest)),
            )
        return pieces.assemble(manifest, {bytes(row["digest"]): bytes(row["body"]) for row in rows})

    # --- what was learned ---

    async def add(self, term: int | None, additions: Additions, mail: Sequence[bytes] = ()) -> None:
        """Write what was learned, each label once; without a term labels and mail only, from a follower."""
        s, group = self._schema, self._group
        async with self._guarded() as connection:
            if term is not None:
                await self._fence(connection, term)
            # First, because what else is added was learned later.
            for table, column in (("templates", "key"), ("labels", "template")):
                await connection.execute(
                    f"DELETE FROM {s}.{table} WHERE grp = $1 AND {column} = ANY ($2::text[])",
                    group,
                    list(additions.forgotten),
                )
            await connection.executemany(
                f"DELETE FROM {s}.notes WHERE grp = $1 AND right(name, length($2) + 1) = ':' || $2",
                [(group, template) for template in additions.forgotten],
            )
            await connection.executemany(
                f"INSERT INTO {s}.templates (grp, key, off, relation, body) VALUES ($1, $2, $3, $4, $5) "
                "ON CONFLICT (grp, key) DO UPDATE SET seen = now(), off = excluded.off, "
                "relation = excluded.relation, body = excluded.body",
                [(group, t.template.key, t.off, t.table, _pack(t.template)) for t in additions.templates],
            )
            await connection.executemany(
                f"INSERT INTO {s}.labels (grp, uid, template, at, body) VALUES ($1, $2, $3, $4, $5) "
                "ON CONFLICT DO NOTHING",
                [(group, label_id(x), x.template, x.timestamp, _pack(x)) for x in additions.labels],
            )
            await connection.executemany(
                f"INSERT INTO {s}.notes (grp, name, body) VALUES ($1, $2, $3) "
                "ON CONFLICT (grp, name) DO UPDATE SET body = excluded.body",
                [(group, name, body) for name, body in additions.notes.items() if body],
            )
            await connection.execute(
                f"DELETE FROM {s}.notes WHERE grp = $1 AND name = ANY ($2::text[])",
                group,
                [name for name, body in additions.notes.items() if not body],  # even a name is a trace
            )
            await connection.executemany(
                f"DELETE FROM {s}.labels WHERE grp = $1 AND template = $2 AND at < $3",
                [(group, template, since) for template, since in additions.void.items()],
            )
            await self._post(connection, mail)

    async def post(self, mail: Sequence[bytes]) -> None:
        """Leave messages for the leader."""
        async with self._guarded() as connection:
            await self._post(connection, mail)

    async def _post(self, connection: Any, mail: Sequence[bytes]) -> None:
        if mail:
            await connection.execute(
                f"INSERT INTO {self._schema}.mail (grp, body) SELECT $1, unnest($2::bytea[])",
                self._group,
                list(mail),
            )

    async def take_mail(self, term: int, limit: int) -> list[bytes]:
        """Return the oldest messages and remove them."""
        s = self._schema
        async with self._guarded() as connection:
            await self._fence(connection, term)
            rows = await connection.fetch(
                f"DELETE FROM {s}.mail WHERE id IN (SELECT id FROM {s}.mail WHERE grp = $1 "
                "ORDER BY id LIMIT $2) RETURNING id, body",
                self._group,
                limit,
            )
        return [bytes(row["body"]) for row in sorted(rows, key=lambda row: int(row["id"]))]

    async def cleared(self) -> dict[str, bytes]:
        """Return the notes of what was cleared, by name."""
        async with self._guarded() as connection:
            rows = await connection.fetch(
                f"SELECT name, body FROM {self._schema}.notes WHERE grp = $1 AND name LIKE 'cleared:%'",
                self._group,
            )
        return {row["name"]: bytes(row["body"]) for row in rows}

    async def load(self, pulse: Callable[[], Any] | None = None) -> Kept:
        """Return everything that the group has learned; `pulse` is awaited between two templates."""
        s, group = self._schema, self._group
        kept = Kept()
        async with self._guarded() as connection:
            rows = await connection.fetch(
                f"SELECT off, relation, body FROM {s}.templates WHERE grp = $1 ORDER BY seen",
                group,
            )
            for row in rows:
                for template in decode(row["body"], Template):
                    kept.templates.append(StoredTemplate(template, row["off"], row["relation"]))
            notes = await connection.fetch(f"SELECT name, body FROM {s}.notes WHERE grp = $1", group)
            kept.notes = {row["name"]: bytes(row["body"]) for row in notes}
        for stored in kept.templates:
            key = stored.template.key
            async with self._guarded() as connection:
                rows = await connection.fetch(
                    f"SELECT body FROM {s}.labels WHERE grp = $1 AND template = $2 "
                    "ORDER BY at DESC, uid LIMIT $3",
                    group,
                    key,
                    LABELS,
                )
            labels = [label for row in rows for label in decode(row["body"], Label)]
            if labels:
                kept.labels[key] = labels[::-1]
            if pulse is not None:
                await pulse()
        return kept

    async def retain(self, term: int, oldest: float, max_size: float) -> None:
        """Delete labels from before `oldest` (Unix time), beyond the number kept, and beyond `max_size`."""
        s, group = self._schema, self._group
        async with self._guarded() as connection:
            await self._fence(connection, term)
            await connection.execute(f"DELETE FROM {s}.labels WHERE grp = $1 AND at < $2", group, oldest)
            await connection.execute(
                f"DELETE FROM {s}.labels l USING (SELECT uid, row_number() OVER "
                "(PARTITION BY template ORDER BY at DESC, uid) AS place, sum(octet_length(body)) OVER "
                f"(ORDER BY at DESC, uid) AS size FROM {s}.labels WHERE grp = $1) AS o "
                "WHERE l.grp = $1 AND l.uid = o.uid AND (o.place > $2 OR o.size > $3)",
                group,
                LABELS,
                max_size,
            )
            await connection.execute(
                f"DELETE FROM {s}.mail WHERE grp = $1 AND sent < now() - interval '1 day'",
                group,
            )


class _Guarded:
    """A transaction; trouble with the store ends the connection and becomes `UnavailableError`."""

    def __init__(self, store: SharedStore, options: Mapping[str, Any]) -> None:
        self._store, self._options = store, options
        self._transaction: Any = None

    async def __aenter__(self) -> Any:
        connection = self._store._connection
        self._transaction = connection.transaction(**self._options)
        try:
            await self._transaction.start()
        except _TROUBLE as error:
            self._fail(error)
        except BaseException:
            # Cancelled, and the driver may take the transaction for open: the next one would be a savepoint
            # in it, and never be committed.
            self._store.drop()
            raise
        return connection

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                await self._transaction.commit()
                return
            if isinstance(error, FencedError):
                await self._transaction.rollback()
                return
        except _TROUBLE as trouble:
            self._fail(trouble)
        except BaseException:
            self._store.drop()
            raise
        if isinstance(error, _TROUBLE):
            self._fail(error)
        self._store.drop()  # cancelled, or a mistake of ours: the state of the connection is not known

    def _fail(self, error: BaseException) -> None:
        self._store.drop()
        raise UnavailableError(str(error) or type(error).__name__) from error
