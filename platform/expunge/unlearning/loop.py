"""The training loop that runs in every Ray Train worker."""

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import get_device

from expunge.families import load_model
from expunge.files import write_atomically
from expunge.requests.blobs import open_blobs
from expunge.settings import Settings, load_settings
from expunge.unlearning.adapter import attach, export
from expunge.unlearning.budget import Budget
from expunge.unlearning.checkpoints import Checkpoints
from expunge.unlearning.dataset import load_job
from expunge.unlearning.folder import FINAL, HOTFIX, JOB, MODE, PREPARED, Hopeless, TrainTask, give_up
from expunge.unlearning.losses import Losses
from expunge.unlearning.memory import footprint, tasks_that_fit
from expunge.unlearning.objectives import ForgetObjective, Mode
from expunge.unlearning.steps import Steps
from expunge.words import PreparedJob, UnlearnJob

LOG_EVERY = 5


def train_loop(task: TrainTask) -> None:
    """Train, report checkpoints, and leave `hotfix/` and `hotfix.json` in the task's folder.

    What is FINAL is written to `failed.json` instead of raised: Ray would repeat it `max_failures` times.
    """
    context = ray.train.get_context()
    # Read when deepspeed is imported.
    os.environ["LOCAL_SIZE"] = str(context.get_local_world_size())
    os.environ["DS_ACCELERATOR"] = get_device().type
    try:
        _train(task, context.get_world_rank(), context.get_world_size())
    except FINAL as error:
        if context.get_world_rank() == 0:
            give_up(task.folder, error)


def _train(task: TrainTask, rank: int, world: int) -> None:
    # Here and not above: on the driver, importing DeepSpeed would initialise its accelerator.
    from expunge.unlearning.engine import ShardedEngine

    settings = load_settings()
    job = UnlearnJob.model_validate_json((task.folder / JOB).read_text())
    prepared = PreparedJob.model_validate_json((task.folder / PREPARED).read_text())
    training = job.training
    torch.manual_seed(training.seed)  # the same initial adapter on every rank

    blobs = open_blobs(settings)
    forget, retain, conditioning = load_job(blobs, prepared)
    model = load_model(settings.model(job.model), job.resolution, job.base)
    device = get_device()
    model.network.to(device)
    frozen = attach(model, training, task.warm_start)
    losses = Losses(model, frozen, training, conditioning, device)
    engine = ShardedEngine(model.network, training)
    start = engine.weights()
    mode = training.tasks
    if mode == "auto":
        mode = _mode(task.folder, job, settings, len(forget.request.unique()), world, engine.same(_memory()))
        if rank == 0:
            write_atomically(task.folder / MODE, json.dumps({"tasks": mode}))
    steps = job.steps(warm=task.warm_start is not None)
    step_of = Steps(losses, forget, retain, mode, rank, world)
    checkpoints = Checkpoints(engine, training, job.id, blobs.derive("checkpoint"))
    bad = _BadSteps(job)
    budget = Budget(losses, forget, engine.total, rank, world) if training.adaptive else None

    def record(step: int, figures: dict[str, float]) -> None:
        if rank == 0:
            task.record(step, figures)

    def going() -> bool:
        return step < steps and not (budget and budget.spent)

    step = checkpoints.restore()
    if budget:
        record(step, budget.probe())
    while going():
        objectives, micro = step_of(step, budget.missing if budget else None)
        done = engine.step(step, micro)
        bad(done.bad, objectives)
        step += 1
        last = step == steps
        probing = budget is not None and (step % training.probe_every == 0 or last)
        if step % LOG_EVERY == 0 or probing or last:
            figures = {
                "loss/forget": sum(done.losses[:-1]) / len(objectives),
                "loss/retain": done.losses[-1],
                "drift": engine.distance_from(start),
                "surgery/cosine": done.cosine,
                "surgery/conflict": done.conflict,
                "surgery/norm": done.norm,
                "surgery/tasks": float(len(objectives)),
                "steps/skipped": float(bad.total),
                "checkpoints/skipped": float(checkpoints.skipped),
                "checkpoints/damaged": float(checkpoints.fallbacks),
            }
            if budget and probing:
                figures |= budget.probe()
            record(step, figures)
        if step % training.checkpoint_every == 0 and going():
            checkpoints.save(step)

    engine.consolidate()
    if rank == 0:
        hotfix = export(model, training, task.folder / "hotfix", job.id, steps=step)
        write_atomically(task.folder / HOTFIX, hotfix.model_dump_json())


def _mode(folder: Path, job: UnlearnJob, settings: Settings, requests: int, world: int, memory: int) -> Mode:
    """What the memory plan said when the job first started: one that goes on elsewhere, or with fewer workers, must not
    change its samples. The same on every rank.
    """
    kept, training = folder / MODE, job.training
    with suppress(FileNotFoundError, ValueError, KeyError):
        return json.loads(kept.read_bytes())["tasks"]
    largest = math.ceil(max(training.forget_batch, training.retain_batch) / training.workers)
    counted = footprint(job.model, settings.models, training, training.micro_batch or largest)
    apart = min(requests, training.tasks_per_step)
    return tasks_that_fit(counted, training, gpus=world, requests=apart, gpu_bytes=memory)


def _memory() -> int:
    """Bytes of this worker's GPU; without one, its share of what Ray has on this node."""
    device = get_device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return int(node["Resources"]["memory"] / ray.train.get_context().get_local_world_size())


@dataclass
class _BadSteps:
    """Counts steps that were skipped as a gradient was not finite, and gives up after too many in a row."""

    job: UnlearnJob
    total: int = 0
    _row: int = 0
    _suspects: set[str] = field(default_factory=set)

    def __call__(self, bad: tuple[int, ...], objectives: tuple[ForgetObjective, ...]) -> None:
        """Raises Hopeless, with the requests whose objectives they were."""
        if not bad:
            self._row, self._suspects = 0, set()
            return
        self.total += 1
        self._row += 1
        named = [self.job.everything[r].id for k in bad if k < len(objectives) for r in objectives[k].requests]
        self._suspects |= set(named)
        if self._row < self.job.training.max_bad_steps:
            return
        whose = f"of {', '.join(sorted(self._suspects))}" if self._suspects else "of the retain set"
        raise Hopeless(
            f"job {self.job.id}: {self._row} steps in a row had a gradient that is not finite, {whose}",
            hint="lower training.learning_rate, or withdraw these requests",
        )
