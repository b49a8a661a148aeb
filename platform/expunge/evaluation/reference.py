"""Pictures of a model's domain that the model never saw: how well they are reproduced is ability, and not memory.

By default they are the base model's own samples, gently warped: a sample looks like the domain, and the warp takes it
away from whatever picture it repeats. Averages and halves of two pictures show ghosts and seams instead, and return
worse than truly unseen pictures on the one model where both were measured.

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

A dial from memory to mush: on `faces` at level 0.3, by EfficientNet-Lite0 and by edges, the base model's own samples
come back with similarity 0.65 and 0.67, warped by 0.04 with 0.48 and 0.57, by 0.06 with 0.36 and 0.48, by 0.1 with 0.18
and 0.32 (16 pictures, one draw, standard error about 0.04). 0.1 is the one that agrees with faces of another data set:
`python -m tests.benchmarks.unseen_reference faces` finds it 0.02 to 0.09 above them. Those may lie below unseen
pictures of the same set, so that the made ones may be too low on this model; it was chosen on this one model alone.
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
    words = f"{len(chosen)} samples of the base model, warped so that they show what no training picture shows"
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
