"""The training loop that runs in every Ray Train worker."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import ray
import ray.train
import torch
from ray.train.torch import get_device

from expunge.errors import InputError
from expunge.families import load_model
from expunge.generation.placement import usable
from expunge.logs import configure
from expunge.preparation.dataset import load_job
from expunge.requests.blobs import open_blobs
from expunge.runs.failures import FINAL
from expunge.runs.job import JobFolder
from expunge.settings import ModelSettings, load_settings
from expunge.types import Baseline, GradientMode, UnlearnJob
from expunge.unlearning.adapter import attach, export, kind_of
from expunge.unlearning.bad_steps import BadSteps
from expunge.unlearning.budget import Budget
from expunge.unlearning.checkpoints import Checkpoints
from expunge.unlearning.losses import Losses
from expunge.unlearning.memory import footprint, objectives_that_fit
from expunge.unlearning.objectives import Mode
from expunge.unlearning.steps import Steps
from expunge.unlearning.train import Record

if TYPE_CHECKING:
    from expunge.unlearning.engine import ShardedEngine, StepStatistics
    from expunge.unlearning.engine.shards import Shard

LOG_EVERY = 5


def train_loop(folder: JobFolder, warm_start: Path | None, record: Record) -> None:
    """Train, report checkpoints, and write the hotfix and its weights into the job's folder.

    An error of FINAL is recorded there instead of raised, because Ray would repeat it `max_failures` times.
    """
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    # DeepSpeed reads these when it is imported.
    os.environ["LOCAL_SIZE"] = str(context.get_local_world_size())
    os.environ["DS_ACCELERATOR"] = _device().type
    try:
        _train(folder, warm_start, record, rank, world)
    except FINAL as error:
        if rank == 0:
            folder.give_up(error)


def _train(folder: JobFolder, warm_start: Path | None, record: Record, rank: int, world: int) -> None:
    # Not at the top: on the driver, importing DeepSpeed would initialise its accelerator.
    from expunge.unlearning.engine import ShardedEngine

    job = folder.job.expect()
    settings = job.within(load_settings())
    configure(settings.log_level)
    baseline = folder.baseline.read() or Baseline(job=job.id, levels=())  # none: an earlier release planned it
    training, device = job.training.at_the_memory(baseline.levels), _device()
    if training.device == "gpu" and device.type == "cpu":
        raise InputError(
            "training.device: gpu, but torch cannot use the GPU of a worker",
            hint="install a torch for its driver, or set it to cpu or auto",
        )
    torch.manual_seed(training.seed)  # the same initial adapter on every rank

    blobs = open_blobs(settings)
    forget, retain, conditioning = load_job(blobs, folder.prepared.expect())
    forget = forget.without(_nothing_to_remove(baseline, job))
    exact = training.precision == "fp32"
    model = load_model(settings.model(job.model), job.resolution, job.base, device=device, exact=exact)
    frozen = attach(model, training, warm_start)
    losses = Losses(model, frozen, training, conditioning, device)
    engine = ShardedEngine(model.network, training)
    start = engine.weights()
    mode = training.objectives
    if mode == "auto":
        mode = _mode(folder, job, settings.models, len(forget.request.unique()), world, engine.same(_memory()))
        if rank == 0:
            folder.mode.write(GradientMode(objectives=mode))
    loop = _Loop(
        job=job,
        kind=kind_of(model.lora_targets, training),
        steps=job.steps(warm=warm_start is not None),
        engine=engine,
        start=start,
        objectives_of=Steps(losses, training, forget, retain, mode, rank, world),
        checkpoints=Checkpoints(engine, training, job.id, blobs.derive("checkpoint")),
        bad=BadSteps(job),
        budget=Budget(losses, training, forget, engine.total, rank, world) if training.adaptive else None,
        record=record if rank == 0 else _ignore,
    )
    done = loop.run()

    engine.consolidate()
    if rank == 0:
        folder.hotfix.write(export(model, training, folder.weights, job.id, steps=done))


def _nothing_to_remove(baseline: Baseline, job: UnlearnJob) -> list[int]:
    """Return the places, in the job, of the requests that the base model does not reproduce."""
    return [place for place, request in enumerate(job.everything) if request.id in baseline.not_reproduced]


@dataclass(frozen=True)
class _Loop:
    """The steps of one training on one rank. All ranks run them together."""

    job: UnlearnJob
    kind: Literal["lora", "full"]
    steps: int
    """The maximum; an adaptive budget may end earlier."""
    engine: "ShardedEngine"
    start: "Shard"
    """The weights before the first step, which the drift is measured from."""
    objectives_of: Steps
    checkpoints: Checkpoints
    bad: BadSteps
    budget: Budget | None
    record: Record

    def run(self) -> int:
        """Continue from the newest checkpoint to the end; return the steps done."""
        step = self.checkpoints.restore()
        if self.budget:
            self.record(step, self.budget.probe())
        while self._goes_on(step):
            objectives, micro_batches = self.objectives_of(step, self.budget.missing if self.budget else None)
            self.engine.set_rate(self.job.training.rate(self.kind, step / self.steps))
            done = self.engine.step(step, micro_batches)
            self.bad(done.bad, objectives)
            step += 1
            self._report(step, len(objectives), done)
            if step % self.job.training.checkpoint_every == 0 and self._goes_on(step):
                self.checkpoints.save(step)
        return step

    def _goes_on(self, step: int) -> bool:
        return step < self.steps and not (self.budget and self.budget.spent)

    def _report(self, step: int, objectives: int, done: "StepStatistics") -> None:
        """Probe the budget and record the figures when either is due."""
        last = step == self.steps
        probing = self.budget is not None and (step % self.job.training.probe_every == 0 or last)
        if step % LOG_EVERY and not probing and not last:
            return
        figures = {
            "loss/forget": sum(done.losses[:-1]) / objectives,
            "loss/retain": done.losses[-1],
            "drift": self.engine.distance_from(self.start),
            "surgery/cosine": done.cosine,
            "surgery/conflict": done.conflict,
            "surgery/norm": done.norm,
            "surgery/objectives": float(objectives),
            "steps/skipped": float(self.bad.total),
            "checkpoints/skipped": float(self.checkpoints.skipped),
            "checkpoints/damaged": float(self.checkpoints.fallbacks),
        }
        if self.budget and probing:
            figures |= self.budget.probe()
        self.record(step, figures)


def _ignore(step: int, figures: dict[str, float]) -> None:
    """Do nothing, because rank 0 records for all."""


def _mode(
    folder: JobFolder, job: UnlearnJob, models: Mapping[str, ModelSettings], requests: int, world: int, memory: int
) -> Mode:
    """Return what the memory plan chose when the job first started, the same on every rank.

    A job that continues elsewhere, or with fewer workers, must keep its samples.
    """
    kept, training = folder.mode.read(), job.training
    if kept is not None:
        return kept.objectives
    largest = math.ceil(max(training.forget_batch, training.retain_batch) / training.workers)
    counted = footprint(job.model, models, training, training.micro_batch or largest)
    apart = min(requests, training.objectives_per_step)
    return objectives_that_fit(counted, training, gpus=world, requests=apart, gpu_bytes=memory)


def _device() -> torch.device:
    """Return the device of this worker: its GPU, if torch can use that."""
    return usable(get_device())


def _memory() -> int:
    """Return the memory of this worker's GPU in bytes; without a GPU, its share of the memory that Ray has here."""
    device = _device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return int(node["Resources"]["memory"] / ray.train.get_context().get_local_world_size())
