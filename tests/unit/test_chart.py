"""The Helm chart, rendered by Helm itself and held against Kubernetes' schemas and the proxy's own options.

Needs the extra `charts` (``make charts``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from config.loader import load
from config.schema import Config
from proxy.supervisor import GRACE, LEARNER_PATIENCE

helm = pytest.importorskip("helm_python", reason="Helm is not installed (make charts)")
kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="not installed (make charts)")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "ruvector-proxy"
VERSIONS = ("1.29", "1.34")

SECRET = {"existingSecret": "given"}
PEER = [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]
SWITCHES: dict[str, dict[str, Any]] = {
    "learner": {"learner": SECRET},
    "shared": {"learner": SECRET, "sharedStore": {**SECRET, "group": "blue"}, "replicas": 3},
    "tls": {"tls": {**SECRET, "mode": "verify-full"}},
    "scaled": {"autoscaling": {"enabled": True}},
    "watched": {
        "networkPolicy": {"clients": PEER, "admin": PEER, "egress": [{"ports": [{"port": 5432}]}]},
        "monitoring": {each: {"enabled": True} for each in ("serviceMonitor", "prometheusRule", "dashboard")},
    },
    "placed": {
        "imagePullSecrets": [{"name": "registry"}],
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "extraEnv": [{"name": "RUVECTOR_LOG_LEVEL", "value": "debug"}],
        "extraVolumes": [{"name": "users", "secret": {"secretName": "users"}}],
        "extraVolumeMounts": [{"name": "users", "mountPath": "/etc/users"}],
    },
}
COMBINATIONS: list[tuple[str, ...]] = [(), *((name,) for name in SWITCHES), tuple(SWITCHES)]


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    chart = helm.Chart.load(str(CHART))
    chart.validate_schema(values)
    files = chart.render(values, name="search", namespace="shop")
    manifests = [yaml.safe_load_all(text) for path, text in files.items() if path.endswith(".yaml")]
    return [manifest for each in manifests for manifest in each if manifest]


def only(kind: str, manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (each for each in manifests if each["kind"] == kind)
    return found


def combined(names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for name in names for key, value in SWITCHES[name].items()}


def validate(manifest: dict[str, Any]) -> None:
    if "monitoring.coreos.com" not in manifest["apiVersion"]:  # the operator's own; no schema at hand
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def configured(pod: dict[str, Any], container: dict[str, Any], file: str, directory: Path) -> Config:
    """Return what the proxy makes of a pod's file and environment; secrets get a connection URI as value."""
    path = directory / "proxy.toml"
    path.write_text(file)
    assert pod["enableServiceLinks"] is False
    return load(path, {each["name"]: each.get("value", "postgresql://u:p@h/d") for each in container["env"]})


def test_the_linter_finds_nothing_but_the_missing_icon() -> None:
    report = helm.lint(str(CHART), strict=True)
    assert [each["error"] for each in report["messages"]] == ["icon is recommended"]
    assert report["errors"] == []


@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names) or "as it comes")
def test_every_mode_and_all_together_are_valid_to_kubernetes_and_to_the_proxy(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    manifests = rendered(combined(names))
    for manifest in manifests:
        validate(manifest)
    pod = only("Deployment", manifests)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    file = next(each for each in manifests if each["metadata"]["name"] == "search" and "data" in each)
    config = configured(pod, container, file["data"]["proxy.toml"], tmp_path)
    assert (config.listen.port, config.admin.port) == (6432, 9464)
    assert config.upstream.host == "postgresql"
    assert (config.learner.dsn is not None) == bool({"learner", "shared"} & set(names))
    assert (config.store.kind, config.store.group) == (
        ("postgres", "blue") if "shared" in names else ("sqlite", "default")
    )
    assert config.listen.effective_tls_mode == ("verify-full" if "tls" in names else "disable")
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert {str(config.store.path), "/tmp", "/etc/ruvector-proxy"} <= mounted
    for path in filter(None, (config.listen.tls_cert, config.listen.tls_key, config.listen.tls_ca)):
        assert str(path.parent) in mounted
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}


@pytest.mark.parametrize("drain", [0, 30, 12.5, 600])
def test_the_grace_period_covers_all_that_stopping_may_take(drain: float, tmp_path: Path) -> None:
    manifests = rendered({"drainTimeout": drain})
    pod = only("Deployment", manifests)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    config = configured(pod, container, "", tmp_path)
    assert config.limits.drain_timeout == drain
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + drain + GRACE + LEARNER_PATIENCE


def test_service_budget_policy_and_monitor_select_the_pods() -> None:
    manifests = rendered(combined(("scaled", "watched")))
    labels = only("Deployment", manifests)["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        *(each["spec"]["selector"] for each in manifests if each["kind"] == "Service"),
        only("PodDisruptionBudget", manifests)["spec"]["selector"]["matchLabels"],
        only("NetworkPolicy", manifests)["spec"]["podSelector"]["matchLabels"],
        only("Deployment", manifests)["spec"]["selector"]["matchLabels"],
    ]
    assert len(selectors) == 5
    assert all(selector.items() <= labels for selector in selectors)
    wanted = only("ServiceMonitor", manifests)["spec"]["selector"]["matchLabels"].items()
    services = [each["metadata"] for each in manifests if each["kind"] == "Service"]
    assert [each["name"] for each in services if wanted <= each["labels"].items()] == ["search-metrics"]
    assert "replicas" not in only("Deployment", manifests)["spec"]


def test_alerts_and_dashboard_arrive_as_they_are() -> None:
    manifests = rendered(combined(("watched",)))
    rules = yaml.safe_load((CHART / "monitoring" / "alerts.yaml").read_text())
    assert only("PrometheusRule", manifests)["spec"] == rules
    (dashboard,) = (each for each in manifests if each["metadata"]["name"] == "search-dashboard")
    expected = (CHART / "monitoring" / "dashboard.json").read_text()
    assert dashboard["data"]["ruvector-proxy.json"].strip() == expected.strip()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"service": {"port": 70000}}, "port"),
        ({"state": {"existingClaim": "disk"}, "replicas": 2}, "one replica"),
        ({"monitoring": {"serviceMonitor": {"enabled": True}}}, "networkPolicy.admin"),
    ],
)
def test_what_is_misspelt_or_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError, match=message):
        rendered(values)


def test_the_chart_as_it_comes_fits_its_schema_which_is_closed() -> None:
    assert helm.Chart.load(str(CHART)).schema["additionalProperties"] is False
    helm.Chart.load(str(CHART)).validate_schema({})


def test_the_sidecar_is_valid_and_lets_the_proxy_drain(tmp_path: Path) -> None:
    manifests = list(yaml.safe_load_all((CHART / "examples" / "sidecar.yaml").read_text()))
    for manifest in manifests:
        validate(manifest)
    pod = only("Deployment", manifests)["spec"]["template"]["spec"]
    (proxy,) = pod["initContainers"]
    assert proxy["restartPolicy"] == "Always"
    config = configured(pod, proxy, only("ConfigMap", manifests)["data"]["proxy.toml"], tmp_path)
    assert pod["terminationGracePeriodSeconds"] > config.limits.drain_timeout + GRACE + LEARNER_PATIENCE
    assert config.learner.dsn is not None
    (application,) = pod["containers"]
    assert f":{config.listen.port}/" in application["env"][0]["value"]
