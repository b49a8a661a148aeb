"""One rank of `test_budget.py`: runs whole trainings through the loop, with folders instead of Ray's storage."""

import sys
from pathlib import Path

import ray.train
import torch
import torch.distributed as dist

from expunge.runs.job import JobFolder
from expunge.settings import TrainingSettings
from expunge.unlearning import loop
from expunge.unlearning.engine import ShardedEngine
from tests.unlearning.groups import leave
from tests.watching import Recorder

BREAK = "break"


class Broken(Exception):
    """Raised on every rank right after a checkpoint."""


class Context:
    def get_world_rank(self) -> int:
        return dist.get_rank()

    def get_world_size(self) -> int:
        return dist.get_world_size()

    def get_local_world_size(self) -> int:
        return dist.get_world_size()


class Folders:
    """Replaces `Checkpoints`; it has the parts that the loop uses."""

    folder: Path
    skipped = fallbacks = 0

    def __init__(self, engine: ShardedEngine, training: TrainingSettings, job: str, key: bytes) -> None:
        self._engine = engine

    def restore(self) -> int:
        found = sorted(self.folder.glob("checkpoint-*"))
        return self._engine.load(found[-1]) if found else 0

    def save(self, step: int) -> None:
        failure = self._engine.save(self.folder / f"checkpoint-{step:03}", step)
        assert failure is None, failure
        if (self.folder / BREAK).exists():
            raise Broken


def main(out: Path) -> None:
    """Train each folder in `out`. One with a file `break` is interrupted at its first checkpoint, and continued."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ray.train.get_context = Context  # pyright: ignore[reportAttributeAccessIssue]
    loop.get_device = lambda: torch.device("cpu")
    loop.Checkpoints = Folders  # pyright: ignore[reportAttributeAccessIssue]
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        Folders.folder = folder
        job, record = JobFolder(folder), Recorder(folder)
        if (folder / BREAK).exists():
            try:
                loop.train_loop(job, None, record)
            except Broken:
                dist.barrier()
                (folder / BREAK).unlink(missing_ok=True)
                dist.barrier()
        loop.train_loop(job, None, record)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
