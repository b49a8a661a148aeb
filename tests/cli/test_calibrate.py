"""`expunge calibrate` makes the match thresholds of a model, and says what is missing before it works for long."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expunge.evaluation.calibration import find_calibration
from expunge.settings import load_settings
from tests.families.tiny import ddpm

Command = Callable[..., Any]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("EXPUNGE_MODELS__MINE__SOURCE", str(ddpm(tmp_path / "model")))
    monkeypatch.setenv("EXPUNGE_EVALUATION__ENCODERS", '["edges"]')
    monkeypatch.setenv("EXPUNGE_EVALUATION__SAMPLING_STEPS", "2")
    return "mine"


def folder(path: Path, count: int, seed: int) -> Path:
    path.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).resize((32, 32)).save(path / f"secret-{i}.png")
    return path


def test_it_is_written_where_the_evaluation_finds_it(command: Command, model: str, tmp_path: Path) -> None:
    known, unseen = folder(tmp_path / "private", 12, 0), folder(tmp_path / "unseen", 9, 1)
    shown = command("calibrate", model, "--pictures", known, "--unseen", unseen)
    assert shown.code == 0, shown.err
    assert "edges" in shown.out
    found = find_calibration(load_settings(), model)
    assert found is not None
    assert found.thresholds["edges"].non_matching == 12 * 11 + 9 * 12 + 128 * 9
    assert "expunge calibrate mine --pictures FOLDER --unseen FOLDER" in found.source
    assert "12 pictures of --pictures" in found.source
    file = load_settings().home / "calibrations" / "mine.json"
    assert str(file) in shown.out
    assert file.stat().st_mode & 0o777 == 0o600
    assert "private" not in file.read_text()


def test_without_folders_the_model_s_own_samples_are_used(command: Command, model: str) -> None:
    printed = command("calibrate", model, "--json").json
    assert printed["thresholds"]["edges"]["how"] == "robust normal tail"
    assert printed["file"].endswith("mine.json")


def test_bad_input_is_one_line_before_any_sample(
    command: Command, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, empty = folder(tmp_path / "few", 7, 0), tmp_path / "empty"
    empty.mkdir()
    for arguments, says in [
        ((model, "--pictures", tmp_path / "none"), "--pictures: there is no folder"),
        ((model, "--pictures", empty), "--pictures: .* holds no image"),
        ((model, "--unseen", few), "--unseen: .* holds 7 pictures: give at least 8"),
        (("nobody",), "nobody"),
    ]:
        shown = command("calibrate", *arguments)
        assert shown.code in (2, 4)
        assert shown.err.count("\n") == 1
        assert re.search(says, shown.err), shown.err
    monkeypatch.setenv("EXPUNGE_EVALUATION__ENCODERS", f'["sscd:/none@{"0" * 64}"]')
    shown = command("calibrate", model)
    assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert "there is no file /none" in shown.err
