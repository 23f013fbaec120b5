"""What the containers of the compose example would run, run without containers: its SQL, its role, its health check."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from bench.embedded import EmbeddedPostgres
from tests.integration.test_serve import serving, tcp, until
from tests.unit.test_images import COMPOSE, health_check

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_the_example_is_recognised_and_measured(
    postgres: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    init = (COMPOSE / "init.sql").read_text().replace("CREATE EXTENSION", "CREATE EXTENSION IF NOT EXISTS")
    init = init.replace("20000", "2000")
    learner = f"postgresql://ruvector:ruvector@127.0.0.1:{postgres.port}/{database}"
    script = (COMPOSE / "search.sql").read_text()
    (search,) = re.findall(r"^SELECT id FROM items ORDER BY.*$", script, re.MULTILINE)
    with psycopg.connect(postgres.dsn(database), autocommit=True) as direct:
        direct.execute(init.encode())
        (wanted,) = direct.execute("SELECT embedding::text FROM items WHERE id = 7").fetchone() or ("",)
    try:
        with serving(tmp_path, tcp(postgres), dsn=learner) as served:
            served.wait_ready()
            environment = {**os.environ, "RUVECTOR_ADMIN_PORT": str(served.admin_port)}
            subprocess.run([sys.executable, *health_check()[1:]], env=environment, check=True, timeout=60)
            with psycopg.connect(
                host="127.0.0.1", port=served.port, user="postgres", dbname=database, autocommit=True
            ) as client:
                statement = search.replace(":wanted", "%s").encode()
                assert len(client.execute(statement, (wanted,), prepare=True).fetchall()) == 10
            until(lambda: served.metric("ruvector_labels_total") > 0)
    finally:
        with psycopg.connect(postgres.dsn(database), autocommit=True) as direct:
            direct.execute("DROP OWNED BY ruvector")
            direct.execute("DROP ROLE ruvector")
