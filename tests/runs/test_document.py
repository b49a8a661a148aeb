"""Stage outputs: computed once, written whole, kept aside and made again where they are damaged."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from expunge.errors import StorageError
from expunge.files import write_atomically
from expunge.runs.document import Document


class Output(BaseModel):
    value: int


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Output:
        self.calls += 1
        return Output(value=self.calls)


def output(folder: Path) -> Document[Output]:
    return Document(folder / "output.json", Output.model_validate_json)


def test_computes_once(tmp_path: Path) -> None:
    compute, document = Counter(), output(tmp_path / "job")
    assert [document.once(compute).value for _ in range(3)] == [1, 1, 1]
    assert compute.calls == 1
    assert [p.name for p in document.path.parent.iterdir()] == ["output.json"], "no partial file is left"


def test_a_failed_stage_leaves_no_output(tmp_path: Path) -> None:
    def fail() -> Output:
        raise RuntimeError("worker lost")

    document = output(tmp_path)
    with pytest.raises(RuntimeError, match="worker lost"):
        document.once(fail)
    assert not document.path.exists()
    assert document.once(Counter()).value == 1


def test_a_kill_while_writing_leaves_the_old_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            write_atomically(path, "new")
        with pytest.raises(KeyboardInterrupt, match="killed"):
            output(tmp_path).once(Counter())
    assert path.read_text() == "old"
    assert not output(tmp_path).path.exists()
    write_atomically(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("text", ['{"other": 1}', "", '{"val', "[]", "\x00" * 12])
def test_an_output_that_makes_no_sense_is_kept_aside_and_made_again(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = output(tmp_path)
    document.path.write_text(text)
    with pytest.raises(StorageError, match=r"output\.json is missing or damaged"):
        document.expect()
    assert document.once(Counter()).value == 1
    assert document.expect() == Output(value=1)
    assert (tmp_path / "output.json.unreadable").read_text() == text
    assert str(document.path) in capsys.readouterr().err


def test_an_output_that_the_disk_does_not_give_is_named(tmp_path: Path) -> None:
    document = output(tmp_path)
    document.path.mkdir()
    with pytest.raises(StorageError, match=r"output\.json cannot be read \(Is a directory\)"):
        document.once(Counter())


def test_an_output_that_names_what_is_gone_is_made_again(tmp_path: Path) -> None:
    compute, document = Counter(), output(tmp_path)
    document.once(compute)
    assert document.once(compute, valid=lambda output: output.value == 1).value == 1
    assert document.once(compute, valid=lambda output: False).value == 2
    assert document.read(valid=lambda output: False) is None
    assert document.read() == Output(value=2), "looking changes nothing"
