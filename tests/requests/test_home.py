"""The home remembers what was made for it: what is missing or another one is refused, never made anew in silence."""

import errno
import fcntl
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expunge.errors import ExpungeError, InputError, StorageError
from expunge.requests.backup import back_up
from expunge.requests.blobs import KEY_FILE, open_blobs
from expunge.requests.home import FILE, check_home, recall, remember
from expunge.requests.store import open_store
from expunge.settings import Settings
from expunge.types import RemovalRequest
from tests.requests.conftest import made_by_an_earlier_release

Ask = Callable[..., RemovalRequest]


def test_a_new_home_remembers_its_database(settings: Settings) -> None:
    assert recall(settings) is None
    identity = open_store(settings).identity()
    known = recall(settings)
    assert known is not None
    assert known.database == identity
    assert open_store(settings).identity() == identity
    assert recall(settings) == known


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.unlink(), "does not exist, but this home"),
        (lambda file: file.write_bytes(b""), "is empty, but this home"),
        (lambda file: file.write_bytes(bytes(4096)), "is damaged"),
    ],
    ids=["deleted", "emptied", "zeroed"],
)
def test_a_database_that_is_gone_is_not_made_anew(
    settings: Settings, ask: Ask, harm: Callable[[Path], None], said: str
) -> None:
    store = open_store(settings)
    store.add(ask("a"))
    store.close()
    file = settings.home / "expunge.db"
    for companion in settings.home.glob("expunge.db-*"):
        companion.unlink()
    harm(file)
    size = file.stat().st_size if file.exists() else None
    for _ in range(2):
        with pytest.raises(StorageError, match=said):
            open_store(settings)
    assert (file.stat().st_size if file.exists() else None) == size


def test_another_database_is_refused(settings: Settings, tmp_path: Path) -> None:
    open_store(settings).close()
    elsewhere = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'other.db'}"})
    with pytest.raises(StorageError, match=r"does not exist, but this home"):
        open_store(elsewhere)
    open_store(elsewhere.model_copy(update={"home": tmp_path / "other"})).close()
    with pytest.raises(StorageError, match=r"the database .* is not the one"):
        open_store(elsewhere)


def test_the_same_database_may_serve_a_home_elsewhere(settings: Settings, tmp_path: Path) -> None:
    identity = open_store(settings).identity()
    key = (settings.home / KEY_FILE).read_text()
    there = {"home": tmp_path / "other", "database_url": settings.database}
    with pytest.raises(StorageError, match="the database is sealed with another key"):
        open_store(settings.model_copy(update={**there, "home": tmp_path / "third"}))
    other = settings.model_copy(update={**there, "blob_key": key})
    assert open_store(other).identity() == identity
    first, second = recall(settings), recall(other)
    assert first is not None
    assert second is not None
    assert first.id != second.id


def test_blobs_that_are_gone_are_noticed(settings: Settings) -> None:
    open_store(settings).close()
    blob = open_blobs(settings).put(b"a picture")
    assert open_blobs(settings).get(blob) == b"a picture"
    shutil.rmtree(settings.home / "blobs")
    for _ in range(2):
        with pytest.raises(StorageError, match="the blob store is gone or empty, but this home has"):
            open_blobs(settings)
    assert not (settings.home / "blobs").exists()


def test_a_backup_of_a_database_that_is_gone_is_refused(settings: Settings, tmp_path: Path) -> None:
    open_store(settings).close()
    (settings.home / "expunge.db").unlink()
    with pytest.raises(StorageError, match="does not exist, but this home has accepted requests"):
        back_up(settings, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2, "id": "x"}', '{"id": 3}'])
def test_a_damaged_memory_is_named(settings: Settings, text: str) -> None:
    open_store(settings).close()
    (settings.home / FILE).write_text(text)
    with pytest.raises(StorageError, match=rf"{FILE} cannot be read \(it is damaged, or of a newer version\)"):
        open_store(settings)


def test_a_key_is_remembered_beside_the_database(settings: Settings) -> None:
    database = open_store(settings).identity()
    remember(settings, key="a" * 16)
    known = remember(settings, key="a" * 16)
    assert (known.database, known.key) == (database, "a" * 16)
    with pytest.raises(StorageError, match=r"the sealing key .* is not the one"):
        remember(settings, key="b" * 16)


def test_processes_that_make_a_home_at_once_agree(settings: Settings) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: remember(settings, database="d").id, range(16)))
    assert len(set(made)) == 1
    assert json.loads((settings.home / FILE).read_text())["id"] == made[0]


def test_a_home_may_lie_on_a_volume_without_file_locks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    database = open_store(settings).identity()
    assert remember(settings, key="a" * 16).database == database


def test_a_night_on_another_home_is_refused(settings: Settings, tmp_path: Path) -> None:
    id = remember(settings, database="d").id
    check_home(settings, id)
    strangers: list[tuple[Settings, str]] = [
        (settings.model_copy(update={"home": tmp_path / "empty"}), "nothing was ever accepted into it"),
        (settings.model_copy(update={"home": tmp_path / "other"}), "its id is"),
    ]
    remember(strangers[1][0], database="d")
    for other, why in strangers:
        with pytest.raises(InputError, match=f"is not the home that this night .*: {why}.* EXPUNGE_HOME"):
            check_home(other, id)


def test_a_home_that_cannot_be_written_says_so(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"home": Path("/proc/1/nowhere")})
    with pytest.raises(ExpungeError, match=r"cannot be (written|made)") as caught:
        open_store(nowhere)
    assert caught.value.exit_code == StorageError.exit_code


def test_a_home_of_the_first_release_is_taken_over(settings: Settings, ask: Ask) -> None:
    """Its database has no id yet, and its home remembers nothing; its open batch goes on."""
    made_by_an_earlier_release(settings, "0001", ask("old"))
    store = open_store(settings)
    batch = store.drain(None)
    assert (batch.id, [request.id for request in batch.requests]) == ("night-old", ["req-old"])
    assert store.start_batch(batch.id, 0) == 1
    known = recall(settings)
    assert known is not None
    assert known.database == store.identity()
