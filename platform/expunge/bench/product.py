"""The product's own step, in one process: its losses, objectives and surgery, without DeepSpeed.

A training on one rank equals one on several, to rounding, by the tests of the engine (tests/unlearning/test_engine.py).
"""

from collections.abc import Mapping

import torch

from expunge.bench.lesson import Gradient, Lesson
from expunge.errors import InputError
from expunge.settings import TrainingSettings
from expunge.unlearning.losses import Losses
from expunge.unlearning.objectives import Mode, forget_step
from expunge.unlearning.steps import Steps
from unlearn_kernels import combine_, gram, surgery

FOLLOWED: Mapping[str, object] = {
    "surgery_geometry": "euclidean",
    "surgery_granularity": "global",
    "adaptive": False,
    "precision": "fp32",
}
"""The only value of each of these settings that is followed here: the others are the sharded engine's."""
GRADIENT = 3
"""Passes of a forward and a backward pass, of which the latter counts as two."""


def product(lesson: Lesson, step: int) -> Gradient:
    """Return the combination of the step's gradients that the surgery of `lesson.training` chooses."""
    training = lesson.training
    losses = Losses(lesson.model, lesson.frozen, training, lesson.conditioning, lesson.device)
    _, micro_batches = Steps(losses, training, lesson.forget, lesson.retain, lesson.mode, 0, 1)(step)
    gradients = [lesson.gradient(torch.stack([micro() for micro in each]).mean()) for each in micro_batches]
    chosen = surgery(training.surgery, gram(gradients), training.forget_weight, seed=training.seed + step)
    combine_(gradients[-1], gradients, chosen)
    return gradients[-1]


def passes_of_product(lesson: Lesson) -> int:
    """Return the network passes of one step of `product`: the frozen model's answers count, too."""
    training = lesson.training
    forget = len(forget_step(training, lesson.mode, lesson.forget.request, 0).rows)
    return forget * (GRADIENT + (training.forget_target == "recognition")) + training.retain_batch * (
        GRADIENT + (training.retain_target == "distill")
    )


def mode_of(training: TrainingSettings, requests: int) -> Mode:
    """Return what `training.objectives = "auto"` comes to for so many requests where memory is no limit."""
    if training.objectives != "auto":
        return training.objectives
    return "request" if requests <= training.forget_batch // training.workers else "batch"


def check(training: TrainingSettings) -> None:
    """Raise InputError for settings that only the sharded engine follows."""
    for name, value in FOLLOWED.items():
        if getattr(training, name) != value:
            raise InputError(
                f"training.{name}: the benchmark trains in one process without the engine, which alone knows "
                f"{getattr(training, name)!r}",
                hint=f"set it to {str(value).lower()}",
            )
