"""submit: what is refused before the night, and what is said about pictures that will be cut."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Command = Callable[..., Any]


def paint(folder: Path, name: str, size: tuple[int, int], colour: str = "teal") -> Path:
    Image.new("RGB", size, colour).save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("blnd", "edit.editor: 'blnd' is unknown: use one of blend, inpaint, regenerate"),
        ("blend:strenth=1", "edit.options.strenth: there is no such option: use one of mode, ellipse"),
        ("blend:strength=2", "edit.options.strength: Input should be less than or equal to 1: strength is a number"),
        ("blend:mode=hard", "edit.options.mode: Input should be 'soft' or 'seamless'"),
        ("blend:mask=tall.png", "edit.mask: 16 x 24 pixels do not fit images[0], which has 24 x 16: give a mask of"),
        ("blend:mask=none.png", "edit.mask: "),
    ],
)
def test_an_edit_that_cannot_work_is_refused(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch, edit: str, message: str
) -> None:
    monkeypatch.chdir(picture.parent)
    paint(picture.parent, "tall.png", (16, 24), "white")
    ended = command("submit", picture, "--model", "flags", "--edit", edit)
    assert ended.code == 2
    assert ended.err.startswith(f"error: {message}")
    line = json.dumps({"model": "flags", "images": [picture.name], "edit": edit})
    (picture.parent / "requests.jsonl").write_text(f"{line}\n{line}\n")
    told = command("submit", "--batch", "requests.jsonl")
    assert told.code == 2
    assert told.err.count(message) == 2
    assert command("list", "--json").json == []


def test_a_submission_without_an_edit_imports_no_editor(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("expunge.surrogates")]:
        monkeypatch.delitem(sys.modules, name)
    assert command("submit", picture, "--model", "flags").code == 0
    assert not any(name.startswith("expunge.surrogates") for name in sys.modules)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((48, 32), None),
        ((49, 32), None),
        ((48, 64), "images[0] is 48 x 64 and the model makes 48 x 32: 50% of its height will be cut away, in equal "),
        ((96, 32), "50% of its width will be cut away, in equal parts at left and right"),
    ],
)
def test_what_will_be_cut_away_is_said(
    command: Command, tmp_path: Path, size: tuple[int, int], said: str | None
) -> None:
    ended = command("submit", paint(tmp_path, "b.png", size), "--model", "flags")
    assert ended.code == 0
    assert ended.out.startswith("accepted req-")
    if said is None:
        assert ended.err == ""
    else:
        assert ended.err.startswith("note: ")
        assert said in ended.err
        assert "submit it again with a box around it" in ended.err


def test_a_box_of_the_models_shape_is_not_cut(command: Command, tmp_path: Path) -> None:
    tall = paint(tmp_path, "b.png", (48, 64))
    ended = command("submit", tall, "--model", "flags", "--box", "0,10,48,42", "--json")
    assert ended.json["notes"] == []
    assert command("submit", tall, "--model", "flags", "--json").json["notes"] != []
    refused = command("submit", tall, "--model", "flags", "--box", "0,10,48,80")
    assert refused.code == 2
    assert refused.err.startswith("error: box: 0,10,48,80 reaches beyond images[0], which is 48 x 64: write left,top")


def test_notes_on_a_file_of_requests(command: Command, tmp_path: Path) -> None:
    paint(tmp_path, "b.png", (48, 64))
    line = {"model": "flags", "images": ["b.png"]}
    written = [{**line, "external_id": str(i)} for i in range(12)]
    written.append({**line, "external_id": "boxed", "box": [0, 0, 1, 0.5]})
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in written))
    ended = command("submit", "--batch", tmp_path / "requests.jsonl")
    assert (ended.code, ended.out) == (0, "13 accepted, 0 known already, 0 refused\n")
    assert ended.err.startswith("note: line 1: images[0] is 48 x 64")
    assert ended.err.count("note: line ") == 10
    assert ended.err.endswith("note: 2 more lines have such notes; --json lists them all\n")
    for each in written:
        each["external_id"] = f"again {each['external_id']}"
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in written))
    told = command("submit", "--batch", tmp_path / "requests.jsonl", "--json").json["lines"]
    assert [len(each["notes"]) for each in told] == [1] * 12 + [0]


@pytest.mark.parametrize("source", ["some/hub-id", "/no/such/folder"])
def test_a_model_whose_files_are_elsewhere_does_not_fail_a_submission(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'[models.mine]\nsource = "{source}"\n')
    monkeypatch.setenv("EXPUNGE_CONFIG", str(config))
    assert command("submit", picture, "--model", "mine").code == 0


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('["odd"]', "model_index.json"),
        ('{"_class_name": ["DDPMPipeline"]}', "model_index.json: _class_name"),
        ('{"_class_name": "FluxPipeline"}', "FluxPipeline is not supported"),
    ],
)
def test_a_model_that_cannot_work_is_refused_before_a_night_is_spent_on_it(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, index: str, said: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text(index)
    config = tmp_path / "config.toml"
    config.write_text(f'[models.mine]\nsource = "{broken}"\n')
    monkeypatch.setenv("EXPUNGE_CONFIG", str(config))
    refused = command("submit", picture, "--model", "mine")
    assert refused.code == 2
    assert f"model mine ({broken}): " in refused.err
    assert said in refused.err
    assert command("list", "--json").json == []


def test_the_settings_resolution_counts(
    command: Command, picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[models.mine]\nsource = "some/hub-id"\nresolution = [64, 64]\n')
    monkeypatch.setenv("EXPUNGE_CONFIG", str(config))
    assert "the model makes 64 x 64: 33% of its width" in command("submit", picture, "--model", "mine").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--due", "2020-01-31"],
            "error: due: 2020-01-31 is in the past: give today or a later day, or leave it out\n",
        ),
        (["--due", "20990131"], "error: due: Input should be a valid date, written YYYY-MM-DD\n"),
        (["--external-id", " "], "error: external_id: String should have 1 to 200 characters"),
    ],
)
def test_what_cannot_be_meant(command: Command, picture: Path, arguments: list[str], message: str) -> None:
    ended = command("submit", picture, "--model", "flags", *arguments)
    assert ended.code == 2
    assert ended.err.startswith(message)
