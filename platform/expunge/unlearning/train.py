"""Run one job's training on a Ray Train worker group."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import ray
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import RayTrainError  # only some of Ray Train's own errors are public
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from expunge.errors import ExpungeError, InputError, StorageError, UnavailableError, last_line
from expunge.files import file_digest
from expunge.logs import get_logger
from expunge.runs.job import JobFolder
from expunge.settings import ClusterSettings
from expunge.types import Hotfix, UnlearnJob
from expunge.unlearning.checkpoints import drop_broken_snapshot, open_storage
from expunge.unlearning.process_group import GpuWorkers

# A job may wait its turn for hours; Ray's default gives a worker group one minute before it logs a failure and retries.
START_TIMEOUT_S = 24 * 3600
# An elastic job asks for as many workers as Ray last counted, which may include a node that was lost up to 20 s ago. It
# must then give up soon, and count again.
ELASTIC_START_TIMEOUT_S = 10
# Seconds between an elastic job's checks for more workers. To use them, it restarts from its newest checkpoint.
GROW_EVERY_S = 300.0
# What gloo and NCCL say when a peer has died.
LOST_PEER = ("closed by peer", "reset by peer", "NCCL", "Broken pipe", "Timed out waiting")


Record = Callable[[int, dict[str, float]], None]
"""Called on rank 0 with the steps done and their figures; it is pickled to the worker."""


def train(folder: JobFolder, *, warm_start: Path | None, record: Record) -> Hotfix:
    """Block until the job is trained. Continues from its newest checkpoint when called again with the same folder.

    warm_start: the folder of the weights to start from; None starts from the base model. Raises ExpungeError if the job
    fails more often than `training.max_failures`, or in a way that trying again does not fix.
    """
    made = folder.hotfix.read(valid=_is_whole)
    if made is not None:
        return made
    folder.hotfix.set_aside()
    folder.start_anew()
    job = folder.job.expect()
    try:
        _trainer(folder, job, partial(_work, folder, warm_start, record)).fit()
    except Exception as error:  # Ray wraps whatever the workers raised in types of its own
        if folder.hotfix.read() is None:
            raise _explained(job.id, error) from error
        # Training had ended, but Ray could not write its own records, as on a full disk.
        why = last_line(_innermost(error))
        get_logger("unlearning").warning("trained, but Ray failed afterwards", job=job.id, why=why)
    gave_up = folder.failure
    if gave_up is not None:
        raise gave_up
    return folder.hotfix.expect()


def _is_whole(hotfix: Hotfix) -> bool:
    """Return whether an earlier call's weights are intact; if not, training continues from a checkpoint."""
    return hotfix.digest in [file_digest(path) for path in hotfix.path.rglob("*.safetensors")]


def _trainer(folder: JobFolder, job: UnlearnJob, work: Callable[[], None]) -> TorchTrainer:
    """Set up Ray Train for the workers that the job can have here."""
    training = job.training
    workers = choose_workers(training)
    get_logger("unlearning").info("chose workers", job=job.id, workers=workers.most, device=workers.device)
    elastic, gpu = workers.fewest < workers.most, workers.device == "gpu"
    _set_timeouts(training, elastic=elastic)
    storage, name = _storage(folder, training, job.id)
    return TorchTrainer(
        work,
        scaling_config=ScalingConfig(
            num_workers=(workers.fewest, workers.most) if elastic else workers.most,
            elastic_resize_monitor_interval_s=GROW_EVERY_S,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if gpu else {"CPU": 1},
        ),
        torch_config=(GpuWorkers if gpu else TorchConfig)(
            backend="nccl" if gpu else "gloo", timeout_s=training.worker_timeout_s
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=training.keep_checkpoints),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}},
        ),
    )


def _set_timeouts(cluster: ClusterSettings, *, elastic: bool) -> None:
    """Set the timeouts that Ray Train reads only from this process's environment."""
    start_timeout = ELASTIC_START_TIMEOUT_S if elastic else START_TIMEOUT_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout)
    # This finds a process that was stopped; the others' own timeout finds one that hangs in a collective.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cluster.worker_timeout_s)


def _storage(folder: JobFolder, cluster: ClusterSettings, job: str) -> tuple[str, str]:
    """Return where Ray Train keeps its state and the checkpoints, as a URL or path and a name, ready to be used.

    Raises StorageError if nothing can be written there.
    """
    url = cluster.checkpoint_url
    state = folder.checkpoints.absolute()
    storage, name = (url, job) if url else (str(state.parent), state.name)
    if drop_broken_snapshot(*open_storage(storage, name)):
        get_logger("unlearning").warning(
            "Ray's list of checkpoints is damaged: using the checkpoints that exist", job=job
        )
    return storage, name


def _work(folder: JobFolder, warm_start: Path | None, record: Record) -> None:
    # Not at the top: this takes seconds, which the process that starts the workers need not spend.
    from expunge.unlearning.loop import train_loop

    train_loop(folder, warm_start, record)


@dataclass(frozen=True)
class Workers:
    """The workers of a job, each with a GPU or a CPU core: `most` if Ray has them, and never under `fewest`."""

    device: Literal["cpu", "gpu"]
    fewest: int
    most: int


def choose_workers(cluster: ClusterSettings) -> Workers:
    """Choose workers from what Ray has. Raises InputError if GPUs are required and Ray has too few.

    `auto` uses the GPUs there are: if they are too few, it warns and uses fewer workers, which only changes rounding.
    """
    gpus, most = int(ray.cluster_resources().get("GPU", 0)), cluster.workers
    fewest = cluster.min_workers or most
    if cluster.device == "gpu" and gpus < fewest:
        raise InputError(
            f"training.device: gpu, but Ray has {gpus} GPUs for {fewest} workers",
            hint="lower training.workers, add a node, or set it to cpu",
        )
    if cluster.device == "cpu" or gpus == 0:
        return Workers("cpu", fewest, most)
    if gpus < fewest:
        get_logger("unlearning").warning(
            f"training.device: auto, and Ray has {gpus} GPUs for {most} workers: training with {gpus} on GPUs",
            hint=f"set training.workers = {gpus}, add a node, or set training.device = cpu",
        )
        return Workers("gpu", gpus, gpus)
    return Workers("gpu", fewest, most)


def _explained(job: str, error: BaseException) -> ExpungeError:
    """Return a StorageError for a full disk, an UnavailableError for a lost worker, or else an error of the job."""
    cause = _innermost(error)
    failed = f"job {job}: training failed: {last_line(cause)}"
    if _no_space(cause):
        hint = "free some space, or set training.checkpoint_url, then run the night again"
        return StorageError(failed, hint=hint)
    if isinstance(error, ControllerError) or any(map(_lost, _failures(error) or [cause])):
        return UnavailableError(failed, hint="see Ray's logs, then run the night again: it continues where it stopped")
    return ExpungeError(failed, hint="see the job's Ray logs; its requests are back in the queue")


def _failures(error: BaseException) -> list[Exception]:
    """Return what each worker raised, if Ray says so."""
    return list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []


def _lost(failure: BaseException) -> bool:
    """Return whether a worker was lost, or lost a peer: survivors only see that a peer does not answer."""
    said = str(failure)
    return isinstance(failure, RayError | RayTrainError) or any(words in said for words in LOST_PEER)


def _no_space(cause: BaseException) -> bool:
    """Return whether the disk is full. Not every layer keeps an error's number, but all keep its text."""
    return (isinstance(cause, OSError) and cause.errno == errno.ENOSPC) or os.strerror(errno.ENOSPC) in str(cause)


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
