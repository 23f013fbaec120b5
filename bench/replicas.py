"""Three replicas on one shared store: are they as good as one, and what happens if one dies?

Real proxies in front of the embedded server, which also holds the store (in a database of its own); clients
on all of them, each asking another third of the queries.

1. learn     until all serve a trusted policy; then one proxy alone learns from all queries, for comparison:
             both policies choose for the same unseen queries, interleaved on one connection
2. spread    each publication, until the workers of every replica serve it
3. kills     the leading learner gets SIGKILL at random moments
4. restarts  the server (and with it the store) is restarted under load
5. messages  followers without workers, more and more of them: what a round costs the store

Results are printed; docs/replicas.md holds those of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import resource
import signal
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import asyncpg
import msgspec
import numpy as np

from bench import dataset
from bench.dataset import Vectors
from bench.demo.proxy import Proxy, serve
from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from learning.optimizer import SearchOptimizer
from learning.outbox import Forwarded
from learning.pieces import Pieces
from learning.records import Snapshot, TemplatePolicy, Trust
from learning.shared import SharedStore
from learning.sqlite_file import read
from learning.upstream import UnavailableError

DATABASE, STORE = "demo", "learned"
ROWS, REPLICAS, K = 6000, 3, 10
QUERY = f"SELECT id FROM items ORDER BY embedding <=> $1 LIMIT {K}"
_HANG = 30.0  # seconds without an answer
_LEADS = re.compile(r"this replica leads \(term (\d+)\)")


def text(vector: Vectors) -> str:
    """Write a vector as pgvector does."""
    return "[" + ",".join(f"{x:.6g}" for x in vector.tolist()) + "]"


async def prepare(server: EmbeddedPostgres, data: dataset.Dataset) -> None:
    """Create both databases, fill the table and build its index."""
    admin = await asyncpg.connect(server.uri())
    for name in (DATABASE, STORE):
        await admin.execute(f"CREATE DATABASE {name}")
    await admin.close()
    connection = await asyncpg.connect(server.uri(DATABASE))
    await connection.execute(
        "CREATE EXTENSION vector; "
        f"CREATE TABLE items (id int PRIMARY KEY, embedding vector({data.dimensions}) NOT NULL)"
    )
    await connection.executemany(
        "INSERT INTO items VALUES ($1, $2::text::vector)", [(n, text(v)) for n, v in enumerate(data.base)]
    )
    await connection.execute(
        "CREATE INDEX ON items USING hnsw (embedding vector_cosine_ops) WITH (m = 8, ef_construction = 32)"
    )
    await connection.execute("ANALYZE items")
    await connection.close()


async def _prepared(connection: Any) -> Any:
    await connection.set_type_codec("vector", schema="public", encoder=str, decoder=str, format="text")
    return await connection.prepare(QUERY)


class Client:
    """Asks one query after the other, and counts what happens."""

    def __init__(self, address: dict[str, Any], queries: Sequence[str]) -> None:
        self.answered = 0
        self.errors: Counter[str] = Counter()
        self._address, self._queries = address, queries

    async def run(self) -> None:
        """Ask until cancelled; a lost connection is counted and made again."""
        while True:
            try:
                connection = await asyncpg.connect(**self._address, timeout=10)
            except (OSError, asyncpg.PostgresError, TimeoutError) as error:
                self._count("connecting", error)
                await asyncio.sleep(0.05)
                continue
            try:
                async with asyncio.timeout(_HANG):
                    statement = await _prepared(connection)
                while True:
                    rows = await statement.fetch(random.choice(self._queries), timeout=_HANG)
                    assert len(rows) == K
                    self.answered += 1
                    await asyncio.sleep(0.1)
            except Exception as error:  # of any kind: a client that ended would see no more of what is wrong
                self._count("asking", error)
            finally:
                connection.terminate()

    def _count(self, doing: str, error: BaseException) -> None:
        state = getattr(error, "sqlstate", None)
        if state is None:
            lost = isinstance(error, OSError | asyncpg.InterfaceError) and not isinstance(error, TimeoutError)
            state = "connection lost" if lost else f"{type(error).__name__} {error}"[:80]
        self.errors[f"{doing}: {state}"] += 1


class Asks(Protocol):
    """A client that asks until it is cancelled."""

    async def run(self) -> None:
        """Ask until cancelled."""


@contextlib.asynccontextmanager
async def asking(clients: Sequence[Asks]) -> AsyncIterator[None]:
    """Let clients ask meanwhile."""
    tasks = [asyncio.create_task(client.run()) for client in clients]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def trusted(snapshot: Snapshot | None) -> TemplatePolicy | None:
    """Return the policy that was learned, if there is one."""
    policies = snapshot.templates.values() if snapshot is not None else ()
    return next((policy for policy in policies if policy.trust is not Trust.OBSERVE), None)


async def published(shared: SharedStore) -> Snapshot | None:
    """Return what the store holds."""
    await shared.connect()
    return await shared.fetch(Pieces())


async def until_learned(proxies: Sequence[Proxy], labels: int, seconds: float = 240.0) -> None:
    """Return when so many queries were measured, and every proxy's newest policy is the same."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        figures = [await proxy.figures() for proxy in proxies]
        measured = sum(each.total("ruvector_labels_total") for each in figures)
        if measured >= labels:
            return
        await asyncio.sleep(0.5)
    raise TimeoutError(f"fewer than {labels} queries were measured in {seconds:g} s")


async def compare(
    server: EmbeddedPostgres, policies: dict[str, Snapshot], data: dataset.Dataset, unseen: Vectors
) -> None:
    """Run unseen queries under each policy in turn, and print recall and milliseconds."""
    base = data.base / np.linalg.norm(data.base, axis=1, keepdims=True)
    optimizers = {name: SearchOptimizer(snapshot) for name, snapshot in policies.items()}
    keys = {name: found.template for name, s in policies.items() if (found := trusted(s)) is not None}
    recall: dict[str, list[float]] = {name: [] for name in policies}
    ms: dict[str, list[float]] = {name: [] for name in policies}
    connection = await asyncpg.connect(server.uri(DATABASE))
    statement = await _prepared(connection)
    for vector in unseen:
        similarity = base @ (vector / np.linalg.norm(vector))
        edge = np.partition(similarity, -K)[-K] - 1e-6
        for name in random.sample(list(policies), len(policies)):
            choice = optimizers[name].optimize(keys[name], vector, K, ())
            assert choice is not None
            async with connection.transaction():
                for setting, value in choice.arm.settings:
                    await connection.execute("SELECT set_config($1, $2, true)", setting, value)
                await statement.fetch(text(vector))
                started = time.perf_counter()
                rows = await statement.fetch(text(vector))
                ms[name].append((time.perf_counter() - started) * 1e3)
            recall[name].append(float(np.mean([similarity[row["id"]] >= edge for row in rows])))
    await connection.close()
    print(f"\n{len(unseen)} unseen queries        recall@{K}   mean ms")
    for name in policies:
        print(f"  {name:<24}{statistics.fmean(recall[name]):>10.4f}{statistics.fmean(ms[name]):>10.3f}")


async def spread(proxies: Sequence[Proxy], shared: SharedStore, count: int) -> None:
    """Have so many policies published, and print when the workers of all replicas served each of them.

    What a worker serves is read from its metrics, which it writes every second: the times are upper bounds,
    up to a second too long.  A publication is provoked by another target, set from SQL at a replica.
    """
    took: list[float] = []
    while len(took) < count:
        version = (await shared.pulse(None, 0.0)).head[1]
        address = random.choice(proxies).address
        connection = await asyncpg.connect(**address)
        target = 0.90 + 0.001 * (len(took) % 50)
        await connection.fetch(f"SELECT ruvector_enable_learning('items', target_recall := {target:g})")
        await connection.close()
        deadline = time.monotonic() + 60.0
        while (head := (await shared.pulse(None, 0.0)).head[1]) == version:
            if time.monotonic() > deadline:
                raise TimeoutError("nothing was published within a minute")
            await asyncio.sleep(0.01)
        published_at = time.monotonic()
        while True:
            figures = await asyncio.gather(*(proxy.figures() for proxy in proxies))
            if all(each.total("ruvector_policy_version") >= head for each in figures):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"policy {head} is not served by all")
            await asyncio.sleep(0.02)
        took.append(time.monotonic() - published_at)
    q = np.quantile(took, [0.0, 0.5, 0.9, 1.0])
    print(
        f"\n{count} policies published; the workers of all {len(proxies)} replicas served it within "
        f"min {q[0]:.2f}, p50 {q[1]:.2f}, p90 {q[2]:.2f}, max {q[3]:.2f} s"
    )


def leader(logs: Sequence[Path]) -> tuple[int, int]:
    """Return the term and the number of the replica that leads, by what they log."""
    terms = [[int(term) for term in _LEADS.findall(log.read_text(errors="replace"))] for log in logs]
    return max((max(found, default=0), number) for number, found in enumerate(terms))


def learner_of(proxy: Proxy) -> int | None:
    """Return the process id of a proxy's learner."""
    supervisor = proxy._process.pid
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    for pid in children:
        with contextlib.suppress(OSError):
            if b"_learner" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
    return None


async def kills(
    proxies: Sequence[Proxy], logs: Sequence[Path], shared: SharedStore, clients: Sequence[Client], count: int
) -> None:
    """Kill the leading learner so often, and print how long nobody led and what clients and policies felt."""
    took: list[float] = []
    lost = 0
    async with asking(clients):
        while len(took) < count:
            await asyncio.sleep(random.uniform(0.3, 2.5))
            before = trusted(await published(shared))
            term, number = leader(logs)
            pid = learner_of(proxies[number])
            if pid is None or (await shared.pulse(None, 0.0)).term != term:
                continue
            os.kill(pid, signal.SIGKILL)
            started = time.monotonic()
            while (await shared.pulse(None, 0.0)).term == term:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            took.append(time.monotonic() - started)
            after = trusted(await published(shared))
            lost += before is not None and after is None
            print(f"  kill {len(took)}: another leads after {took[-1]:.2f} s", flush=True)
    q = np.quantile(took, [0.0, 0.5, 0.9, 1.0])
    print(
        f"\nleader killed {count} times: takeover "
        f"min {q[0]:.2f}, p50 {q[1]:.2f}, p90 {q[2]:.2f}, max {q[3]:.2f} s"
    )
    errors = sum((client.errors for client in clients), Counter[str]())
    print(f"policies lost {lost}; answered {sum(c.answered for c in clients)}, client errors {dict(errors)}")


async def restarts(
    server: EmbeddedPostgres, clients: dict[str, Client], shared: SharedStore, count: int
) -> None:
    """Restart the server so often, and print what clients saw, direct and proxied, and what was kept."""
    before = await published(shared)
    rows = await _labels(server)
    async with asking(list(clients.values())):
        for number in range(count):
            await asyncio.sleep(random.uniform(1.0, 2.0))
            await asyncio.to_thread(server.restart, random.choice(["fast", "immediate"]))
            print(f"  restart {number + 1}", flush=True)
        await asyncio.sleep(10.0)
    shared.drop()
    after = await published(shared)
    print(f"\nserver restarted {count} times")
    for name, client in clients.items():
        print(f"  {name:<10} answered {client.answered:>6}   {dict(client.errors)}")
    kept = trusted(before) is not None and trusted(after) is not None
    version = (before.version if before else 0, after.version if after else 0)
    print(
        f"  policy kept: {kept}, version {version[0]} -> {version[1]}; "
        f"labels {rows} -> {await _labels(server)}"
    )


async def _labels(server: EmbeddedPostgres) -> int:
    connection = await asyncpg.connect(server.uri(STORE))
    count = await connection.fetchval("SELECT count(*) FROM ruvector_proxy.labels")
    await connection.close()
    return int(count)


def _server_seconds(server: EmbeddedPostgres) -> float:
    """Return the CPU seconds of the server's processes, those that ended included."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if server.pid in (int(stat.parent.name), int(fields[1])):
                children = sum(map(int, fields[13:15])) if int(stat.parent.name) == server.pid else 0
                total += (sum(map(int, fields[11:13])) + children) / ticks
    return total


async def messages(server: EmbeddedPostgres, sizes: Sequence[int]) -> None:
    """Let followers take part for a while, and print what each costs the store per second."""
    print("\nfollowers   rounds/s   WAL kB/s   server CPU ms/s   per follower ms/s   pulse p50 / p99 ms")
    for size in sizes:
        stores = [SharedStore(server.uri(STORE), group=f"size {size}") for _ in range(size)]
        for store in stores:
            await store.connect()
        term = await stores[0].acquire(60.0)
        took: list[float] = []

        # 500 queries of 384 dimensions a second in all, which is what the leader asks for.
        body = msgspec.msgpack.encode(Forwarded((), (), 30, 50_000)) + os.urandom(500 * 1700 // size)

        async def follow(store: SharedStore, took: list[float] = took, body: bytes = body) -> None:
            await asyncio.sleep(random.random())
            while True:
                started = time.perf_counter()
                await store.pulse(None, 0.0)
                took.append(time.perf_counter() - started)
                await store.post([body])
                await asyncio.sleep(random.uniform(0.9, 1.1))

        async def lead(term: int, store: SharedStore) -> None:
            while True:
                await store.pulse(term, 60.0)
                while len(await store.take_mail(term, 500)) == 500:
                    pass
                await asyncio.sleep(1.0)

        assert term is not None
        tasks = [asyncio.create_task(follow(store)) for store in stores[1:]]
        tasks.append(asyncio.create_task(lead(term, stores[0])))
        await asyncio.sleep(2.0)
        took.clear()
        admin = await asyncpg.connect(server.uri(STORE))
        wal, cpu, begin = await admin.fetchval(_WAL), _server_seconds(server), time.monotonic()
        await asyncio.sleep(10.0)
        seconds = time.monotonic() - begin
        wal, cpu = (
            float(await admin.fetchval(_WAL) - wal) / seconds,
            (_server_seconds(server) - cpu) / seconds,
        )
        for task in tasks:
            task.cancel()
        outcome = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [error for error in outcome if isinstance(error, UnavailableError)]
        p50, p99 = np.quantile(took, [0.5, 0.99]) * 1e3
        print(
            f"{size - 1:>9}{len(took) / seconds:>11.1f}{wal / 1e3:>11.1f}{cpu * 1e3:>18.1f}"
            f"{cpu * 1e3 / size:>20.2f}{p50:>16.2f} / {p99:.1f}"
            + (f"  {len(failed)} failed" if failed else ""),
            flush=True,
        )
        await admin.close()
        for store in stores:
            await store.close()
        await asyncio.sleep(0.5)


_WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8"


async def run(options: argparse.Namespace, home: Path) -> None:
    """Run the stages that were asked for."""
    data = dataset.load(rows=ROWS)
    pool = np.concatenate([data.queries["sentence"][:600], data.queries["gloss"][:300]])
    unseen = np.concatenate([data.queries["sentence"][600:900], data.queries["gloss"][300:450]])
    texts = [text(vector) for vector in pool]
    settings = {**FAST_SETTINGS, "max_connections": "400"}
    with EmbeddedPostgres(settings=settings, listen=True) as server:
        await prepare(server, data)
        if options.messages:
            one = SharedStore(server.uri(STORE), group="first")
            await one.connect()  # creates the schema
            await one.close()
            await messages(server, options.messages)
        if not (options.kills or options.restarts or options.compare or options.spread):
            return
        name = uuid.uuid4().hex[:6]
        os.environ["RUVECTOR_STORE_KIND"] = "postgres"
        os.environ["RUVECTOR_STORE_DSN"] = server.uri(STORE)
        os.environ["RUVECTOR_STORE_GROUP"] = name
        os.environ["RUVECTOR_LEARNING_TARGET_RECALL"] = "0.95"
        shared = SharedStore(server.uri(STORE), group=name)
        async with contextlib.AsyncExitStack() as stack:
            proxies, logs = [], []
            for number in range(REPLICAS):
                directory = home / str(number)
                directory.mkdir()
                proxies.append(await stack.enter_async_context(serve(server, directory)))
                logs.append(directory / "proxy.log")
            thirds = [Client(proxy.address, texts[n::REPLICAS]) for n, proxy in enumerate(proxies)]
            async with asking(thirds):
                await until_learned(proxies, options.labels)
                await asyncio.sleep(6.0)
                while trusted(await published(shared)) is None:  # noqa: ASYNC110
                    await asyncio.sleep(1.0)
            together = await published(shared)
            assert together is not None
            print(f"three replicas: {_words(together)}", flush=True)
            if options.spread:
                async with asking([Client(proxy.address, texts) for proxy in proxies]):
                    await spread(proxies, shared, options.spread)
            if options.kills:
                clients = [Client(proxy.address, texts) for proxy in proxies]
                await kills(proxies, logs, shared, clients, options.kills)
            if options.restarts:
                direct = {"host": server.host, "port": server.port, "user": server.user, "database": DATABASE}
                each = {"direct": Client(direct, texts)}
                each |= {f"proxy {n}": Client(proxy.address, texts) for n, proxy in enumerate(proxies)}
                await restarts(server, each, shared, options.restarts)
        shared.drop()
        if options.compare:
            os.environ["RUVECTOR_STORE_KIND"] = "sqlite"
            del os.environ["RUVECTOR_STORE_DSN"]
            directory = home / "alone"
            directory.mkdir()
            async with serve(server, directory) as proxy:
                clients = [Client(proxy.address, texts) for _ in range(REPLICAS)]
                async with asking(clients):
                    await until_learned([proxy], options.labels)
                    await asyncio.sleep(6.0)
            alone = read(directory / "state").snapshot
            assert alone is not None
            print(f"one replica: {_words(alone)}", flush=True)
            policies = {"three replicas": together, "one that saw everything": alone}
            await compare(server, policies, data, unseen)


def _words(snapshot: Snapshot) -> str:
    policy = trusted(snapshot)
    return f"policy {snapshot.version}: {policy.trust} ({policy.reason})" if policy else "nothing trusted"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spread", type=int, default=20, help="policies published, to be served by all")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument(
        "--labels", type=int, default=400, help="measured queries before policies are compared"
    )
    parser.add_argument("--no-compare", dest="compare", action="store_false")
    parser.add_argument("--messages", type=int, nargs="*", default=[4, 16, 64, 192])
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    with tempfile.TemporaryDirectory(prefix="rvr-") as home:
        Path(home).chmod(0o755)
        asyncio.run(run(options, Path(home)))


if __name__ == "__main__":
    main()
