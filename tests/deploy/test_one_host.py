"""compose.yaml and ray-cluster.yaml: valid by their schemas, closed by default, true to the chart where they meet."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.helm.charts import Chart, Rendered
from tests.helm.conftest import fetch_helm, npm_package

Json = dict[str, Any]
DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE_SCHEMA = ("dclint", "3.1.0")  # ships compose-spec's schema


@pytest.fixture(scope="module")
def compose() -> Json:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def cluster() -> Json:
    return yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())


def compose_errors(document: Json) -> list[str]:
    schema = json.loads((npm_package(*COMPOSE_SCHEMA) / "schemas" / "compose.schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def test_compose_is_valid(compose: Json) -> None:
    assert compose_errors(compose) == []


def test_an_unknown_key_would_be_seen(compose: Json) -> None:
    assert "'helthcheck'" in compose_errors({**compose, "services": {"a": {"helthcheck": {}}}})[0]


def test_images_are_pinned(compose: Json) -> None:
    for name, service in compose["services"].items():
        _, _, tag = service["image"].partition(":")
        assert tag not in ("", "latest"), name


def test_secrets_come_from_a_file_that_stays_on_the_host(compose: Json) -> None:
    """Each is demanded: an empty one would start a server with an empty password."""
    text = (DEPLOY / "compose.yaml").read_text()
    demanded = set(re.findall(r"\$\{(\w+):\?", text))
    assert set(re.findall(r"\$\{(\w+)", text)) == demanded
    example = (DEPLOY / "compose.env.example").read_text()
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == demanded
    assert ".env" in (DEPLOY / ".gitignore").read_text().split()


def test_ports_are_open_to_this_host_only(compose: Json) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_what_is_waited_for_can_say_that_it_is_ready(compose: Json) -> None:
    services = compose["services"]
    for service in services.values():
        for other, condition in service.get("depends_on", {}).items():
            if condition["condition"] == "service_healthy":
                own = services[other].get("environment", {})
                assert "healthcheck" in services[other] or "HEALTH_URL" in own, other


def test_our_own_services_are_hardened(compose: Json) -> None:
    for name in ("mlflow", "ray", "bucket"):
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.fixture(scope="module")
def server() -> Json:
    chart: Chart = fetch_helm()
    rendered: Rendered = chart.render("production")
    (container,) = rendered.one("Deployment")["spec"]["template"]["spec"]["containers"]
    return container


def test_mlflow_is_as_closed_as_in_the_chart(compose: Json, server: Json) -> None:
    here = compose["services"]["mlflow"]
    chart = {variable["name"]: variable.get("value") for variable in server["env"]}
    for name in (
        "MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX",
        "MLFLOW_SERVER_X_FRAME_OPTIONS",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION",
    ):
        assert here["environment"][name].replace("$$", "$") == chart[name]
    options = {a.partition("=")[0] for a in here["command"] if a.startswith("--")}
    assert options == {a.partition("=")[0] for a in server["args"]}
    assert "*" not in here["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]


def test_ray_asks_for_a_token(compose: Json) -> None:
    assert compose["services"]["ray"]["environment"]["RAY_AUTH_MODE"] == "token"
    assert "--dashboard-host=127.0.0.1" in compose["services"]["ray"]["command"]


def ray_schema() -> Json:
    return json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())


def test_the_clusters_file_is_valid(cluster: Json) -> None:
    jsonschema.validate(cluster, ray_schema())


def test_an_unknown_field_of_a_cluster_would_be_seen(cluster: Json) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker'"):
        jsonschema.validate({**cluster, "max_worker": 2}, ray_schema())


def test_the_launcher_takes_it(cluster: Json) -> None:
    """Its own preparation and checks, which ask nobody."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["max_workers"] == 2


def test_no_secret_is_in_the_clusters_file(cluster: Json) -> None:
    assert "--env-file=/etc/expunge/environment" in cluster["docker"]["run_options"]
    assert not re.search(r"(?i)(password|token|key)\s*[:=]\s*\S", re.sub(r"ssh_private_key.*", "", yaml.dump(cluster)))
    assert any("--dashboard-host=127.0.0.1" in command for command in cluster["head_start_ray_commands"])
