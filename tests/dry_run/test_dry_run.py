"""The dry run in small: its model is one that the platform takes, and it finds what a stage should not hold."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from expunge.families import deep_preflight, load_model
from expunge.settings import ModelSettings, load_settings
from tests.dry_run import __main__, checkpoint, load_back, night, report
from tests.dry_run.watch import Memory, Record, Stage

PIXELS = 32


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model, with T5 in two files as the hub has it."""
    monkeypatch.setattr(checkpoint, "SHARD", 30_000)
    return checkpoint.write(tmp_path / "model", checkpoint.TINY)


def test_the_model_is_one_that_the_platform_takes(written: Path, tmp_path: Path) -> None:
    settings = ModelSettings(source=str(written), resolution=(PIXELS, PIXELS), prompt_tokens=4)
    assert deep_preflight("random", settings, tmp_path / "cache") == (PIXELS, PIXELS)
    assert (written / "text_encoder_3" / "model.safetensors.index.json").is_file()
    model = load_model(settings, (PIXELS, PIXELS))
    rows = model.condition(["a photo of a house", ""])
    assert not torch.equal(*rows["encoder_hidden_states"]), "the prompts differ"
    picture = torch.rand(1, 3, PIXELS, PIXELS)
    again = model.decode(model.encode(picture))
    assert bool(again.isfinite().all())
    assert again.std() > 0.05, "the autoencoder returns more than grey"


def test_plain_diffusers_loads_it(written: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(written, torch_dtype=torch.bfloat16, use_safetensors=True)
    made = pipeline("a photo", height=PIXELS, width=PIXELS, num_inference_steps=2, output_type="pt").images  # pyright: ignore
    assert isinstance(made, torch.Tensor)
    assert bool(made.isfinite().all())


def test_a_model_that_was_written_is_kept(written: Path) -> None:
    before = (written / "model_index.json").stat().st_mtime_ns
    checkpoint.write(written, checkpoint.TINY)
    assert (written / "model_index.json").stat().st_mtime_ns == before


def record(**held: list[list[str]]) -> Record:
    memory = {"ray::task (1)": Memory(before=1, peak=3, own=2)}
    stages = {
        name: Stage(read=sorted({one for each in sets for one in each}), together=sets, processes=memory)
        for name, sets in held.items()
    }
    return Record(stages=stages)


GOOD = {
    "prepare": [["text_encoder"], ["text_encoder_2"], ["text_encoder_3"], ["transformer"], ["vae"]],
    "examine": [["vae"], ["transformer", "vae"]],
    "train": [["transformer"]],
    "evaluate": [["vae"], ["transformer", "vae"]],
}


def test_a_night_that_holds_what_it_needs_has_no_fault() -> None:
    assert report.faults(record(**GOOD)) == []


@pytest.mark.parametrize(
    ("stage", "held"),
    [
        ("prepare", ["text_encoder_3", "transformer"]),
        ("train", ["transformer", "vae"]),
        ("evaluate", ["text_encoder", "transformer"]),
        ("register", ["transformer"]),
    ],
)
def test_a_stage_that_holds_more_is_named(stage: str, held: list[str]) -> None:
    [fault] = report.faults(record(**{**GOOD, stage: [*GOOD.get(stage, []), held]}))
    assert stage in fault
    assert all(name in fault for name in held)


def test_a_stage_that_was_not_seen_is_a_fault() -> None:
    [fault] = report.faults(record(**{name: held for name, held in GOOD.items() if name != "train"}))
    assert "train" in fault


@pytest.mark.slow
def test_a_whole_night_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("EXPUNGE_HOME", str(home))
    night.make_home(home, checkpoint.write(tmp_path / "model", checkpoint.TINY), PIXELS)
    seen = __main__.run(home)
    assert report.faults(seen) == []
    assert "| evaluate |" in report.table(seen, load_settings())
    assert "load back" in load_back.run(home, PIXELS)
    assert __main__.run(home) == seen, "a second call has nothing to do"
