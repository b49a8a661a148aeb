"""Views of a target and its surrogate: an instance is more than one file.

A model that learns to replace one file still reproduces the picture mirrored, moved or in another light. So training
sees each pair in several views, transformed in pixels and only then encoded, because most autoencoders do not commute
with such transforms. Target and surrogate are always transformed together: what differs between them stays the only
difference.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

# About twice as much as the evaluation's own views change a picture, which training must not be fitted to. Chosen by
# eye on the testbeds: at the ends of these ranges the instance is still clearly itself.
ANGLE = 0.09
"""The largest rotation, in radians."""
SCALE = 0.08
"""The largest change of size, as a logarithm."""
SHIFT = 0.06
"""The largest shift, as a fraction of the picture's side."""
CONTRAST, BRIGHTNESS = 0.25, 0.15
"""The largest change of contrast, as a logarithm, and of brightness, on [-1, 1]."""


def views_of_pair(target: Tensor, surrogate: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` views of target and surrogate, float32 [count, 3, h, w] each in [-1, 1].

    target, surrogate: float32 [3, h, w] in [-1, 1]. The first view is the pair itself, the second its mirror image. The
    others are random, every other one of them mirrored; (seed, i) and the target decide view i alone.
    """
    pair = torch.stack([target, surrogate])
    views = [pair, pair.flip(-1)][:count]
    content = hashlib.sha256(target.contiguous().numpy().tobytes()).digest()[:8]
    for i in range(2, count):
        draws = np.random.default_rng([seed, i, int.from_bytes(content)]).uniform(-1, 1, 6)
        views.append(_changed(pair.flip(-1) if i % 2 else pair, draws))
    both = torch.stack(views)
    return both[:, 0], both[:, 1]


def resampled(pictures: Tensor, source: Tensor) -> Tensor:
    """Move pictures [N, C, h, w] by an affine transform; bicubic interpolation may leave their range.

    source: [2, 3], where each pixel comes from, in coordinates from -1 to 1: the inverse of the transform, with a shift
    by a fraction of the side counted twice.
    """
    grid = torch.nn.functional.affine_grid(
        source.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(pictures, grid, mode="bicubic", padding_mode="border", align_corners=False)


def _changed(pair: Tensor, draws: np.ndarray) -> Tensor:
    """Rotate, scale, shift and relight both pictures alike; each of the six draws is in [-1, 1]."""
    angle, scale, right, down, contrast, brightness = draws.tolist()
    # Of the inverse, as `resampled` wants it.
    turn, zoom = ANGLE * angle, math.exp(-SCALE * scale)
    # In these coordinates a pixel is as wide as it is high only if the picture is.
    height, width = pair.shape[-2:]
    source = torch.tensor(
        [
            [zoom * math.cos(turn), -zoom * math.sin(turn) * height / width, -2 * SHIFT * right],
            [zoom * math.sin(turn) * width / height, zoom * math.cos(turn), -2 * SHIFT * down],
        ]
    )
    return (math.exp(CONTRAST * contrast) * resampled(pair, source) + BRIGHTNESS * brightness).clamp(-1, 1)
