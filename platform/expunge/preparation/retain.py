"""The retain images, which the model must keep generating: how they are generated, and told from targets."""

import torch
from torch import Tensor

from expunge.families.base import Conditioning, DiffusionModel, rows
from expunge.families.sampler import generate

RESEMBLES = 0.9
"""Centred cosine in latent space above which two images count as the same. A guess, checked by eye on the testbed."""

CHUNK = 32


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
    parts = []
    for index in torch.arange(len(prompt)).split(CHUNK):
        noise = torch.stack([torch.randn(model.latent_shape, generator=_generator(seed, int(i))) for i in index])
        cond, blank = rows(conditioning, prompt[index]), rows(empty, torch.zeros(len(index), dtype=torch.long))
        parts.append(generate(model, noise, cond, steps=steps, guidance=guidance, empty=blank))
    return torch.cat(parts)


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
