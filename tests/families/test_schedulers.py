"""What a model generates here is what its own pipeline would, whatever its scheduler's settings; tiny random models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from expunge.families import load_model
from expunge.families.ddpm import DDPM
from expunge.families.sd3 import SD3
from expunge.settings import ModelSettings, TrainingSettings
from expunge.unlearning.weighting import WEIGHTINGS
from tests.families.tiny import Build, ddim, ddpm, edit, sd3

SIZE = (32, 48)


def noise(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3(tmp_path_factory.mktemp("sd3"))


def flow(folder: Path, changes: Mapping[str, object]) -> SD3:
    path = folder / "scheduler" / "scheduler_config.json"
    before = path.read_text()
    edit(path, changes)
    try:
        model = load_model(ModelSettings(source=str(folder), prompt_tokens=1), SIZE)
    finally:
        path.write_text(before)
    assert isinstance(model, SD3)
    return model


FLOWS = [
    {},
    {"shift": 3.0},
    {"shift_terminal": 0.1},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.3},
    {"use_karras_sigmas": True, "shift": 3.0},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"num_train_timesteps": 500},
]


@pytest.mark.parametrize("changes", FLOWS, ids=lambda changes: "-".join(changes) or "plain")
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_flow_generates_what_its_pipeline_does(changes: dict[str, object], guidance: float, stable: Path) -> None:
    model = flow(stable, changes)
    start, empty = noise(2, *model.latent_shape), model.condition(["", ""])
    pipeline: Any = model.pipeline
    theirs = pipeline(
        prompt=["a flag", "another"],
        height=SIZE[0],
        width=SIZE[1],
        latents=start.clone(),
        num_inference_steps=6,
        guidance_scale=guidance,
        max_sequence_length=1,
        output_type="latent",
    ).images
    mine = model.generate(start, model.condition(["a flag", "another"]), steps=6, guidance=guidance, empty=empty)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)  # their last level can be below our lowest
    times = torch.cat([time for time, _ in model._path_down(1.0, 6)])
    torch.testing.assert_close(times, pipeline.scheduler.timesteps, rtol=0, atol=1e-3)


def test_the_flows_differ(stable: Path) -> None:
    """Else the test above could not fail."""
    times = [torch.cat(flow(stable, changes)._descending(torch.tensor([1000.0]), 6)) for changes in FLOWS[:-1]]
    assert len({tuple(round(value, 3) for value in time.tolist()) for time in times}) == len(times)


def test_a_level_starts_the_same_schedule_lower(stable: Path) -> None:
    model = flow(stable, {"use_karras_sigmas": True})
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(model.pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    times = torch.cat([time for time, _ in model._path_down(0.5, 6)])
    torch.testing.assert_close(times, (500 * scheduler.sigmas[:-1]).clamp_min(1))


def test_an_autoencoder_without_a_shift_shifts_by_none(stable: Path) -> None:
    path = stable / "vae" / "config.json"
    before = path.read_text()
    results: list[Tensor] = []
    try:
        for shift in (0.0, None):
            edit(path, {"shift_factor": shift})
            model = load_model(ModelSettings(source=str(stable), prompt_tokens=1), SIZE)
            latents = model.encode(torch.linspace(-1, 1, 3 * SIZE[0] * SIZE[1]).view(1, 3, *SIZE))
            results.append(model.decode(latents))
    finally:
        path.write_text(before)
    torch.testing.assert_close(results[0], results[1])


DDIMS = [
    {},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
    {"clip_sample": False},
    {"clip_sample_range": 0.3},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "clip_sample": False},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear"},
    {"trained_betas": torch.linspace(0.01, 0.3, 50).tolist()},
]


@pytest.mark.parametrize(
    "changes", DDIMS, ids=lambda changes: "-".join(f"{k}={str(v)[:9]}" for k, v in changes.items())
)
@pytest.mark.parametrize("steps", [5, 7, 60])
def test_a_ddim_generates_what_its_pipeline_does(changes: dict[str, object], steps: int, tmp_path: Path) -> None:
    model = load_model(ModelSettings(source=str(ddim(tmp_path / "model", **changes))), (8, 8))
    assert isinstance(model, DDPM)
    pipeline = DDIMPipeline(model.pipeline.unet, model.pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    most = 49 if changes.get("steps_offset") else 50  # with an offset diffusers asks for a time beyond the last
    result: Any = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=min(steps, most),
        output_type="pt",
    )
    mine = model.generate(noise(2, 1, 8, 8), {}, steps=min(steps, most), guidance=1.0, empty={})
    torch.testing.assert_close((mine / 2 + 0.5).clamp(0, 1), result.images, rtol=0, atol=1e-3)


def test_a_ddpm_pipeline_with_a_ddim_scheduler_is_a_ddim(tmp_path: Path) -> None:
    folder = ddim(tmp_path / "model", timestep_spacing="trailing")
    edit(folder / "model_index.json", {"_class_name": "DDPMPipeline"})
    model = load_model(ModelSettings(source=str(folder)), (8, 8))
    assert isinstance(model, DDPM)
    pipeline: Any = model.pipeline
    result = pipeline(1, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt")
    mine = model.generate(noise(1, 1, 8, 8), {}, steps=5, guidance=1.0, empty={})
    torch.testing.assert_close((mine / 2 + 0.5).clamp(0, 1), result.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "bound"), [({}, 1.0), ({"clip_sample_range": 0.5}, 0.5), ({"clip_sample": False}, None)]
)
@pytest.mark.parametrize("build", [ddpm, ddim])
def test_a_clean_estimate_is_bounded_as_the_scheduler_says(
    build: Build, changes: dict[str, object], bound: float | None, tmp_path: Path
) -> None:
    folder = build(tmp_path / "model")
    edit(folder / "scheduler" / "scheduler_config.json", changes)
    model = load_model(ModelSettings(source=str(folder)), (8, 8))
    wild = 10 * noise(1, 1, 8, 8)
    torch.testing.assert_close(model.clip(wild), wild if bound is None else wild.clamp(-bound, bound))


def test_a_bound_of_a_ddpm_is_met_where_it_samples(tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model", clip_sample_range=0.25)
    model = load_model(ModelSettings(source=str(folder)), (8, 8))
    assert model.generate(noise(2, 1, 8, 8), {}, steps=5, guidance=1.0, empty={}).abs().max() <= 0.25


@pytest.mark.parametrize("build", [ddpm, ddim])
def test_v_prediction_at_zero_terminal_snr_is_finite(build: Build, tmp_path: Path) -> None:
    """At the last time nothing of the picture is left: a is 0, and the network itself says what the picture is."""
    folder = build(tmp_path / "model")
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    edit(folder / "scheduler" / "scheduler_config.json", changes)
    model = load_model(ModelSettings(source=str(folder)), (8, 8))
    time = torch.tensor([49])
    at = model.at(time)
    assert at.a.item() == 0
    x_t, prediction = noise(2, 1, 1, 8, 8).unbind()
    torch.testing.assert_close(at.clean(x_t, prediction), -prediction)
    assert at.coefficients.isfinite().all()
    for name, weighting in WEIGHTINGS.items():
        assert weighting(at, TrainingSettings()).isfinite().all(), name
    assert model.generate(noise(2, 1, 8, 8), {}, steps=5, guidance=1.0, empty={}).isfinite().all()
    assert model.time_at(torch.tensor([1.0])) == 49


def test_the_schedules_of_a_ddim_differ() -> None:
    """Else its parity could not fail."""
    times = []
    for changes in DDIMS[:4]:
        scheduler: Any = DDIMScheduler.from_config({"num_train_timesteps": 50, **changes})
        scheduler.set_timesteps(7)
        times.append(tuple(scheduler.timesteps.tolist()))
    assert len(set(times)) == 4
