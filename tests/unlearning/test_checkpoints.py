"""Checkpoints are pickles: one that this job's workers did not write, or not so, is never loaded. Without Ray."""

import json
import pickle
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import ray.train
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint

from expunge.files import file_digest
from expunge.requests.keys import derive, sign
from expunge.settings import TrainingSettings
from expunge.unlearning.checkpoints import Checkpoints
from expunge.unlearning.seals import CheckpointSeal

if TYPE_CHECKING:
    from expunge.unlearning.engine import ShardedEngine

KEY = derive(bytes(range(32)), "checkpoint")
JOB, NAME = "faces-0123456789ab", "checkpoint_000003_1a2b"
SEAL = CheckpointSeal(KEY, JOB)

Harm = Callable[[Path], object]


def write(folder: Path, *, name: str = NAME, seal: CheckpointSeal = SEAL, world: int = 2, step: int = 3) -> Path:
    """A checkpoint as all workers leave it: each has signed only what it wrote itself."""
    for rank in range(world):
        own = folder.parent / f"{folder.name}-{rank}"
        (own / "state").mkdir(parents=True)
        (own / "state" / f"rank_{rank}_optim_states.pt").write_bytes(pickle.dumps({"step": step}))
        if rank == 0:
            (own / "state" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps({"weights": step}))
        seal.close(own, checkpoint=name, step=step, rank=rank, world=world)
        for path in sorted(own.rglob("*")):
            to = folder / path.relative_to(own)
            to.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                path.rename(to)
    return folder


def edit(folder: Path, **changes: object) -> None:
    part = json.loads((folder / "part-0.json").read_text())
    (folder / "part-0.json").write_text(json.dumps({**part, **changes}))


def replace_and_edit(folder: Path) -> None:
    """What an attacker without the key does: another file, and a part-0.json that says it is right."""
    path = folder / "state" / "mp_rank_00_model_states.pt"
    path.write_bytes(pickle.dumps("runs what it likes"))
    files = json.loads((folder / "part-0.json").read_text())["files"]
    edit(folder, files={**files, "state/mp_rank_00_model_states.pt": file_digest(path)})


def sign_with_a_guess(folder: Path) -> None:
    part = json.loads((folder / "part-0.json").read_text())
    del part["seal"]
    edit(folder, seal=sign(bytes(32), json.dumps(part, sort_keys=True).encode()))


def take_the_signature_away(folder: Path) -> None:
    part = json.loads((folder / "part-0.json").read_text())
    del part["seal"]
    (folder / "part-0.json").write_text(json.dumps(part))


def link(folder: Path) -> None:
    path = folder / "state" / "mp_rank_00_model_states.pt"
    path.rename(folder.parent / "elsewhere.pt")
    path.symlink_to(folder.parent / "elsewhere.pt")


def flip(folder: Path) -> None:
    path = folder / "state" / "rank_1_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


HARMS: dict[str, tuple[Harm, str]] = {
    "replaced, and its digest edited": (replace_and_edit, "signature does not match"),
    "signed with another key": (sign_with_a_guess, "signature does not match"),
    "not signed": (take_the_signature_away, "not signed"),
    "signature that is no text": (lambda folder: edit(folder, seal=7), "cut short"),
    "other step": (lambda folder: edit(folder, step=9), "signature does not match"),
    "other world": (lambda folder: edit(folder, world=1), "signature does not match"),
    "a bit flipped in another worker's file": (flip, "rank_1_optim_states.pt was altered"),
    "a file gone": (lambda folder: (folder / "state" / "rank_1_optim_states.pt").unlink(), "a file is missing"),
    "a file added": (lambda folder: (folder / "state" / "rank_2_optim_states.pt").write_bytes(b"x"), "was added"),
    "a part gone": (lambda folder: (folder / "part-1.json").unlink(), "part is missing"),
    "all parts gone": (lambda folder: [path.unlink() for path in folder.glob("part-*.json")], "part is missing"),
    "a part cut short": (lambda folder: (folder / "part-1.json").write_text('{"world": 2'), "cut short"),
    "a part that is a list": (lambda folder: (folder / "part-1.json").write_text("[]"), "cut short"),
    "a part twice": (
        lambda folder: (folder / "part-2.json").write_bytes((folder / "part-1.json").read_bytes()),
        "part is missing",
    ),
    "a link": (link, "contains a link"),
}


def test_what_the_workers_wrote_is_in_order(tmp_path: Path) -> None:
    assert SEAL.wrong(write(tmp_path / NAME), NAME) is None
    assert KEY.hex() not in (tmp_path / NAME / "part-0.json").read_text()


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_wrong_is_said(tmp_path: Path, harm: str) -> None:
    folder = write(tmp_path / NAME)
    do, message = HARMS[harm]
    do(folder)
    wrong = SEAL.wrong(folder, NAME)
    assert wrong is not None
    assert message in wrong


def test_a_checkpoint_under_another_name_or_of_another_job_is_not_this_one(tmp_path: Path) -> None:
    folder = write(tmp_path / NAME)
    later = folder.rename(tmp_path / "checkpoint_000009_ffff")
    assert SEAL.wrong(later, later.name) == "it is another checkpoint under this name"
    assert CheckpointSeal(KEY, "flags-0").wrong(later, NAME) == "it is another checkpoint under this name"


def test_parts_of_two_checkpoints_are_none(tmp_path: Path) -> None:
    one, other = write(tmp_path / NAME), write(tmp_path / "other", name="checkpoint_000006_1", step=6)
    (one / "part-1.json").write_bytes((other / "part-1.json").read_bytes())
    assert SEAL.wrong(one, NAME) == "a worker's part is missing"


class _Engine:
    """Unpickles what it is told to load, and says where that was."""

    def __init__(self) -> None:
        self.loaded: list[Path] = []
        self.modes: list[int] = []

    def everywhere(self, here: bool) -> bool:
        return here

    def same(self, number: int) -> int:
        return number

    def save(self, folder: Path, step: int) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps({"step": step}))

    def load(self, folder: Path) -> int:
        self.loaded.append(folder)
        self.modes.append(stat.S_IMODE(folder.stat().st_mode))
        return pickle.loads((folder / "state" / "mp_rank_00_model_states.pt").read_bytes())["step"]


class _Context:
    """Of a lone worker."""

    def __init__(self, folder: Path) -> None:
        self.storage_filesystem, self.experiment_fs_path = LocalFileSystem(), str(folder)

    def get_storage(self) -> "_Context":
        return self

    def get_world_rank(self) -> int:
        return 0

    def get_local_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1


class _Reported:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint


Open = Callable[..., tuple[Checkpoints, _Engine]]


@pytest.fixture(params=["in the job's folder", "elsewhere"])
def open_checkpoints(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    folder = tmp_path / "train"
    folder.mkdir()
    known: list[_Reported] = []
    monkeypatch.setattr(ray.train, "get_context", lambda: _Context(folder))
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: known)
    monkeypatch.setattr(ray.train, "report", lambda metrics, checkpoint, **how: known.append(_Reported(checkpoint)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    url = "" if request.param == "in the job's folder" else str(folder)

    def make(key: bytes = KEY) -> tuple[Checkpoints, _Engine]:
        engine = _Engine()
        training = TrainingSettings(checkpoint_url=url)
        return Checkpoints(cast("ShardedEngine", engine), training, JOB, key), engine

    return make


def written(tmp_path: Path, step: int) -> Path:
    (found,) = (tmp_path / "train").glob(f"checkpoint_{step:06d}_*")
    return found


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(tempfile.gettempdir()) / "it-ran",)


def test_the_newest_is_loaded(open_checkpoints: Open, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkpoints, _ = open_checkpoints()
    for step in (3, 6):
        checkpoints.save(step)
    checkpoints, engine = open_checkpoints()
    assert checkpoints.restore() == 6
    assert checkpoints.fallbacks == 0
    (folder,) = engine.loaded
    if folder.is_relative_to(tmp_path / "tmp"):
        assert engine.modes == [0o700]
    else:
        assert folder == written(tmp_path, 6)
    assert list((tmp_path / "tmp").iterdir()) == [], "the copy is gone"


def test_code_in_a_replaced_file_does_not_run(open_checkpoints: Open, tmp_path: Path) -> None:
    checkpoints, _ = open_checkpoints()
    for step in (3, 6):
        checkpoints.save(step)
    folder = written(tmp_path, 6)
    file = folder / "state" / "mp_rank_00_model_states.pt"
    file.write_bytes(pickle.dumps(_Bomb()))
    files = json.loads((folder / "part-0.json").read_text())["files"]
    edit(folder, files={**files, "state/mp_rank_00_model_states.pt": file_digest(file)})
    checkpoints, engine = open_checkpoints()
    assert checkpoints.restore() == 3
    assert checkpoints.fallbacks == 1
    assert len(engine.loaded) == 1
    assert list((tmp_path / "tmp").iterdir()) == []


def test_another_key_starts_over_and_says_why(
    open_checkpoints: Open, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints, _ = open_checkpoints()
    checkpoints.save(3)
    checkpoints, engine = open_checkpoints(derive(bytes(32), "checkpoint"))
    assert checkpoints.restore() == 0
    assert (checkpoints.fallbacks, engine.loaded) == (1, [])
    said = "".join(capfd.readouterr())
    assert "this checkpoint is damaged: going back to the one before" in said
    assert "its signature does not match" in said


def test_one_that_is_gone_is_passed_over(open_checkpoints: Open, tmp_path: Path) -> None:
    checkpoints, _ = open_checkpoints()
    for step in (3, 6):
        checkpoints.save(step)
    for path in sorted(written(tmp_path, 6).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    written(tmp_path, 6).rmdir()
    checkpoints, _ = open_checkpoints()
    assert checkpoints.restore() == 3
