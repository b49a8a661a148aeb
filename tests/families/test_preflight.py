"""A model that cannot work is refused before a night begins, by the name of the file and the field; at any config."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from hypothesis import HealthCheck, given, settings, strategies
from safetensors.torch import load_file, save_file

from expunge.errors import InputError
from expunge.families import deep_preflight, load_model, preflight
from expunge.settings import ModelSettings, Resolution
from tests.families.conftest import shipped
from tests.families.tiny import Build, ddim, ddpm, edit, sd3, unet

UNET, SCHEDULER, WEIGHTS = "unet/config.json", "scheduler/scheduler_config.json", "diffusion_pytorch_model.safetensors"


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


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (UNET, {"num_class_embeds": 10}, "num_class_embeds is 10: a class-conditional UNet is not supported"),
        (UNET, {"class_embed_type": "timestep"}, 'class_embed_type is "timestep": a class-conditional UNet'),
        (UNET, {"out_channels": 2}, "out_channels is 2: a learned variance is not supported"),
        (UNET, {"out_channels": 3}, "out_channels is 3: must be in_channels, 1"),
        (UNET, {"in_channels": 4}, "in_channels is 4: a picture has 1 or 3 channels"),
        (UNET, {"time_embedding_type": "fourier"}, 'time_embedding_type is "fourier"'),
        (UNET, {"sample_size": None}, "sample_size is null: the model has no resolution of its own"),
        (UNET, {"sample_size": "8"}, 'sample_size is "8": must be a whole number, or the height and the width'),
        (UNET, {"sample_size": [8, 8, 8]}, r"sample_size is \[8, 8, 8\]: must be a whole number"),
        (UNET, {"sample_size": 4}, "its own resolution, 4x4, is outside of 8 to 4096"),
        (UNET, {"sample_size": 9}, r"resolution \[9, 9\]: both sides must be multiples of 2 .* set it to \[8, 8\] or"),
        (UNET, {"in_channels": "one"}, 'in_channels is "one": must be a whole number'),
        (UNET, {"in_channels": True}, "in_channels is true: must be a whole number"),
        (UNET, {"down_block_types": ["DownBlock2D"] * 5000}, "no resolution is possible: the UNet halves them 4999"),
        (UNET, {"down_block_types": "DownBlock2D"}, "down_block_types is .*: must be a list"),
        (UNET, {"layers_per_block": 10**6}, "layers_per_block is 1000000: must be at most 1000"),
        (SCHEDULER, {"num_train_timesteps": 10**10}, "num_train_timesteps is 10000000000: must be at most 100,000"),
        (SCHEDULER, {"prediction_type": "sample"}, "prediction_type is \"sample\": 'sample' is not supported"),
        (SCHEDULER, {"prediction_type": None}, "prediction_type is null: must be a text"),
        (SCHEDULER, {"variance_type": "learned_range"}, "variance_type is .*: a learned variance is not supported"),
        (SCHEDULER, {"thresholding": True}, "thresholding is true: dynamic thresholding is not supported"),
        (SCHEDULER, {"clip_sample_range": 0}, "clip_sample_range is 0: must be above 0"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true: .* predicted epsilon"),
        (SCHEDULER, {"trained_betas": [0.1] * 49 + [1.0]}, "trained_betas is .* predicted epsilon"),
        (SCHEDULER, {"trained_betas": [0.1] * 3}, "trained_betas is .*: must be 50 numbers"),
        (SCHEDULER, {"trained_betas": ["a"] * 50}, "trained_betas is .*: must be 50 numbers"),
        (SCHEDULER, {"beta_schedule": "cosine"}, 'beta_schedule is "cosine": must be one of linear'),
        (SCHEDULER, {"beta_end": math.nan}, "beta_end is NaN: must be a number"),
        (SCHEDULER, {"beta_end": 2}, "beta_end is 2: "),
        (SCHEDULER, {"timestep_spacing": "even"}, 'timestep_spacing is "even": must be leading'),
        (SCHEDULER, {"steps_offset": 2}, "steps_offset is 2: must be 0 or 1"),
        (SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps is 0: must be a whole number"),
        ("model_index.json", {"_class_name": ["a", "list"]}, r'_class_name is \["a", "list"\]: must be a text'),
        ("model_index.json", {"_class_name": "PNDMPipeline"}, "PNDMPipeline is not supported: use one of DDIMPipeline"),
        ("model_index.json", {"scheduler": ["diffusers", "PNDMScheduler"]}, "scheduler: PNDMScheduler is not supp"),
        ("model_index.json", {"scheduler": "DDPMScheduler"}, "scheduler is .*: must be a library and a class"),
        ("model_index.json", {"scheduler": [None, None]}, r"scheduler is \[null, null\]: the pipeline needs it"),
        ("model_index.json", {"unet": ["os", "UNet2DModel"]}, "unet is .*: its class must be of diffusers or"),
    ],
)
def test_an_unconditional_model_that_cannot_work_is_refused_by_name(
    file: str, changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    folder = ddpm(tmp_path / "model")
    assert preflight("mine", options(folder)) == (8, 8)
    edit(folder / file, changes)
    with pytest.raises(InputError, match=says) as refused:
        preflight("mine", options(folder))
    assert str(refused.value).startswith(f"model mine ({folder}): ")
    if "sample_size" not in changes:
        with pytest.raises(InputError, match=says):
            load_model(options(folder), (8, 8))


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_what_a_ddim_cannot_have_is_refused(schedule: str, tmp_path: Path) -> None:
    ddpm(tmp_path / "ddpm", beta_schedule=schedule)
    assert preflight("mine", options(tmp_path / "ddpm")) == (8, 8)
    edit(ddim(tmp_path / "ddim") / SCHEDULER, {"beta_schedule": schedule})
    with pytest.raises(InputError, match=f'beta_schedule is "{schedule}": must be one of linear'):
        preflight("mine", options(tmp_path / "ddim"))


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3(tmp_path_factory.mktemp("sd3"))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (
            "transformer/config.json",
            {"in_channels": 33},
            "in_channels is 33: must be the autoencoder's",
        ),
        ("transformer/config.json", {"out_channels": 16}, "out_channels is 16: must be the autoencoder's"),
        ("transformer/config.json", {"pooled_projection_dim": 64}, "pooled_projection_dim is 64: .* add up to 128"),
        ("transformer/config.json", {"pos_embed_max_size": 4}, "pos_embed_max_size is 4: .* up to 32 pixels, not 48"),
        ("transformer/config.json", {"sample_size": None}, "sample_size is null: must be a whole number"),
        ("vae/config.json", {"in_channels": 1}, "in_channels is 1: a picture has 3 channels"),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor is null: must be a number"),
        ("vae/config.json", {"shift_factor": "0"}, 'shift_factor is "0": must be a number'),
        (SCHEDULER, {"invert_sigmas": True}, "invert_sigmas is true: noise levels must go down"),
        (SCHEDULER, {"stochastic_sampling": True}, "stochastic_sampling is true: sampling has to be deterministic"),
        (SCHEDULER, {"shift_terminal": 1}, "shift_terminal is 1: must be between 0 and 1"),
        (SCHEDULER, {"shift": 0}, "shift is 0: must be above 0"),
        (SCHEDULER, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas"),
        (SCHEDULER, {"use_dynamic_shifting": True, "max_image_seq_len": 9}, "max_image_seq_len is 9: must be above"),
        (SCHEDULER, {"use_dynamic_shifting": True, "time_shift_type": "x"}, 'time_shift_type is "x"'),
        ("model_index.json", {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}, "Heun.* is not supported"),
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder is .*: the pipeline needs it"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae: AutoencoderTiny is not supported"),
    ],
)
def test_an_sd3_that_cannot_work_is_refused_by_name(
    file: str, changes: dict[str, object], says: str, stable: Path
) -> None:
    before = (stable / file).read_text()
    assert preflight("mine", options(stable)) == (48, 48)
    edit(stable / file, changes)
    try:
        with pytest.raises(InputError, match=says):
            preflight("mine", options(stable))
        with pytest.raises(InputError, match=says):
            load_model(options(stable), (48, 48))
    finally:
        (stable / file).write_text(before)


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


def test_a_size_of_null_is_no_fault_where_a_resolution_is_set(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    edit(folder / UNET, {"sample_size": None})
    asked = options(folder, (8, 16))
    assert deep_preflight("mine", asked, tmp_path / "cache") == (8, 16)
    assert load_model(asked, (8, 16)).latent_shape == (1, 8, 16)


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers(-9, 99) | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("build", [ddpm, sd3])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_any_config_is_accepted_or_refused_in_a_sentence(
    build: Build, data: strategies.DataObject, tmp_path_factory: pytest.TempPathFactory, stable: Path
) -> None:
    """Never another exception: it would end the night for all models."""
    folder = _UNCONDITIONAL.setdefault("folder", ddpm(tmp_path_factory.mktemp("ddpm"))) if build is ddpm else stable
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


_UNCONDITIONAL: dict[str, Path] = {}


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


def test_the_old_names_of_attention_weights_are_known(tmp_path: Path) -> None:
    """As in google/ddpm-*: diffusers renames them on loading."""
    folder = ddpm(tmp_path / "model")
    path = folder / "unet" / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any(".query." in key for key in weights)
    save_file(weights, path)
    assert deep_preflight("mine", options(folder), tmp_path / "cache") == (8, 8)
    loaded = load_model(options(folder), (8, 8)).network.state_dict()
    torch.testing.assert_close(
        loaded["mid_block.attentions.0.to_q.weight"], weights["mid_block.attentions.0.query.weight"]
    )


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


def test_three_channels_are_as_good_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    DDPMPipeline(unet(in_channels=3, out_channels=3, sample_size=[8, 16]), DDPMScheduler()).save_pretrained(folder)
    assert deep_preflight("mine", options(folder), tmp_path / "cache") == (8, 16)
