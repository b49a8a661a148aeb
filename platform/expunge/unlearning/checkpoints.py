"""Checkpoints in Ray Train's storage: written by all workers or by none, read only if intact and signed by us."""

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import ray.train
from pyarrow import ArrowException
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, copy_files
from ray.train import Checkpoint, CheckpointUploadMode

from expunge.errors import StorageError, last_line
from expunge.logs import get_logger
from expunge.settings import ClusterSettings
from expunge.unlearning.seals import CheckpointSeal

if TYPE_CHECKING:
    from expunge.unlearning.engine import ShardedEngine


SNAPSHOT = "checkpoint_manager_snapshot.json"
"""The file beside the checkpoints in which Ray Train lists those that it knows."""


class _Storage(Protocol):
    """The part of Ray's storage context that is used here; it has no public type."""

    storage_filesystem: FileSystem
    experiment_fs_path: str


class Checkpoints:
    """The checkpoints of one worker group, signed with `key`. All workers call every method at the same time."""

    def __init__(self, engine: "ShardedEngine", cluster: ClusterSettings, job: str, key: bytes) -> None:
        context = ray.train.get_context()
        self._rank, self._world = context.get_world_rank(), context.get_world_size()
        self._first = context.get_local_rank() == 0  # one per node
        self._seal = CheckpointSeal(key, job)
        self._storage = cast(_Storage, context.get_storage())
        self._engine, self._cluster = engine, cluster
        self._log = get_logger("unlearning").bind(job=job)
        self._saved = False
        self.skipped = 0
        """The number of checkpoints that could not be written."""
        self.fallbacks = 0
        """The number of checkpoints that could not be read, so that an older one was used."""

    def restore(self) -> int:
        """Load the newest intact checkpoint and return the steps done; 0 without one."""
        candidates = self._candidates()
        self._engine.everywhere(True)  # nothing is swept before all have looked
        if self._rank == 0:
            self._sweep({Path(checkpoint.path).name for checkpoint in candidates})
        for checkpoint in reversed(candidates):
            name = Path(checkpoint.path).name
            with self._at_hand(checkpoint, name) as (folder, wrong):
                if self._engine.everywhere(wrong is None):
                    self._saved = True
                    done = self._engine.load(folder)
                    self._engine.everywhere(True)  # nothing is deleted before all have read
                    return done
            self.fallbacks += 1
            if wrong is not None or self._rank == 0:
                why = wrong or "a worker on another node cannot read it"
                self._log.warning("this checkpoint is damaged: going back to the one before", checkpoint=name, why=why)
        return 0

    def save(self, step: int) -> None:
        """Write a checkpoint and report it to Ray; if a worker cannot write its part, training goes on without it.

        Raises StorageError on every worker if no checkpoint of this job was ever written. Such a training could not be
        resumed, and there would be no space for its result either, so it stops at once.
        """
        # All workers need the same new name: a step is saved twice if its first checkpoint was damaged.
        name = f"checkpoint_{step:06d}_{self._engine.same(time.time_ns()):x}"
        target = f"{self._storage.experiment_fs_path}/{name}"
        with tempfile.TemporaryDirectory() as folder:
            failure = self._write(Path(folder), name, step)
        if self._engine.everywhere(failure is None):
            self._saved = True
            checkpoint = Checkpoint(target, self._storage.storage_filesystem)
            ray.train.report({"step": step}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
            return
        self.skipped += 1
        why = str(failure or "another worker could not write its part")
        if self._rank == 0:
            with suppress(OSError):
                self._storage.storage_filesystem.delete_dir(target)
        if not self._saved:
            raise StorageError(
                f"no checkpoint can be written: {why}", hint="free some space, or set training.checkpoint_url"
            )
        if failure is not None or self._rank == 0:
            self._log.warning("a checkpoint could not be written: going on without it", step=step, why=why)

    def _candidates(self) -> list[Checkpoint]:
        """Return the checkpoints that Ray knows, oldest first; if its list is lost, all that are complete."""
        known = [reported.checkpoint for reported in ray.train.get_all_reported_checkpoints()]
        if known:
            return known
        storage = self._storage.storage_filesystem
        return [Checkpoint(entry.path, storage) for entry in self._written() if _whole(storage, entry.path)]

    def _written(self) -> list[FileInfo]:
        """List the folders of all checkpoints, oldest first."""
        try:
            entries = self._storage.storage_filesystem.get_file_info(FileSelector(self._storage.experiment_fs_path))
        except OSError:
            return []
        folders = [e for e in entries if e.type == FileType.Directory and e.base_name.startswith("checkpoint_")]
        return sorted(folders, key=lambda entry: entry.base_name)

    def _sweep(self, known: set[str]) -> None:
        """Delete checkpoints of a worker group that ended before it could report them to Ray."""
        with suppress(OSError):
            for entry in self._written():
                if entry.base_name not in known:
                    self._storage.storage_filesystem.delete_dir(entry.path)

    def _write(self, folder: Path, name: str, step: int) -> Exception | None:
        failure = self._engine.save(folder, step)
        target = f"{self._storage.experiment_fs_path}/{name}"
        try:
            self._seal.close(folder, checkpoint=name, step=step, rank=self._rank, world=self._world)
            self._storage.storage_filesystem.create_dir(target, recursive=True)
            copy_files(str(folder), target, destination_filesystem=self._storage.storage_filesystem)
        except OSError as error:
            failure = failure or error
        return failure

    @contextmanager
    def _at_hand(self, checkpoint: Checkpoint, name: str) -> Iterator[tuple[Path, str | None]]:
        """Yield a folder on this node to load from, and what is wrong with it, which one worker per node checks.

        A checkpoint at a `checkpoint_url` is copied first, because others may write there, even between check and load.
        The job's own folder is in the home, to which only its owner can write, and is read in place.
        """
        if not self._cluster.checkpoint_url:
            folder = Path(checkpoint.path)
            yield folder, self._seal.wrong(folder, name) if self._first else None
            return
        # All workers of a node need the same name, and nobody else may guess it.
        folder = Path(tempfile.gettempdir()) / f"expunge-checkpoint-{self._engine.same(secrets.randbits(62)):016x}"
        try:
            yield folder, self._fetched(checkpoint, name, folder) if self._first else None
        finally:
            if self._first:
                shutil.rmtree(folder, ignore_errors=True)

    def _fetched(self, checkpoint: Checkpoint, name: str, folder: Path) -> str | None:
        try:
            folder.mkdir(mode=0o700)
            copy_files(checkpoint.path, str(folder), source_filesystem=checkpoint.filesystem)
        except (OSError, ArrowException) as error:
            return f"it cannot be copied to {folder.parent} ({last_line(error)})"
        return self._seal.wrong(folder, name)


def open_storage(url: str, name: str) -> tuple[FileSystem, str]:
    """Return the file system of a folder or URL, and the path of its subfolder `name`, which is created if missing.

    Raises StorageError if that fails; Ray would say the same in a page, minutes later. A local folder must exist: a
    shared volume that is not mounted would otherwise be created on the local disk.
    """
    try:
        storage, folder = FileSystem.from_uri(url)
        if storage.type_name == "mock":
            raise ValueError("it is kept in memory and would be lost")
        if isinstance(storage, LocalFileSystem) and storage.get_file_info(folder).type != FileType.Directory:
            raise NotADirectoryError("no such folder here")
        storage.create_dir(f"{folder}/{name}", recursive=True)
    except (OSError, ValueError, ArrowException) as error:
        raise StorageError(
            f"no checkpoint can be written to {url}: {last_line(error)}",
            hint="check that it exists and is writable, or change training.checkpoint_url",
        ) from None
    return storage, f"{folder}/{name}"


def drop_broken_snapshot(storage: FileSystem, folder: str) -> bool:
    """Delete Ray's list of checkpoints if it is cut short, as by a full disk, or names a missing one; return whether.

    Ray would refuse to start with such a list. Without it, `restore` uses the checkpoints themselves.
    """
    snapshot = f"{folder}/{SNAPSHOT}"
    try:
        with storage.open_input_stream(snapshot) as file:
            listed = json.loads(file.read())["checkpoint_results"]
        paths = [f"{folder}/{entry['checkpoint_dir_name']}" for entry in listed]
        if not paths or all(entry.type == FileType.Directory for entry in storage.get_file_info(paths)):
            return False
    except (ValueError, KeyError, TypeError):
        pass
    except OSError:
        return False  # there is no list
    storage.delete_file(snapshot)
    return True


def _whole(storage: FileSystem, folder: str) -> bool:
    """Return whether every worker has written its part."""
    try:
        parts = [e for e in storage.get_file_info(FileSelector(folder)) if e.base_name.startswith("part-")]
        with storage.open_input_stream(f"{folder}/part-0.json") as file:
            return len(parts) == json.loads(file.read())["world"]
    except (OSError, ValueError, KeyError):
        return False
