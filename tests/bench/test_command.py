"""`expunge bench method`: what it refuses, and that a run that was stopped goes on where it was."""

import json
from pathlib import Path
from typing import Any

import pytest

from expunge.bench.arms import ARMS, choose_arms
from expunge.bench.running import Run, prepare_group, run_arm
from expunge.cli import run
from expunge.errors import InputError
from expunge.settings import Settings, load_settings
from expunge.testbed import faces

TINY = {
    "TRAINING__STEPS": "2",
    "TRAINING__VIEWS": "2",
    "TRAINING__RETAIN_SIZE": "8",
    "TRAINING__RETAIN_BATCH": "8",
    "EVALUATION__ENCODERS": '["edges"]',
    "EVALUATION__LEVELS": "[0.4]",
    "EVALUATION__SEEDS": "8",
    "EVALUATION__UNSEEN_PICTURES": "16",
    "EVALUATION__GENERATION_SAMPLES": "16",
    "EVALUATION__INTEGRITY_SAMPLES": "16",
    "EVALUATION__SAMPLING_STEPS": "4",
    "EVALUATION__ROBUSTNESS": "off",
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in TINY.items():
        monkeypatch.setenv(f"EXPUNGE_{name}", value)
    return load_settings()


@pytest.fixture
def begun(settings: Settings, tmp_path: Path) -> Run:
    """A benchmark of one run with one face, which is prepared."""
    found = Run.of(tmp_path / "out", settings, "faces", [(46,)])
    found.begin()
    prepare_group(found, 0, 2)
    return found


def test_an_arm_is_measured_once_and_what_a_killed_run_left_is_in_nobody_s_way(begun: Run) -> None:
    (begun.folder / "arms" / "no-op-0" / "hotfix").mkdir(parents=True)
    (begun.folder / "arms" / "no-op-0" / "evidence.json").write_text("{")
    first = run_arm(begun, "no-op", 0)
    file = begun.folder / "results" / "no-op-0.json"
    written = file.stat().st_mtime_ns
    assert run_arm(begun, "no-op", 0) == first
    assert file.stat().st_mtime_ns == written
    assert (first.passes, first.steps, first.psnr) == (0, 0, 100.0)
    assert [request.removed for request in first.requests] == [False]
    assert not (begun.folder / "arms" / "no-op-0").exists()
    file.write_text("{ half")
    assert run_arm(begun, "no-op", 0).requests == first.requests


def test_arms_train_for_as_many_passes_as_the_product(begun: Run) -> None:
    """8 targets at 4 passes and 8 others at 4, twice, are 128: 48 per step of NegGrad, so 2 steps."""
    ours, control = run_arm(begun, "ours", 0), run_arm(begun, "neggrad", 0)
    assert (ours.steps, ours.passes) == (2, 128)
    assert (control.steps, control.passes) == (2, 96)
    assert ours.psnr is not None
    assert control.psnr is not None
    assert control.psnr != ours.psnr < 100


def test_nothing_of_the_user_s_home_is_touched(begun: Run, settings: Settings) -> None:
    assert begun.settings.home == begun.folder / "home"
    kept = {path.name for path in settings.home.iterdir()} if settings.home.exists() else set()
    assert kept <= {"blob.key"}, "the key that seals the files of nights, and nothing else"


def test_a_preparation_is_kept(begun: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in begun.prepared(0, 2).path.glob("*.json")}
    prepare_group(begun, 0, 2)
    assert {path: path.stat().st_mtime_ns for path in begun.prepared(0, 2).path.glob("*.json")} == before


def test_results_of_other_settings_are_not_mixed(
    begun: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run.of(begun.folder, settings, "faces", [(46,), (6,)]).begin()  # more runs are welcome
    with pytest.raises(InputError, match="other groups"):
        Run.of(begun.folder, settings, "faces", [(7,)]).begin()
    monkeypatch.setenv("EXPUNGE_TRAINING__STEPS", "3")
    with pytest.raises(InputError, match="other training"):
        Run.of(begun.folder, load_settings(), "faces", [(46,)]).begin()


def test_a_retrained_model_takes_the_base_model_s_place(settings: Settings, tmp_path: Path) -> None:
    oracle = faces.run(tmp_path / "oracle", tmp_path, steps=1, without=[46])
    found = Run.of(tmp_path / "out", settings, "faces", [(46,)], oracle)
    found.begin()
    prepare_group(found, 0, 2)
    result = run_arm(found, "retrained", 0)
    assert result.passes == 0
    assert result.psnr is not None
    assert result.psnr < 20  # one step of training makes no faces


def test_the_default_arms_are_those_that_can_run() -> None:
    assert set(ARMS) - set(choose_arms("all", prompts=False, oracle=False)) == {"esd", "retrained"}
    assert choose_arms("all", prompts=True, oracle=True) == list(ARMS)
    assert choose_arms(" ours, no-op", prompts=False, oracle=False) == ["no-op", "ours"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arms", "ours,theirs"], "--arms: there is no arm 'theirs': use some of no-op"),
        (["--arms", "esd"], "esd needs a model with prompts"),
        (["--arms", "retrained"], "expunge testbed NAME --without NUMBERS"),
        (["--oracle", "somewhere"], "--oracle and --without belong together"),
        (["--without", "0-19"], "--oracle and --without belong together"),
        (["--oracle", "no-such-folder", "--without", "0-19"], "--oracle"),
        (["--testbed", "people", "--requests", "17"], "--requests: 17 are more than the 16"),
        (["--testbed", "dogs"], "Invalid value for '--testbed'"),
        (["--seeds", "0"], "Invalid value for '--seeds'"),
    ],
)
def test_it_refuses_before_anything_is_computed(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["bench", "method", "--out", str(out), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(["bench", "method", "--out", str(tmp_path / "file" / "out")]) == 6
    assert "error:" in capsys.readouterr().err


def test_errors_are_json_where_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "method", "--arms", "theirs", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


@pytest.mark.slow
def test_a_second_start_on_ray_measures_only_what_is_left(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(arms: str) -> Any:
        command = [
            "bench",
            "method",
            "--seeds",
            "1",
            "--requests",
            "1",
            "--workers",
            "1",
            "--out",
            str(tmp_path / "out"),
        ]
        capsys.readouterr()
        assert run([*command, "--out", str(tmp_path / "out"), "--arms", arms, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    start("no-op")
    file = tmp_path / "out" / "results" / "no-op-0.json"
    written = file.stat().st_mtime_ns
    both = start("no-op,fine-tune")
    assert [result["arm"] for result in both["results"]] == ["no-op", "fine-tune"]
    assert both["failures"] == []
    assert file.stat().st_mtime_ns == written
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines == both["results"]
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "fine-tuning on the surrogate" in (out / "table.md").read_text()
