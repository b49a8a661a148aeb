"""`faces`: a small pixel-space DDPM of the 100 real faces that scikit-image ships."""

from collections.abc import Collection
from pathlib import Path
from typing import cast

import numpy as np
import skimage
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from expunge.testbed.loop import Recipe, train

SIZE = 24
RECIPE = Recipe(steps=16_000)
BATCH = 16


def images() -> Tensor:
    """Return float32 [100, 1, 24, 24] in [-1, 1]: Labeled Faces in the Wild, no identities, cropped from 25x25."""
    path = Path(skimage.__file__).parent / "data" / "lfw_subset.npy"
    faces = np.load(path)[:100, :SIZE, :SIZE].astype(np.float32)
    return torch.from_numpy(faces)[:, None] * 2 - 1


def build() -> UNet2DModel:
    """Build the untrained network, for pictures [B, 1, 24, 24]."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def run(out: Path, work: Path, steps: int | None = None, seed: int = 0, without: Collection[int] = ()) -> None:
    """Train and save the pipeline to `out`; `work` keeps the checkpoint that a killed run resumes from.

    without: faces (0 to 99) that the model shall not know. Such a model is what a perfect removal of them would leave.
    """
    torch.manual_seed(seed)
    recipe = Recipe(steps=steps or RECIPE.steps, seed=seed)
    unet, scheduler = build(), DDPMScheduler(num_train_timesteps=1000)
    data = images()[[face for face in range(100) if face not in without]]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (BATCH,), generator=generator)
        x_0 = data[index]
        flip = torch.rand(BATCH, generator=generator) < 0.5
        x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        # Stratified over the batch: one timestep from each of BATCH equal slices, which lowers the loss's variance.
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * 1000).long()
        noise = torch.randn(x_0.shape, generator=generator)
        return torch.nn.functional.mse_loss(
            unet(scheduler.add_noise(x_0, noise, cast(torch.IntTensor, t)), t).sample, noise
        )

    name = "-".join(["faces", *map(str, sorted(without))])
    train(unet, loss, recipe, work / f"{name}.pt", name)
    DDPMPipeline(unet.half(), scheduler).save_pretrained(out, safe_serialization=True)
