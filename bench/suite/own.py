"""``ruvector-proxy bench``: the contest on a user's own table, without writing to the user's database.

What is asked is ``SELECT column <operator> $1 ... ORDER BY column <operator> $1 LIMIT k``, with ``WHERE
filter = $2`` where a filter column is named.  The operator is that of the column's vector index.  Exact
answers come from the server itself, with index scans off, once for each query: the k-th distance.  A returned
row is right if its distance, which the server computed as well, is not larger.

Rules
-----
- Every connection, the proxy's learner included, has ``default_transaction_read_only`` on: whatever it might
  try to write, the server would refuse.
- Queries are the user's own where there is a file of them; else vectors of the table's own rows, moved in a
  random direction to a cosine of `MOVED`, for a row that finds itself is too easy.  Real queries are better.
- Filter values are drawn from the rows, so that frequent ones come often.
- The proxy's state is in a temporary directory and goes with it.
"""

from __future__ import annotations

import asyncio
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit, urlunsplit

import asyncpg
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from bench.dataset import Dataset, Vectors
from bench.demo.proxy import Upstream
from bench.demo.workload import text_vector
from bench.replay.record import moved
from bench.suite import contest, loaders, report, systems
from bench.suite.contest import Contest, Split
from bench.suite.queries import TOLERANCE, Client, Question
from bench.suite.records import Report, Result
from bench.suite.stage import FULL, Scale, Stage, processors
from bench.suite.systems import EXACT, FILTERED, PLAIN, Way

MOVED = 0.95
READ_ONLY = {"default_transaction_read_only": "on"}
_OPERATORS = {"cosine": "<=>", "l2": "<->", "ip": "<#>", "l1": "<+>"}
_SAMPLE = 4_000
_SHORTEST = 60.0
_TYPES = ("vector", "halfvec")

_DESCRIBE = """
SELECT a.atttypid::regtype::text AS type, t.typname AS name, n.nspname AS namespace, a.atttypmod AS
dimensions, greatest(c.reltuples, 0)::bigint AS rows, (SELECT array_agg(o.opcname) FROM pg_index i JOIN
pg_opclass o ON o.oid = i.indclass[0] WHERE i.indrelid = c.oid AND i.indisvalid AND i.indkey[0] = a.attnum) AS
classes FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_type t ON t.oid = a.atttypid JOIN
pg_namespace n ON n.oid = t.typnamespace WHERE c.oid = to_regclass($1) AND a.attname = $2 AND NOT
a.attisdropped
"""


class OwnError(ValueError):
    """The table cannot be measured; the message says why and what to do."""


@dataclass(frozen=True)
class Wish:
    """What the user wants measured."""

    dsn: str
    table: str
    column: str
    filter: str | None = None
    queries: Path | None = None
    k: int = 10
    target: float = 0.98
    seconds: float = 300.0
    output: Path = Path("bench-results")


@dataclass(frozen=True)
class Subject:
    """What the server says about the table; `sql` is the statement that is measured."""

    wish: Wish
    type: str
    name: str
    namespace: str
    rows: int
    operator: str

    @property
    def sql(self) -> str:
        """The statement; $1 is the vector, $2 the filter value."""
        expression = f"{quoted(self.wish.column)} {self.operator} $1"
        where = f" WHERE {quoted(self.wish.filter)} = $2" if self.wish.filter else ""
        return (
            f"SELECT {expression} AS distance FROM {self.wish.table}{where} "
            f"ORDER BY {expression} LIMIT {self.wish.k}"
        )


@dataclass(frozen=True, eq=False)
class OwnQuestion(Question):
    """A query with its exact answer: the k-th distance, and how many rows there are."""

    value: object = None
    limit: float = np.inf
    exists: int = 0


class OwnClient(Client):
    """Asks about the user's table; an answer says of each row whether it is right, 1 or 0.  See `of`."""

    subject: Subject

    @classmethod
    def of(cls, subject: Subject) -> type[OwnClient]:
        """Return the class of clients for a subject."""
        return type("OwnClient", (cls,), {"subject": subject})

    @classmethod
    async def _set_up(cls, connection: asyncpg.Connection[Any], settings: Mapping[str, str]) -> None:
        await prepare(connection, cls.subject, settings)

    async def ask(self, query: Question) -> list[int]:
        """Run the query; return for each row whether it belongs to the exact answer."""
        assert isinstance(query, OwnQuestion)
        distances = await self.distances(query)
        return [int(distance <= query.limit) for distance in distances]

    async def distances(self, query: OwnQuestion) -> list[float]:
        """Run the query; return the distances of the rows."""
        if self._statement is None:
            self._statement = await self._connection.prepare(self.subject.sql)
        filtered = () if self.subject.wish.filter is None else (query.value,)
        return [row[0] for row in await self._statement.fetch(query.vector, *filtered)]

    _statement: Any = None


class OwnJudge:
    """Exact answers as they are in the questions."""

    def limits(self, queries: Sequence[Question]) -> NDArray[np.float64]:
        """Return the distance of the last row of each exact answer."""
        return np.array([query.limit for query in queries if isinstance(query, OwnQuestion)])

    def found(self, query: Question) -> int:
        """Return how many rows the query should return."""
        assert isinstance(query, OwnQuestion)
        return query.exists

    def recall(self, query: Question, ids: list[int], limit: float) -> float:
        """Return the share of the exact answer that was returned; `ids` as an `OwnClient` gives them."""
        return min(sum(ids), self.found(query)) / self.found(query) if self.found(query) else 1.0


def quoted(name: str | None) -> str:
    """Return an identifier in quotation marks."""
    return '"' + (name or "").replace('"', '""') + '"'


async def prepare(connection: asyncpg.Connection[Any], subject: Subject, settings: Mapping[str, str]) -> None:
    """Make a connection read-only, teach it the column's type, and put settings in force."""
    for name, value in {**READ_ONLY, **settings}.items():
        await connection.execute(f"SET {name} = {value}")
    await connection.set_type_codec(
        subject.name, schema=subject.namespace, encoder=text_vector, decoder=_vector, format="text"
    )


def _vector(text: str) -> NDArray[np.float32]:
    return np.array(text.strip("[]").split(","), dtype=np.float32)


def upstream_of(dsn: str) -> Upstream:
    """Return how to reach the server of a connection URI.

    Raises
    ------
    OwnError
        It is no URI with user and database.
    """
    parts = urlsplit(dsn)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    host = options.get("host") or parts.hostname
    database = parts.path.lstrip("/")
    user = options.get("user") or parts.username
    if parts.scheme not in ("postgresql", "postgres") or not host or not database or not user:
        raise OwnError(
            "--dsn has to be a URI with user and database: postgresql://user:password@host:5432/database"
        )
    port = int(options.get("port") or parts.port or 5432)
    read_only = urlunsplit(parts._replace(query=urlencode({**options, **READ_ONLY})))
    return Upstream(
        unquote(host),
        port,
        read_only,
        unquote(user),
        unquote(database),
        unquote(parts.password) if parts.password else None,
        options.get("sslmode"),
    )


async def describe(wish: Wish, upstream: Upstream) -> tuple[Subject, dict[str, str]]:
    """Ask the server about the table; return that and its versions.

    Raises
    ------
    OwnError
        There is no such table or column, or no index that could be tuned.
    """
    connection = await asyncpg.connect(**upstream.address)
    try:
        await connection.execute("SET default_transaction_read_only = on")
        found = await connection.fetchrow(_DESCRIBE, wish.table, wish.column)
        if found is None:
            raise OwnError(f"there is no column {wish.column!r} in a table {wish.table!r}")
        if found["name"] not in _TYPES:
            raise OwnError(f"column {wish.column!r} is of type {found['type']}, not of {' or '.join(_TYPES)}")
        operators = [
            operator
            for name in found["classes"] or []
            for part, operator in _OPERATORS.items()
            if f"_{part}_" in name
        ]
        if not operators:
            raise OwnError(f"column {wish.column!r} has no HNSW or IVFFlat index: there is nothing to tune")
        versions = {
            "PostgreSQL": str(await connection.fetchval("SELECT current_setting('server_version')")),
            "pgvector": str(
                await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
            ),
        }
        subject = Subject(wish, found["type"], found["name"], found["namespace"], found["rows"], operators[0])
        return subject, versions
    finally:
        await connection.close()


async def questions(subject: Subject, upstream: Upstream, say: Console) -> tuple[Vectors, list[object]]:
    """Return query vectors, and filter values by how often rows have them."""
    wish = subject.wish
    connection = await asyncpg.connect(**upstream.address)
    try:
        await prepare(connection, subject, {})
        share = 100.0 * min(1.0, 2.0 * _SAMPLE / max(1, subject.rows))
        columns = ", ".join(quoted(name) for name in (wish.column, wish.filter) if name)
        rows = await connection.fetch(
            f"SELECT {columns} FROM {wish.table} TABLESAMPLE BERNOULLI ({share}) "
            f"WHERE {quoted(wish.column)} IS NOT NULL LIMIT {_SAMPLE}"
        )
    finally:
        await connection.close()
    values = [row[1] for row in rows if row[1] is not None] if wish.filter else [None]
    if not rows or not values:
        raise OwnError(f"table {wish.table!r} has no rows that could be asked for")
    if wish.queries is not None:
        return loaders.dataset_queries(wish.queries), values
    say.print(
        f"No --queries: vectors of the table's own rows are asked for, moved to cosine {MOVED}. "
        "Queries of your own "
        "application say more.",
        highlight=False,
    )
    own = np.stack([row[0] for row in rows])
    norms = np.linalg.norm(own, axis=1, keepdims=True)
    usable = norms[:, 0] > 0
    own, norms = own[usable], norms[usable]
    vectors: Vectors = (moved(own, MOVED, np.random.default_rng(0)) * norms).astype(np.float32)
    return vectors, values


def split(subject: Subject, vectors: Vectors, values: Sequence[object], scale: Scale) -> Split:
    """Return disjoint learning, tuning and test queries, a fifth of all for each of the last two."""
    rng = np.random.default_rng(1)
    vectors = vectors[rng.permutation(len(vectors))]
    if len(vectors) < 100:
        raise OwnError(f"{len(vectors)} queries are too few; 100 are needed, 1,000 are better")
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    tuning, test = (min(len(vectors) // 5, scale.queries(count)) for count in (150, 600))

    def make(vector: NDArray[np.float32]) -> OwnQuestion:
        value = values[int(rng.integers(len(values)))]
        question = OwnQuestion(
            "", vector, None if subject.wish.filter is None else numbers[value], k=subject.wish.k
        )
        object.__setattr__(question, "value", value)
        return question

    held_out = [make(vector) for vector in vectors[: tuning + test]]
    rest = vectors[tuning + test :]

    def live() -> Iterator[Question]:
        while True:
            yield make(rest[rng.integers(len(rest))])

    return Split(live(), held_out[:tuning], held_out[tuning:])


async def answer(subject: Subject, upstream: Upstream, asked: Sequence[Question], seconds: float) -> int:
    """Put the exact answers into questions, as many as time allows; return how many."""
    settings = {"enable_indexscan": "off", "plan_cache_mode": "force_custom_plan"}
    deadline = time.monotonic() + seconds
    async with await OwnClient.of(subject).connect(upstream.address, settings) as client:
        for number, question in enumerate(asked):
            if time.monotonic() > deadline:
                return number
            assert isinstance(question, OwnQuestion)
            distances = await client.distances(question)
            tolerance = TOLERANCE * max(1.0, abs(distances[-1])) if distances else 0.0
            object.__setattr__(question, "limit", distances[-1] + tolerance if distances else np.inf)
            object.__setattr__(question, "exists", len(distances))
    return len(asked)


def ways(subject: Subject) -> dict[str, Way]:
    """Return the static settings that are compared; with probes where the index is IVFFlat."""
    base = FILTERED if subject.wish.filter else PLAIN
    probes = {f"probes={n}": Way("static", {"ivfflat.probes": str(n)}) for n in (3, 10, 30, 100)}
    return {
        **base,
        **({} if EXACT in base else {EXACT: Way("static", {"enable_indexscan": "off"})}),
        **probes,
    }


async def run(wish: Wish, console: Console) -> Report:
    """Measure; return the record."""
    upstream = upstream_of(wish.dsn)
    subject, versions = await describe(wish, upstream)
    console.print(f"Measured is: {subject.sql}", highlight=False, markup=False)
    vectors, values = await questions(subject, upstream, console)
    scale = replace(FULL, hurry=300.0 / max(wish.seconds, _SHORTEST) if wish.seconds else 1.0)
    found = split(subject, vectors, values, scale)
    known = []
    for part, share in ((found.tuning, 0.05), (found.test, 0.15)):
        count = await answer(subject, upstream, part, share * wish.seconds)
        if count < 30:
            raise OwnError(
                f"exact answers take too long: {count} in {share * wish.seconds:.0f} s; give more --seconds"
            )
        known.append(part[:count])
    found = Split(found.live, *known)
    data = Dataset(np.empty((0, vectors.shape[1]), np.float32), np.empty(0, np.int16), {}, "own")
    compared = ways(subject)
    with tempfile.TemporaryDirectory(prefix="ruvector-bench-") as home:
        stage = Stage(upstream, data, Path(home), scale, console, client=OwnClient.of(subject))
        wanted = Contest(
            "own",
            f"{wish.table}.{wish.column}",
            subject.sql,
            {},
            found,
            compared,
            targets={wish.target: None},
            group=("value", lambda query: str(query.category)) if wish.filter else None,
            control=systems.ef(100) if wish.filter else systems.ef(80),
            learning=110.0,
            credit=80.0,
            tuning=25.0,
            measuring=90.0,
        )
        result = contest.judge(await contest.run(stage, wanted, judge=OwnJudge()))
    result.facts["tables"] = f"{wish.table}: about {subject.rows:,} rows, {vectors.shape[1]} dimensions"
    return _report(result, versions)


def _report(result: Result, versions: Mapping[str, str]) -> Report:
    environment = {
        "date": time.strftime("%Y-%m-%d"),
        **versions,
        "Python": platform.python_version(),
        "processors of this machine": str(processors()),
    }
    return Report(environment, [result])


def main(wish: Wish) -> int:
    """Run the command; return the exit code: 0 done, 1 not, 130 interrupted."""
    from bench.suite.main import write

    console = Console(soft_wrap=True)
    started = time.monotonic()
    try:
        found = asyncio.run(run(wish, console))
    except KeyboardInterrupt:
        console.print("Stopped; nothing is left running.")
        return 130
    except (OwnError, loaders.LoaderError) as error:
        console.print(f"ruvector-proxy: {error}", highlight=False, markup=False)
        return 1
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, RuntimeError) as error:
        console.print(f"ruvector-proxy: {type(error).__name__}: {error}", highlight=False, markup=False)
        return 1
    found.seconds = time.monotonic() - started
    write(found, wish.output)
    for result in found.results:
        console.print(report.lines_table(result))
        report.tell(result, console)
    console.print(f"Figures and picture: {wish.output}", highlight=False)
    return 0
