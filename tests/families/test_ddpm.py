"""DDPM and DDIM: what is refused, pictures as latents, the path of any schedule, and diffusers' own samples."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from expunge.errors import InputError
from expunge.families import deep_preflight, load_model, preflight
from expunge.families.ddpm import DDPM
from expunge.families.loading import load_base
from expunge.families.sampler import denoise, generate
from expunge.settings import ModelSettings, Resolution, TrainingSettings
from expunge.testbed import faces as face_data
from expunge.unlearning.weighting import WEIGHTINGS
from tests.families.refusals import INDEX, SCHEDULER, Refusal
from tests.families.tiny import Build, at_the_root, ddim, ddpm, edit, unet

UNET, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SIZE = (8, 8)


def options(folder: Path, resolution: Resolution | None = None) -> ModelSettings:
    return ModelSettings(source=str(folder), resolution=resolution)


def load(folder: Path, resolution: Resolution = SIZE) -> DDPM:
    model = load_model(options(folder), resolution)
    assert isinstance(model, DDPM)
    return model


def noise(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


REFUSED = [
    Refusal(UNET, "num_class_embeds", 10, "class-conditional"),
    Refusal(UNET, "class_embed_type", "timestep", "class-conditional"),
    Refusal(UNET, "out_channels", 2, "learned variance"),
    Refusal(UNET, "out_channels", 3, "in_channels, 1"),
    Refusal(UNET, "in_channels", 4, "1 or 3 channels"),
    Refusal(UNET, "in_channels", "one", "whole number"),
    Refusal(UNET, "in_channels", True, "whole number"),
    Refusal(UNET, "time_embedding_type", "fourier", "divides by the time"),
    Refusal(UNET, "sample_size", None, "no resolution of its own"),
    Refusal(UNET, "sample_size", "8", "the height and the width"),
    Refusal(UNET, "sample_size", [8, 8, 8], "the height and the width"),
    Refusal(UNET, "down_block_types", "DownBlock2D", "a list"),
    Refusal(UNET, "layers_per_block", 10**6, "at most 1000"),
    Refusal(SCHEDULER, "num_train_timesteps", 0, "at least 2"),
    Refusal(SCHEDULER, "num_train_timesteps", 1, "at least 2"),
    Refusal(SCHEDULER, "num_train_timesteps", 10**10, "at most 100,000"),
    Refusal(SCHEDULER, "prediction_type", "sample", "epsilon or v_prediction"),
    Refusal(SCHEDULER, "prediction_type", None, "string"),
    Refusal(SCHEDULER, "variance_type", "learned_range", "learned variance"),
    Refusal(SCHEDULER, "thresholding", True, "clip_sample"),
    Refusal(SCHEDULER, "clip_sample_range", 0, "above 0"),
    Refusal(SCHEDULER, "rescale_betas_zero_snr", True, "epsilon"),
    Refusal(SCHEDULER, "trained_betas", [0.1] * 49 + [1.0], "epsilon"),
    Refusal(SCHEDULER, "trained_betas", [0.1] * 3, "50 numbers"),
    Refusal(SCHEDULER, "trained_betas", ["a"] * 50, "50 numbers"),
    Refusal(SCHEDULER, "beta_schedule", "cosine", "linear"),
    Refusal(SCHEDULER, "beta_end", math.nan, "a number"),
    Refusal(SCHEDULER, "beta_end", 2, "between 0 and 1"),
    Refusal(SCHEDULER, "timestep_spacing", "even", "trailing"),
    Refusal(SCHEDULER, "steps_offset", 2, "0 or 1"),
    Refusal(INDEX, "_class_name", ["a", "list"], "string"),
    Refusal(INDEX, "scheduler", "DDPMScheduler", "a library and a class"),
    Refusal(INDEX, "scheduler", [None, None], "needs it"),
    Refusal(INDEX, "unet", ["os", "UNet2DModel"], "diffusers"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is only looked at, or changed back."""
    return ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.mark.parametrize("refusal", REFUSED, ids=str)
def test_a_config_that_cannot_work_is_refused_by_file_and_field(refusal: Refusal, folder: Path) -> None:
    assert preflight("mine", options(folder)) == SIZE
    with refusal.in_place(folder):
        refusal.is_raised_by(lambda: preflight("mine", options(folder)), f"model mine ({folder})")
        if refusal.field != "sample_size":
            refusal.is_raised_by(lambda: load_model(options(folder), SIZE), f"model {folder}")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("_class_name", "PNDMPipeline", "PNDMPipeline is not supported.*DDIMPipeline"),
        ("scheduler", ["diffusers", "PNDMScheduler"], "scheduler: PNDMScheduler is not supported"),
        ("unet", ["diffusers", "UNet2DConditionModel"], "unet: UNet2DConditionModel is not supported"),
    ],
)
def test_other_classes_are_refused_by_name(field: str, value: object, says: str, folder: Path) -> None:
    with Refusal(INDEX, field, value, "").in_place(folder):
        for ask in (lambda: preflight("mine", options(folder)), lambda: load_model(options(folder), SIZE)):
            with pytest.raises(InputError, match=says):
                ask()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sample_size": 4}, "4x4, is outside of 8 to 4096"),
        ({"sample_size": 9}, r"\[9, 9\].* multiples of 2 .*\[8, 8\] or \[10, 10\]"),
        ({"down_block_types": ["DownBlock2D"] * 5000}, "no resolution is possible.* 4999 times"),
    ],
)
def test_an_impossible_resolution_is_refused(changes: dict[str, object], says: str, folder: Path) -> None:
    ((field, value),) = changes.items()
    with Refusal(UNET, field, value, "").in_place(folder), pytest.raises(InputError, match=says):
        preflight("mine", options(folder))


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_a_ddim_has_fewer_schedules(schedule: str, tmp_path: Path) -> None:
    ddpm(tmp_path / "ddpm", beta_schedule=schedule)
    assert preflight("mine", options(tmp_path / "ddpm")) == SIZE
    refusal = Refusal(SCHEDULER, "beta_schedule", schedule, "linear")
    with refusal.in_place(ddim(tmp_path / "ddim")):
        label = f"model mine ({tmp_path / 'ddim'})"
        refusal.is_raised_by(lambda: preflight("mine", options(tmp_path / "ddim")), label)


def test_another_network_at_the_root_is_refused(tmp_path: Path) -> None:
    folder = at_the_root(tmp_path / "model")
    edit(folder / "config.json", {"_class_name": "UNet2DConditionModel"})
    with pytest.raises(InputError, match=r"config\.json: UNet2DConditionModel is not supported"):
        preflight("mine", options(folder))


def test_a_size_of_null_is_no_fault_where_a_resolution_is_set(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    edit(folder / UNET, {"sample_size": None})
    asked = options(folder, (8, 16))
    assert deep_preflight("mine", asked, tmp_path / "cache") == (8, 16)
    assert load_model(asked, (8, 16)).latent_shape == (1, 8, 16)


def test_three_channels_are_as_good_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    DDPMPipeline(unet(in_channels=3, out_channels=3, sample_size=[8, 16]), DDPMScheduler()).save_pretrained(folder)
    assert deep_preflight("mine", options(folder), tmp_path / "cache") == (8, 16)


def test_the_old_names_of_attention_weights_are_known(tmp_path: Path) -> None:
    """As in google/ddpm-*: diffusers renames them on loading."""
    folder = ddpm(tmp_path / "model")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / WEIGHTS)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
    assert any(".query." in key for key in weights)
    save_file(weights, folder / WEIGHTS)
    assert deep_preflight("mine", options(folder), tmp_path / "cache") == SIZE
    loaded = load(folder).network.state_dict()
    torch.testing.assert_close(
        loaded["mid_block.attentions.0.to_q.weight"], weights["mid_block.attentions.0.query.weight"]
    )


def test_faces_are_their_own_latents(faces: DDPM) -> None:
    pictures = face_data.images()[:4]
    torch.testing.assert_close(faces.encode(faces.decode(pictures)), pictures)


def test_training_faces_are_recovered_from_noise(faces: DDPM) -> None:
    x_0 = face_data.images()[:6]
    at = faces.at(torch.full((6,), 250))
    x_t = at.a.view(-1, 1, 1, 1) * x_0 + at.b.view(-1, 1, 1, 1) * noise(6, *faces.latent_shape)
    level = (at.b / (at.a + at.b))[0].item()
    back = denoise(faces, x_t, level, {}, steps=20, guidance=1.0, empty={})
    centred = [x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (back, x_0)]
    assert torch.cosine_similarity(*centred, dim=1).mean().item() >= 0.85


def test_denoising_is_ddim(faces: DDPM) -> None:
    """The same times, handed to diffusers' deterministic sampler."""
    steps = 7
    config = load_base("testbed:faces").scheduler.config
    scheduler: Any = DDIMScheduler.from_config(config, clip_sample=True, set_alpha_to_one=True)
    times = [int(t) for t in faces.times_down(faces.time_at(torch.tensor([1.0])), steps)]
    x = start = noise(2, *faces.latent_shape)
    with torch.no_grad():
        for here, there in zip(times, [*times[1:], -1], strict=True):
            # diffusers derives the next time from an even stride; ours are rounded, so the stride is set at each step.
            scheduler.config.num_train_timesteps, scheduler.num_inference_steps = here - there, 1
            predicted = faces.network(x, torch.full((2,), here)).sample
            x = scheduler.step(predicted, here, x, eta=0.0, use_clipped_model_output=True).prev_sample
    mine = generate(faces, start, {}, steps=steps, guidance=1.0, empty={})
    torch.testing.assert_close(mine, x, rtol=0, atol=1e-4)


SPACINGS = [
    {},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
]
DDIMS = [
    *SPACINGS,
    {"clip_sample": False},
    {"clip_sample_range": 0.3},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "clip_sample": False},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear"},
    {"trained_betas": torch.linspace(0.01, 0.3, 50).tolist()},
]
# 7 steps do not divide the 50 of training evenly; 5 do, and of 10 there are fewer than 12: a matter of spacing alone.
CASES = [
    *((changes, 7) for changes in DDIMS),
    *((changes, 5) for changes in SPACINGS),
    *(({**changes, "num_train_timesteps": 10}, 12) for changes in SPACINGS),
]


def name(value: object) -> str:
    return "-".join(f"{k}={str(v)[:9]}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("changes", "steps"), CASES, ids=name)
def test_a_ddim_generates_what_its_pipeline_does(changes: dict[str, object], steps: int, tmp_path: Path) -> None:
    model = load(ddim(tmp_path / "model", **changes))
    pipeline: Any = load_base(str(tmp_path / "model"))
    pipeline.set_progress_bar_config(disable=True)
    # With an offset diffusers would ask for a time beyond the last.
    most = int(str(changes.get("num_train_timesteps", 50))) - ("steps_offset" in changes)
    result: Any = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=min(steps, most),
        output_type="pt",
    )
    mine = generate(model, noise(2, 1, 8, 8), {}, steps=min(steps, most), guidance=1.0, empty={})
    torch.testing.assert_close((mine / 2 + 0.5).clamp(0, 1), result.images, rtol=0, atol=1e-3)


def test_the_schedules_of_a_ddim_differ() -> None:
    """Else its parity could not fail."""
    times = []
    for changes in SPACINGS[:4]:
        scheduler: Any = DDIMScheduler.from_config({"num_train_timesteps": 50, **changes})
        scheduler.set_timesteps(7)
        times.append(tuple(scheduler.timesteps.tolist()))
    assert len(set(times)) == 4


def test_a_ddpm_pipeline_with_a_ddim_scheduler_is_a_ddim(tmp_path: Path) -> None:
    folder = ddim(tmp_path / "model", timestep_spacing="trailing")
    edit(folder / INDEX, {"_class_name": "DDPMPipeline"})
    model = load(folder)
    pipeline: Any = load_base(str(folder))
    result = pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt")
    mine = generate(model, noise(1, 1, 8, 8), {}, steps=5, guidance=1.0, empty={})
    torch.testing.assert_close((mine / 2 + 0.5).clamp(0, 1), result.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "bound"), [({}, 1.0), ({"clip_sample_range": 0.5}, 0.5), ({"clip_sample": False}, None)]
)
@pytest.mark.parametrize("build", [ddpm, ddim])
def test_a_clean_estimate_is_bounded_as_the_scheduler_says(
    build: Build, changes: dict[str, object], bound: float | None, tmp_path: Path
) -> None:
    folder = build(tmp_path / "model")
    edit(folder / SCHEDULER, changes)
    wild = 10 * noise(1, 1, 8, 8)
    torch.testing.assert_close(load(folder).clip(wild), wild if bound is None else wild.clamp(-bound, bound))


def test_a_bound_of_a_ddpm_is_met_where_it_samples(tmp_path: Path) -> None:
    model = load(ddpm(tmp_path / "model", clip_sample_range=0.25))
    assert generate(model, noise(2, 1, 8, 8), {}, steps=5, guidance=1.0, empty={}).abs().max() <= 0.25


@pytest.mark.parametrize("build", [ddpm, ddim])
def test_v_prediction_at_zero_terminal_snr_is_finite(build: Build, tmp_path: Path) -> None:
    """At the last time nothing of the picture is left: a is 0, and the network itself predicts the picture."""
    folder = build(tmp_path / "model")
    edit(folder / SCHEDULER, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    model = load(folder)
    time = torch.tensor([49])
    at = model.at(time)
    assert at.a.item() == 0
    x_t, prediction = noise(2, 1, 1, 8, 8).unbind()
    torch.testing.assert_close(at.clean(x_t, prediction), -prediction)
    assert at.coefficients.isfinite().all()
    for weighting in WEIGHTINGS.values():
        assert weighting(at, TrainingSettings()).isfinite().all(), weighting
    assert generate(model, noise(2, 1, 8, 8), {}, steps=5, guidance=1.0, empty={}).isfinite().all()
    assert model.time_at(torch.tensor([1.0])) == 49


def test_a_root_layout_may_have_an_index(tmp_path: Path) -> None:
    folder = at_the_root(tmp_path / "model")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / INDEX).write_text(json.dumps(index))
    expected = load_file(folder / Path(WEIGHTS).name)
    torch.testing.assert_close(dict(load(folder).network.state_dict()), expected)
