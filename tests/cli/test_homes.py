"""A home may have any name: what is kept in it lies in it, and nowhere else."""

from pathlib import Path

import pytest

from expunge import doctor
from expunge.registry.tracking import Tracker
from expunge.settings import load_settings
from tests.cli.conftest import Command

NAMES = ["a b", "q?mode=memory", "q?", "h#x", "p%20x", "100%", "a+b", "naïve Ünïcode", "a::b", "user:pw@host", "[a]*"]


@pytest.fixture(params=[*NAMES, "slash/", "./dot/../x", "relative", "~", "~/below"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here" / "dot").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    name = request.param
    monkeypatch.setenv("HOME", str(tmp_path / "here" / "user"))
    if name != "relative" and not name.startswith("~"):
        monkeypatch.setenv("EXPUNGE_HOME", f"{tmp_path}/here/{name}")
        return (tmp_path / "here" / name).resolve()
    monkeypatch.setenv("EXPUNGE_HOME", name)
    return tmp_path / "here" / name.replace("~", "user")


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_all_that_is_kept_lies_in_the_home(
    command: Command, picture: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("submit", picture, "--model", "faces").code == 0
    for name in ("home", "store", "blobs", "tracking"):
        doctor.LOOKS[name](load_settings())
    kept = files(tmp_path / "here")
    assert kept
    assert all(path.is_relative_to(home) for path in kept), kept
    assert (home / "expunge.db").is_file()
    monkeypatch.chdir(tmp_path)
    if home.name != "relative":
        assert len(command("list", "--json").json) == 1


def test_a_backup_moves_from_and_to_any_name(
    command: Command, picture: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("submit", picture, "--model", "faces")
    assert command("backup", tmp_path / "b?#%20").code == 0
    (tmp_path / "key").write_bytes((home / "blob.key").read_bytes())
    home.rename(tmp_path / "old")
    home.mkdir()
    (home / "blob.key").write_bytes((tmp_path / "key").read_bytes())
    assert command("restore", tmp_path / "b?#%20").code == 0
    assert len(command("list", "--json").json) == 1
    assert (home / "expunge.db").is_file()


def test_a_user_that_is_not_there_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_HOME", "~no-such-user/home")
    ended = command("list")
    assert ended.code == 2
    assert "home: ~no-such-user/home names no user of this machine" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a b", "q?x=1", "h#x", "p%20x", "ü"])
def test_mlflow_keeps_its_files_in_such_a_home(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_HOME", str(tmp_path / "here" / name))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    home = tmp_path / "here" / name
    tracker = Tracker(load_settings().tracking)
    run = tracker.ensure_run("faces", "job-1", params={"steps": 1}, tags={})
    tracker.log_metrics(run, 1, {"loss": 0.5})
    tracker.log_artifact_bytes(run, "curves.svg", b"<svg/>")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"w")
    uri = tracker.log_folder(run, "hotfix", tmp_path / "weights")
    assert tracker.curves(run, ["loss"]) == {"loss": [(1, 0.5)]}
    assert (tracker.fetch(uri) / "w.bin").read_bytes() == b"w"
    assert (tracker.fetch(uri, tmp_path / "copy") / "w.bin").read_bytes() == b"w"
    assert (home / "mlflow" / "mlflow.db").is_file()
    assert all(path.is_relative_to(home) for path in files(tmp_path / "here"))
