"""Run one job's training on a Ray Train worker group."""

import os
from functools import partial
from pathlib import Path

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from expunge.errors import ExpungeError
from expunge.unlearning.loop import HOTFIX, JOB, TrainTask, train_loop
from expunge.words import Hotfix, UnlearnJob

# A job may wait its turn for hours; Ray's default gives a worker group one minute before it logs a failure and retries.
START_TIMEOUT_S = 24 * 3600


def train(task: TrainTask) -> Hotfix:
    """Blocks until the job is trained. Continues from its newest checkpoint when called again with the same folder.

    Raises ExpungeError where the job fails more often than `training.max_failures`.
    """
    done = task.folder / HOTFIX
    if done.exists():
        return Hotfix.model_validate_json(done.read_text())
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    job = UnlearnJob.model_validate_json((task.folder / JOB).read_text())
    training = job.training
    threads = {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(training.workers), "TOKENIZERS_PARALLELISM": "false"}
    trainer = TorchTrainer(
        partial(train_loop, task),
        scaling_config=ScalingConfig(num_workers=training.workers, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="train",
            storage_path=str(Path(task.folder).absolute()),
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": threads},
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever the workers raised in types of its own
        raise ExpungeError(
            f"job {job.id}: training failed: {_cause(error)}",
            mend="see the job's Ray logs; its requests are back in the queue",
        ) from error
    return Hotfix.model_validate_json(done.read_text())


def _cause(error: BaseException) -> str:
    """The innermost message, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
