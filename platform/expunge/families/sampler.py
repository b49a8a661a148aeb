"""Deterministic sampling: DDIM for a DDPM, Euler for a flow, with classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from expunge.families.base import Conditioning, DiffusionModel
from expunge.families.path import PathPoint

Between = Callable[[Tensor, PathPoint], Tensor]
"""Changes a sample [B, C, H, W] that has just moved to a point of the path [1]."""


def generate(
    model: DiffusionModel,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    steps: int,
    guidance: float,
    empty: Conditioning,
) -> Tensor:
    """Sample latents [B, C, H, W] from pure noise of that shape."""
    return denoise(model, noise, 1.0, conditioning, steps=steps, guidance=guidance, empty=empty)


def descend(
    model: DiffusionModel,
    x_t: Tensor,
    start: float,
    conditioning: Conditioning,
    *,
    steps: int,
    guidance: float,
    empty: Conditioning,
    between: Between | None = None,
) -> Tensor:
    """Take x_t [B, C, H, W] from noise level `start` down to a clean latent of the same shape.

    conditioning, empty: one row for each sample, with its prompt and with the empty prompt. between: called after
    every move except the last, which leads to the clean estimate.

    DDIM and Euler are one rule here: estimate (x_0, eps) at x_t and move along the path to the next, lower level.
    x_t, conditioning and empty are on one device, in float32, whatever the network computes in. Gradients pass through;
    `denoise` is the same without them.
    """
    x = x_t
    guided = _unlike(conditioning, empty) if guidance > 1 and empty else x_t.new_zeros(0, dtype=torch.long)
    # One batch holds the samples with and without the prompt: small batches cost more per sample.
    asked = torch.cat([torch.arange(len(x), device=x.device), guided])
    conditions = conditioning
    if len(guided):
        conditions = {name: torch.cat([table, empty[name][guided]]) for name, table in conditioning.items()}
    for time, there in model.path_down(torch.tensor([start], dtype=torch.float32), steps):
        here = model.at(time.expand(len(x))).to(x.device)
        both = model.predict(x[asked], time.expand(len(asked)), conditions)
        prediction, unguided = both[: len(x)], both[len(x) :]
        prediction[guided] = unguided + guidance * (prediction[guided] - unguided)
        estimate = here.clean(x, prediction)
        clean = model.clip(estimate)
        if there is None:
            return clean
        there = there.to(x.device)
        a, b = (v.view(-1, 1, 1, 1) for v in (here.a, here.b))
        noise = (x - a * (clean if model.noise_of_clipped else estimate)) / b
        x = there.noised(clean, noise)
        x = x if between is None else between(x, there)
    return x


denoise = torch.no_grad()(descend)


def _unlike(conditioning: Conditioning, empty: Conditioning) -> Tensor:
    """Find the samples that guidance moves, int64 [G]: those whose conditioning is not the empty one already."""
    # Not bit by bit: a text encoder rounds a prompt differently in another batch.
    same = [torch.isclose(table, empty[name], 1e-4, 1e-4).flatten(1).all(1) for name, table in conditioning.items()]
    return torch.nonzero(~torch.stack(same).all(0)).flatten()
