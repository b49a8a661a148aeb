"""Checkpoints in DeepSpeed's own sharded format, for the same number of ranks or another."""

import argparse
import os
import secrets
import shutil
import tempfile
from pathlib import Path

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from expunge.errors import StorageError

TAG = "state"


class _Patient(TorchCheckpointEngine):
    """Keeps going when the disk fails: an exception on one rank would leave the others waiting for it."""

    failure: Exception | None = None

    def save(self, state_dict: object, path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch sometimes wraps an OSError in a RuntimeError
            self.failure = error


def save(engine: DeepSpeedEngine, folder: Path, step: int) -> Exception | None:
    """Write this rank's files and return the error if one occurred: they are then useless. Every rank must call it."""
    engine.checkpoint_engine = writer = _Patient()
    # DeepSpeed would copy a script beside the files that nobody here needs; on a full disk that would end one rank.
    engine._copy_recovery_script = lambda save_path: None
    engine.save_checkpoint(
        str(folder), tag=TAG, client_state={"step": step}, save_latest=False, exclude_frozen_parameters=True
    )
    return writer.failure


def load(engine: DeepSpeedEngine, folder: Path) -> int:
    """Restore a checkpoint and return the number of steps done; every rank must call it.

    `folder` must hold the files of all ranks. They are unpickled, so they can run code: the caller has to know who
    wrote them. The same number of ranks continues bitwise as if it had never stopped. Another number goes through
    DeepSpeed's universal format and continues within rounding. Raises StorageError if the files are not readable.
    """
    saved = len(list((folder / TAG).glob("*_optim_states.pt")))
    if saved in (0, dist.get_world_size()):  # stage 0 writes none: every rank has everything
        return _load(engine, folder)
    # All workers of a node need the same name, and nobody else may guess it: the contents are unpickled.
    names = [f"expunge-universal-{secrets.token_hex(16)}"]
    dist.broadcast_object_list(names, src=0)
    scratch = Path(tempfile.gettempdir()) / names[0]
    config = engine._config
    assert config is not None
    first = os.environ["LOCAL_RANK"] == "0"  # one rank per node
    try:
        if first:
            scratch.mkdir(mode=0o700)
            _convert(folder / TAG, scratch / TAG)
        dist.barrier()
        _spare_if_empty(engine)
        config.load_universal_checkpoint = True
        done = _load(engine, scratch)
        dist.barrier()
    finally:
        config.load_universal_checkpoint = False
        if first:
            shutil.rmtree(scratch, ignore_errors=True)
    return done


def _load(engine: DeepSpeedEngine, folder: Path) -> int:
    # Not strict: checkpoints leave out frozen weights.
    path, client = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    if path is None or client is None:
        raise StorageError(f"the checkpoint in {folder} cannot be loaded", hint="delete it, and submit the night again")
    return int(client["step"])


def _spare_if_empty(engine: DeepSpeedEngine) -> None:
    """Skip the loader on a rank whose partition is nothing but padding: DeepSpeed's looks for a step count and fails.

    Such a rank has nothing to read; it still takes part in gathering all partitions afterwards.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    if not any(optimizer.params_in_partition):
        optimizer.load_hp_checkpoint_state_from_checkpoint_dir = lambda lp_groups_name, checkpoint_dir: None


def _convert(source: Path, target: Path) -> None:
    """Do in this process what the command `ds_to_universal` does."""
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
