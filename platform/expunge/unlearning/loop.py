"""The training loop that runs in every Ray Train worker."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray.train
import torch

from expunge.errors import ExpungeError
from expunge.families import load_model
from expunge.files import write_atomically
from expunge.requests.blobs import open_blobs
from expunge.settings import load_settings
from expunge.unlearning.adapter import attach, export
from expunge.unlearning.dataset import load_job
from expunge.unlearning.objective import Objective
from expunge.unlearning.sampling import Draw, Stream, draw
from expunge.words import PreparedJob, UnlearnJob

if TYPE_CHECKING:
    from expunge.unlearning.engine import ShardedEngine

JOB, PREPARED, HOTFIX = "job.json", "prepared.json", "hotfix.json"
"""What a job's folder holds: its description, where its tensors are, and what training made."""

LOG_EVERY = 5

Record = Callable[[int, dict[str, float]], None]
"""Called on rank 0 with the steps done and their figures; it is pickled to the worker."""


@dataclass(frozen=True)
class TrainTask:
    """All that a worker is sent. The job lies in its folder and the tensors in the blob store: Ray carries neither."""

    folder: Path
    warm_start: Path | None
    record: Record


def train_loop(task: TrainTask) -> None:
    """Train, report checkpoints, and leave `hotfix/` and `hotfix.json` in the task's folder."""
    # Here and not above: on the driver, importing DeepSpeed would initialise its accelerator.
    from expunge.unlearning.engine import ShardedEngine

    settings = load_settings()
    job = UnlearnJob.model_validate_json((task.folder / JOB).read_text())
    prepared = PreparedJob.model_validate_json((task.folder / PREPARED).read_text())
    training = job.training
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(training.seed)  # the same initial adapter on every rank

    forget, retain, conditioning = load_job(open_blobs(settings), prepared)
    model = load_model(settings.model(job.model), job.resolution)
    frozen = attach(model, training, task.warm_start)
    objective = Objective(model, frozen, training, conditioning)
    engine = ShardedEngine(model.network, training)
    start = engine.weights()

    def sample(stream: Stream, step: int, size: int, batch: int) -> Draw:
        return draw(model, training, stream, step, size=size, batch=batch, rank=rank, world=world)

    for step in range(_resume(engine), training.steps):
        forget_draw = sample("forget", step, len(forget.x_f), training.forget_batch)
        retain_draw = sample("retain", step, len(retain.x_0), training.retain_batch)
        surgery = engine.step(
            [
                [lambda draw=forget_draw: objective.forget(forget, draw)],
                [lambda draw=retain_draw: objective.retain(retain, draw)],
            ]
        )
        if surgery.bad:
            raise ExpungeError(
                f"job {job.id}: the loss is not finite at step {step}",
                mend="lower training.learning_rate, or look at its requests",
            )
        done = step + 1
        if done % LOG_EVERY == 0 or done == training.steps:
            figures = {
                "loss/forget": surgery.losses[0],
                "loss/retain": surgery.losses[-1],
                "drift": engine.distance_from(start),
                "surgery/cosine": surgery.cosine,
                "surgery/conflict": surgery.conflict,
                "surgery/norm": surgery.norm,
            }
            if rank == 0:
                task.record(done, figures)
        if done % training.checkpoint_every == 0 and done < training.steps:
            _checkpoint(engine, done)

    engine.consolidate()
    if rank == 0:
        hotfix = export(model, training, task.folder / "hotfix", job.id)
        write_atomically(task.folder / HOTFIX, hotfix.model_dump_json())
    ray.train.report({"step": training.steps})


def _resume(engine: "ShardedEngine") -> int:
    """Steps already done, from the newest checkpoint that Ray Train knows."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return engine.load(Path(folder))


def _checkpoint(engine: "ShardedEngine", step: int) -> None:
    # Every rank reports a folder with its own part; Ray merges them.
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder), step)
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
