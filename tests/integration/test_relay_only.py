"""The kill switch on the wire: nothing is changed any more, whatever was under way, and it goes back."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.pair import LITERAL, Pair
from tests.integration.proxied import Proxy
from tests.integration.raw import SYNC, bind, execute, parse, query
from tests.integration.test_serve import Served, serving, until

pytestmark = pytest.mark.integration

TOKEN = "0123456789abcdef"
PREPARED = (parse("SELECT id FROM items ORDER BY embedding <-> $1::vector LIMIT 500", "v"), SYNC)
RUN = (bind(b"[1,1,1]", name="v"), execute(), SYNC)


@pytest.fixture
def thrown(dictating: Proxy) -> Iterator[Proxy]:
    yield dictating
    dictating.call(lambda: dictating.adapter.switch(False))


def rows(replies: list[tuple[str, bytes]]) -> int:
    return sum(tag == "D" for tag, _ in replies)


def test_nothing_is_adapted_or_recorded_and_then_it_is_again(pair: Pair, thrown: Proxy) -> None:
    adapted = pair.proxied.run(query(LITERAL))
    pair.both(*PREPARED)
    assert rows(pair.proxied.run(*RUN)) == rows(adapted) != rows(pair.direct.run(*RUN))
    thrown.call(lambda: thrown.adapter.switch(True))
    recorded = len(thrown.trajectories)
    counted = thrown.call(lambda: dict(thrown.counters.recognised))
    for messages in ((query(LITERAL),), RUN, (parse(LITERAL), bind(), execute(), SYNC)):
        pair.same(*messages)
    assert len(thrown.trajectories) == recorded
    assert thrown.call(lambda: dict(thrown.counters.recognised)) == counted
    thrown.call(lambda: thrown.adapter.switch(False))
    assert rows(pair.proxied.run(query(LITERAL))) == rows(adapted)
    assert rows(pair.proxied.run(*RUN)) == rows(adapted)


def test_in_a_transaction_with_settings_in_force(pair: Pair, thrown: Proxy) -> None:
    pair.same(query("BEGIN"))
    pair.both(*PREPARED)
    pair.both(*RUN)
    thrown.call(lambda: thrown.adapter.switch(True))
    pair.same(*RUN)
    pair.same(query("SHOW hnsw.ef_search"))
    pair.same(query("COMMIT"))


def test_what_the_client_sets_meanwhile_is_its_own_will_afterwards(pair: Pair, thrown: Proxy) -> None:
    thrown.call(lambda: thrown.adapter.switch(True))
    pair.same(query("SET hnsw.ef_search = 55"))
    thrown.call(lambda: thrown.adapter.switch(False))
    pair.same(query(LITERAL))
    assert pair.setting() == b"55"


def post(served: Served, wanted: bool) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{served.admin_port}/relay-only",
        json.dumps({"relay_only": wanted}).encode(),
        {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["relay_only"] is wanted


@pytest.mark.slow
def test_every_way_to_throw_it_reaches_every_worker_and_survives_their_deaths(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    more = f'[workers]\ncount = 2\n[admin]\ntoken = "{TOKEN}"\n[sql]\nmanager = "keepers"\n'
    with serving(tmp_path, (postgres.host, postgres.port), more) as served:
        until(lambda: served.get("/readyz")[0] == 200, 60)
        until(lambda: len(served.pids("worker 1")) == len(served.pids("worker 2")) == 1, 60)

        def everywhere(wanted: bool) -> bool:
            """Ask some connections, which both workers get."""
            for _ in range(12):
                with closing(served.connect()) as connection:
                    if connection.execute("SELECT ruvector_relay_only()").fetchone() != (wanted,):
                        return False
            return True

        until(lambda: everywhere(False), 60)
        for wanted in (True, False):
            post(served, wanted)
            until(lambda wanted=wanted: everywhere(wanted), 60)  # type: ignore[misc]
        for order, wanted in ((signal.SIGUSR1, True), (signal.SIGUSR2, False)):
            os.kill(served.process.pid, order)
            until(lambda wanted=wanted: everywhere(wanted), 60)  # type: ignore[misc]
        with closing(served.connect()) as connection:
            connection.execute("CREATE ROLE nobody_special")
            connection.execute("SET LOCAL ROLE nobody_special")
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="ruvector_relay_only"):
                connection.execute("SELECT ruvector_relay_only(true)")
            connection.rollback()
            assert connection.execute("SELECT ruvector_relay_only(true)").fetchone() == (True,)
        until(lambda: everywhere(True), 60)
        for number in (1, 2):
            os.kill(served.pids(f"worker {number}")[0], signal.SIGKILL)
        until(lambda: len(served.pids("worker 1")) == len(served.pids("worker 2")) == 2, 60)
        until(lambda: everywhere(True), 60)
    with serving(tmp_path, (postgres.host, postgres.port), more) as served:
        until(lambda: served.get("/readyz")[0] == 200, 60)
        until(lambda: everywhere(True), 60)
        assert "the proxy is a pure relay: user postgres, from SQL" in served.log
