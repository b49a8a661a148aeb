"""The training loop that both testbed recipes share: seeded per step, EMA, cosine schedule, exact resume."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from expunge.files import write_atomically

LOG_EVERY = 200


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


def train(
    model: nn.Module, loss: Callable[[int, torch.Generator], Tensor], recipe: Recipe, checkpoint: Path, title: str
) -> None:
    """Train `model` in place and leave its EMA weights in it.

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
    with Progress(*columns) as progress:
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
