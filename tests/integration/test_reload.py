"""The configuration of a running proxy, under load: what takes effect, what is refused, and no client notices."""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.learner_kit import clustered, create_items, text
from tests.integration.test_serve import Served, serving, until

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]

QUERIES = [text(vector) for vector in clustered(300) + 0.3]
PATIENCE = 90.0  # seconds, for a busy machine
AS_IT_CAME = "10, on, off"
IN_FORCE = (
    "concat_ws(', ', current_setting('hnsw.ef_search'), current_setting('enable_indexscan'), "
    "current_setting('hnsw.iterative_scan'))"
)
SEARCH = f"SELECT id, {IN_FORCE} FROM items ORDER BY embedding <-> %s::vector LIMIT 10"


class Load:
    """Clients that ask all the time, and note what settings each statement was executed with."""

    def __init__(self, served: Served, database: str) -> None:
        self._served, self._database = served, database
        self._stop = threading.Event()
        self.seen: list[tuple[float, str]] = []  # when the statement was sent, settings in force
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._ask, args=[number]) for number in range(3)]

    def _ask(self, number: int) -> None:
        try:
            # The three ways of a driver: simple protocol, extended, prepared.
            options = {"cursor_factory": psycopg.ClientCursor} if number == 0 else {}
            with self._served.connect(self._database, autocommit=True, **options) as connection:
                connection.prepare_threshold = 1 if number == 2 else None
                while not self._stop.is_set():
                    for query in QUERIES[number::3]:
                        sent = time.monotonic()
                        row = connection.execute(SEARCH, [query]).fetchone()
                        assert row is not None
                        self.seen.append((sent, str(row[1])))
                        if self._stop.wait(0.005):
                            break
        except BaseException as error:
            self.errors.append(error)

    def seconds_until(self, adapted: bool) -> float:
        """Wait until most statements get settings, or none does; return after how long that began.

        Some get none for reasons of their own: what is asked for may be known to be easy.
        """
        since = time.monotonic()

        def after() -> list[tuple[float, bool]]:
            return [
                (sent - since, in_force != AS_IT_CAME) for sent, in_force in list(self.seen) if sent > since
            ]

        def settled() -> bool:
            assert not self.errors, self.errors
            last = [got for _, got in after()[-50:]]
            return len(last) == 50 and (sum(last) > 25 if adapted else not any(last))

        until(settled, PATIENCE)
        times = [seconds for seconds, got in after() if got]
        return min(times) if adapted else max(times, default=0.0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(PATIENCE)
        assert not self.errors, self.errors


@pytest.mark.timeout(600)
def test_options_change_under_load_and_no_client_notices(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    create_items(postgres.dsn(database))
    with psycopg.connect(postgres.dsn(database), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {database} SET hnsw.ef_search = 10")
    more = "[learning]\ntarget_recall = 0.95\n"
    with serving(tmp_path, ("127.0.0.1", postgres.port), more, postgres.uri()) as served:
        served.wait_ready()
        file = tmp_path / "proxy.toml"
        written = file.read_text()
        load = Load(served, database)
        with load.running():
            load.seconds_until(adapted=True)

            file.write_text(written + '[tables."public.items"]\nadaptive_search = false\n')
            off = load.seconds_until(adapted=False)
            assert 'tables."public.items".adaptive_search = false (was true)' in served.log

            file.write_text(written)
            served.process.send_signal(signal.SIGHUP)
            on = load.seconds_until(adapted=True)  # what was measured is still known
            print(f"toggled under load: off after {off:.2f} s, on after {on:.2f} s")

            def refused(words: str) -> bool:
                return words in served.log.rpartition("not reloaded")[2]

            # Bad files, and keys that take a restart, change nothing, whatever else they hold.
            off_and = written + '[tables."public.items"]\nadaptive_search = false\n'
            for bad, words in (
                (off_and + "target_recal = 1\n", "did you mean"),
                (
                    off_and + "[listen]\nport = 1\n[limits]\ndrain_timeout = 1.0\n",
                    "limits.drain_timeout = 1.0",
                ),
                (off_and + "[tables.", "is not TOML"),
            ):
                file.write_text(bad)
                until(functools.partial(refused, words), PATIENCE)
                assert served.metric("ruvector_config_last_reload_successful") == 0
                load.seconds_until(adapted=True)
            file.unlink()
            until(lambda: "cannot be read" in served.log, PATIENCE)

            file.write_text(written + "enabled = false\n")  # in [learning]
            load.seconds_until(adapted=False)
            until(lambda: served.metric("ruvector_learner_configured") == 0, PATIENCE)
            until(lambda: "there is no learner" in served.get("/advice")[1], PATIENCE)
            assert served.metric("ruvector_config_last_reload_successful") == 1
            file.write_text(written + "[log]\nlevel = 'debug'\n")
            load.seconds_until(adapted=True)
            assert served.metric("ruvector_learner_configured") == 1
            assert re.search("DEBUG +worker 1 .* learner not reachable", served.log)  # it is starting
            until(lambda: len(served.pids("learner")) == 2, PATIENCE)
        assert len(served.pids("worker 1")) == 1


def test_a_target_set_in_the_file_is_what_show_tells(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    with serving(tmp_path, ("127.0.0.1", postgres.port)) as served:
        served.wait_ready()
        with served.connect(autocommit=True, prepare_threshold=None) as connection:

            def shown() -> object:
                row = connection.execute("SHOW ruvector.target_recall").fetchone()
                assert row is not None
                return row[0]

            assert shown() == "0.98"
            file = tmp_path / "proxy.toml"
            file.write_text(file.read_text() + "[learning]\ntarget_recall = 0.9\n")
            until(lambda: shown() == "0.9", PATIENCE)
