"""DDPM: a `UNet2DModel` in pixel space with a discrete schedule; epsilon or v-prediction."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import Tensor

from expunge.errors import InputError
from expunge.families.base import Conditioning, DiffusionModel
from expunge.families.path import PathPoint, Prediction, point


class DDPM(DiffusionModel):
    """Time is the integer step 0 .. T-1; there is no prompt, so a conditioning is empty."""

    component = "unet"

    def __init__(self, pipeline: DDPMPipeline | DDIMPipeline, resolution: tuple[int, int]) -> None:
        self.pipeline = pipeline
        self.network = pipeline.unet
        schedule = pipeline.scheduler
        self._prediction: Prediction = cast(Prediction, schedule.config["prediction_type"])
        alpha_bar = schedule.alphas_cumprod.float()
        self._a, self._b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self._level = self._b / (self._a + self._b)
        self._bound = float(schedule.config["clip_sample_range"]) if schedule.config["clip_sample"] else None
        # A DDIM's own sampling is deterministic: it is what is generated here. A DDPM's is not, and its spacing of
        # fewer steps is free: it starts at the last time and keeps to the clipped estimate.
        self._ddim = copy.deepcopy(schedule) if isinstance(schedule, DDIMScheduler) else None
        self.noise_of_clipped = self._ddim is None
        self._channels = int(pipeline.unet.config["in_channels"])
        self.latent_shape = (self._channels, *resolution)

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures if self._channels == 3 else pictures.mean(1, keepdim=True)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1).clamp(-1, 1)

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        return {}

    def at(self, time: Tensor) -> PathPoint:
        return point(self._prediction, self._a[time], self._b[time])

    def time_at(self, level: Tensor) -> Tensor:
        return (self._level[None] - level[:, None]).abs().argmin(1)

    def time_from_uniform(self, u: Tensor) -> Tensor:
        return (u * len(self._a)).long().clamp_max(len(self._a) - 1)

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        # Through `self.network`: the frozen copy takes its place while the base model is asked.
        return cast(UNet2DModel, self.network)(x_t, time).sample

    def clip(self, clean: Tensor) -> Tensor:
        return clean if self._bound is None else clean.clamp(-self._bound, self._bound)

    def save_adapter(self, folder: Path) -> None:
        raise InputError("adapter: a DDPM is trained in full", hint="set adapter to full or auto")

    def _path_down(self, start: float, steps: int) -> list[tuple[Tensor, PathPoint | None]]:
        if self._ddim is None or start < 1:
            return super()._path_down(start, steps)
        last = len(self._a) - 1
        self._ddim.set_timesteps(min(steps, last + 1))
        # The stride that diffusers goes by, whether or not it leads to the next of its times.
        stride = (last + 1) // min(steps, last + 1)
        times = cast(Tensor, self._ddim.timesteps).clamp(0, last)
        return [(time, self._after(time - stride)) for time in times.split(1)]

    def _after(self, time: Tensor) -> PathPoint | None:
        """Below the first time lies the clean picture, or, without `set_alpha_to_one`, the first time again."""
        if time >= 0:
            return self.at(time)
        assert self._ddim is not None
        return None if self._ddim.config["set_alpha_to_one"] else self.at(torch.zeros_like(time))

    def _descending(self, first: Tensor, steps: int) -> list[Tensor]:
        times = torch.linspace(first.item(), 0, steps + 1)[:-1].round().long().unique_consecutive()
        return list(times.split(1))
