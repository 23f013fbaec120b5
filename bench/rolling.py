"""A rolling update for real: an older version of the program and today's, side by side on one shared store.

The older one is a commit of this repository, checked out beside it (``git worktree``) and run by the same
Python.  Two replicas, clients on both, who connect again when their proxy ends:

1. both are of the older version, and learn
2. the one that follows is replaced by today's, with the same state directory
3. the one that leads is replaced: today's version takes over, and the older one comes back to follow it
4. the one that leads, of today's version, is killed: the older one takes over
5. the older one is replaced, too

After each step both replicas must serve the same trusted policy, of at least the version before, and the
labels in the store must not have become fewer.  What clients saw is counted: only the end of a connection
whose proxy was stopped, or killed, is allowed.

    python -m bench.rolling --old a9ddc16
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np

from bench import dataset
from bench.demo.proxy import Proxy
from bench.embedded import FAST_SETTINGS, EmbeddedPostgres, free_port
from bench.replicas import DATABASE, ROWS, STORE, K, asking, prepare, published, text, trusted
from learning.shared import SharedStore

ROOT = Path(__file__).resolve().parent.parent
OLD = "f90c5ae"
"""The first commit with everything that replicas share."""

QUERY = f"SELECT id FROM items ORDER BY embedding <=> '{{}}' LIMIT {K}"
_LOST = frozenset({"57P01", "08006", "08003", "connection lost", "refused"})  # 08003: asyncpg's own


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Check a commit out beside this one; it is removed in the end."""
    with tempfile.TemporaryDirectory(prefix="rv-old-") as directory:
        place = Path(directory) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(place), commit], check=True, capture_output=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True, capture_output=True)


class Replica:
    """A place for a proxy: its ports and its state stay, its program changes."""

    def __init__(self, name: str, home: Path, server: EmbeddedPostgres) -> None:
        self.name, self.home = name, home
        self.port, self.admin_port = free_port(), free_port()
        self.code = ROOT
        self.process: subprocess.Popen[bytes] | None = None
        home.mkdir()
        (home / "proxy.toml").write_text(
            f"[listen]\nport = {self.port}\n[admin]\nport = {self.admin_port}\n"
            f'[upstream]\nhost = "{server.host}"\nport = {server.port}\n'
            f'[learner]\ndsn = "{server.uri(DATABASE)}"\n[learning]\ntarget_recall = 0.95\n'
            f'[store]\nkind = "postgres"\npath = "{home / "state"}"\ndsn = "{server.uri(STORE)}"\n'
        )

    @property
    def version(self) -> str:
        """Which program runs."""
        return "today" if self.code == ROOT else "older"

    async def start(self, code: Path) -> None:
        """Run the program of a checkout, and wait until it serves."""
        self.code = code
        with (self.home / "proxy.log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: ASYNC220
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "proxy.main",
                    "serve",
                    "--config",
                    str(self.home / "proxy.toml"),
                ],
                env={**os.environ, "PYTHONPATH": str(code)},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        await self._proxy().wait_until_ready()

    def _proxy(self) -> Proxy:
        assert self.process is not None
        return Proxy(self.process, self.port, self.admin_port, self.home / "proxy.log")

    async def stop(self) -> None:
        """Stop it as a service manager does."""
        if self.process is not None:
            await asyncio.to_thread(self._proxy().stop)

    async def kill(self) -> None:
        """Kill all of it at once."""
        assert self.process is not None
        for pid in (self.process.pid, *_children(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)

    async def figure(self, name: str) -> float:
        """Return one of its metrics."""
        return (await self._proxy().figures()).total(name)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Client:
    """Asks one query after the other, and counts what goes wrong."""

    def __init__(self, port: int, queries: list[str]) -> None:
        self.answered = 0
        self.troubles: Counter[str] = Counter()
        self._port, self._queries = port, queries

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            try:
                connection: Any = await asyncpg.connect(
                    host="127.0.0.1", port=self._port, user="postgres", database=DATABASE, timeout=30
                )
                try:
                    while True:
                        query = self._queries[self.answered % len(self._queries)]
                        assert len(await connection.fetch(query)) == K
                        self.answered += 1
                        await asyncio.sleep(0.05)
                finally:
                    connection.terminate()
            except asyncpg.PostgresError as error:
                self.troubles[error.sqlstate or "?"] += 1
            except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
                self.troubles[
                    "refused" if isinstance(error, ConnectionRefusedError) else "connection lost"
                ] += 1
            await asyncio.sleep(0.1)


async def until(true: Any, seconds: float, what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not await true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.2)


class Update:
    """The steps, with what must hold after each."""

    def __init__(self, replicas: list[Replica], shared: SharedStore, server: EmbeddedPostgres) -> None:
        self._replicas, self._shared, self._server = replicas, shared, server
        self._version = 0
        self._labels = 0

    async def leader(self) -> Replica:
        """Return the replica that leads, once there is one."""
        found: list[Replica] = []

        async def one() -> bool:
            found[:] = [each for each in self._replicas if await each.figure("ruvector_replica_leading") == 1]
            return len(found) == 1

        await until(one, 60.0, "one replica leads")
        return found[0]

    async def check(self, step: str) -> None:
        """Wait until both serve the same trusted policy, and print what is so."""

        async def same() -> bool:
            versions = {await each.figure("ruvector_policy_version") for each in self._replicas}
            snapshot = await published(self._shared)
            return snapshot is not None and trusted(snapshot) is not None and versions == {snapshot.version}

        leader = await self.leader()
        await until(same, 120.0, f"{step}: both serve what is published, and it is trusted")
        snapshot = await published(self._shared)
        connection = await asyncpg.connect(self._server.uri(STORE))
        labels = int(await connection.fetchval("SELECT count(*) FROM ruvector_proxy.labels"))
        await connection.close()
        assert snapshot is not None
        assert snapshot.version >= self._version, (snapshot.version, self._version)
        assert labels >= self._labels, (labels, self._labels)
        self._version, self._labels = snapshot.version, labels
        policy = trusted(snapshot)
        trust = policy.trust.value if policy is not None else "-"
        programs = " + ".join(each.version for each in self._replicas)
        print(
            f"{step:<52}{programs:<17}{leader.version:<8}{snapshot.version:>7}{trust:>9}{labels:>8}",
            flush=True,
        )


async def run(old: Path, home: Path) -> int:
    """Run the update; return 0 where everything held."""
    data = dataset.load(rows=ROWS)
    queries = [QUERY.format(text(vector)) for vector in np.concatenate(list(data.queries.values()))[:900]]
    with EmbeddedPostgres(settings={**FAST_SETTINGS, "max_connections": "200"}, listen=True) as server:
        await prepare(server, data)
        shared = SharedStore(server.uri(STORE))
        replicas = [Replica(name, home / name, server) for name in ("a", "b")]
        clients = [Client(each.port, queries[n::2]) for n, each in enumerate(replicas)]
        update = Update(replicas, shared, server)
        print(f"{'step':<52}{'programs':<17}{'leads':<8}{'policy':>7}{'trust':>9}{'labels':>8}")
        try:
            for each in replicas:
                await each.start(old)
            async with asking(clients):
                await steps(update, replicas, old)
        finally:
            for each in replicas:
                await each.stop()
            await shared.close()
    for each, client in zip(replicas, clients, strict=True):
        print(f"client of {each.name}: {client.answered} answered, troubles {dict(client.troubles)}")
    strange = sum((client.troubles for client in clients), Counter[str]()).keys() - _LOST
    for each in replicas:
        bad = [line for line in (each.home / "proxy.log").read_text().splitlines() if "Traceback" in line]
        strange |= {f"a traceback in the log of {each.name}"} if bad else set()
    if strange:
        print(f"not allowed: {sorted(strange)}")
    return 1 if strange else 0


async def steps(update: Update, replicas: list[Replica], old: Path) -> None:
    """Replace one program after the other."""
    await update.check("1 both of the older version have learned")
    leader = await update.leader()
    follower = next(each for each in replicas if each is not leader)
    await follower.stop()
    await follower.start(ROOT)
    await update.check("2 the follower is of today")
    await leader.stop()
    await until(lambda: _leads(follower), 60.0, "today's version takes over")
    await leader.start(old)
    await update.check("3 today's leads, the older one follows it")
    await follower.kill()
    await until(lambda: _leads(leader), 60.0, "the older version takes over")
    await follower.start(ROOT)
    await update.check("4 today's was killed: the older one leads, it follows")
    await leader.stop()
    await leader.start(ROOT)
    await update.check("5 both of today")


async def _leads(replica: Replica) -> bool:
    return await replica.figure("ruvector_replica_leading") == 1


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--old", default=OLD, help="commit of the older version")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rvu-") as home, checkout(options.old) as old:
        Path(home).chmod(0o755)
        differs = subprocess.run(
            ["git", "-C", str(ROOT), "diff", "--shortstat", options.old, "--", "learning", "proxy"],
            check=True,
            capture_output=True,
            text=True,
        )
        print(f"older: {options.old};{differs.stdout.rstrip()} since then, in learning/ and proxy/")
        return asyncio.run(run(old, Path(home)))


if __name__ == "__main__":
    raise SystemExit(main())
