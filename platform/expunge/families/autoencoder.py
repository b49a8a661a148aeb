"""Pictures through an autoencoder in bounded memory: a few at once, and a large one in tiles."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

PIXELS = 2**20
"""Pixels of pictures that pass through at once: one of 1024 x 1024 takes about 3 GB in float32."""


@torch.no_grad()
def in_chunks(autoencoder: AutoencoderKL, run: Callable[[Tensor], Tensor], given: Tensor, pixels: int) -> Tensor:
    """Return what `run` makes of `given` [B, ...], float32 on the host.

    run: takes a part of `given` on the autoencoder's device and in its precision. pixels: of one picture; one with more
    than PIXELS is coded in tiles, which overlap.
    """
    if pixels > PIXELS:
        autoencoder.enable_tiling()
    where = {"device": autoencoder.device, "dtype": autoencoder.dtype}
    parts = [run(part.to(**where)).float().cpu() for part in given.split(max(1, PIXELS // pixels))]
    return torch.cat(parts)
