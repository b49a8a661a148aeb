"""Pictures of a model's domain that the model never saw: how well they are reproduced is ability, and not memory.

By default they are the base model's own samples, gently warped: a sample looks like the domain, and the warp takes it
away from whatever picture it repeats. Averages and halves of two pictures show ghosts and seams instead: on a model of
drawings they return with 0.05 to 0.18 less similarity than truly unseen pictures.

If the reference returns too poorly, ability passes for memory: verdicts are too strict, and a request that is not
reproduced may be taken for one that is. If it returns too well, memory passes for ability: verdicts are too lax.
A folder of truly unseen pictures does neither.
"""

from pathlib import Path

import torch
from torch import Tensor

from expunge.errors import InputError
from expunge.pixels import to_tensor
from expunge.preparation.pictures import load_folder
from expunge.settings import EvaluationSettings, Resolution

GRID = 4
"""A warp is a smooth field of displacements, drawn at GRID x GRID points and interpolated between them."""
STRENGTH = 0.1
"""Standard deviation of a displacement, as a fraction of half the picture's side.

It moves the reference from memory to mush. `python -m tests.benchmarks.unseen_reference` finds samples warped by 0.1
0.08 to 0.16 below people whom `people` never saw (by 0.07: about equal), and on `faces` 0.02 to 0.09 above faces
of another data set (by 0.14: 0.01 to 0.07 below), which may come back worse than unseen faces of the same set would.
The testbeds do not agree on a better strength. docs/measurements.md has all figures.
"""


def unseen_pictures(
    samples: Tensor,
    options: EvaluationSettings,
    resolution: Resolution,
    seed: int,
    *,
    max_bytes: int = 64_000_000,
    max_pixels: int = 32_000_000,
) -> tuple[Tensor, str]:
    """Return M = `options.unseen_pictures` pictures, float32 [M, 3, h, w] in [-1, 1], and in words what they are.

    They come from `options.unseen_folder` or, by default, are warped samples of the base model: `samples`, float32
    [N, 3, h, w], of which each is used equally often. `seed` decides the warps, and which files of a larger folder are
    used. max_bytes, max_pixels: limits for a file of the folder. Raises InputError if the folder does not hold enough
    pictures, or one is unusable; ValueError without samples.
    """
    if options.unseen_folder is not None:
        return _from_folder(options.unseen_folder, options.unseen_pictures, resolution, seed, max_bytes, max_pixels)
    if not len(samples):
        raise ValueError("there are no samples to make unseen pictures of")
    chosen = samples[torch.arange(options.unseen_pictures) % len(samples)]
    words = f"{len(chosen)} pictures, each a gently warped sample of the base model"
    return warped(chosen, seed), words


def warped(pictures: Tensor, seed: int, strength: float = STRENGTH) -> Tensor:
    """Bend each of `pictures` [N, 3, h, w] by a smooth random field of its own; (seed, i) decides that of picture i."""
    fields = torch.stack([_noise(seed, i) for i in range(len(pictures))]) * strength
    fine = torch.nn.functional.interpolate(fields, size=pictures.shape[-2:], mode="bicubic")
    straight = torch.eye(2, 3).expand(len(pictures), 2, 3)
    grid = torch.nn.functional.affine_grid(straight, list(pictures.shape), align_corners=False)
    return torch.nn.functional.grid_sample(
        pictures, grid + fine.permute(0, 2, 3, 1), mode="bilinear", padding_mode="reflection", align_corners=False
    )


def _noise(seed: int, index: int) -> Tensor:
    return torch.randn(2, GRID, GRID, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))


def _from_folder(
    folder: Path, count: int, resolution: Resolution, seed: int, max_bytes: int, max_pixels: int
) -> tuple[Tensor, str]:
    field = "evaluation.unseen_folder"
    pictures = load_folder(folder, resolution, field=field, max_bytes=max_bytes, max_pixels=max_pixels)
    if len(pictures) < count:
        raise InputError(
            f"{field}: {folder} holds {len(pictures)} pictures, not {count}",
            hint="add pictures or lower evaluation.unseen_pictures",
        )
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count]
    words = f"{count} pictures of evaluation.unseen_folder, which the base model never saw according to its owner"
    return to_tensor([pictures[i] for i in order.tolist()]), words
