"""What nights that have ended leave behind: checkpoints and weights that no job goes back to, here and in buckets."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from expunge.errors import StorageError, last_line
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.settings import Settings


@dataclass(frozen=True)
class Leftover:
    """A folder of a job whose batch has ended."""

    name: str
    """Its path, or its URL without options."""
    storage: FileSystem
    path: str
    size: int
    """Bytes."""

    def delete(self) -> None:
        """Delete it. Raises StorageError."""
        try:
            if isinstance(self.storage, LocalFileSystem):
                shutil.rmtree(self.path)
            else:
                self.storage.delete_dir(self.path)
        except (OSError, ArrowException) as error:
            raise StorageError(
                f"{self.name} cannot be deleted ({last_line(error)})", hint="check its permissions, then repeat"
            ) from None


def leftovers(settings: Settings, store: RequestStore, model: str) -> list[Leftover]:
    """Return the checkpoints and weights of a model's jobs whose batch has ended, as far as they are still there.

    Raises StorageError if a folder of checkpoints cannot be looked at.
    """
    found = []
    for batch in (record.id for record in store.batches() if record.closed):
        for path in sorted((settings.runs / batch).glob(f"{model}-*")):
            job = JobFolder(path)
            planned = job.job.read()
            if planned is not None and planned.model == model:
                found += _here(job)
                found += _elsewhere(planned.training.checkpoint_url, planned.id)
    return found


def _here(job: JobFolder) -> Iterator[Leftover]:
    for folder in (job.checkpoints, job.champion, job.weights):
        if folder.is_dir():
            yield Leftover(str(folder), LocalFileSystem(), str(folder), _size_of(folder))


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _elsewhere(url: str, job: str) -> Iterator[Leftover]:
    """Yield the job's checkpoints at `training.checkpoint_url`."""
    if not url:
        return
    try:
        storage, root = FileSystem.from_uri(url)
        folder = f"{root}/{job}"
        if storage.get_file_info(folder).type != FileType.Directory:
            return
        files = storage.get_file_info(FileSelector(folder, recursive=True))
    except (OSError, ValueError, ArrowException) as error:
        raise StorageError(
            f"the checkpoints at {url} cannot be looked at ({last_line(error)})",
            hint="check that the bucket or folder can be reached from here, then repeat",
        ) from None
    size = sum(entry.size for entry in files if entry.type == FileType.File)
    yield Leftover(f"{url.partition('?')[0].rstrip('/')}/{job}", storage, folder, size)
