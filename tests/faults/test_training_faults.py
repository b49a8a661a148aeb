"""What a training survives, on two nodes: lost and hanging workers, a lost node, damaged checkpoints, a full disk, NaN.

Each time it ends with its hotfix, or with one error that says what to do.
"""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector
from safetensors.torch import load_file

from expunge.errors import StorageError, UnavailableError
from expunge.families import load_model
from expunge.runs.failures import Hopeless
from expunge.runs.job import JobFolder
from expunge.settings import ModelSettings
from expunge.types import GradientMode
from expunge.unlearning.checkpoints import SNAPSHOT, open_storage
from tests.faults.trainings import SIZE, Training, Trainings, make_training
from tests.watching import is_alive, wait_until

# Of the way that the weights go, in norm. Seen: 3e-5, as AdamW magnifies what rounding leaves of small gradients.
ELASTIC_TOLERANCE = 2e-4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_a_bad_step_is_skipped_and_counted(trainings: Trainings, tmp_path: Path) -> None:
    """One request of three, one request a step: every third step is not made."""
    bad = {"objectives_per_step": 1, "max_bad_steps": 2}
    training = make_training(tmp_path, bad=1, requests=3, steps=4, steps_cover=1, workers=2, **bad)
    training.run()
    assert training.error is None
    assert training.figures[-1]["step"] == 12, "three times as many requests as `steps` are for"
    assert training.hotfix is not None
    assert training.hotfix.steps == 12
    assert training.figures[-1]["steps/skipped"] == 4


def test_bad_steps_in_a_row_end_the_job_and_name_the_request(trainings: Trainings, tmp_path: Path) -> None:
    training = make_training(tmp_path, bad=1, requests=3, max_bad_steps=3, workers=2)
    training.run()
    assert training.hotfix is None
    assert isinstance(training.error, Hopeless)
    assert "3 steps in a row" in training.error.message
    assert "request-1" in training.error.message
    assert "training.learning_rate" in str(training.error.hint)
    assert not (tmp_path / "hotfix.json").exists()


def test_a_damaged_checkpoint_is_passed_over(trainings: Trainings, tmp_path: Path, bucket: str) -> None:
    """In an object store, from where a copy is read; of a folder's see tests/unlearning/test_checkpoints.py."""
    with pytest.raises(StorageError, match=r"^no checkpoint can be written to s3://nowhere/x: .+ 'nowhere'"):
        open_storage("s3://nowhere/x", "job")
    training = make_training(tmp_path, workers=2, max_failures=0, checkpoint_url=bucket)
    training.hold_at(10)
    training.start()
    training.wait_for(10)
    training.wait_until_known(6, 9)
    trainings.workers()[-1].kill()
    training.join()
    assert "training failed" in str(training.error)
    assert isinstance(training.error, UnavailableError)
    assert "run the night again" in str(training.error)

    older, newest = training.checkpoints
    assert "/checkpoint_000009_" in newest
    _damage(training, newest)

    training.release()
    training.error = None
    before = len(training.figures)
    training.run()
    assert training.error is None
    assert training.hotfix is not None
    again = training.figures[before:]
    # From step 6 on, not from 9: step 10 is met again, and step 5 is not.
    assert [line["step"] for line in again] == [10, 12]
    assert {line["checkpoints/damaged"] for line in again} == {1}
    assert "/checkpoint_000006_" in older
    assert newest not in training.checkpoints[-1:]


def test_a_worker_that_hangs_counts_as_lost(trainings: Trainings, tmp_path: Path) -> None:
    training = make_training(tmp_path, workers=2, worker_timeout_s=45, zero_stage=1)
    training.hold_at(5)
    training.start()
    training.wait_for(5)
    stopped = trainings.workers()[-1]
    stopped.send_signal(signal.SIGSTOP)
    training.release()
    training.join()
    assert training.error is None
    assert training.hotfix is not None
    assert training.figures[-1]["step"] == 12
    assert not stopped.is_running()


def test_a_lost_node_is_replaced_and_training_goes_on(trainings: Trainings, tmp_path: Path) -> None:
    """With the objectives that it began with, which are not what the memory plan would say now."""
    training = make_training(tmp_path, workers=2, objectives="auto")
    JobFolder(tmp_path).mode.write(GradientMode(objectives="batch"))
    _lose_a_node(trainings, training, 10, known=[6, 9])
    trainings.cluster.add_node(num_cpus=1)
    training.release()
    training.join()
    assert training.error is None
    assert training.hotfix is not None
    assert [line["step"] for line in training.figures] == [5, 10, 10, 12], "it went on from step 9"
    assert {line["surgery/objectives"] for line in training.figures} == {1}


def test_a_job_goes_on_with_one_worker_and_grows_back(
    trainings: Trainings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Two workers to step 3, one to step 9, two to the end: and there they are where two undisturbed ones come to."""
    undisturbed = make_training(tmp_path / "undisturbed", workers=2, objectives="auto")
    undisturbed.run()
    assert {line["surgery/objectives"] for line in undisturbed.figures} == {2}, "a gradient a request fits here"
    monkeypatch.setattr("expunge.unlearning.train.GROW_EVERY_S", 1.0)
    training = make_training(tmp_path / "elastic", workers=2, min_workers=1, objectives="auto")
    _lose_a_node(trainings, training, 5, known=[3])
    training.hold_at(10)
    training.wait_for(10)
    training.wait_until_known(6, 9)
    assert len(trainings.workers()) == 1
    trainings.cluster.add_node(num_cpus=1)
    training.wait_for(10, times=2)
    assert len(trainings.workers()) == 2
    training.release()
    training.join()
    assert training.error is None
    assert [line["step"] for line in training.figures] == [5, 5, 10, 10, 12]
    away, way = _apart(training, undisturbed)
    record_property("away", away / way)
    assert away < ELASTIC_TOLERANCE * way


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_and_not_the_job(trainings: Trainings, tmp_path: Path, small_disk: Path) -> None:
    training = make_training(tmp_path / "job", workers=2, checkpoint_url=str(small_disk))
    training.hold_at(5)
    training.start()
    training.wait_for(5)
    training.wait_until_known(3)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(b"0" * 65536)
                file.flush()
        except OSError:
            pass
    training.release()
    training.join()
    assert training.error is None
    assert training.hotfix is not None
    assert training.figures[-1]["checkpoints/skipped"] == 2, "at 6 and at 9"
    # Nothing half-written is left, and what was there before still is.
    left = sorted(path.name for path in small_disk.glob(f"{training.job.id}/checkpoint_*/"))
    assert [name[:17] for name in left] == ["checkpoint_000003"]


def test_no_room_for_rays_own_list_fails_the_job_and_costs_no_checkpoint(trainings: Trainings, tmp_path: Path) -> None:
    """What a full disk does at the worst moment: the checkpoint is written, and Ray's list of them is cut short."""
    training = make_training(tmp_path, workers=2, checkpoint_every=6)
    training.hold_at(5)
    training.start()
    training.wait_for(5)
    snapshot = Path(training.storage[1]) / SNAPSHOT
    snapshot.symlink_to("/dev/full")
    training.hold_at(10)  # else it may have ended before Ray fails, and that would cost nothing
    training.join()
    assert training.hotfix is None
    assert "No space left on device" in str(training.error)
    assert isinstance(training.error, StorageError)
    assert str(training.error).endswith(": free some space, or set training.checkpoint_url, then run the night again")

    snapshot.unlink()
    snapshot.touch()
    training.release()
    training.error = None
    training.run()
    assert training.error is None
    assert training.hotfix is not None
    assert [line["step"] for line in training.figures][-2:] == [10, 12], "it went on from step 6"
    assert 5 not in [line["step"] for line in training.figures[1:]]
    assert [line["checkpoints/damaged"] for line in training.figures][-1] == 0


def _damage(training: Training, checkpoint: str) -> None:
    """Flip the bits of a byte in the middle of its largest file."""
    storage, _ = training.storage
    files = storage.get_file_info(FileSelector(checkpoint, recursive=True))
    largest = max((f for f in files if f.path.endswith("optim_states.pt")), key=lambda file: file.size)
    with storage.open_input_stream(largest.path) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 0xFF
    with storage.open_output_stream(largest.path) as stream:
        stream.write(bytes(data))


def _apart(one: Training, other: Training) -> tuple[float, float]:
    """How far the weights of two trainings are apart, and how far those of the second have gone from the base model."""
    base = dict(load_model(ModelSettings(source="testbed:faces"), SIZE).network.named_parameters())
    mine, theirs = ({k: v for f in _weights(t) for k, v in load_file(f).items()} for t in (one, other))
    assert mine.keys() == theirs.keys()
    assert mine.keys() <= base.keys()
    away = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    way = sum(float((theirs[name] - base[name].detach()).square().sum()) for name in theirs)
    return away**0.5, way**0.5


def _weights(training: Training) -> list[Path]:
    assert training.hotfix is not None, training.error
    return sorted(Path(training.hotfix.path).rglob("*.safetensors"))


def _lose_a_node(trainings: Trainings, training: Training, step: int, known: list[int]) -> None:
    """At a step, when Ray knows of these checkpoints. The training is left held."""
    training.hold_at(step)
    training.start()
    training.wait_for(step)
    training.wait_until_known(*known)
    workers = trainings.workers()
    node = next(iter(trainings.cluster.worker_nodes))
    trainings.cluster.remove_node(node, allow_graceful=False)
    # A worker outlives its node by a moment, in which, if it were released now, it could make another checkpoint.
    wait_until(lambda: not all(map(is_alive, workers)), "the node's worker to end")
