"""Alerts and dashboard name series that exist, with their labels, used as their type allows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from proxy.admin import docs

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "helm" / "ruvector-proxy" / "monitoring"
ALERTS = MONITORING / "alerts.yaml"
CASES = ROOT / "tests" / "monitoring" / "alerts.test.yaml"

TARGET_LABELS = {"job", "instance"}
"""Labels that every scraped series has."""

FAMILIES = {
    series: family
    for families in docs.catalogue().values()
    for family in families
    for series in family.series
}


def alert_rules() -> list[dict[str, str]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def dashboard_queries() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    variables = [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return targets + variables


EXPRESSIONS = [rule["expr"] for rule in alert_rules()] + dashboard_queries()


def mistakes(expression: str) -> Iterator[str]:
    """Say what is wrong with the series in a PromQL expression."""
    used = set(re.findall(r"\bruvector_\w+", expression))
    if not used:
        yield "no series"
    for series in used - set(FAMILIES):
        yield f"there is no series {series}"
    known = TARGET_LABELS.union(*(FAMILIES[series].labels for series in used & set(FAMILIES)))
    if any(series.endswith("_bucket") for series in used):
        known |= {"le"}
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        for label in set(labels.split(", ")) - known:
            yield f"grouped by the label {label}, which no series in it has"
    for series, selector in re.findall(r"(ruvector_\w+)\{([^}]*)\}", expression):
        if series in FAMILIES:
            for label in set(re.findall(r"(\w+)=", selector)) - TARGET_LABELS - set(FAMILIES[series].labels):
                yield f"{series} has no label {label}"
    rated = set(re.findall(r"\b(?:rate|increase)\((ruvector_\w+)", expression))
    for series in used & set(FAMILIES):
        if (FAMILIES[series].type == "gauge") == (series in rated) and "label_values(" not in expression:
            yield f"{series} is a {FAMILIES[series].type}"


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_series_exists_with_its_labels_and_is_used_by_its_type(expression: str) -> None:
    assert list(mistakes(expression)) == []


@pytest.mark.parametrize(
    ("expression", "mistake"),
    [
        ("up == 0", "no series"),
        ("ruvector_gone == 0", "no series ruvector_gone"),
        ("sum by (table) (rate(ruvector_statements_total[5m]))", "the label table"),
        ('ruvector_workers_up{table="x"} == 0', "no label table"),
        ("rate(ruvector_workers_up[5m])", "is a gauge"),
        ("ruvector_statements_total > 1", "is a counter"),
    ],
)
def test_a_wrong_expression_is_found(expression: str, mistake: str) -> None:
    assert mistake in "; ".join(mistakes(expression))


def test_no_panel_of_the_dashboard_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {rule["alert"] for rule in alert_rules()} == {
        case["alertname"] for case in cases if case.get("exp_alerts")
    }


@pytest.mark.parametrize("command", [("check", "rules", ALERTS), ("test", "rules", CASES)])
def test_promtool_accepts_the_alerts_and_they_fire_when_they_should(command: tuple[str, str, Path]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_is_up_to_date() -> None:
    assert docs.REFERENCE.read_text(encoding="utf-8") == docs.reference(), "run: python -m proxy.admin.docs"


def test_every_metric_is_explained_in_a_sentence() -> None:
    assert [family.name for family in FAMILIES.values() if not family.text.endswith(".")] == []
