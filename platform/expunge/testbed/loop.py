"""What the testbed recipes share: a training loop that is seeded per step and resumes exactly, and the DDPM's loss."""

import io
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from expunge.errors import InputError
from expunge.files import write_atomically

LOG_EVERY = 200
DDPM_BATCH = 16


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training phase; the steps decide most of the quality, the rest are ordinary choices."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 300
    ema_decay: float = 0.9995
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0


def without_these(total: int, without: Collection[int]) -> list[int]:
    """Return the numbers 0 to total - 1 except `without`. Raises InputError for one that is not among them."""
    strangers = sorted(set(without) - set(range(total)))
    if strangers:
        raise InputError(f"without: there is no {strangers[0]}", hint=f"name some of 0 to {total - 1}")
    kept = [each for each in range(total) if each not in without]
    if not kept:
        raise InputError("without: nothing is left to train on", hint=f"leave some of 0 to {total - 1}")
    return kept


def run_name(name: str, without: Collection[int] = (), recipe: Recipe | None = None) -> str:
    """Name a model by what it was trained without, such as `people-without-16-to-23`, and a run also by its recipe.

    A run resumes from the checkpoint of its name, so whatever makes another model must be in it.
    """
    parts = [name, "without"] if without else [name]
    for _, run in groupby(enumerate(sorted(set(without))), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        parts.append(f"{numbers[0]}-to-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}")
    return "-".join(parts if recipe is None else [*parts, f"steps-{recipe.steps}", f"seed-{recipe.seed}"])


def build_ddpm(size: int | tuple[int, int], widths: tuple[int, int, int]) -> UNet2DModel:
    """Build an untrained network for grey pictures of `size`, with attention at its lowest resolution."""
    return UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def run_ddpm(
    name: str,
    build: Callable[[], UNet2DModel],
    data: Tensor,
    recipe: Recipe,
    out: Path | None,
    work: Path,
    without: Collection[int],
) -> Path:
    """Train what `build` builds, save the pipeline to `out`, by default a folder in `work`, and return the folder."""
    torch.manual_seed(recipe.seed)
    pipeline = train_ddpm(build(), data, recipe, work / f"{run_name(name, without, recipe)}.pt")
    out = out or work / run_name(name, without)
    pipeline.save_pretrained(out, safe_serialization=True)
    return out


def train_ddpm(unet: UNet2DModel, data: Tensor, recipe: Recipe, checkpoint: Path) -> DDPMPipeline:
    """Train `unet` on pictures float32 [N, 1, h, w] and their mirror images; return the pipeline in float16."""
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (DDPM_BATCH,), generator=generator)
        x_0 = data[index]
        flip = torch.rand(DDPM_BATCH, generator=generator) < 0.5
        x_0 = torch.where(flip[:, None, None, None], x_0.flip(-1), x_0)
        # Stratified: one timestep from each of equal slices, as many as the batch is large, lowers the loss's variance.
        t = ((torch.arange(DDPM_BATCH) + torch.rand(DDPM_BATCH, generator=generator)) / DDPM_BATCH * 1000).long()
        noise = torch.randn(x_0.shape, generator=generator)
        noisy = scheduler.add_noise(x_0, noise, cast(torch.IntTensor, t))
        return torch.nn.functional.mse_loss(unet(noisy, t).sample, noise)

    train(unet, loss, recipe, checkpoint)
    return DDPMPipeline(unet.half(), scheduler)


def train(model: nn.Module, loss: Callable[[int, torch.Generator], Tensor], recipe: Recipe, checkpoint: Path) -> None:
    """Train `model` in place, from `checkpoint` on where there is one, and leave its EMA weights in it.

    `loss(step, generator)` returns a scalar; everything random in it must come from `generator`, which is seeded by
    (seed, step), so that a resumed run equals an uninterrupted one.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    ema = EMAModel(model.parameters(), decay=recipe.ema_decay)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start = state["step"]

    model.train()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    title = checkpoint.stem
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=recipe.steps, completed=start)
        running = 0.0
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe)
            value = loss(step, torch.Generator().manual_seed(recipe.seed * 1_000_003 + step))
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(model.parameters())
            running += value.item()
            progress.advance(task)
            if (step + 1) % LOG_EVERY == 0:
                progress.console.print(f"{title} step {step + 1}/{recipe.steps} loss {running / LOG_EVERY:.4f}")
                running = 0.0
                _save(
                    checkpoint,
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "ema": ema.state_dict(),
                        "step": step + 1,
                    },
                )
    ema.copy_to(model.parameters())
    model.eval()


def _schedule(step: int, recipe: Recipe) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def _save(path: Path, state: dict[str, object]) -> None:
    """Save a checkpoint; a kill in the middle leaves the previous one."""
    data = io.BytesIO()
    torch.save(state, data)
    write_atomically(path, data.getvalue())
