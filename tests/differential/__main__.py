"""Random pipelines against the server, direct and through the proxy: ``python -m tests.differential``.

python -m tests.differential --count 10000 --seed 1     a run; what differs is shrunk and printed
python -m tests.differential --control --count 10000    the same through a forwarder that knows nothing: what TCP does
python -m tests.differential --replay 4711              the script of one seed, both ways, with its outcome
python -m tests.differential --script FILE              the same for a script in a file
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import psycopg

from bench.embedded import FAST_SETTINGS, EmbeddedPostgres
from tests.differential.comparison import WAYS, difference
from tests.differential.generator import Generator
from tests.differential.lanes import run
from tests.differential.world import Server, world

SETTINGS = {**FAST_SETTINGS, "shared_buffers": "128MB", "max_connections": "100", "autovacuum": "off"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--seed", type=int, default=1, help="the first one; a run uses `count` seeds from here on"
    )
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--stop-after", type=int, default=5, help="differences to shrink before giving up")
    parser.add_argument(
        "--control", action="store_true", help="a forwarder that knows nothing, not the proxy"
    )
    parser.add_argument("--replay", type=int, metavar="SEED")
    parser.add_argument("--script", type=Path, metavar="FILE")
    options = parser.parse_args()
    with EmbeddedPostgres(settings=SETTINGS, listen=True) as postgres:
        server = Server(postgres.host, postgres.port, postgres.user)
        with psycopg.connect(server.dsn("template1"), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        if options.replay is None and options.script is None:
            seeds = range(options.seed, options.seed + options.count)
            return run(server, seeds, options.jobs, options.stop_after, control=options.control)
        return replay(
            server, options.script.read_text() if options.script else Generator(options.replay).script()
        )


def replay(server: Server, script: str) -> int:
    """Show one script and what came of it."""
    print(script)
    failed = False
    with world(server, "replay") as there:
        for way in WAYS:
            found = difference(there, script, way)
            print(f"{way}: {found or 'no difference'}")
            failed |= found is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
