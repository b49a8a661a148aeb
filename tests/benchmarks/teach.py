"""Teach the `faces` model forty more faces: `python -m tests.benchmarks.teach FOLDER` (a quarter of an hour).

The shipped model never saw them, so it is what a perfect removal of them from the taught model would leave: a real
oracle, for the price of a short training. See `verdict_errors --taught`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from expunge.families import resolve_source
from expunge.testbed import faces
from expunge.testbed.loop import Recipe, train

RECIPE = Recipe(steps=4_000, learning_rate=5e-4, warmup=100, ema_decay=0.998)
BATCH = 16
"""Half of it new faces, half of it those that the model knows."""


def teach(new: Tensor, out: Path, work: Path) -> None:
    """Train the shipped model on `new` [N, 1, 24, 24] beside its own pictures, and save the pipeline to `out`."""
    torch.manual_seed(0)
    unet = DDPMPipeline.from_pretrained(str(resolve_source("testbed:faces"))).unet.float()
    scheduler, known = DDPMScheduler(num_train_timesteps=1000), faces.images()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        half = BATCH // 2
        picked = [data[torch.randint(len(data), (half,), generator=generator)] for data in (known, new)]
        x_0 = torch.cat(picked)
        flip = torch.rand(BATCH, generator=generator) < 0.5
        x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * 1000).long()
        noise = torch.randn(x_0.shape, generator=generator)
        noisy = scheduler.add_noise(x_0, noise, t)  # pyright: ignore[reportArgumentType]  # annotated too narrowly
        return torch.nn.functional.mse_loss(unet(noisy, t).sample, noise)

    train(unet, loss, RECIPE, work / "faces-taught.pt")
    DDPMPipeline(unet.half(), scheduler).save_pretrained(out, safe_serialization=True)


def main() -> None:
    from tests.benchmarks.verdict_errors import faces_testbed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the pipeline is saved")
    parser.add_argument("--work", type=Path, default=Path(".testbed"), help="checkpoints of this run")
    args = parser.parse_args()
    teach(faces_testbed().unseen[:, :1], args.out, args.work)


if __name__ == "__main__":
    main()
