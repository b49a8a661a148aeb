"""Alerts and dashboard: they ask for what the driver exports, and each alert leads to its entry in the runbook."""

import json
import re

import pytest

from expunge.batch.metrics import METRICS
from tests.helm.charts import ROOT, Chart, Json, Rendered

KUBE_STATE_METRICS = {
    "kube_job_status_failed": {"namespace", "job_name"},
    "kube_job_status_start_time": {"namespace", "job_name"},
    "kube_cronjob_status_last_successful_time": {"namespace", "cronjob"},
    "kube_deployment_status_replicas_available": {"namespace", "deployment"},
}
SELECTION = re.compile(r"((?:ray_expunge|kube)_\w+)\{([^}]*)\}")
RAYS = {"expunge_release"}


@pytest.fixture(scope="module")
def alerts(rendered: dict[str, Rendered]) -> dict[str, Json]:
    (group,) = rendered["production"].one("PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


@pytest.fixture(scope="module")
def dashboard(rendered: dict[str, Rendered]) -> Json:
    return json.loads(rendered["production"].one("ConfigMap", "-dashboard")["data"]["expunge.json"])


def unknown(expression: str) -> list[str]:
    """Metrics that nobody exports, and labels that they do not have."""
    known = {f"ray_{name}": RAYS | set(labels) for name, (_, labels) in METRICS.items()} | KUBE_STATE_METRICS
    found = []
    for metric, labels in SELECTION.findall(expression):
        names = set(re.findall(r"(\w+)\s*=", labels))
        if metric not in known:
            found.append(metric)
        elif not names <= known[metric] or not names:
            found.append(f"{metric}: {names}")
    return found


def test_the_alerts_are_those_that_a_person_must_know(alerts: dict[str, Json]) -> None:
    assert set(alerts) == {
        "ExpungeDueDateNear",
        "ExpungeNightFailed",
        "ExpungeNightMissing",
        "ExpungeResurfaced",
        "ExpungeGateFailures",
        "ExpungeRegistryUnreachable",
    }


def test_alerts_ask_for_what_is_exported(alerts: dict[str, Json]) -> None:
    for name, rule in alerts.items():
        assert SELECTION.search(rule["expr"]), name
        assert unknown(rule["expr"]) == [], name
        assert _balanced(rule["expr"]), name


def test_an_alert_on_a_metric_that_is_gone_would_be_seen() -> None:
    assert unknown('ray_expunge_gone{expunge_release="x"}') == ["ray_expunge_gone"]
    assert unknown('ray_expunge_queue_depth{release="x"}') == ["ray_expunge_queue_depth: {'release'}"]
    assert not _balanced("max(a{b='c'}")


def test_every_alert_leads_to_its_entry(alerts: dict[str, Json]) -> None:
    headings = re.findall(r"^### (\w+)$", (ROOT / "deploy" / "RUNBOOK.md").read_text(), re.MULTILINE)
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook_url"] == f"deploy/RUNBOOK.md#{name.lower()}"
        assert name in headings


def test_every_metric_is_on_the_dashboard(dashboard: Json) -> None:
    expressions = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    for name in METRICS:
        assert f"ray_{name}{{" in expressions, name


def test_the_dashboard_asks_for_what_is_exported(dashboard: Json) -> None:
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert unknown(target["expr"]) == [], panel["title"]
            assert _balanced(target["expr"]), panel["title"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(places) == len(set(places))


def test_rays_pods_are_scraped_whatever_the_night(rendered: dict[str, Rendered]) -> None:
    production = rendered["production"]
    monitor = production.one("ServiceMonitor")["spec"]
    service = production.one("Service", "-ray-metrics")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    (port,) = service["spec"]["ports"]
    assert endpoint["port"] == port["name"]
    for name, pod in production.pods():
        if name in ("RayJob/head", "RayJob/a100"):
            assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
            ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
            assert ports[port["targetPort"]] == 8080


def test_thresholds_are_values(chart: Chart) -> None:
    values = {"monitoring": {"prometheusRule": {"dueDays": 9, "nightHours": 50, "runbook": "https://wiki/expunge"}}}
    rule = chart.render("production", values=values).one("PrometheusRule")
    text = json.dumps(rule)
    assert "< 9" in text
    assert "> 180000" in text
    assert "https://wiki/expunge#expungenightfailed" in text


def test_an_external_registry_is_not_watched_from_here(chart: Chart) -> None:
    values = {"monitoring": {"prometheusRule": {"enabled": True}}}
    rule = chart.render("external-everything", values=values).one("PrometheusRule")
    assert "ExpungeRegistryUnreachable" not in json.dumps(rule)


def _balanced(expression: str) -> bool:
    """Brackets of all kinds, outside of strings."""
    open_, pairs = [], {")": "(", "]": "[", "}": "{"}
    for character in re.sub(r'"[^"]*"', '""', expression):
        if character in "([{":
            open_.append(character)
        elif character in pairs and (not open_ or open_.pop() != pairs[character]):
            return False
    return not open_
