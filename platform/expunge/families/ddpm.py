"""DDPM: a `UNet2DModel` in pixel space with a discrete schedule; epsilon or v-prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
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
        kind = cast(str, schedule.config["prediction_type"])
        if kind not in ("epsilon", "v_prediction"):
            raise InputError(f"model: prediction type {kind!r} is not supported", hint="use epsilon or v_prediction")
        self._prediction: Prediction = cast(Prediction, kind)
        alpha_bar = schedule.alphas_cumprod.float()
        self._a, self._b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self._level = self._b / (self._a + self._b)
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
        return clean.clamp(-1, 1)

    def save_adapter(self, folder: Path) -> None:
        raise InputError("adapter: a DDPM is trained in full", hint="set adapter to full or auto")

    def _descending(self, first: Tensor, steps: int) -> list[Tensor]:
        times = torch.linspace(first.item(), 0, steps + 1)[:-1].round().long().unique_consecutive()
        return list(times.split(1))
