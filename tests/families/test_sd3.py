"""Stable Diffusion 3: what is refused, the autoencoder, prompts, and the samples of the pipeline's own scheduler."""

import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from expunge.errors import InputError
from expunge.families import load_model, preflight
from expunge.families.base import rows
from expunge.families.loading import load_base
from expunge.families.sampler import generate
from expunge.families.sd3 import SD3
from expunge.settings import ModelSettings
from expunge.testbed import flags as flag_data
from tests.families.refusals import INDEX, SCHEDULER, Refusal
from tests.families.tiny import edit, sd3

TRANSFORMER, VAE = "transformer/config.json", "vae/config.json"
SIZE = (32, 48)
COPIES = count()

REFUSED = [
    Refusal(TRANSFORMER, "in_channels", 33, "latent_channels"),
    Refusal(TRANSFORMER, "out_channels", 16, "latent_channels"),
    Refusal(TRANSFORMER, "pooled_projection_dim", 64, "128"),
    Refusal(TRANSFORMER, "pos_embed_max_size", 4, "32 pixels, not 48"),
    Refusal(TRANSFORMER, "sample_size", None, "whole number"),
    Refusal(VAE, "in_channels", 1, "3 channels"),
    Refusal(VAE, "scaling_factor", None, "a number"),
    Refusal(VAE, "scaling_factor", 0, "above 0"),
    Refusal(VAE, "shift_factor", "0", "a number"),
    Refusal(SCHEDULER, "invert_sigmas", True, "go down"),
    Refusal(SCHEDULER, "stochastic_sampling", True, "deterministic"),
    Refusal(SCHEDULER, "num_train_timesteps", 10**10, "at most 100,000"),
    Refusal(SCHEDULER, "shift_terminal", 1, "between 0 and 1"),
    Refusal(SCHEDULER, "shift", 0, "above 0"),
    Refusal(SCHEDULER, "max_image_seq_len", 9, "base_image_seq_len", (("use_dynamic_shifting", True),)),
    Refusal(SCHEDULER, "time_shift_type", "x", "exponential", (("use_dynamic_shifting", True),)),
    Refusal(INDEX, "text_encoder", [None, None], "needs it"),
]


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def flag_pictures() -> Tensor:
    return flag_data.images()[0]


def options(folder: Path) -> ModelSettings:
    return ModelSettings(source=str(folder), prompt_tokens=1)


def noise(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def load(folder: Path, changes: Mapping[str, object], file: str = SCHEDULER) -> SD3:
    """A copy of the model, with other fields in one of its files."""
    copy = Path(shutil.copytree(folder, folder.with_name(f"copy-{next(COPIES)}")))
    edit(copy / file, changes)
    model = load_model(options(copy), SIZE)
    assert isinstance(model, SD3)
    return model


@pytest.mark.parametrize("refusal", REFUSED, ids=str)
def test_a_config_that_cannot_work_is_refused_by_file_and_field(refusal: Refusal, stable: Path) -> None:
    assert preflight("mine", options(stable)) == (48, 48)
    with refusal.in_place(stable):
        refusal.is_raised_by(lambda: preflight("mine", options(stable)), f"model mine ({stable})")
        refusal.is_raised_by(lambda: load_model(options(stable), (48, 48)), f"model {stable}")


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (SCHEDULER, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas"),
        (INDEX, {"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}, "scheduler: .*Heun.* not supported"),
        (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "vae: AutoencoderTiny is not supported"),
    ],
)
def test_other_classes_and_pairs_of_fields_are_refused(
    file: str, changes: dict[str, object], says: str, stable: Path
) -> None:
    before = (stable / file).read_text()
    edit(stable / file, changes)
    try:
        with pytest.raises(InputError, match=says):
            preflight("mine", options(stable))
    finally:
        (stable / file).write_text(before)


def test_flags_survive_the_autoencoder(flags: SD3, flag_pictures: Tensor) -> None:
    pictures = flag_pictures[::4]
    latents = flags.encode(pictures)
    assert (flags.decode(latents) - pictures).abs().mean().item() < 0.05
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.mean().item() == pytest.approx(0, abs=0.05)


def test_encoding_has_no_noise(flags: SD3, flag_pictures: Tensor) -> None:
    assert torch.equal(flags.encode(flag_pictures[:2]), flags.encode(flag_pictures[:2]))


def test_an_autoencoder_without_a_shift_shifts_by_none(stable: Path) -> None:
    pictures = torch.linspace(-1, 1, 3 * SIZE[0] * SIZE[1]).view(1, 3, *SIZE)
    results: list[Tensor] = []
    for shift in (0.0, None):
        model = load(stable, {"shift_factor": shift}, VAE)
        results.append(model.decode(model.encode(pictures)))
    torch.testing.assert_close(results[0], results[1])


def test_conditioning_depends_on_the_prompt_alone(flags: SD3) -> None:
    together = flags.condition(["a flag", "the flag of Japan"])
    alone = flags.condition(["the flag of Japan"])
    for name, table in together.items():
        torch.testing.assert_close(table[1:], alone[name], rtol=1e-4, atol=1e-5)
        assert (table[0] - table[1]).abs().max() > 0.1


def theirs(model: SD3, start: Tensor, prompts: list[str], *, steps: int, guidance: float) -> tuple[Tensor, Tensor]:
    """The latents that the pipeline itself generates, and its times."""
    pipeline: Any = load_base(str(model.parts.layout.folder))
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=prompts,
        height=SIZE[0],
        width=SIZE[1],
        latents=start.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=1,
        output_type="latent",
    )
    return made.images, pipeline.scheduler.timesteps


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (10, 2.0)])
def test_the_shipped_model_generates_what_its_pipeline_does(flags: SD3, steps: int, guidance: float) -> None:
    prompts = ["the flag of Japan", "the flag of Brazil"]
    start, empty = noise(2, *flags.latent_shape), rows(flags.condition([""]), torch.zeros(2, dtype=torch.long))
    mine = generate(flags, start, flags.condition(prompts), steps=steps, guidance=guidance, empty=empty)
    expected, _ = theirs(flags, start, prompts, steps=steps, guidance=guidance)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-3)


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
def test_a_flow_generates_what_its_pipeline_does(changes: dict[str, object], stable: Path) -> None:
    model, prompts = load(stable, changes), ["a flag", "another"]
    start, empty = noise(2, *model.latent_shape), model.condition(["", ""])
    mine = generate(model, start, model.condition(prompts), steps=6, guidance=2.0, empty=empty)
    expected, levels = theirs(model, start, prompts, steps=6, guidance=2.0)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-3)  # their last level can be below our lowest
    times = torch.cat([time for time, _ in model.path_down(torch.tensor([1.0]), 6)])
    torch.testing.assert_close(times, levels, rtol=0, atol=1e-3)


def test_the_flows_differ() -> None:
    """Else the test above could not fail."""
    times = set()
    for changes in FLOWS[:-1]:
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(changes)
        scheduler.set_timesteps(6, mu=0.4 if "use_dynamic_shifting" in changes else None)
        times.add(tuple(round(value, 3) for value in scheduler.timesteps.tolist()))
    assert len(times) == len(FLOWS) - 1


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (20, 3.0)])
def test_levels_are_the_flow_schedulers(steps: int, shift: float, stable: Path) -> None:
    model = load(stable, {"shift": shift})
    scheduler: Any = model.parts.other("scheduler")
    scheduler.set_timesteps(steps)
    times = torch.cat(model.times_down(torch.tensor([1000.0]), steps))
    torch.testing.assert_close(times, scheduler.timesteps, rtol=1e-5, atol=1e-3)


def test_a_level_starts_the_same_schedule_lower(stable: Path) -> None:
    model = load(stable, {"use_karras_sigmas": True})
    scheduler: Any = model.parts.other("scheduler")
    scheduler.set_timesteps(6)
    times = torch.cat([time for time, _ in model.path_down(torch.tensor([0.5]), 6)])
    torch.testing.assert_close(times, (500 * scheduler.sigmas[:-1]).clamp_min(1))


@pytest.mark.slow
def test_prompts_name_their_flags(flags: SD3, flag_pictures: Tensor) -> None:
    """64 countries; the nearest of all 256 flags in pixel space is the country's own, or one that looks the same."""
    names = flag_data.images()[1]
    chosen = np.random.default_rng(0).choice(len(names), 64, replace=False)
    conditioning = flags.condition([flag_data.caption(names[i]) for i in chosen])
    empty = rows(flags.condition([""]), torch.zeros(64, dtype=torch.long))
    latents = generate(flags, noise(64, *flags.latent_shape), conditioning, steps=20, guidance=2.0, empty=empty)
    nearest = torch.cdist(flags.decode(latents).flatten(1), flag_pictures.flatten(1)).argmin(1)
    same = [torch.equal(flag_pictures[n], flag_pictures[i]) for n, i in zip(nearest.tolist(), chosen, strict=True)]
    assert sum(same) / 64 >= 0.9
