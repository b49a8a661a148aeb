"""Our policies hold for every profile, at the longest release name too, and each of them can fail."""

import copy
import json
from collections.abc import Callable

import pytest

from tests.helm.charts import LONGEST, PROFILES, Chart, Json, Rendered
from tests.helm.policies import POLICIES

RAYCRONJOB = ("--api-versions", "ray.io/v1/RayCronJob")
NO_NETWORK = "everything is denied to every pod, and each hole names its ports"


@pytest.fixture(scope="module")
def longest(chart: Chart) -> dict[str, Rendered]:
    return {profile: chart.render(profile, release=LONGEST) for profile in PROFILES}


@pytest.fixture(scope="module")
def by_raycronjob(chart: Chart) -> dict[str, Rendered]:
    values = {"trigger": {"kind": "RayCronJob"}, "kueue": {"queue": "", "priorityClass": ""}}
    return {profile: chart.render(profile, *RAYCRONJOB, values=values) for profile in PROFILES}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("profile", PROFILES)
def test_it_holds(
    rendered: dict[str, Rendered],
    longest: dict[str, Rendered],
    by_raycronjob: dict[str, Rendered],
    profile: str,
    policy: str,
) -> None:
    known = ["no network policy"] if (profile, policy) == ("dev", NO_NETWORK) else []  # and its notes say so
    for found in (rendered, longest, by_raycronjob):
        assert POLICIES[policy](found[profile]) == known


def _container(spec: Json) -> Json:
    return spec["containers"][0]


def _pod(item: Json) -> Json:
    return item["spec"]["template"]["spec"]


BREAKS: dict[str, tuple[str, Callable[[Json], object], str]] = {
    "every pod meets the restricted pod security standard": (
        "Deployment",
        lambda o: _container(_pod(o))["securityContext"].update(allowPrivilegeEscalation=True),
        "mlflow may escalate",
    ),
    "root file systems are read-only, and /tmp is a bounded emptyDir": (
        "Deployment",
        lambda o: _pod(o)["volumes"][0].update(emptyDir={}),
        "scratch has no limit",
    ),
    "images are pinned": (
        "Deployment",
        lambda o: _container(_pod(o)).update(image="localhost:5000/expunge:latest"),
        "runs localhost:5000/expunge:latest",
    ),
    "requests are limits, GPUs included": (
        "Deployment",
        lambda o: _container(_pod(o))["resources"]["limits"].update(cpu="9"),
        "requests",
    ),
    "only the trigger, the test and the autoscaler's pod hold a token of the API server": (
        "Deployment",
        lambda o: _pod(o).pop("automountServiceAccountToken"),
        "holds a token",
    ),
    "the one role may create and get rayjobs, nothing else": (
        "Role",
        lambda o: o["rules"][0]["verbs"].append("delete"),
        "grants",
    ),
    "no secret is rendered, and secrets reach pods by reference alone": (
        "Deployment",
        lambda o: _container(_pod(o))["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        "AWS_SECRET_ACCESS_KEY is in clear",
    ),
    "names fit Kubernetes and KubeRay": ("CronJob", lambda o: o["metadata"].update(name="a" * 53), "CronJob aaa"),
    NO_NETWORK: ("NetworkPolicy", lambda o: o["spec"].update(egress=[{}]), "opens every port"),
    "services stay inside the cluster, and none is an Ingress": (
        "Service",
        lambda o: o["spec"].update(type="LoadBalancer"),
        "is LoadBalancer",
    ),
    "a service named like a setting does not become one": (
        "Deployment",
        lambda o: _pod(o).pop("enableServiceLinks"),
        "has service links",
    ),
}


@pytest.mark.parametrize("policy", BREAKS)
def test_it_can_fail(rendered: dict[str, Rendered], policy: str) -> None:
    kind, harm, complaint = BREAKS[policy]
    broken = Rendered(copy.deepcopy(rendered["production"].objects))
    harm(next(o for o in broken.objects if o["kind"] == kind))
    assert any(complaint in found for found in POLICIES[policy](broken))


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda job: job["metadata"].update(annotations={"requester": "jane"}), "metadata holds annotations"),
        (lambda job: job["metadata"]["labels"].update(requester="jane"), "the label requester is none of ours"),
        (lambda job: job["spec"].update(entrypoint="python nightly.py --prompt x"), "the entrypoint is python"),
        (lambda job: job["spec"].update(runtimeEnvYAML="env_vars: {A: b}"), "spec holds runtimeEnvYAML"),
        (lambda job: job["spec"].update(metadata={"a": "b"}), "spec holds metadata"),
    ],
)
def test_a_rayjob_that_says_more_would_be_seen(
    rendered: dict[str, Rendered], harm: Callable[[Json], object], complaint: str
) -> None:
    policy = "nothing of a request or a secret is in the RayJob's metadata, entrypoint or runtime environment"
    broken = Rendered(copy.deepcopy(rendered["production"].objects))
    config = broken.one("ConfigMap", "-config")
    job = json.loads(config["data"]["rayjob.json"])
    harm(job)
    config["data"]["rayjob.json"] = json.dumps(job)
    assert any(complaint in found for found in POLICIES[policy](broken))


def test_every_policy_is_shown_to_fail() -> None:
    assert POLICIES.keys() - BREAKS.keys() == {
        "nothing of a request or a secret is in the RayJob's metadata, entrypoint or runtime environment"
    }
