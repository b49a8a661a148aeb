"""`faces`: a small pixel-space DDPM of the 100 real faces that scikit-image ships."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import skimage
import torch
from diffusers import UNet2DModel
from torch import Tensor

from expunge.testbed.loop import Recipe, build_ddpm, run_ddpm, without_these

SIZE = 24
RECIPE = Recipe(steps=16_000)


def images() -> Tensor:
    """Return float32 [100, 1, 24, 24] in [-1, 1]: Labeled Faces in the Wild, no identities, cropped from 25x25."""
    path = Path(skimage.__file__).parent / "data" / "lfw_subset.npy"
    faces = np.load(path)[:100, :SIZE, :SIZE].astype(np.float32)
    return torch.from_numpy(faces)[:, None] * 2 - 1


def build() -> UNet2DModel:
    """Build the untrained network, for pictures [B, 1, 24, 24]."""
    return build_ddpm(SIZE, (32, 64, 64))


def run(out: Path | None, work: Path, steps: int | None = None, seed: int = 0, without: Collection[int] = ()) -> Path:
    """Train and save the pipeline to `out`, by default a folder in `work`, and return the folder.

    work: where the checkpoint is that a killed run resumes from. without: faces (0 to 99) that the model shall not
    know; such a model is what a perfect removal of them would leave. Raises InputError if one is not known.
    """
    recipe = replace(RECIPE, steps=steps or RECIPE.steps, seed=seed)
    return run_ddpm("faces", build, images()[without_these(100, without)], recipe, out, work, without)
