"""Backup and restore as a pair: what was accepted is there again, and a backup gives nothing away."""

import json
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from expunge.errors import InputError, StorageError
from expunge.files import file_digest, write_atomically
from expunge.requests import passphrase as passphrases
from expunge.requests.backup import back_up
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.manifest import Manifest
from expunge.requests.restore import restore
from expunge.requests.store import open_store
from expunge.settings import Settings, load_settings
from expunge.types import RemovalRequest, RequestState
from tests.requests.conftest import Bucket

PASSPHRASE = "correct horse battery staple"
PICTURE = b"a picture of Jane Doe"
NEXT_KEY = "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="


@pytest.fixture
def settings() -> Settings:
    """A home in use: three requests, one decided, one picture of each."""
    settings = load_settings()
    store, blobs = open_store(settings), open_blobs(settings)
    for name in "abc":
        blob = blobs.put(PICTURE + name.encode())
        fields = {"id": f"req-{name}", "model": "faces", "images": [blob], "external_id": f"ticket-{name}"}
        store.add(RemovalRequest.model_validate({**fields, "reason": "she asked"}))
    store.drain("night-1", limit=2)
    store.transition("req-a", RequestState.REMOVED, detail="gone", evidence={"shift": 0.7})
    store.close()
    return settings


@pytest.fixture
def elsewhere(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"home": tmp_path / "elsewhere"})


def everything(settings: Settings) -> list[str]:
    store = open_store(settings)
    try:
        return [record.model_dump_json() for record in store.list()] + [b.model_dump_json() for b in store.batches()]
    finally:
        store.close()


def test_what_was_accepted_is_there_again(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    manifest = back_up(settings, tmp_path / "b", PASSPHRASE)
    assert (manifest.requests, manifest.blobs, manifest.key) == (3, 3, True)
    restore(elsewhere, tmp_path / "b", PASSPHRASE)
    assert everything(elsewhere) == everything(settings)
    (record, *_) = open_store(elsewhere).list()
    assert open_blobs(elsewhere).get(record.request.images[0]) == PICTURE + b"a"
    assert open_store(elsewhere).drain(None).id == "night-1"


def test_a_backup_gives_no_picture_and_no_key_away(settings: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    key = (settings.home / "blob.key").read_bytes().strip()
    for path in (tmp_path / "b").rglob("*"):
        if path.is_file():
            assert PICTURE not in path.read_bytes(), path
            assert key not in path.read_bytes(), path
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700


def test_without_a_passphrase_the_key_stays_behind(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    assert not back_up(settings, tmp_path / "b").key
    assert not (tmp_path / "b" / "key.sealed").exists()
    with pytest.raises(InputError, match="no key is at hand"):
        restore(elsewhere, tmp_path / "b")
    restore(elsewhere, tmp_path / "b", unverified=True)
    assert not (elsewhere.home / "blob.key").exists()
    with pytest.raises(StorageError, match=r"blob\.key is gone"):
        open_blobs(elsewhere)


def test_the_key_may_lie_in_the_new_home_already(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b")
    elsewhere.home.mkdir()
    (elsewhere.home / "blob.key").write_bytes((settings.home / "blob.key").read_bytes())
    restore(elsewhere, tmp_path / "b")
    assert everything(elsewhere) == everything(settings)


def test_the_key_may_come_from_the_environment(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    key = (settings.home / "blob.key").read_text().strip()
    back_up(settings.model_copy(update={"blob_key": key}), tmp_path / "b", PASSPHRASE)
    restore(elsewhere.model_copy(update={"blob_key": key}), tmp_path / "b", PASSPHRASE)
    assert not (elsewhere.home / "blob.key").exists()
    again = elsewhere.model_copy(update={"home": tmp_path / "again", "blob_key": key})
    restore(again, tmp_path / "b")
    assert everything(again) == everything(settings)


def test_a_key_that_does_not_open_the_backup_is_refused_first(
    settings: Settings, elsewhere: Settings, tmp_path: Path
) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    other = elsewhere.model_copy(update={"blob_key": NEXT_KEY})
    mine = open_blobs(settings).fingerprint
    for unverified in (False, True):
        with pytest.raises(StorageError, match=f"does not open this backup: .* key whose fingerprint is {mine}"):
            restore(other, tmp_path / "b", unverified=unverified)
    with pytest.raises(InputError, match="EXPUNGE_BLOB_KEY is another key"):
        restore(other, tmp_path / "b", PASSPHRASE)
    assert not elsewhere.home.exists()


def test_another_passphrase_opens_nothing(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    with pytest.raises(InputError, match="does not open the backup's key"):
        restore(elsewhere, tmp_path / "b", PASSPHRASE + "r")
    assert not elsewhere.home.exists()


def test_a_key_sealed_for_something_else_does_not_open() -> None:
    sealed = passphrases.seal("text", PASSPHRASE, "key.sealed")
    assert passphrases.unseal(sealed, PASSPHRASE, "key.sealed") == "text"
    with pytest.raises(InputError, match="does not open"):
        passphrases.unseal(sealed, PASSPHRASE, "token.sealed")


@pytest.mark.parametrize("harm", ["changed", "gone", "emptied", "cut short"])
@pytest.mark.parametrize("part", ["expunge.db", "blobs", "blobs/key-fingerprint", "key.sealed"])
@pytest.mark.parametrize("unverified", [False, True])
def test_an_altered_backup_is_refused(
    settings: Settings, elsewhere: Settings, tmp_path: Path, part: str, harm: str, unverified: bool
) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    path = next(p for p in (tmp_path / "b" / part, *sorted((tmp_path / "b" / part).glob("??/*"))) if p.is_file())
    if harm == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"changed": data[:-1] + bytes([data[-1] ^ 1]), "emptied": b"", "cut short": data[:10]}[harm])
    with pytest.raises((StorageError, InputError), match=r"was altered|does not open the backup's key"):
        restore(elsewhere, tmp_path / "b", None if unverified else PASSPHRASE, unverified=unverified)
    assert not elsewhere.home.exists()


def edit_manifest(folder: Path, **changes: object) -> None:
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**about, **changes}))


def test_a_backup_edited_to_all_removed_is_refused(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    """Every checksum of it is right."""
    back_up(settings, tmp_path / "b", PASSPHRASE)
    database = tmp_path / "b" / "expunge.db"
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TRIGGER requests_lifecycle")
        connection.execute("UPDATE requests SET state = 'removed'")
    connection.close()
    files = json.loads((tmp_path / "b" / "manifest.json").read_text())["files"]
    edit_manifest(tmp_path / "b", files={**files, "expunge.db": file_digest(database)})
    with pytest.raises(StorageError, match=r"the backup .* was altered: manifest\.json"):
        restore(elsewhere, tmp_path / "b", PASSPHRASE)
    assert not elsewhere.home.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": 2},
        {"damaged": ["0" * 64]},
        {"lacking": ["req-a"]},
        {"created": "2020-01-01T00:00:00Z"},
        {"signature": ""},
        {"signature": "0" * 64},
        {"fingerprint": "0" * 16},
    ],
)
def test_the_signature_is_over_everything(
    settings: Settings, elsewhere: Settings, tmp_path: Path, changes: dict[str, object]
) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    edit_manifest(tmp_path / "b", **changes)
    for unverified in (False, True):
        with pytest.raises(StorageError, match=r"was altered|does not open this backup"):
            restore(elsewhere, tmp_path / "b", PASSPHRASE, unverified=unverified)
    assert not elsewhere.home.exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "blobs/../../x", "blobs/aa/x", "runs/x.json", "blob.key"])
def test_a_manifest_names_nothing_but_what_a_backup_holds(
    settings: Settings, elsewhere: Settings, tmp_path: Path, name: str
) -> None:
    back_up(settings, tmp_path / "b")
    files = json.loads((tmp_path / "b" / "manifest.json").read_text())["files"]
    edit_manifest(tmp_path / "b", files={**files, name: "0" * 64})
    with pytest.raises(StorageError, match=r"was altered: manifest\.json"):
        restore(elsewhere, tmp_path / "b", unverified=True)


def test_what_is_added_to_a_backup_is_not_restored(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    (tmp_path / "b" / "blobs" / "00").mkdir(exist_ok=True)
    (tmp_path / "b" / "blobs" / "00" / ("0" * 64)).write_bytes(b"not from here")
    restore(elsewhere, tmp_path / "b", PASSPHRASE)
    assert len(open_blobs(elsewhere).ids()) == 3


def as_version_1(folder: Path) -> None:
    """As an earlier version made it: no signature, no fingerprint, nothing looked at."""
    (folder / "blobs" / "key-fingerprint").unlink()
    about = json.loads((folder / "manifest.json").read_text())
    for name in ("fingerprint", "damaged", "lacking", "signature"):
        del about[name]
    del about["files"]["blobs/key-fingerprint"]
    (folder / "manifest.json").write_text(json.dumps({**about, "version": 1}))


def test_a_backup_of_an_earlier_version_is_restored_where_that_is_asked_for(
    settings: Settings, elsewhere: Settings, tmp_path: Path
) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    as_version_1(tmp_path / "b")
    with pytest.raises(InputError, match="an earlier version made it, and did not sign it: add --unverified"):
        restore(elsewhere, tmp_path / "b", PASSPHRASE)
    assert not elsewhere.home.exists()
    manifest = restore(elsewhere, tmp_path / "b", PASSPHRASE, unverified=True)
    assert (manifest.damaged, manifest.lacking) == ((), ())
    assert everything(elsewhere) == everything(settings)
    assert open_blobs(elsewhere).get(open_store(elsewhere).list()[0].request.images[0]) == PICTURE + b"a"


def test_a_backup_of_an_earlier_version_says_what_is_damaged_in_it(
    settings: Settings, elsewhere: Settings, tmp_path: Path
) -> None:
    blob = damage(settings, "req-b")
    back_up(settings, tmp_path / "b", PASSPHRASE, allow_damaged=True)
    as_version_1(tmp_path / "b")
    manifest = restore(elsewhere, tmp_path / "b", PASSPHRASE, unverified=True)
    assert (manifest.damaged, manifest.lacking) == ((blob,), ("req-b",))


def test_a_key_that_opens_nothing_of_an_earlier_version_is_refused(
    settings: Settings, elsewhere: Settings, tmp_path: Path
) -> None:
    back_up(settings, tmp_path / "b")
    as_version_1(tmp_path / "b")
    with pytest.raises(StorageError, match=r"does not open this backup: .*EXPUNGE_BLOB_KEY"):
        restore(elsewhere.model_copy(update={"blob_key": NEXT_KEY}), tmp_path / "b", unverified=True)
    assert not elsewhere.home.exists()


def picture_of(settings: Settings, request: str) -> Path:
    store = open_store(settings)
    (blob,) = store.get(request).request.images
    store.close()
    return settings.home / "blobs" / blob[:2] / blob


def damage(settings: Settings, request: str) -> str:
    path = picture_of(settings, request)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return path.name


@pytest.mark.parametrize("request_id", ["req-a", "req-b", "req-c"])
def test_every_blob_is_opened_by_a_backup(
    settings: Settings, elsewhere: Settings, tmp_path: Path, request_id: str
) -> None:
    blob = damage(settings, request_id)
    message = rf"1 of 3 blobs do not open \({blob[:16]}\) and 1 of 3 requests lack pictures \({request_id}\): submit"
    with pytest.raises(StorageError, match=message):
        back_up(settings, tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []
    made = back_up(settings, tmp_path / "b", PASSPHRASE, allow_damaged=True)
    assert (made.damaged, made.lacking, made.blobs) == ((blob,), (request_id,), 3)
    assert restore(elsewhere, tmp_path / "b", PASSPHRASE) == made


def test_a_request_without_its_picture_fails_a_backup(settings: Settings, tmp_path: Path) -> None:
    picture_of(settings, "req-b").unlink()
    with pytest.raises(StorageError, match=r"^backup: 1 of 3 requests lack pictures \(req-b\): submit"):
        back_up(settings, tmp_path / "b")
    assert back_up(settings, tmp_path / "b", allow_damaged=True).lacking == ("req-b",)


def test_a_withdrawn_request_needs_no_picture(settings: Settings, tmp_path: Path) -> None:
    picture_of(settings, "req-c").unlink()
    store = open_store(settings)
    store.transition("req-c", RequestState.WITHDRAWN)
    store.close()
    assert back_up(settings, tmp_path / "b").lacking == ()


def test_the_restored_store_has_the_same_key(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b")
    restore(elsewhere, tmp_path / "b", unverified=True)
    with pytest.raises(StorageError, match="the blobs are sealed with another key"):
        open_blobs(elsewhere.model_copy(update={"blob_key": NEXT_KEY}))


def test_a_folder_that_was_not_finished_is_no_backup(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"is not a backup \(manifest\.json: No such file"):
        restore(elsewhere, tmp_path / "b")


def test_a_newer_backup_is_refused(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b")
    about = json.loads((tmp_path / "b" / "manifest.json").read_text())
    (tmp_path / "b" / "manifest.json").write_text(json.dumps({**about, "migration": "9999"}))
    with pytest.raises(StorageError, match=r"of a newer expunge .*: upgrade expunge"):
        restore(elsewhere, tmp_path / "b")


def _used(settings: Settings) -> None:
    open_store(settings.model_copy(update={"blob_key": NEXT_KEY})).close()


def _blob(settings: Settings) -> None:
    open_blobs(settings.model_copy(update={"blob_key": NEXT_KEY})).put(b"x")


@pytest.mark.parametrize("use", [_used, _blob], ids=["database", "blobs"])
def test_nothing_is_restored_over_something(
    settings: Settings, elsewhere: Settings, tmp_path: Path, use: Callable[[Settings], None]
) -> None:
    back_up(settings, tmp_path / "b")
    use(elsewhere)
    with pytest.raises(InputError, match=r"home: .* holds .*: restore into a new EXPUNGE_HOME"):
        restore(elsewhere, tmp_path / "b", unverified=True)


def test_nor_over_a_store_outside_of_the_home(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b")
    blobs = elsewhere.model_copy(update={"blob_url": settings.blobs})
    with pytest.raises(InputError, match=r"blob_url: .* holds blobs"):
        restore(blobs, tmp_path / "b", unverified=True)
    database = elsewhere.model_copy(update={"database_url": settings.database})
    with pytest.raises(InputError, match=r"database_url: .* exists"):
        restore(database, tmp_path / "b", unverified=True)


def test_nor_into_a_blob_store_of_another_key(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    other = BlobStore(str(tmp_path / "shared"), bytes(32))
    other.delete(other.put(b"x"))
    with pytest.raises(InputError, match="blob_url: the blob store is of another key"):
        restore(elsewhere.model_copy(update={"blob_url": str(tmp_path / "shared")}), tmp_path / "b", PASSPHRASE)
    assert not elsewhere.home.exists()


@pytest.mark.parametrize("last", ["blob", "expunge.db"])
def test_a_restore_that_was_cut_off_can_be_repeated(
    settings: Settings, elsewhere: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    before = everything(settings)
    back_up(settings, tmp_path / "b", PASSPHRASE)
    written = iter(range(100))

    def full_disk(path: Path, data: bytes) -> None:
        if path.name == last or (last == "blob" and next(written) == 2):
            path.with_name(f".{path.name}.0123456789ab.tmp").write_bytes(data[:10])  # as a kill leaves it
            raise OSError(28, "No space left on device")
        write_atomically(path, data)

    with monkeypatch.context() as patched:
        for module in ("restore", "filesystems"):
            patched.setattr(f"expunge.requests.{module}.write_atomically", full_disk)
        with pytest.raises(StorageError, match="cannot be written"):
            restore(elsewhere, tmp_path / "b", PASSPHRASE)
    back_up(settings, tmp_path / "another", PASSPHRASE)
    with pytest.raises(InputError, match=r"home: .* holds .*: restore into a new EXPUNGE_HOME"):
        restore(elsewhere, tmp_path / "another", PASSPHRASE)
    restore(elsewhere, tmp_path / "b", PASSPHRASE)
    assert not list(elsewhere.home.glob(".re*")) + list(elsewhere.home.glob(".*.tmp"))
    assert everything(elsewhere) == before


def test_a_config_file_may_be_there_already(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b")
    elsewhere.home.mkdir()
    (elsewhere.home / "config.toml").touch()
    assert restore(elsewhere, tmp_path / "b", unverified=True).requests == 3


def test_blobs_may_lie_in_an_object_store(
    settings: Settings, elsewhere: Settings, tmp_path: Path, bucket: Bucket
) -> None:
    back_up(settings, tmp_path / "b", PASSPHRASE)
    remote = elsewhere.model_copy(update={"blob_url": bucket.url})
    restore(remote, tmp_path / "b", PASSPHRASE)
    (record, *_) = open_store(remote).list()
    assert open_blobs(remote).get(record.request.images[0]) == PICTURE + b"a"
    assert back_up(remote, tmp_path / "again").blobs == 3


def test_postgresql_is_sent_to_its_own_tools(settings: Settings, tmp_path: Path) -> None:
    other = settings.model_copy(update={"database_url": "postgresql+psycopg://expunge@db/expunge"})
    with pytest.raises(InputError, match=r"postgresql is not backed up from here: .*pg_dump"):
        back_up(other, tmp_path / "b")
    with pytest.raises(InputError, match="pg_restore"):
        restore(other, tmp_path / "b")


@pytest.mark.parametrize("where", ["there", "home/backup"])
def test_a_target_that_would_harm_is_refused(settings: Settings, tmp_path: Path, where: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"there exists|lies in the home"):
        back_up(settings, tmp_path / where)


def test_a_short_passphrase_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="9 characters where 16 are needed"):
        back_up(settings, tmp_path / "b", "too short")


def test_a_failure_leaves_nothing(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("expunge.requests.backup.write_atomically", full)
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\)"):
        back_up(settings, tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []


def test_requests_may_be_accepted_meanwhile(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    """A writer that never stops: the copy is one state, and every row in it has its picture."""
    stop = threading.Event()

    def accept() -> None:
        store, blobs = open_store(settings), open_blobs(settings)
        for number in range(10_000):
            if stop.is_set():
                break
            blob = blobs.put(str(number).encode())
            fields = {"id": f"req-w{number}", "model": "faces", "images": [blob], "external_id": f"w{number}"}
            store.add(RemovalRequest.model_validate(fields))
        store.close()

    writer = threading.Thread(target=accept)
    writer.start()
    try:
        made = [back_up(settings, tmp_path / f"b{turn}", PASSPHRASE) for turn in range(3)]
    finally:
        stop.set()
        writer.join()
    assert made[0].requests <= made[1].requests <= made[2].requests
    restore(elsewhere, tmp_path / "b2", PASSPHRASE)
    blobs, records = open_blobs(elsewhere), open_store(elsewhere).list()
    assert len(records) == made[2].requests
    assert all(blobs.has(record.request.images[0]) for record in records)


def test_a_damaged_database_is_not_backed_up(settings: Settings, tmp_path: Path) -> None:
    path = Path(settings.database.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 3] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"damaged|malformed"):
        back_up(settings, tmp_path / "b")


def test_the_manifest_names_no_person(settings: Settings, tmp_path: Path) -> None:
    back_up(settings, tmp_path / "b")
    text = (tmp_path / "b" / "manifest.json").read_text()
    assert "ticket" not in text
    assert Manifest.model_validate_json(text).files.keys() >= {"expunge.db"}
