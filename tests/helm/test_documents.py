"""What a person reads: the notes after an install, the README's table, and links that lead somewhere."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.helm.charts import CHART, PROFILES, ROOT, Chart, Rendered, documents, profile_file

NOTED = """apiVersion: v1
kind: ConfigMap
metadata: {name: noted}
data:
  notes: {{ tpl (.Files.Get "files/NOTES.txt") . | toJson }}
"""


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("helm_readme", ROOT / "helm" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def noted(chart: Chart, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The notes of every profile. Only an install prints them, which asks a cluster: so a copy renders them as data."""
    copy = tmp_path_factory.mktemp("notes") / "expunge"
    shutil.copytree(CHART, copy)
    (copy / "templates" / "NOTES.txt").rename(copy / "files" / "NOTES.txt")
    (copy / "templates" / "noted.yaml").write_text(NOTED)
    found = {}
    for profile in PROFILES:
        done = chart.run("template", "expunge", str(copy), "-n", "night", "-f", str(profile_file(profile)))
        assert done.code == 0, done.err
        (found[profile],) = (d["data"]["notes"] for d in documents(done.out) if d["metadata"]["name"] == "noted")
    return found


def test_the_readme_is_what_the_comments_say(readme: ModuleType) -> None:
    """Else run `python helm/readme.py`."""
    table = readme.table((CHART / "values.yaml").read_text())
    assert table in (CHART / "README.md").read_text()


def test_the_readme_has_a_row_for_every_value(readme: ModuleType) -> None:
    rows = set(re.findall(r"^\| `([^`]+)` \|", readme.table((CHART / "values.yaml").read_text()), re.MULTILINE))

    def leaves(tree: dict[str, object], prefix: str = "") -> list[str]:
        return [
            leaf
            for name, value in tree.items()
            for leaf in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name])
        ]

    for leaf in leaves(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert any(leaf == row or leaf.startswith(f"{row}.") for row in rows), leaf


def test_a_comment_of_two_lines_is_one_description(readme: ModuleType) -> None:
    source = "a:\n  # -- One\n  # two.\n  b: 1\n  # no description\n  c: {d: 2}\n"
    assert readme.table(source).splitlines()[2:] == ["| `a.b` | `1` | One two. |", '| `a.c` | `{"d": 2}` |  |']


@pytest.mark.parametrize("profile", PROFILES)
def test_the_notes_name_what_is_there(noted: dict[str, str], rendered: dict[str, Rendered], profile: str) -> None:
    text = noted[profile]
    (cronjob,) = rendered[profile].of("CronJob")
    assert f"--from=cronjob/{cronjob}" in text
    assert "helm test expunge -n night" in text


def test_the_notes_name_every_secret_that_must_exist(noted: dict[str, str], rendered: dict[str, Rendered]) -> None:
    for profile in PROFILES:
        text = noted[profile]
        for _, template in rendered[profile].pods():
            for container in template["spec"]["containers"]:
                for variable in container["env"]:
                    reference = variable.get("valueFrom", {}).get("secretKeyRef")
                    assert reference is None or re.search(rf"{reference['name']} with .*{reference['key']}", text)


def test_the_notes_of_dev_warn(noted: dict[str, str]) -> None:
    text = noted["dev"]
    assert "Do not use it for anyone's data" in text
    assert "Network policies are off" in text
    assert "Do not use it" not in noted["production"]


def test_the_notes_say_which_holes_are_wide(noted: dict[str, str]) -> None:
    assert noted["production"].count("networkPolicy.") == 2
    assert "networkPolicy.objectStore.peers" not in noted["no-gpu"]


@pytest.mark.parametrize("path", ["helm/expunge/README.md", "deploy/RUNBOOK.md"])
def test_files_that_a_document_names_exist(path: str) -> None:
    named = re.findall(r"`((?:helm|deploy|jobs|ci|templates|tests)/[\w./-]+\.\w+)`", (ROOT / path).read_text())
    for name in named:
        assert (ROOT / name).exists() or (CHART / name).exists(), name
    assert len(named) >= 2


def test_nothing_is_left_from_a_template() -> None:
    assert {path.name for path in (CHART / "templates").iterdir()} >= {"NOTES.txt", "tests"}
    for path in [*CHART.rglob("*.yaml"), *CHART.rglob("*.tpl")]:
        assert "TODO" not in Path(path).read_text(), path
