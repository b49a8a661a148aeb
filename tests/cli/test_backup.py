"""`expunge backup` and `expunge restore` as an operator runs them."""

from pathlib import Path

import pytest

from tests.cli.conftest import Command


@pytest.fixture
def passphrase(tmp_path: Path) -> Path:
    (tmp_path / "passphrase").write_text("correct horse battery staple\n")
    return tmp_path / "passphrase"


def test_a_home_moves(
    command: Command, picture: Path, passphrase: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("submit", picture, "--model", "faces", "--external-id", "T-1")
    before = command("list", "--json").json
    done = command("backup", tmp_path / "b", "--passphrase-file", passphrase)
    assert (done.code, done.out) == (0, f"{tmp_path / 'b'}: 1 requests, 1 sealed blobs, with the key, sealed\n")
    monkeypatch.setenv("EXPUNGE_HOME", str(tmp_path / "moved"))
    done = command("restore", tmp_path / "b", "--passphrase-file", passphrase)
    assert (done.code, done.out) == (0, f"{tmp_path / 'moved'}: 1 requests, 1 sealed blobs, the key opens them\n")
    assert command("list", "--json").json == before
    assert command("restore", tmp_path / "b").code == 2


def test_a_key_left_out_is_said(command: Command, picture: Path, tmp_path: Path) -> None:
    command("submit", picture, "--model", "faces")
    assert "WITHOUT the key" in command("backup", tmp_path / "b").out


def test_json_counts(command: Command, picture: Path, tmp_path: Path) -> None:
    command("submit", picture, "--model", "faces")
    answer = command("backup", tmp_path / "b", "--json").json
    assert (answer["requests"], answer["blobs"], answer["key"]) == (1, 1, False)
    assert "files" not in answer


def test_nothing_to_back_up_is_one_line(command: Command, tmp_path: Path) -> None:
    done = command("backup", tmp_path / "b")
    assert done.code == 6
    assert "expunge.db does not exist: check EXPUNGE_HOME" in done.err


@pytest.mark.parametrize("content", [None, ""])
def test_a_passphrase_file_without_one_is_one_line(command: Command, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "p").write_text(content)
    done = command("backup", tmp_path / "b", "--passphrase-file", tmp_path / "p")
    assert done.code == 2
    assert "cannot be read" in done.err


def test_without_a_key_a_backup_is_restored_only_where_that_is_asked_for(
    command: Command, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("submit", picture, "--model", "faces")
    command("backup", tmp_path / "b")
    monkeypatch.setenv("EXPUNGE_HOME", str(tmp_path / "moved"))
    refused = command("restore", tmp_path / "b")
    assert refused.code == 2
    assert "no key is at hand: give --passphrase-file or set EXPUNGE_BLOB_KEY to check it, or add" in refused.err
    done = command("restore", tmp_path / "b", "--unverified")
    assert done.code == 0
    assert "no key yet" in done.out


def test_what_is_damaged_is_said_at_the_backup_and_at_the_restore(
    command: Command, picture: Path, passphrase: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = command("submit", picture, "--model", "faces", "--json").json["id"]
    (blob,) = (tmp_path / "home" / "blobs").glob("??/*")
    blob.write_bytes(b"damaged")
    refused = command("backup", tmp_path / "b", "--passphrase-file", passphrase)
    assert refused.code == 6
    assert f"1 of 1 blobs do not open ({blob.name[:16]}) and 1 of 1 requests lack pictures ({request})" in refused.err
    said = f"DAMAGED: 1 blobs do not open: {blob.name}\nDAMAGED: 1 requests lack pictures: {request}; submit"
    done = command("backup", tmp_path / "b", "--passphrase-file", passphrase, "--allow-damaged")
    assert done.code == 0
    assert said in done.out
    monkeypatch.setenv("EXPUNGE_HOME", str(tmp_path / "moved"))
    done = command("restore", tmp_path / "b", "--passphrase-file", passphrase)
    assert done.code == 0
    assert said in done.out
