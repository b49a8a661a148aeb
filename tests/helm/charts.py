"""What the tests render: the chart by values, with the real helm, into plain objects."""

import gzip
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "expunge"
PROFILES = ("dev", "production", "kueue", "no-gpu", "external-everything")
KUBERNETES = ("1.29", "1.30", "1.31", "1.32", "1.33")
LONGEST = "a" * 53  # what helm takes as a release name
CRDS = Path(__file__).parent / "crds"


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Chart:
    """One helm binary, and the chart in the checkout."""

    helm: Path

    def run(self, *arguments: str) -> Ended:
        done = subprocess.run([self.helm, *arguments], capture_output=True, text=True, check=False, timeout=60)
        return Ended(done.returncode, done.stdout, done.stderr)

    def template(self, *arguments: str, release: str = "expunge", values: Json | None = None) -> Ended:
        """`helm template` in the namespace `night`; `values` are written over those of `arguments`."""
        with tempfile.TemporaryDirectory() as folder:
            extra = Path(folder) / "values.yaml"
            extra.write_text(json.dumps(values or {}))
            return self.run("template", release, str(CHART), "-n", "night", *arguments, "-f", str(extra))

    def render(self, profile: str, *arguments: str, release: str = "expunge", values: Json | None = None) -> "Rendered":
        done = self.template("-f", str(profile_file(profile)), *arguments, release=release, values=values)
        assert done.code == 0, done.err
        return Rendered(tuple(sorted(documents(done.out), key=lambda o: (o["kind"], o["metadata"]["name"]))))


@dataclass(frozen=True)
class Rendered:
    objects: tuple[Json, ...]

    def of(self, kind: str) -> dict[str, Json]:
        return {o["metadata"]["name"]: o for o in self.objects if o["kind"] == kind}

    def one(self, kind: str, end: str = "") -> Json:
        """The only object of a kind whose name ends so."""
        (found,) = (o for name, o in self.of(kind).items() if name.endswith(end))
        return found

    @property
    def rayjob(self) -> Json:
        """The template that the trigger reads, as it would send it."""
        template = json.loads(self.one("ConfigMap", "-config")["data"]["rayjob.json"])
        template["metadata"]["name"] = "night"
        return template

    @property
    def cluster(self) -> Json:
        return self.rayjob["spec"]["rayClusterSpec"]

    def pods(self) -> Iterator[tuple[str, Json]]:
        """Every pod template with its name, those inside of the RayJob included."""
        for item in self.objects:
            name, spec = f"{item['kind']}/{item['metadata']['name']}", item.get("spec", {})
            match item["kind"]:
                case "Pod":
                    yield name, item
                case "Deployment":
                    yield name, spec["template"]
                case "CronJob":
                    yield name, spec["jobTemplate"]["spec"]["template"]
                case "RayCronJob":
                    yield from _ray_pods(spec["jobTemplate"])
                case "ConfigMap" if "rayjob.json" in item["data"]:
                    yield from _ray_pods(json.loads(item["data"]["rayjob.json"])["spec"])


def _ray_pods(spec: Json) -> Iterator[tuple[str, Json]]:
    cluster = spec["rayClusterSpec"]
    yield "RayJob/head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", []):
        yield f"RayJob/{group['groupName']}", group["template"]
    if "submitterPodTemplate" in spec:
        yield "RayJob/submitter", spec["submitterPodTemplate"]


def profile_file(profile: str) -> Path:
    return CHART / "ci" / f"{profile}-values.yaml"


def documents(text: str) -> list[Json]:
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


@cache
def strict_schema(plural: str) -> Json:
    """KubeRay's definition of a kind, with unknown fields refused wherever it does not say that it keeps them."""
    text = gzip.decompress((CRDS / f"ray.io_{plural}.yaml.gz").read_bytes())
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    return _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Json) -> Json:
    made = {key: _strict_of(key, value) for key, value in schema.items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not keeps:
        made["additionalProperties"] = False
    return made


def _strict_of(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: _strict(inner) for name, inner in value.items()}
    if key in ("items", "additionalProperties") and isinstance(value, dict):
        return _strict(value)
    return value
