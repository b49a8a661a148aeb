"""Files are whole, private, and made once, whoever else writes at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expunge.files import move_into_place, write_atomically, write_once


def test_a_file_and_its_folders_are_private(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    for text in ("first", "second"):
        write_atomically(file, text)
        assert file.read_text() == text
    assert [path.stat().st_mode & 0o777 for path in (file, file.parent, file.parent.parent)] == [0o600, 0o700, 0o700]
    assert [*file.parent.iterdir()] == [file]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", "text")
    assert [*tmp_path.iterdir()] == [tmp_path / "folder"]


@pytest.mark.parametrize("links", [True, False])
def test_of_many_writers_one_makes_the_file(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refuse)
    file = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_once(file, f"{i}"), range(32)))
    first = file.read_text()
    write_once(file, "another")
    assert file.read_text() == first
    assert [*tmp_path.iterdir()] == [file]


def test_a_folder_is_moved_into_place(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "file").write_text("text")
    move_into_place(tmp_path / "partial", tmp_path / "whole")
    assert (tmp_path / "whole" / "file").read_text() == "text"
    assert not (tmp_path / "partial").exists()
