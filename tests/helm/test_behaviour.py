"""What the rendered objects say, by the values that say it."""

import json
from typing import Any

import pytest

from tests.helm.charts import PROFILES, Chart, Json, Rendered

RAYCRONJOB = ("--api-versions", "ray.io/v1/RayCronJob")


def container(pod: Json) -> Json:
    (only,) = pod["spec"]["containers"]
    return only


def environment(pod: Json) -> dict[str, Any]:
    """A value, or the (secret, key) that it comes from."""
    found = {}
    for variable in container(pod)["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        found[variable["name"]] = (reference["name"], reference["key"]) if reference else variable.get("value")
    return found


def pod(rendered: Rendered, name: str) -> Json:
    return dict(rendered.pods())[name]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_night_is_never_started_twice(rendered: dict[str, Rendered], profile: str) -> None:
    spec = rendered[profile].one("CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] == 7200
    assert spec["jobTemplate"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "trigger", "operator": "In", "values": [1, 2]}},
    ]


def test_the_schedule_is_the_values(rendered: dict[str, Rendered]) -> None:
    spec = rendered["production"].one("CronJob")["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["suspend"]) == ("30 1 * * *", "Europe/Berlin", False)
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (7, 7)


def test_the_trigger_outlasts_the_night_and_kubernetes_the_trigger(rendered: dict[str, Rendered]) -> None:
    """With every retry used up: (28800 + 3600) * 3."""
    job = rendered["production"].one("CronJob")["spec"]["jobTemplate"]["spec"]
    (deadline,) = (a for a in container(job["template"])["args"] if a.startswith("--deadline="))
    assert (28800 + 3600) * 3 < int(deadline.removeprefix("--deadline=")) < job["activeDeadlineSeconds"]


def test_the_trigger_runs_the_submitter_with_what_it_needs(chart: Chart) -> None:
    rendered = chart.render("production", values={"trigger": {"models": ["sd3", "faces"]}})
    trigger = container(pod(rendered, "CronJob/expunge-night"))
    assert trigger["command"] == ["python", "-m", "expunge.jobs.submit_rayjob"]
    assert {"--prefix=expunge", "--namespace=night", "--night=$(NIGHT)"} <= set(trigger["args"])
    assert [a for a in trigger["args"] if a.startswith("--model")] == ["--model=sd3", "--model=faces"]
    (night,) = (v for v in trigger["env"] if v["name"] == "NIGHT")
    assert night["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"


def test_production_takes_every_secret_from_a_secret(rendered: dict[str, Rendered]) -> None:
    for name in ("CronJob/expunge-night", "RayJob/head", "RayJob/a100"):
        found = environment(pod(rendered["production"], name))
        assert found["EXPUNGE_DATABASE_URL"] == ("expunge-database", "url")
        assert found["EXPUNGE_BLOB_KEY"] == ("expunge-sealing-key", "blob-key")
        assert found["EXPUNGE_BLOB_URL"] == "s3://acme-expunge/blobs"
        assert found["EXPUNGE_TRACKING_URI"] == "http://expunge-mlflow:5000"
    server = environment(pod(rendered["production"], "Deployment/expunge-mlflow"))
    assert server["MLFLOW_BACKEND_STORE_URI"] == ("expunge-mlflow-database", "url")
    assert not {"EXPUNGE_DATABASE_URL", "EXPUNGE_BLOB_KEY"} & server.keys()


def test_a_bucket_without_identity_gets_its_keys_from_a_secret(rendered: dict[str, Rendered]) -> None:
    found = environment(pod(rendered["no-gpu"], "RayJob/cpu"))
    assert found["AWS_ACCESS_KEY_ID"] == ("expunge-s3", "AWS_ACCESS_KEY_ID")
    assert found["AWS_ENDPOINT_URL"] == "https://minio.storage.svc:9000"
    assert "AWS_ACCESS_KEY_ID" not in environment(pod(rendered["production"], "RayJob/head"))


def test_the_identity_is_on_those_who_use_the_bucket(rendered: dict[str, Rendered]) -> None:
    accounts = rendered["production"].of("ServiceAccount")
    annotated = {name for name, account in accounts.items() if account["metadata"].get("annotations")}
    assert annotated == {"expunge-ray", "expunge-mlflow"}


def test_dev_needs_neither_secrets_nor_workers(rendered: dict[str, Rendered]) -> None:
    dev = rendered["dev"]
    assert all("valueFrom" not in v or v["name"] == "NIGHT" for _, p in dev.pods() for v in container(p)["env"])
    assert "workerGroupSpecs" not in dev.cluster
    assert "num-cpus" not in dev.cluster["headGroupSpec"]["rayStartParams"]
    server = container(pod(dev, "Deployment/expunge-mlflow"))
    assert "--artifacts-destination=/var/lib/mlflow/artifacts" in server["args"]
    assert dev.one("Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert set(dev.of("PersistentVolumeClaim")) == {"expunge-home", "expunge-mlflow"}


def test_external_everything_brings_no_server_and_no_volume(rendered: dict[str, Rendered]) -> None:
    external = rendered["external-everything"]
    assert not external.of("Deployment")
    assert not external.of("PersistentVolumeClaim")
    assert not external.of("Service")
    found = environment(pod(external, "RayJob/head"))
    assert found["EXPUNGE_TRACKING_URI"] == "https://mlflow.example.org"
    assert found["EXPUNGE_BLOB_KEY"] == ("kms-exported", "current")
    volumes = pod(external, "RayJob/head")["spec"]["volumes"]
    claims = {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v}
    assert claims == {"team-share", "base-models"}


def test_the_home_is_shared_and_survives_the_release(rendered: dict[str, Rendered]) -> None:
    claim = rendered["production"].one("PersistentVolumeClaim", "-home")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    for name, template in rendered["production"].pods():
        mounts = {m["mountPath"] for m in container(template)["volumeMounts"]}
        assert ("/var/lib/expunge" in mounts) == (name not in ("Deployment/expunge-mlflow", "RayJob/submitter"))


def test_the_head_runs_the_driver_and_workers_do_the_work(rendered: dict[str, Rendered]) -> None:
    cluster = rendered["production"].cluster
    assert cluster["headGroupSpec"]["rayStartParams"] == {"dashboard-host": "0.0.0.0", "num-cpus": "0"}
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 8)
    amounts = {"cpu": "12", "memory": "120Gi", "nvidia.com/gpu": "1"}
    assert container(group["template"])["resources"] == {"limits": amounts, "requests": amounts}


def test_gpus_may_be_called_otherwise(chart: Chart) -> None:
    rendered = chart.render("production", values={"ray": {"gpuResource": "amd.com/gpu"}})
    limits = container(rendered.cluster["workerGroupSpecs"][0]["template"])["resources"]["limits"]
    assert (limits["amd.com/gpu"], "nvidia.com/gpu" in limits) == ("1", False)


def test_gpu_workers_land_where_they_should_and_apart(rendered: dict[str, Rendered]) -> None:
    spec = pod(rendered["production"], "RayJob/a100")["spec"]
    assert spec["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert spec["priorityClassName"] == "batch"
    (spread,) = spec["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("topology.kubernetes.io/zone", "ScheduleAnyway")
    assert spread["labelSelector"]["matchLabels"]["ray.io/group"] == "a100"


def test_shared_memory_is_memory_and_bounded(rendered: dict[str, Rendered]) -> None:
    template = pod(rendered["production"], "RayJob/a100")
    (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == "shared-memory")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container(template)["volumeMounts"]


def test_collectives_and_caches_find_their_place(rendered: dict[str, Rendered]) -> None:
    found = environment(pod(rendered["production"], "RayJob/a100"))
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("eth0", "eth0")
    assert found["TRITON_CACHE_DIR"].startswith("/tmp/")
    assert found["HOME"].startswith("/tmp/")
    assert found["HF_HUB_OFFLINE"] == "1"


def test_base_models_are_mounted_read_only(rendered: dict[str, Rendered]) -> None:
    template = pod(rendered["production"], "RayJob/a100")
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in container(template)["volumeMounts"]
    (volume,) = (v for v in template["spec"]["volumes"] if v["name"] == "models")
    assert volume["persistentVolumeClaim"] == {"claimName": "base-models", "readOnly": True}


@pytest.mark.parametrize("profile", PROFILES)
def test_ray_asks_for_a_token(rendered: dict[str, Rendered], profile: str) -> None:
    auth = rendered[profile].cluster["authOptions"]
    assert auth["mode"] == "token"
    assert auth.get("secretName") == {"production": "expunge-ray-token", "external-everything": "shared-ray-token"}.get(
        profile
    )


def test_ray_may_have_an_image_of_its_own(rendered: dict[str, Rendered]) -> None:
    production = rendered["production"]
    assert container(pod(production, "RayJob/a100"))["image"] == "registry.example.org/expunge:0.1.0-cuda"
    assert container(pod(production, "RayJob/submitter"))["image"] == "registry.example.org/expunge:0.1.0-cuda"
    assert container(pod(production, "CronJob/expunge-night"))["image"] == "registry.example.org/expunge:0.1.0-cpu"
    digest = container(pod(rendered["external-everything"], "RayJob/head"))["image"]
    assert digest.startswith("registry.example.org/expunge@sha256:")


def test_the_autoscaler_comes_with_its_limits(rendered: dict[str, Rendered]) -> None:
    cluster = rendered["production"].cluster
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["autoscalerOptions"]["resources"]["limits"] == {"cpu": "500m", "memory": "1Gi"}
    assert "autoscalerOptions" not in rendered["kueue"].cluster


@pytest.mark.parametrize("profile", PROFILES)
def test_no_ray_pod_sets_a_restart_policy(rendered: dict[str, Rendered], profile: str) -> None:
    """The autoscaler v2 refuses any but Never, which KubeRay then sets."""
    groups = [rendered[profile].cluster["headGroupSpec"], *rendered[profile].cluster.get("workerGroupSpecs", [])]
    assert all("restartPolicy" not in group["template"]["spec"] for group in groups)


def test_a_night_is_bounded_retried_and_cleaned_up(rendered: dict[str, Rendered]) -> None:
    spec = rendered["production"].rayjob["spec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"], spec["backoffLimit"]) == (28800, 3600, 2)
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 300)
    assert "deletionStrategy" not in spec


def test_deletion_rules_take_the_place_of_the_shutdown(rendered: dict[str, Rendered]) -> None:
    spec = rendered["external-everything"].rayjob["spec"]
    assert [rule["policy"] for rule in spec["deletionStrategy"]["deletionRules"]] == [
        "DeleteCluster",
        "DeleteCluster",
        "DeleteSelf",
    ]
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & spec.keys()


@pytest.mark.parametrize("mode", ["HTTPMode", "SidecarMode"])
def test_only_a_submitter_pod_has_a_template(chart: Chart, rendered: dict[str, Rendered], mode: str) -> None:
    assert "submitterPodTemplate" in rendered["production"].rayjob["spec"]
    spec = chart.render("production", values={"rayJob": {"submissionMode": mode}}).rayjob["spec"]
    assert not {"submitterPodTemplate", "submitterConfig"} & spec.keys()


def test_the_submitter_knows_no_secret(rendered: dict[str, Rendered]) -> None:
    """KubeRay gives it Ray's token, and it needs nothing else."""
    assert all(isinstance(v, str) for v in environment(pod(rendered["production"], "RayJob/submitter")).values())


def test_kueue_finds_its_queue_on_the_rayjob(rendered: dict[str, Rendered]) -> None:
    labels = rendered["kueue"].rayjob["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "nightly"
    assert labels["kueue.x-k8s.io/priority-class"] == "batch-low"
    assert not any("kueue" in label for label in rendered["production"].rayjob["metadata"]["labels"])


def test_raycronjob_takes_the_place_of_trigger_and_test(chart: Chart) -> None:
    rendered = chart.render("production", *RAYCRONJOB, values={"trigger": {"kind": "RayCronJob"}})
    assert not rendered.of("CronJob")
    assert not rendered.of("Pod")
    spec = rendered.one("RayCronJob")["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("30 1 * * *", "Europe/Berlin")
    assert "BATCH-ID" not in json.dumps(spec)
    assert "rayjob.json" not in rendered.one("ConfigMap", "-config")["data"]


def test_mlflow_is_hardened(rendered: dict[str, Rendered]) -> None:
    server = environment(pod(rendered["production"], "Deployment/expunge-mlflow"))
    assert server["MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX"] == "^mlflow-artifacts:/.*$"
    hosts = server["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert {"expunge-mlflow:5000", "expunge-mlflow.night.svc", "mlflow.example.org"} <= set(hosts)
    assert "*" not in server["MLFLOW_SERVER_ALLOWED_HOSTS"]


@pytest.mark.parametrize("profile", [p for p in PROFILES if p != "external-everything"])
def test_mlflow_is_probed_and_disrupted_one_at_a_time(rendered: dict[str, Rendered], profile: str) -> None:
    server = container(pod(rendered[profile], "Deployment/expunge-mlflow"))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    budget = rendered[profile].one("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    deployment = rendered[profile].one("Deployment")["spec"]
    assert budget["selector"] == deployment["selector"]
    service = rendered[profile].one("Service", "-mlflow")["spec"]["selector"]
    assert service.items() <= deployment["template"]["metadata"]["labels"].items()


HOLES = {
    "production": {"api-server", "autoscaler", "database", "dns", "metrics", "mlflow", "mlflow-database"}
    | {"object-store", "operator", "ray", "to-mlflow", "deny-all"},
    "external-everything": {"api-server", "database", "dns", "metrics", "object-store", "operator", "ray", "tracking"}
    | {"deny-all"},
    "dev": set(),
}


@pytest.mark.parametrize("profile", HOLES)
def test_there_are_only_the_holes_that_the_values_need(rendered: dict[str, Rendered], profile: str) -> None:
    name = rendered[profile].one("CronJob")["metadata"]["name"].removesuffix("-night")
    assert {p.removeprefix(f"{name}-") for p in rendered[profile].of("NetworkPolicy")} == HOLES[profile]


def test_a_hole_is_as_wide_as_its_peers(rendered: dict[str, Rendered]) -> None:
    (rule,) = rendered["production"].of("NetworkPolicy")["expunge-database"]["spec"]["egress"]
    assert rule == {"to": [{"ipBlock": {"cidr": "10.20.0.0/24"}}], "ports": [{"protocol": "TCP", "port": 5432}]}
    (dns,) = rendered["production"].one("NetworkPolicy", "-dns")["spec"]["egress"]
    assert [port["protocol"] for port in dns["ports"]] == ["UDP", "TCP"]
    (mlflow,) = rendered["production"].of("NetworkPolicy")["expunge-mlflow"]["spec"]["ingress"]
    assert len(mlflow["from"]) == 2


def test_a_model_hub_is_a_hole_of_its_own(chart: Chart) -> None:
    rendered = chart.render("kueue", values={"networkPolicy": {"modelHub": {"enabled": True}}})
    assert "expunge-model-hub" in rendered.of("NetworkPolicy")
    assert "HF_HUB_OFFLINE" not in environment(pod(rendered, "RayJob/head"))


def test_helm_test_asks_for_a_removal_of_its_own(rendered: dict[str, Rendered]) -> None:
    test = rendered["production"].one("Pod")
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert test["spec"]["activeDeadlineSeconds"] == 3600
    assert container(test)["args"] == container(pod(rendered["production"], "CronJob/expunge-night"))["args"]


def test_helm_test_can_be_left_out(chart: Chart) -> None:
    rendered = chart.render("production", values={"tests": {"enabled": False}})
    assert not rendered.of("Pod")
    assert "helm-test" not in rendered.one("ConfigMap", "-config")["data"]["config.toml"]
