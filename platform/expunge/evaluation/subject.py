"""A model as the evaluation sees it: pictures and prompts go in, pictures come out.

Every figure is computed from a subject's pictures alone, so a fake that only returns pictures can be judged exactly as
a model is.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from expunge.families.base import Conditioning, DiffusionModel, rows
from expunge.families.sampler import denoise

CHUNK = 64
"""Samples per forward pass."""


class Subject(ABC):
    """What is judged. N samples per call; a sample depends on its own arguments and seed alone."""

    passes: int = 0
    """Network passes so far, one for each sample and step."""

    @abstractmethod
    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        """Noise float32 [N, 3, h, w] in [-1, 1] up to noise level `level` and denoise it again; return the same shape.

        prompts: int64 [N], rows of the conditioning. seeds: int64 [N].
        """

    @abstractmethod
    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        """Sample pictures, float32 [N, 3, h, w] in [-1, 1], from pure noise; prompts, seeds: int64 [N]."""


class ModelSubject(Subject):
    """A diffusion model, sampled deterministically from seeded noise."""

    def __init__(
        self, model: DiffusionModel, conditioning: Conditioning, empty: Conditioning, *, guidance: float, steps: int
    ) -> None:
        """Take a model with the table of its prompts. empty: the row of the empty prompt. steps: from pure noise."""
        self.model, self.conditioning, self.empty = model, conditioning, empty
        self.guidance, self.steps = guidance, steps
        self.passes = 0

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        point = self.model.at(self.model.time_at(torch.tensor([level])))
        a, b = (v.view(-1, 1, 1, 1) for v in (point.a, point.b))
        steps = max(2, round(level * self.steps))
        parts = [
            self._denoise(
                a * self.model.encode(pictures[part]) + b * self.noise(seeds[part]), prompts[part], level, steps
            )
            for part in torch.arange(len(pictures)).split(CHUNK)
        ]
        return torch.cat(parts)

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        parts = [
            self._denoise(self.noise(seeds[part]), prompts[part], 1.0, self.steps)
            for part in torch.arange(len(prompts)).split(CHUNK)
        ]
        return torch.cat(parts)

    def noise(self, seeds: Tensor) -> Tensor:
        """Draw standard normal latents [N, C, H, W]; seeds: int64 [N], of which each decides its own alone."""
        # Not torch's generator, which on a CPU looks at the lowest 32 bits of a seed only.
        generators = (np.random.Generator(np.random.Philox(key=int(seed))) for seed in seeds)
        drawn = [generator.standard_normal(self.model.latent_shape, dtype=np.float32) for generator in generators]
        return torch.from_numpy(np.stack(drawn))

    @torch.no_grad()
    def _denoise(self, x_t: Tensor, prompts: Tensor, level: float, steps: int) -> Tensor:
        blank = rows(self.empty, torch.zeros(len(x_t), dtype=torch.long))
        cond = rows(self.conditioning, prompts)
        clean = denoise(self.model, x_t, level, cond, steps=steps, guidance=self.guidance, empty=blank)
        self.passes += len(x_t) * steps
        return self.model.decode(clean)
