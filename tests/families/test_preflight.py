"""A model that cannot work is refused before a night begins, whatever its configs hold; a success is remembered."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from safetensors.torch import load_file, save_file

from expunge.errors import InputError
from expunge.families import deep_preflight, load_model, preflight
from expunge.settings import ModelSettings, Resolution
from tests.families.conftest import shipped
from tests.families.tiny import ddpm, edit, sd3

UNET, WEIGHTS = "unet/config.json", "diffusion_pytorch_model.safetensors"


def options(folder: Path, resolution: Resolution | None = None) -> ModelSettings:
    return ModelSettings(source=str(folder), resolution=resolution)


@pytest.mark.parametrize(("name", "size"), [("faces", (24, 24)), ("flags", (32, 48))])
def test_shipped_models_pass(name: str, size: Resolution, tmp_path: Path) -> None:
    assert preflight(name, shipped(name)) == size
    assert deep_preflight(name, shipped(name), tmp_path) == size


def test_a_look_at_the_configs_imports_no_torch() -> None:
    code = (
        "import sys; from expunge.families import preflight; from expunge.settings import load_settings\n"
        "for name, model in load_settings().models.items(): preflight(name, model)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3(tmp_path_factory.mktemp("sd3"))


@pytest.mark.parametrize(
    ("name", "resolution", "says"),
    [
        ("flags", (32, 44), r"both sides must be multiples of 8 .* set it to \[32, 40\] or \[32, 48\]"),
        ("flags", (32, 104), "up to 96 pixels, not 104"),
        ("faces", (24, 26), r"both sides must be multiples of 4 \(the UNet halves them 2 times\)"),
    ],
)
def test_a_resolution_that_the_model_cannot_have_is_refused(name: str, resolution: Resolution, says: str) -> None:
    asked = shipped(name).model_copy(update={"resolution": resolution})
    with pytest.raises(InputError, match=says):
        preflight(name, asked)
    with pytest.raises(InputError, match=says):
        load_model(asked, resolution)


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers(-9, 99) | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_any_config_is_accepted_or_refused_in_a_sentence(
    data: strategies.DataObject, unconditional: Path, stable: Path
) -> None:
    """Never another exception: it would end the night for all models."""
    folder = data.draw(strategies.sampled_from([unconditional, stable]))
    path = data.draw(strategies.sampled_from(sorted(folder.rglob("*.json"))))
    before = path.read_text()
    fields: dict[str, Any] = json.loads(before)
    if data.draw(strategies.booleans()):
        written = json.dumps({**fields, data.draw(strategies.sampled_from(sorted(fields))): data.draw(JSON)})
    else:
        written = data.draw(strategies.sampled_from(["", "{", "{}", "[]", "null", "[" * 50_000, "\ud800"]))
    path.write_bytes(written.encode(errors="surrogatepass"))
    refused = ""
    try:
        preflight("mine", options(folder))
    except InputError as error:
        refused = str(error)
    finally:
        path.write_text(before)
    assert not refused or refused.startswith("model mine (")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """diffusers would fill what is missing with random numbers."""
    folder = ddpm(tmp_path / "model")
    path = folder / "unet" / WEIGHTS
    weights = load_file(path)
    for changed, says in (
        ({k: v for k, v in weights.items() if k != "conv_in.bias"}, "conv_in.bias is missing"),
        ({**weights, "conv_in.bias": torch.zeros(3)}, r"conv_in.bias has shape \[3\], not \[8\]"),
    ):
        save_file(changed, path)
        with pytest.raises(InputError, match=f"unet: {WEIGHTS}: {says}"):
            deep_preflight("mine", options(folder), tmp_path / "cache")
    save_file(weights, path)
    assert deep_preflight("mine", options(folder), tmp_path / "cache") == (8, 8)


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_damaged_weights_are_named(name: str, stable: Path, tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model") if name == "unet" else stable
    path = next((folder / name).glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(InputError, match=f"{name}/{path.name} is damaged"):
            deep_preflight("mine", options(folder), tmp_path / "cache")
    finally:
        path.write_bytes(whole)


def test_what_diffusers_cannot_build_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    edit(folder / UNET, {"norm_num_groups": 3})
    assert preflight("mine", options(folder)) == (8, 8)
    with pytest.raises(InputError, match=r"a forward pass at 8x8 fails \(ValueError: .*num_channels"):
        deep_preflight("mine", options(folder), tmp_path / "cache")


def test_a_success_is_remembered_until_the_model_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.families import architectures

    asked: list[Resolution] = []
    real = architectures.fake_networks
    monkeypatch.setattr(architectures, "fake_networks", lambda layout, size: asked.append(size) or real(layout, size))
    folder, cache = ddpm(tmp_path / "model"), tmp_path / "home" / "cache"
    for _ in range(2):
        assert deep_preflight("mine", options(folder), cache) == (8, 8)
    deep_preflight("mine", options(folder, (16, 8)), cache)
    weights = folder / "unet" / WEIGHTS
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    deep_preflight("mine", options(folder), cache)
    assert asked == [(8, 8), (16, 8), (8, 8)]
    edit(folder / UNET, {"norm_num_groups": 3})
    for _ in range(2):
        with pytest.raises(InputError, match="forward pass"):
            deep_preflight("mine", options(folder), cache)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2/tokenizer.json", "text_encoder", "vae", "scheduler"])
def test_a_missing_part_is_named(part: str, stable: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stable, folder)
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"{part.partition('/')[0]}.* (has none of|cannot be read)"):
        preflight("mine", options(folder))


def test_a_text_encoder_comes_with_its_tokenizer(stable: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stable, folder)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_3")
    edit(folder / "model_index.json", {"tokenizer_3": ["transformers", "T5TokenizerFast"]})
    with pytest.raises(InputError, match="tokenizer_3 and text_encoder_3 are there together or not at all"):
        preflight("mine", options(folder))


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("StableDiffusionPipeline", "Stable Diffusion 1 or 2"),
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("FluxPipeline", "Flux"),
    ],
)
def test_another_architecture_is_named_with_what_is_supported(
    pipeline: str, name: str, stable: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stable, folder)
    edit(folder / "model_index.json", {"_class_name": pipeline})
    with pytest.raises(InputError, match=rf"{pipeline} is not supported \({name}\): .*StableDiffusion3Pipeline"):
        preflight("mine", options(folder))
