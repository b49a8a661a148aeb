"""One arm's training, in one process: the same optimizer, schedule and clip for all, and as many network passes."""

from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, sqrt
from pathlib import Path

import torch

from expunge.bench.arms import Arm
from expunge.bench.lesson import Lesson, Method, dot
from expunge.bench.product import mode_of, passes_of_product
from expunge.families import load_model
from expunge.generation.placement import device
from expunge.preparation.dataset import load_job, load_tensors
from expunge.requests.blobs import BlobStore
from expunge.settings import Settings, TrainingSettings
from expunge.types import Baseline, Hotfix, PreparedJob, UnlearnJob
from expunge.unlearning.adapter import attach, export, kind_of


@dataclass(frozen=True)
class Trained:
    """A hotfix, and what it took."""

    hotfix: Hotfix
    passes: int
    """Network passes of the training."""
    diverged: bool
    """The gradient stayed infinite or NaN, so that the training ended early."""


def train_arm(
    arm: Arm,
    job: UnlearnJob,
    prepared: PreparedJob,
    baseline: Baseline,
    settings: Settings,
    blobs: BlobStore,
    out: Path,
    *,
    train: bool = True,
) -> Trained:
    """Train the job, whose settings are those of the product, as `arm` does, and export the weights to `out`.

    train: False leaves the base model as it is, because there is nothing to remove.
    """
    lesson = _lesson(arm.training(job.training), job, prepared, baseline, settings, blobs)
    kind = kind_of(lesson.model.lora_targets, lesson.training)
    if arm.method is None or not train:
        return Trained(export(lesson.model, lesson.training, out, job.id, steps=0), 0, False)
    steps = max(1, _budget(lesson, job) // arm.passes(lesson))
    rate = partial(lesson.training.rate, kind)
    done, diverged = descend(
        lesson, arm.method, [rate(0.0 if arm.constant_rate else step / steps) for step in range(steps)]
    )
    hotfix = export(lesson.model, lesson.training, out, job.id, steps=done)
    return Trained(hotfix, done * arm.passes(lesson), diverged)


def descend(lesson: Lesson, method: Method, rates: list[float]) -> tuple[int, bool]:
    """Make a step at each learning rate; return how many were made, and whether the training diverged.

    A step whose gradient is not finite is skipped; after `max_bad_steps` in a row the training ends where it is.
    """
    optimizer = torch.optim.AdamW(lesson.weights, weight_decay=0.0)
    bad = 0
    for step, rate in enumerate(rates):
        gradient = method(lesson, step)
        norm = sqrt(squares) if isfinite(squares := dot(gradient, gradient)) else float("nan")
        bad = 0 if isfinite(norm) else bad + 1
        if bad == lesson.training.max_bad_steps:
            return step + 1, True
        if bad:
            continue
        scale = min(1.0, lesson.training.clip / norm) if norm else 1.0
        for weight, part in zip(lesson.weights, gradient, strict=True):
            weight.grad = part * scale
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return len(rates), False


def retrained(folder: Path, job: UnlearnJob, settings: Settings, out: Path) -> Hotfix:
    """Export the weights of the pipeline in `folder`, which was trained without the job's targets, as a hotfix.

    Raises InputError where it is not a model of the job's kind.
    """
    options = settings.model(job.model).model_copy(update={"source": str(folder), "revision": ""})
    model = load_model(options, job.resolution)
    whole: TrainingSettings = job.training.model_copy(update={"adapter": "full"})
    return export(model, whole, out, job.id, steps=0)


def _lesson(
    training: TrainingSettings,
    job: UnlearnJob,
    prepared: PreparedJob,
    baseline: Baseline,
    settings: Settings,
    blobs: BlobStore,
) -> Lesson:
    training = training.at_the_memory(baseline.levels)
    forget, retain, conditioning = load_job(blobs, prepared)
    absent = [place for place, request in enumerate(job.everything) if request.id in baseline.not_reproduced]
    forget = forget.without(absent)
    assert prepared.empty is not None
    where = device()
    model = load_model(settings.model(job.model), job.resolution, job.base, device=where, exact=True)
    torch.manual_seed(training.seed)  # the same initial adapter in every arm
    return Lesson(
        model=model,
        frozen=attach(model, training, None),
        training=training,
        forget=forget,
        retain=retain,
        conditioning=conditioning,
        empty=load_tensors(blobs, prepared.empty),
        mode=mode_of(training, len(forget.request.unique())),
        device=where,
    )


def _budget(lesson: Lesson, job: UnlearnJob) -> int:
    """Return the network passes that the product's own training of the job takes."""
    product = replace(lesson, training=job.training)
    return job.steps(warm=False) * passes_of_product(product)
