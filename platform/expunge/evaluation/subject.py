"""A model as the evaluation sees it: pictures and prompts go in, pictures come out.

Every figure is computed from a subject's pictures alone, so a fake that only returns pictures can be judged exactly as
a model is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor

from expunge.families.base import Conditioning, DiffusionModel, steps_from
from expunge.generation.noise import seeded_noise
from expunge.generation.sampling import Items, Sampler

CHUNK = 64
"""Pictures that are encoded, sampled and decoded together."""


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
        self,
        model: DiffusionModel,
        conditioning: Conditioning,
        empty: Conditioning,
        *,
        guidance: float,
        steps: int,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Take a model with the table of its prompts.

        empty: the row of the empty prompt. steps: from pure noise. ready: called before the model is asked, where
        several subjects share its network.
        """
        self.model, self.conditioning, self.empty = model, conditioning, empty
        self.guidance, self.steps = guidance, steps
        self.passes = 0
        self.ready = ready
        self._sample = Sampler(model, conditioning, empty, guidance=guidance)

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        steps = steps_from(level, self.steps)
        parts = torch.arange(len(pictures)).split(CHUNK)
        return torch.cat([self._pictures(prompts[i], seeds[i], steps, level, pictures[i]) for i in parts])

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        parts = torch.arange(len(prompts)).split(CHUNK)
        return torch.cat([self._pictures(prompts[i], seeds[i], self.steps) for i in parts])

    def noise(self, seeds: Tensor) -> Tensor:
        """Draw standard normal latents [N, C, H, W]; seeds: int64 [N], of which each decides its own alone."""
        return seeded_noise(seeds, self.model.latent_shape)

    def _encoded(self, pictures: Tensor) -> Tensor:
        """Encode float32 [N, 3, h, w], each picture once: most draws of a test begin with the same few."""
        places: dict[bytes, int] = {}
        which = [places.setdefault(sha256(picture.numpy().tobytes()).digest(), len(places)) for picture in pictures]
        first = [which.index(place) for place in range(len(places))]
        return self.model.encode(pictures[first])[which]

    def _pictures(
        self, prompts: Tensor, seeds: Tensor, steps: int, level: float = 1.0, pictures: Tensor | None = None
    ) -> Tensor:
        self.ready()
        start = None if pictures is None else self._encoded(pictures)
        latents = self._sample(Items(prompts, lambda index: self.noise(seeds[index]), steps, level, start))
        self.passes += len(prompts) * steps
        return self.model.decode(latents)
