"""Values that are refused, each with the sentence that a person reads."""

from pathlib import Path

import pytest
import yaml

from tests.helm.charts import Chart, Json, profile_file

REFUSED: list[Json] = yaml.safe_load((Path(__file__).parent / "refused.yaml").read_text())
WORKER = {
    "replicas": 1,
    "minReplicas": 0,
    "maxReplicas": 2,
    "resources": {"cpu": 8, "memory": "64Gi"},
    "sharedMemory": "16Gi",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["says"][:60])
def test_it_is_refused_with_what_to_write(chart: Chart, case: Json) -> None:
    done = chart.template("-f", str(profile_file(case["profile"])), values=case["values"])
    assert done.code != 0
    assert case["says"] in done.err


def test_all_problems_are_said_at_once(chart: Chart) -> None:
    values = {"trigger": {"schedule": "x", "timeZone": "?"}, "image": {"tag": "latest"}}
    done = chart.template("-f", str(profile_file("dev")), values=values)
    assert "values of expunge are refused:" in done.err
    assert [line.split(":")[0] for line in done.err.splitlines() if line.startswith("- ")] == [
        "- image.tag",
        "- trigger.schedule",
        "- trigger.timeZone",
    ]


def test_the_defaults_ask_for_what_production_needs(chart: Chart) -> None:
    done = chart.template()
    assert done.err.count("(or profile: dev") == 5


@pytest.mark.parametrize(
    "values",
    [
        {"trigger": {"schedule": "@daily", "timeZone": "America/Argentina/Buenos_Aires"}},
        {"trigger": {"timeZone": "Etc/GMT+2"}},
        {"fullnameOverride": "a" * 23},
        {"ray": {"head": {"sharedMemory": "1.5Gi"}}},
        {"ray": {"env": {"NCCL_IB_DISABLE": 1, "TOKENIZERS_PARALLELISM": "false"}}},
        {
            "ray": {"workers": [{**WORKER, "name": "a", "spreadOver": ""}, {**WORKER, "name": "cpu-2"}]},
            "home": {"accessMode": "ReadWriteMany"},
        },
    ],
    ids=str,
)
def test_what_is_right_is_silent(chart: Chart, values: Json) -> None:
    assert chart.template("-f", str(profile_file("dev")), values=values).err == ""
