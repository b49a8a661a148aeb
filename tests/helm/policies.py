"""Our own policies over rendered objects: each is a function from a rendering to what violates it."""

import json
import re
from collections.abc import Callable, Iterator

from tests.helm.charts import Json, Rendered

Policy = Callable[[Rendered], list[str]]
POLICIES: dict[str, Policy] = {}

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SECRET = re.compile(r"(?i)(password|secret|token|credential|private_key|access_key|blob_key|database_url)")
ENTRYPOINT = "python -m expunge.jobs.nightly --batch BATCH-ID --home HOME-ID"
LIMITS = {"CronJob": 52, "RayCronJob": 36, "Service": 63, "Deployment": 63, "Pod": 63, "NetworkPolicy": 63}
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def policy(name: str) -> Callable[[Policy], Policy]:
    def add(function: Policy) -> Policy:
        POLICIES[name] = function
        return function

    return add


@policy("every pod meets the restricted pod security standard")
def restricted(rendered: Rendered) -> list[str]:
    found = []
    for name, pod in rendered.pods():
        spec = pod["spec"]
        whole = spec.get("securityContext", {})
        if not whole.get("runAsNonRoot") or not whole.get("runAsUser"):
            found.append(f"{name} may run as root")
        if whole.get("seccompProfile") != {"type": "RuntimeDefault"}:
            found.append(f"{name} has no seccomp profile")
        found += [f"{name} has {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
        for volume in spec.get("volumes", []):
            found += [f"{name} mounts {kind}" for kind in volume.keys() - {"name"} - VOLUMES]
        for container in containers(spec):
            found += [f"{name}: {problem}" for problem in _not_restricted(container)]
    if autoscaler := rendered_autoscaler(rendered):
        found += [f"autoscaler: {problem}" for problem in _not_restricted({"name": "autoscaler", **autoscaler})]
    return found


def _not_restricted(container: Json) -> Iterator[str]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{container['name']} may escalate"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{container['name']} keeps capabilities"
    if context.get("privileged"):
        yield f"{container['name']} is privileged"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield f"{container['name']} takes a port of the host"


@policy("root file systems are read-only, and /tmp is a bounded emptyDir")
def read_only(rendered: Rendered) -> list[str]:
    found = []
    for name, pod in rendered.pods():
        empty = {v["name"]: v["emptyDir"] for v in pod["spec"].get("volumes", []) if "emptyDir" in v}
        found += [f"{name}: {volume} has no limit" for volume, at in empty.items() if not at.get("sizeLimit")]
        for container in containers(pod["spec"]):
            if not container.get("securityContext", {}).get("readOnlyRootFilesystem"):
                found.append(f"{name}: {container['name']} can write to its root")
            mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
            if mounts.get("/tmp") not in empty:
                found.append(f"{name}: {container['name']} has no /tmp")
    return found


@policy("images are pinned")
def pinned(rendered: Rendered) -> list[str]:
    found = []
    for name, pod in rendered.pods():
        for image in (container["image"] for container in containers(pod["spec"])):
            _, _, tag = image.rpartition("/")[2].partition(":")
            if "@sha256:" not in image and tag in ("", "latest"):
                found.append(f"{name} runs {image}")
    return found


@policy("requests are limits, GPUs included")
def guaranteed(rendered: Rendered) -> list[str]:
    found = []
    for name, pod in rendered.pods():
        for container in containers(pod["spec"]):
            resources = container.get("resources", {})
            limits, requests = resources.get("limits"), resources.get("requests")
            if not limits or limits != requests or not {"cpu", "memory"} <= limits.keys():
                found.append(f"{name}: {container['name']} requests {requests} and is limited to {limits}")
    return found


@policy("only the trigger, the test and the autoscaler's pod hold a token of the API server")
def tokens(rendered: Rendered) -> list[str]:
    found = []
    for name, pod in rendered.pods():
        needs = name.startswith(("CronJob/", "Pod/")) or (name == "RayJob/head" and bool(rendered_autoscaler(rendered)))
        if pod["spec"].get("automountServiceAccountToken") is not needs:
            found.append(f"{name} {'lacks' if needs else 'holds'} a token")
    for name, account in rendered.of("ServiceAccount").items():
        if account.get("automountServiceAccountToken") is not False:
            found.append(f"{name} gives its token to every pod")
    return found


@policy("the one role may create and get rayjobs, nothing else")
def rights(rendered: Rendered) -> list[str]:
    allowed = [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    found = [f"{name} grants {r['rules']}" for name, r in rendered.of("Role").items() if r["rules"] != allowed]
    found += [f"{kind} {name}" for kind in ("ClusterRole", "ClusterRoleBinding") for name in rendered.of(kind)]
    for name, binding in rendered.of("RoleBinding").items():
        subjects = [subject["name"] for subject in binding["subjects"]]
        if len(subjects) != 1 or not subjects[0].endswith("-trigger"):
            found.append(f"{name} binds {subjects}")
    return found


@policy("no secret is rendered, and secrets reach pods by reference alone")
def referred(rendered: Rendered) -> list[str]:
    found = [f"Secret {name} is rendered" for name in rendered.of("Secret")]
    for name, pod in rendered.pods():
        for container in containers(pod["spec"]):
            for variable in container.get("env", []):
                if SECRET.search(variable["name"]) and "value" in variable:
                    found.append(f"{name}: {variable['name']} is in clear")
            words = [*container.get("command", []), *container.get("args", [])]
            found += [f"{name}: {word} names a secret" for word in words if SECRET.search(word)]
    return found


@policy("nothing of a request or a secret is in the RayJob's metadata, entrypoint or runtime environment")
def impersonal(rendered: Rendered) -> list[str]:
    if not rendered.of("CronJob"):
        return []
    job = rendered.rayjob
    found = [f"metadata holds {key}" for key in job["metadata"].keys() - {"name", "labels"}]
    found += [f"spec holds {key}" for key in ("runtimeEnvYAML", "metadata") if key in job["spec"]]
    if job["spec"]["entrypoint"] != ENTRYPOINT:
        found.append(f"the entrypoint is {job['spec']['entrypoint']}")
    known = re.compile(r"(app\.kubernetes\.io|helm\.sh|kueue\.x-k8s\.io)/")
    found += [f"the label {label} is none of ours" for label in job["metadata"]["labels"] if not known.match(label)]
    return found


@policy("names fit Kubernetes and KubeRay")
def names(rendered: Rendered) -> list[str]:
    found = []
    for item in rendered.objects:
        name, kind = item["metadata"]["name"], item["kind"]
        if len(name) > LIMITS.get(kind, 253) or not DNS_LABEL.fullmatch(name):
            found.append(f"{kind} {name}")
    for cronjob in rendered.of("CronJob").values():
        (prefix,) = (a for a in _container(cronjob)["args"] if a.startswith("--prefix="))
        if len(prefix.removeprefix("--prefix=")) > 23:
            found.append(f"RayJobs would be named {prefix}")
    return found


@policy("everything is denied to every pod, and each hole names its ports")
def closed(rendered: Rendered) -> list[str]:
    policies = rendered.of("NetworkPolicy")
    if not policies:
        return ["no network policy"]
    deny = rendered.one("NetworkPolicy", "-deny-all")["spec"]
    everyone = deny["podSelector"]["matchLabels"]
    found = []
    if deny["policyTypes"] != ["Ingress", "Egress"] or "ingress" in deny or "egress" in deny:
        found.append("deny-all lets something through")
    for name, pod in rendered.pods():
        if not everyone.items() <= pod["metadata"]["labels"].items():
            found.append(f"deny-all does not select {name}")
    for name, item in policies.items():
        for rule in [*item["spec"].get("ingress", []), *item["spec"].get("egress", [])]:
            if not rule.get("ports") and not name.endswith("-ray"):
                found.append(f"{name} opens every port")
    return found


@policy("services stay inside the cluster, and none is an Ingress")
def internal(rendered: Rendered) -> list[str]:
    services = rendered.of("Service").items()
    found = [
        f"{name} is {s['spec']['type']}" for name, s in services if s["spec"].get("type", "ClusterIP") != "ClusterIP"
    ]
    return found + [f"Ingress {name}" for name in rendered.of("Ingress")]


@policy("a service named like a setting does not become one")
def unlinked(rendered: Rendered) -> list[str]:
    """Kubernetes would add EXPUNGE_MLFLOW_PORT and its like to every pod, for a release called expunge."""
    return [
        f"{name} has service links"
        for name, pod in rendered.pods()
        if pod["spec"].get("enableServiceLinks") is not False
    ]


def containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def rendered_autoscaler(rendered: Rendered) -> Json | None:
    for item in rendered.objects:
        if "rayjob.json" in item.get("data", {}):
            return json.loads(item["data"]["rayjob.json"])["spec"]["rayClusterSpec"].get("autoscalerOptions")
        if item["kind"] == "RayCronJob":
            return item["spec"]["jobTemplate"]["rayClusterSpec"].get("autoscalerOptions")
    return None


def _container(cronjob: Json) -> Json:
    return cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
