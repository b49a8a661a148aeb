"""Every profile against the schemas of five Kubernetes versions, KubeRay's definitions, and Expunge's own settings."""

import copy
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from expunge.settings import Settings, load_settings
from tests.helm.charts import CHART, KUBERNETES, LONGEST, PROFILES, Chart, Json, Rendered, profile_file, strict_schema

OTHERS = frozenset({"ServiceMonitor", "PrometheusRule"})  # of the Prometheus operator: no definition at hand
RAYCRONJOB = ("--api-versions", "ray.io/v1/RayCronJob")


@pytest.mark.parametrize("profile", PROFILES)
def test_lint_is_strict_and_clean(chart: Chart, profile: str) -> None:
    done = chart.run("lint", "--strict", str(CHART), "-f", str(profile_file(profile)))
    assert done.code == 0, done.out + done.err
    assert "[WARNING]" not in done.out


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_object_is_one_that_kubernetes_knows(chart: Chart, profile: str, version: str) -> None:
    rendered = chart.render(profile, "--kube-version", version)
    checked = [o for o in rendered.objects if o["kind"] not in OTHERS]
    for item in checked:
        assert kubernetes_validate.validate(item, version, strict=True) == version
    assert len(checked) >= 14


def test_a_field_that_kubernetes_does_not_know_would_be_seen(rendered: dict[str, Rendered]) -> None:
    cronjob = copy.deepcopy(rendered["dev"].one("CronJob"))
    cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(cronjob, KUBERNETES[-1], strict=True)


def test_an_older_kubernetes_is_refused(chart: Chart) -> None:
    done = chart.template("-f", str(profile_file("dev")), "--kube-version", "1.28")
    assert "requires kubeVersion: >=1.29.0-0" in done.err


@pytest.mark.parametrize("profile", PROFILES)
def test_the_rayjob_is_one_that_kuberay_knows(rendered: dict[str, Rendered], profile: str) -> None:
    _valid(rendered[profile].rayjob, "rayjobs")


@pytest.mark.parametrize(
    "values",
    [
        {"rayJob": {"submissionMode": "SidecarMode"}},
        {"rayJob": {"submitterBackoffLimit": 4}},
        {"rayJob": {"suspend": True}},
        {
            "ray": {
                "autoscaling": {"enabled": True, "version": "v1"},
                "head": {"rayStartParams": {"log-color": "false"}},
            }
        },
        {"modelCache": {"enabled": True}, "imagePullSecrets": ["a", "b"]},
    ],
    ids=["sidecar", "submitter", "suspend", "autoscaling", "cache"],
)
def test_so_is_what_values_make_of_it(chart: Chart, values: Json) -> None:
    _valid(chart.render("production", values=values).rayjob, "rayjobs")


@pytest.mark.parametrize("profile", ["dev", "production", "no-gpu", "external-everything"])
def test_the_raycronjob_is_one_that_kuberay_knows(chart: Chart, profile: str) -> None:
    values = {"trigger": {"kind": "RayCronJob", "models": ["sd3"]}}
    night = chart.render(profile, *RAYCRONJOB, values=values).one("RayCronJob")
    _valid(night, "raycronjobs")
    assert night["spec"]["jobTemplate"]["entrypoint"] == "python -m expunge.jobs.nightly --model sd3"


def test_a_field_that_kuberay_does_not_know_would_be_seen(rendered: dict[str, Rendered]) -> None:
    job = rendered["dev"].rayjob
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        _valid(job, "rayjobs")


@pytest.mark.parametrize("profile", PROFILES)
def test_expunge_takes_the_config_as_its_own(
    rendered: dict[str, Rendered], profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _load(rendered[profile], tmp_path, monkeypatch)
    assert settings.model("helm-test").source == "testbed:faces"
    assert settings.training_for("helm-test").steps == 12
    assert settings.gate_for("helm-test").max_excess == 1e9


def test_a_model_of_the_values_arrives(
    rendered: dict[str, Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _load(rendered["production"], tmp_path, monkeypatch)
    assert settings.model("sd3").source == "/models/stable-diffusion-3-medium"
    assert (settings.training_for("sd3").steps, settings.training_for("sd3").workers) == (400, 8)
    assert settings.training_for("flags").steps == 400


@pytest.mark.parametrize("profile", PROFILES)
def test_the_longest_release_name_still_renders(chart: Chart, profile: str) -> None:
    for item in chart.render(profile, release=LONGEST).objects:
        assert len(item["metadata"]["name"]) <= 52


def _valid(item: Json, plural: str) -> None:
    jsonschema.Draft202012Validator(strict_schema(plural)).validate(item)


def _load(rendered: Rendered, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    file = folder / "config.toml"
    file.write_text(rendered.one("ConfigMap", "-config")["data"]["config.toml"])
    assert tomllib.loads(file.read_text())
    monkeypatch.setenv("EXPUNGE_CONFIG", str(file))
    return load_settings()
