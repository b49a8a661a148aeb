"""The fields that Kubernetes lets nobody change: an upgrade that changes one fails on the cluster.

`python -m tests.helm.immutables` writes down those of the chart as it is, when a version of it is released.
"""

import json
from pathlib import Path

from tests.helm.charts import PROFILES, Json, Rendered

SNAPSHOT = Path(__file__).parent / "immutables.json"


def immutables(rendered: Rendered) -> Json:
    """`Kind/name` to its immutable fields. A claim may grow, so its size is none of them."""
    found: Json = {}
    for item in rendered.objects:
        spec = item.get("spec", {})
        match item["kind"]:
            case "Deployment":
                fields = {"selector": spec["selector"]}
            case "PersistentVolumeClaim":
                fields = {name: value for name, value in spec.items() if name != "resources"}
            case "Service":
                fields = {"clusterIP": spec.get("clusterIP")}
            case "RoleBinding":
                fields = {"roleRef": item["roleRef"]}
            case _:
                continue
        found[f"{item['kind']}/{item['metadata']['name']}"] = fields
    return found


def main() -> None:
    from tests.helm.conftest import fetch_helm

    chart = fetch_helm()
    everything = {profile: immutables(chart.render(profile)) for profile in PROFILES}
    SNAPSHOT.write_text(json.dumps(everything, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
