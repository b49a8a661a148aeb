"""The retain images, which the model must keep generating: how they are generated, and told from targets."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from expunge.families.base import Conditioning, DiffusionModel
from expunge.generation.sampling import Items, Sampler
from expunge.pixels import to_pictures, to_tensor

RESEMBLES = 0.9
"""Centred cosine in latent space above which two images count as the same. A guess, checked by eye on the testbed."""

CHUNK = 32
"""Pictures per pass."""
DONORS = 80
"""Pictures at most that editors may take parts of, and that surrogates are judged by: 240 MB at 1024 x 1024."""


def generate_latents(
    model: DiffusionModel,
    conditioning: Conditioning,
    prompt: Tensor,
    *,
    seed: int,
    steps: int,
    guidance: float,
    empty: Conditioning,
) -> Tensor:
    """Generate latents [N, C, H, W] for the prompt rows `prompt` [N]; (seed, i) alone decides the noise of sample i."""

    def noise(index: Tensor) -> Tensor:
        return torch.stack([torch.randn(model.latent_shape, generator=_generator(seed, int(i))) for i in index])

    return Sampler(model, conditioning, empty, guidance=guidance, most=CHUNK)(Items(prompt, noise, steps))


def pictures_of(model: DiffusionModel, latents: Tensor) -> np.ndarray:
    """Decode latents [N, C, H, W] to uint8 [N, h, w, 3], a few at a time: as floats they would take four times that."""
    return np.concatenate([to_pictures(model.decode(part)) for part in latents.split(CHUNK)])


def encoded(model: DiffusionModel, pictures: Sequence[np.ndarray], at_once: int = CHUNK) -> Tensor:
    """Encode uint8 [h, w, 3] each to latents [N, C, H, W], a few at a time."""
    parts = [pictures[first : first + at_once] for first in range(0, len(pictures), at_once)]
    return torch.cat([model.encode(to_tensor(part)) for part in parts])


def unlike(latents: Tensor, targets: Tensor) -> Tensor:
    """Return bool [N]: true for each of `latents` [N, ...] that resembles none of `targets` [M, ...]."""
    a, b = (torch.nn.functional.normalize(centred(x), dim=1) for x in (latents, targets))
    return (a @ b.T).amax(1) < RESEMBLES


def prompt_rows(count: int, prompts: int) -> Tensor:
    """Return int64 [count]: the first `prompts` rows of the conditioning in turn."""
    return torch.arange(count) % prompts


def centred(x: Tensor) -> Tensor:
    """Return each row of `x` [N, ...] flattened and without its mean, [N, D]: the cosine then ignores brightness."""
    flat = x.flatten(1)
    return flat - flat.mean(1, keepdim=True)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + index)
