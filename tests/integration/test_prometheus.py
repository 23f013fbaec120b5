"""A real Prometheus scrapes a real proxy: the target is up, the rules load, the dashboard's queries are answered."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.embedded import EmbeddedPostgres, free_port
from tests.integration.test_serve import serving, tcp, until
from tests.unit.test_monitoring import ALERTS, alert_rules, dashboard_queries

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian)"),
]


class Prometheus:
    """A running server that scrapes one target every half second."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of the API's answer; raises urllib.error.HTTPError for a query that is wrong."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def values(self, query: str) -> list[str]:
        return [each["value"][1] for each in self.ask("query", query=query)["result"]]

    def has(self, query: str, values: list[str]) -> bool:
        try:
            return self.values(query) == values
        except OSError:  # it is still starting
            return False


@contextlib.contextmanager
def prometheus(directory: Path, target: int) -> Iterator[Prometheus]:
    directory.mkdir()
    configuration = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {"job_name": "ruvector", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
        ],
    }
    file = directory / "prometheus.yml"
    file.write_text(json.dumps(configuration))  # JSON is YAML
    port = free_port()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=log,
        )
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(20)
        print((directory / "log").read_text())


def test_prometheus_scrapes_the_proxy_and_knows_the_rules_and_queries(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with serving(tmp_path, tcp(postgres), dsn=postgres.uri()) as served:
        served.wait_ready()
        with served.connect() as connection:
            connection.execute("SELECT 1")
        with prometheus(tmp_path / "prometheus", served.admin_port) as asked:
            until(lambda: asked.has("up", ["1"]))
            until(lambda: asked.has("ruvector_connections_total", ["1"]))
            assert asked.values("ruvector_upstream_up") == ["1"]
            assert asked.values("ruvector_learner_configured") == ["1"]
            until(lambda: asked.has("ruvector_learner_connected", asked.values("ruvector_workers_up")))
            (group,) = asked.ask("rules")["groups"]
            assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in alert_rules()]
            assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
            assert {rule["state"] for rule in group["rules"]} == {"inactive"}
            answered = 0
            for query in dashboard_queries():
                if not query.startswith("label_values("):  # Grafana's own
                    for variable, value in {"$job": ".+", "$instance": ".+", "$table": ".+"}.items():
                        query = query.replace(variable, value)
                    for interval in ("$__rate_interval", "$__range"):
                        query = query.replace(interval, "1m")
                    asked.ask("query", query=query)  # an error of the query raises
                    answered += 1
            assert answered > 20


def test_prometheus_sees_that_the_server_is_away(tmp_path: Path) -> None:
    with (
        serving(tmp_path, ("127.0.0.1", free_port())) as served,
        prometheus(tmp_path / "prometheus", served.admin_port) as asked,
    ):
        until(lambda: asked.has("ruvector_upstream_up", ["0"]))
        until(
            lambda: asked.has('ALERTS{alertname="RuvectorUpstreamUnreachable", alertstate="pending"}', ["1"])
        )
        assert asked.values("ruvector_learner_configured") == ["0"]
