"""Stage outputs: computed once, written whole, by one driver at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from expunge.batch.stages import PLAN, Progress, advance, once, only_driver, stored
from expunge.errors import StorageError, UnavailableError
from expunge.files import write_atomically


class Output(BaseModel):
    value: int


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Output:
        self.calls += 1
        return Output(value=self.calls)


def test_computes_once(tmp_path: Path) -> None:
    compute, path = Counter(), tmp_path / "job" / "output.json"
    assert [once(path, Output, compute).value for _ in range(3)] == [1, 1, 1]
    assert compute.calls == 1
    assert [p.name for p in path.parent.iterdir()] == ["output.json"], "no partial file is left"


def test_a_failed_stage_leaves_no_output(tmp_path: Path) -> None:
    def fail() -> Output:
        raise RuntimeError("worker lost")

    path = tmp_path / "output.json"
    with pytest.raises(RuntimeError, match="worker lost"):
        once(path, Output, fail)
    assert not path.exists()
    assert once(path, Output, Counter()).value == 1


def test_a_kill_while_writing_leaves_the_old_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "output.json"
    write_atomically(path, "old")

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            write_atomically(path, "new")
        with pytest.raises(KeyboardInterrupt, match="killed"):
            once(tmp_path / "other.json", Output, Counter())
    assert path.read_text() == "old"
    assert not (tmp_path / "other.json").exists()
    write_atomically(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("text", ['{"other": 1}', "", '{"val', "[]", "\x00" * 12])
def test_an_output_that_makes_no_sense_is_kept_aside_and_made_again(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "output.json"
    path.write_text(text)
    assert once(path, Output, Counter()).value == 1
    assert stored(path, Output) == Output(value=1)
    assert (tmp_path / "output.json.unreadable").read_text() == text
    assert str(path) in capsys.readouterr().err


def test_an_output_that_the_disk_does_not_give_is_named(tmp_path: Path) -> None:
    (tmp_path / "output.json").mkdir()
    with pytest.raises(StorageError, match=r"output\.json cannot be read \(Is a directory\)"):
        once(tmp_path / "output.json", Output, Counter())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "train"}', "null"])
def test_progress_that_was_cut_short_is_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert Progress(tmp_path).read() == ("wait", 0, 0)


HOLD = """
import sys
from pathlib import Path
from expunge.batch.stages import only_driver
with only_driver(Path(sys.argv[1]), "night-1"):
    sys.stdout.write("held\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


def test_a_second_driver_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(UnavailableError, match="night-1 is being run by another driver"),
            only_driver(tmp_path, "night-1"),
        ):
            pytest.fail("two drivers")
        with only_driver(tmp_path / "other", "night-2"):
            pass
        first.kill()
        first.wait()
    with only_driver(tmp_path, "night-1"):
        pass


def test_the_lock_ends_with_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stage failed"), only_driver(tmp_path, "night-1"):
            raise RuntimeError("stage failed")


def test_how_far_a_batch_has_got_only_grows(tmp_path: Path) -> None:
    got = [advance(tmp_path)]
    (tmp_path / PLAN).write_text("{}")
    got.append(advance(tmp_path))
    first, second = Progress(tmp_path / "job-1"), Progress(tmp_path / "job-2")
    for step in (
        lambda: first("prepare"),
        lambda: second("prepare"),
        lambda: first("train", 0, 9_000_000),
        lambda: first("train", 50, 9_000_000),
        lambda: second("train", 9_000_000, 9_000_000),
        lambda: first("evaluate", 0, 3),
        lambda: second("done"),
    ):
        step()
        got.append(advance(tmp_path))
    assert got == sorted(set(got))


def test_progress(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "job")
    assert progress.read() == ("wait", 0, 0)
    progress("train", 5, 150)
    assert Progress(tmp_path / "job").read() == ("train", 5, 150)
    progress("done")
    assert progress.read() == ("done", 0, 0)


def test_an_output_that_names_what_is_gone_is_made_again(tmp_path: Path) -> None:
    compute, path = Counter(), tmp_path / "output.json"
    once(path, Output, compute)
    assert once(path, Output, compute, valid=lambda output: output.value == 1).value == 1
    assert once(path, Output, compute, valid=lambda output: False).value == 2
    assert stored(path, Output, valid=lambda output: False) is None
    assert stored(path, Output) == Output(value=2), "looking changes nothing"
