"""An upgrade changes no immutable field: not from the last release, not with the version, not with everyday values."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from tests.helm.charts import CHART, PROFILES, Chart, Json, Rendered, documents, profile_file
from tests.helm.immutables import SNAPSHOT, immutables

EVERYDAY: list[Json] = [
    {"image": {"tag": "9.9.9"}},
    {"config": {"training": {"steps": 7}}},
    {"mlflow": {"resources": {"cpu": 3, "memory": "5Gi"}, "workers": 4}},
    {"home": {"size": "2Ti"}, "mlflow": {"persistence": {"size": "90Gi"}}},
    {"trigger": {"schedule": "0 3 * * *", "suspend": True}},
    {"monitoring": {"serviceMonitor": {"enabled": True}, "dashboard": {"enabled": True}}},
]


def changed(before: Json, after: Json) -> list[str]:
    """Objects of both whose immutable fields differ, and claims that are gone."""
    found = [name for name in before.keys() & after.keys() if before[name] != after[name]]
    return found + [name for name in before.keys() - after.keys() if name.startswith("PersistentVolumeClaim/")]


@pytest.mark.parametrize("profile", PROFILES)
def test_from_the_released_version(rendered: dict[str, Rendered], profile: str) -> None:
    released = json.loads(SNAPSHOT.read_text())[profile]
    assert changed(released, immutables(rendered[profile])) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_with_the_version(chart: Chart, rendered: dict[str, Rendered], profile: str, tmp_path: Path) -> None:
    """A label that carries the version must not be in a selector."""
    newer = tmp_path / "expunge"
    shutil.copytree(CHART, newer)
    about = (newer / "Chart.yaml").read_text().replace("ersion: 0.1.0", "ersion: 9.9.9")
    (newer / "Chart.yaml").write_text(about)
    done = chart.run("template", "expunge", str(newer), "-n", "night", "-f", str(profile_file(profile)))
    after = Rendered(tuple(documents(done.out)))
    assert any("9.9.9" in json.dumps(item) for item in after.objects)
    assert changed(immutables(rendered[profile]), immutables(after)) == []


@pytest.mark.parametrize("values", EVERYDAY, ids=json.dumps)
def test_with_everyday_values(chart: Chart, rendered: dict[str, Rendered], values: Json) -> None:
    after = chart.render("dev", values=values)
    assert after.objects != rendered["dev"].objects
    assert changed(immutables(rendered["dev"]), immutables(after)) == []


def test_a_changed_selector_or_a_lost_claim_would_be_seen(rendered: dict[str, Rendered]) -> None:
    before = immutables(rendered["dev"])
    after = copy.deepcopy(before)
    after["Deployment/expunge-mlflow"]["selector"]["matchLabels"]["app.kubernetes.io/version"] = "2"
    del after["PersistentVolumeClaim/expunge-home"]
    assert changed(before, after) == ["Deployment/expunge-mlflow", "PersistentVolumeClaim/expunge-home"]


def test_the_snapshot_knows_what_cannot_change() -> None:
    kinds = {name.split("/")[0] for found in json.loads(SNAPSHOT.read_text()).values() for name in found}
    assert kinds == {"Deployment", "PersistentVolumeClaim", "Service", "RoleBinding"}
