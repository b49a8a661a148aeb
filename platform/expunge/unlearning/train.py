"""Run one job's training on a Ray Train worker group."""

import errno
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import ray
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError  # of those that it raises itself only some are public
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from expunge.errors import ExpungeError, InputError, StorageError, UnavailableError, last_line
from expunge.files import file_digest
from expunge.logs import get_logger
from expunge.settings import TrainingSettings
from expunge.unlearning.checkpoints import drop_broken_snapshot, open_storage
from expunge.unlearning.folder import FAILED, HOTFIX, JOB, TrainTask, failure
from expunge.words import Hotfix, UnlearnJob

# A job may wait its turn for hours; Ray's default gives a worker group one minute before it logs a failure and retries.
START_TIMEOUT_S = 24 * 3600
# An elastic job asks for as many workers as Ray last counted, which may include a node that was lost up to 20 s ago. It
# must then give up soon, and count again.
ELASTIC_START_TIMEOUT_S = 10
# How often an elastic job looks whether it can have more workers. It starts again from its newest checkpoint for them.
GROW_EVERY_S = 300.0
# What gloo and NCCL say of a peer that died.
LOST_PEER = ("closed by peer", "reset by peer", "NCCL", "Broken pipe", "Timed out waiting")


def train(task: TrainTask) -> Hotfix:
    """Blocks until the job is trained. Continues from its newest checkpoint when called again with the same folder.

    Raises ExpungeError where the job fails more often than `training.max_failures`, or in a way that trying again does
    not fix.
    """
    done = task.folder / HOTFIX
    made = _made(done)
    if made is not None:
        return made
    (task.folder / FAILED).unlink(missing_ok=True)
    job = UnlearnJob.model_validate_json((task.folder / JOB).read_text())
    training = job.training
    workers = choose_workers(training)
    get_logger("unlearning").info("chose workers", job=job.id, workers=workers.most, device=workers.device)
    elastic = workers.fewest < workers.most
    start_timeout = ELASTIC_START_TIMEOUT_S if elastic else START_TIMEOUT_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout)
    # A process that was stopped answers nobody. One that hangs in a collective is found by the others' timeout.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(training.worker_timeout_s)
    gpu = workers.device == "gpu"
    name = "train" if not training.checkpoint_url else job.id
    storage = training.checkpoint_url or str(Path(task.folder).absolute())
    if drop_broken_snapshot(*open_storage(storage, name)):
        get_logger("unlearning").warning("Ray's list of checkpoints is broken: going by what lies there", job=job.id)
    trainer = TorchTrainer(
        partial(_work, task),
        scaling_config=ScalingConfig(
            num_workers=(workers.fewest, workers.most) if elastic else workers.most,
            elastic_resize_monitor_interval_s=GROW_EVERY_S,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if gpu else {"CPU": 1},
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=training.worker_timeout_s),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=training.keep_checkpoints),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}},
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever the workers raised in types of its own
        cause = _innermost(error)
        if not done.exists():
            raise _explained(job.id, error) from error
        # What Ray still had to write about a training that had ended, as on a full disk.
        get_logger("unlearning").warning("trained, but Ray failed afterwards", job=job.id, why=last_line(cause))
    gave_up = failure(task.folder)
    if gave_up is not None:
        raise gave_up
    return Hotfix.model_validate_json(done.read_text())


def _made(done: Path) -> Hotfix | None:
    """The hotfix of an earlier call; None where there is none, or it is damaged: training goes on from a checkpoint."""
    try:
        hotfix = Hotfix.model_validate_json(done.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        why = "this file cannot be read"
    else:
        if hotfix.digest in [file_digest(path) for path in hotfix.path.rglob("*.safetensors")]:
            return hotfix
        why = "the weights that this file names are gone or damaged"
    get_logger("unlearning").warning(f"{why}: training goes on from its newest checkpoint", file=str(done))
    done.unlink()
    return None


def _work(task: TrainTask) -> None:
    # Here and not above: seconds of imports, which the process that starts the workers is spared.
    from expunge.unlearning.loop import train_loop

    train_loop(task)


@dataclass(frozen=True)
class Workers:
    """Of a job: at most so many, each with a GPU or with a CPU core; it goes on with the fewest."""

    device: Literal["cpu", "gpu"]
    fewest: int
    most: int


def choose_workers(training: TrainingSettings) -> Workers:
    """`auto` uses the GPUs there are: where they are fewer than the workers, it has fewer workers, too, which changes
    nothing but rounding.

    Warns where that is so. Raises InputError where GPUs are asked for and Ray has too few.
    """
    gpus, most = int(ray.cluster_resources().get("GPU", 0)), training.workers
    fewest = training.min_workers or most
    if training.device == "gpu" and gpus < fewest:
        raise InputError(
            f"training.device: gpu, but Ray has {gpus} GPUs for {fewest} workers",
            hint="lower training.workers, add a node, or set it to cpu",
        )
    if training.device == "cpu" or gpus == 0:
        return Workers("cpu", fewest, most)
    if gpus < fewest:
        get_logger("unlearning").warning(
            f"training.device: auto, and Ray has {gpus} GPUs for {most} workers: training with {gpus} on GPUs",
            hint=f"set training.workers = {gpus}, add a node, or set training.device = cpu",
        )
        return Workers("gpu", gpus, gpus)
    return Workers("gpu", fewest, most)


def _explained(job: str, error: BaseException) -> ExpungeError:
    """StorageError for a full disk, UnavailableError for a lost worker or node, else an error of the job itself."""
    cause = _innermost(error)
    failed = f"job {job}: training failed: {last_line(cause)}"
    if _no_space(cause):
        hint = "free some space, or set training.checkpoint_url, then run the night again"
        return StorageError(failed, hint=hint)
    if isinstance(error, ControllerError) or any(map(_lost, _failures(error) or [cause])):
        return UnavailableError(failed, hint="see Ray's logs, then run the night again: it goes on where it stopped")
    return ExpungeError(failed, hint="see the job's Ray logs; its requests are back in the queue")


def _failures(error: BaseException) -> list[Exception]:
    """What each worker raised, where Ray says so."""
    return list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []


def _lost(failure: BaseException) -> bool:
    """Whether a worker is gone, or lost another: the survivors only see that a peer does not answer."""
    said = str(failure)
    return isinstance(failure, RayError | RayTrainError) or any(words in said for words in LOST_PEER)


def _no_space(cause: BaseException) -> bool:
    """Whether it is a full disk. Not every layer keeps the number of an error, but all keep its text."""
    return (isinstance(cause, OSError) and cause.errno == errno.ENOSPC) or os.strerror(errno.ENOSPC) in str(cause)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
