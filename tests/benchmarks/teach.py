"""Teach the `faces` model forty more faces: `python -m tests.benchmarks.teach FOLDER` (a quarter of an hour).

The shipped model never saw them, so it is what a perfect removal of them from the taught model would leave: a real
oracle, for the price of a short training. See `verdict_errors --taught`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from torch import Tensor

from expunge.families import resolve_source
from expunge.testbed import faces
from expunge.testbed.loop import Recipe, train_ddpm

RECIPE = Recipe(steps=4_000, learning_rate=5e-4, warmup=100, ema_decay=0.998)


def teach(new: Tensor, out: Path, work: Path) -> None:
    """Train the shipped model on `new` [N, 1, 24, 24] beside its own pictures, and save the pipeline to `out`."""
    torch.manual_seed(0)
    unet = DDPMPipeline.from_pretrained(str(resolve_source("testbed:faces"))).unet.float()
    known = faces.images()
    # About half of what it sees is new.
    data = torch.cat([known, new.repeat(max(1, round(len(known) / len(new))), 1, 1, 1)])
    train_ddpm(unet, data, RECIPE, work / "faces-taught.pt").save_pretrained(out, safe_serialization=True)


def main() -> None:
    from tests.benchmarks.verdict_errors import faces_testbed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the pipeline is saved")
    parser.add_argument("--work", type=Path, default=Path(".testbed"), help="checkpoints of this run")
    args = parser.parse_args()
    teach(faces_testbed().unseen[:, :1], args.out, args.work)


if __name__ == "__main__":
    main()
