"""Whose fault a failure is: only the platform's is tried again without an attempt being counted."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from expunge.batch.faults import is_platforms, reason
from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError, UnavailableError
from expunge.runs.failures import Hopeless
from expunge.runs.job import JobFolder
from expunge.unlearning import train as train_module
from tests.runs.conftest import make_job


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnavailableError("MLflow does not answer"), True),
        (StorageError("the disk is full"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (MemoryError(), True),
        (WorkerCrashedError(), True),
        (OutOfMemoryError("killed"), True),
        (NodeDiedError("gone"), True),
        (InputError("model: no weights"), False),
        (NotFoundError("blob 1 does not exist"), True),
        (Hopeless("not finite"), False),
        (ExpungeError("training failed"), False),
        (OSError("Error no file named diffusion_pytorch_model.safetensors"), False),
        (ValueError("odd config"), False),
        (TypeError("unhashable type: 'list'"), False),
        (KeyError("sample_size"), False),
    ],
)
def test_whose_fault_it_is_also_from_inside_of_a_task(error: Exception, expected: bool) -> None:
    assert is_platforms(error) is expected
    assert is_platforms(RayTaskError("run", "Traceback", error)) is expected


def test_a_reason_is_one_line_without_what_ray_puts_around_it() -> None:
    inner = InputError("model faces: no weights", hint="copy them")
    assert reason(RayTaskError("run", "Traceback\nmany lines", inner)) == "model faces: no weights: copy them"
    assert reason(ValueError("first\n  last")) == "ValueError: last"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WorkerGroupError("lost", {0: WorkerCrashedError()}), UnavailableError),
        (WorkerGroupError("hangs", {1: WorkerHealthCheckFailedError("no answer", ValueError())}), UnavailableError),
        (WorkerGroupError("peer", {0: RuntimeError("Connection closed by peer [127.0.0.1]:1")}), UnavailableError),
        (WorkerGroupError("mixed", {0: ValueError("x"), 1: WorkerCrashedError()}), UnavailableError),
        (ControllerError(RuntimeError("no resources")), UnavailableError),
        (WorkerGroupError("disk", {0: OSError(errno.ENOSPC, "No space left on device")}), StorageError),
        (WorkerGroupError("ours", {0: ValueError("shapes"), 1: ValueError("shapes")}), ExpungeError),
    ],
)
def test_a_training_that_failed_says_whose_fault_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[ExpungeError]
) -> None:
    if isinstance(error, WorkerGroupError):
        error.__cause__ = next(iter(error.worker_failures.values()))

    class Training:
        """Stands where Ray Train would start workers."""

        def __init__(self, work: Callable[[], None], **options: object) -> None:
            pass

        def fit(self) -> None:
            raise error

    monkeypatch.setattr(train_module, "TorchTrainer", Training)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    folder, job = JobFolder(tmp_path), make_job("faces")
    folder.job.write(job)
    with pytest.raises(ExpungeError, match=f"{job.id}: training failed") as raised:
        train_module.train(folder, warm_start=None, record=lambda step, figures: None)
    assert type(raised.value) is kind
    assert is_platforms(raised.value) is (kind is not ExpungeError)
