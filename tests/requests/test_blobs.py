"""Sealed storage: what comes back, what does not, and what a full disk leaves behind."""

import base64
import errno
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from expunge.errors import InputError, NotFoundError, StorageError
from expunge.requests.blobs import MARKER, BlobStore, open_blobs
from expunge.settings import Settings, load_settings
from tests.requests.conftest import KEY, Bucket

SECRET = b"a face that must not be at rest in the clear"
ID = hashlib.sha256(SECRET).hexdigest()
OTHER_KEY = bytes(32)


def files(folder: Path) -> list[Path]:
    """Without the key's fingerprint."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != MARKER]


def encoded(key: bytes) -> str:
    return base64.b64encode(key).decode()


def test_round_trip(blobs: BlobStore, tmp_path: Path) -> None:
    assert not blobs.has(ID)
    assert blobs.put(SECRET) == ID
    assert blobs.has(ID)
    assert blobs.get(ID) == SECRET
    (stored,) = files(tmp_path / "blobs")
    assert stored == tmp_path / "blobs" / ID[:2] / ID
    assert SECRET not in stored.read_bytes()
    assert stored.stat().st_mode & 0o777 == 0o600
    blobs.delete(ID)
    blobs.delete(ID)
    with pytest.raises(NotFoundError, match=f"blob {ID} does not exist"):
        blobs.get(ID)


def test_put_again_leaves_the_sealed_bytes_alone(blobs: BlobStore, tmp_path: Path) -> None:
    blobs.put(SECRET)
    before = files(tmp_path / "blobs")[0].read_bytes()
    blobs.put(SECRET)
    assert files(tmp_path / "blobs")[0].read_bytes() == before


@pytest.mark.parametrize("at", [0, 4, 16, -1])
def test_tampered(blobs: BlobStore, tmp_path: Path, at: int) -> None:
    blobs.put(SECRET)
    (stored,) = files(tmp_path / "blobs")
    data = bytearray(stored.read_bytes())
    data[at] ^= 1
    stored.write_bytes(data)
    with pytest.raises(StorageError, match="does not open: it is damaged: submit its request again"):
        blobs.get(ID)
    blobs.put(SECRET)  # whoever brings the content again repairs it
    assert blobs.get(ID) == SECRET
    aside = stored.with_name(f"{ID}.damaged")
    assert aside.read_bytes() == data, "nothing is overwritten that may open elsewhere"
    stored.write_bytes(b"damaged again")
    blobs.put(SECRET)
    assert aside.read_bytes() == data
    blobs.delete(ID)
    assert files(tmp_path / "blobs") == []


def test_what_cannot_be_read_is_not_overwritten(blobs: BlobStore, tmp_path: Path) -> None:
    blobs.put(SECRET)
    (stored,) = files(tmp_path / "blobs")
    stored.unlink()
    stored.mkdir()
    with pytest.raises(StorageError, match="the blob store cannot read"):
        blobs.put(SECRET)
    assert stored.is_dir()


def test_truncated_and_swapped(blobs: BlobStore, tmp_path: Path) -> None:
    other = blobs.put(b"another picture")
    blobs.put(SECRET)
    stored = tmp_path / "blobs" / ID[:2] / ID
    stored.write_bytes((tmp_path / "blobs" / other[:2] / other).read_bytes())
    with pytest.raises(StorageError, match="does not open"):
        blobs.get(ID)
    stored.write_bytes(b"EXB1")
    with pytest.raises(StorageError, match="does not open"):
        blobs.get(ID)


@pytest.fixture(params=["local", "object store"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "blobs") if request.param == "local" else request.getfixturevalue("bucket").url


def test_a_store_of_another_key_is_not_opened(anywhere: str) -> None:
    mine = BlobStore(anywhere, KEY)
    mine.put(SECRET)
    with pytest.raises(StorageError, match="the blobs are sealed with another key") as caught:
        BlobStore(anywhere, OTHER_KEY)
    assert mine.fingerprint in str(caught.value.hint)
    assert mine.fingerprint != BlobStore(anywhere + "2", OTHER_KEY).fingerprint
    assert BlobStore(anywhere, KEY).get(ID) == SECRET


def test_two_keys_that_meet_in_an_empty_store_do_not_share_it(anywhere: str) -> None:
    first, second = BlobStore(anywhere, KEY), BlobStore(anywhere, OTHER_KEY)
    first.put(SECRET)
    for data in (SECRET, b"another picture"):
        with pytest.raises(StorageError, match="another key"):
            second.put(data)
    assert first.get(ID) == SECRET
    assert first.ids() == [ID]


def test_a_store_without_conditional_writes_has_one_key_too(bucket: Bucket) -> None:
    bucket.without_conditional_writes()
    BlobStore(bucket.url, KEY).put(SECRET)
    with pytest.raises(StorageError, match="another key"):
        BlobStore(bucket.url, OTHER_KEY)


def test_many_openers_of_an_empty_store_agree_on_one_key(tmp_path: Path) -> None:
    def store(number: int) -> bool:
        try:
            BlobStore(str(tmp_path / "blobs"), bytes([number % 2]) * 32).put(bytes([number]))
        except StorageError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(store, range(32)))
    assert {number % 2 for number, ok in enumerate(stored) if ok} in ({0}, {1})
    assert sum(stored) == 16


def test_opening_alone_leaves_nothing(tmp_path: Path) -> None:
    BlobStore(str(tmp_path / "blobs"), KEY)
    assert not (tmp_path / "blobs").exists()


def test_a_store_of_an_earlier_version_is_marked_by_the_key_that_opens_it(blobs: BlobStore, tmp_path: Path) -> None:
    blobs.put(SECRET)
    (tmp_path / "blobs" / MARKER).unlink()
    with pytest.raises(StorageError, match=r"opens none of the blobs: .*EXPUNGE_BLOB_KEY"):
        BlobStore(str(tmp_path / "blobs"), OTHER_KEY)
    assert not (tmp_path / "blobs" / MARKER).exists()
    assert BlobStore(str(tmp_path / "blobs"), KEY).get(ID) == SECRET
    assert (tmp_path / "blobs" / MARKER).read_text().strip() == blobs.fingerprint


def test_a_damaged_blob_does_not_lock_out_a_store_of_an_earlier_version(blobs: BlobStore, tmp_path: Path) -> None:
    for number in range(3):
        blobs.put(bytes([number]))
    (tmp_path / "blobs" / MARKER).unlink()
    files(tmp_path / "blobs")[0].write_bytes(b"damaged")
    BlobStore(str(tmp_path / "blobs"), KEY)
    assert (tmp_path / "blobs" / MARKER).exists()


@pytest.mark.parametrize("content", ["", "0123", "x" * 16, "0" * 17])
def test_a_damaged_marker_is_named(blobs: BlobStore, tmp_path: Path, content: str) -> None:
    blobs.put(SECRET)
    (tmp_path / "blobs" / MARKER).write_text(content)
    with pytest.raises(StorageError, match="key-fingerprint in the blob store is damaged: delete it"):
        BlobStore(str(tmp_path / "blobs"), KEY)
    (tmp_path / "blobs" / MARKER).unlink()
    assert BlobStore(str(tmp_path / "blobs"), KEY).get(ID) == SECRET


def test_the_marker_does_not_give_the_key_away(blobs: BlobStore, tmp_path: Path) -> None:
    blobs.put(SECRET)
    marker = tmp_path / "blobs" / MARKER
    assert len(marker.read_text()) == 17
    assert KEY not in marker.read_bytes()
    assert marker.stat().st_mode & 0o777 == 0o600


def test_what_is_derived_differs_by_purpose_and_key(tmp_path: Path) -> None:
    stores = [BlobStore(str(tmp_path / name), key) for name, key in (("a", KEY), ("b", OTHER_KEY))]
    derived = {store.derive(purpose) for store in stores for purpose in ("manifest", "checkpoint")}
    assert len(derived | {KEY, OTHER_KEY}) == 6
    assert stores[0].derive("manifest") == BlobStore(str(tmp_path / "c"), KEY).derive("manifest")


@pytest.mark.parametrize("name", ["", "abc", "../" * 20 + "etcd", "Z" * 64, ID.upper()])
def test_only_hashes_are_ids(blobs: BlobStore, name: str) -> None:
    with pytest.raises(NotFoundError, match="is not a SHA-256"):
        blobs.get(name)


def test_remote(bucket: Bucket) -> None:
    blobs = BlobStore(bucket.url, OTHER_KEY)
    assert blobs.get(blobs.put(SECRET)) == SECRET
    assert blobs.ids() == [ID]
    blobs.delete(ID)
    assert not blobs.has(ID)


def test_a_damaged_remote_blob_is_repaired(bucket: Bucket) -> None:
    blobs = BlobStore(bucket.url, KEY)
    blobs.put(SECRET)
    bucket.write(f"{ID[:2]}/{ID}", b"damaged")
    blobs.put(SECRET)
    assert blobs.get(ID) == SECRET
    assert bucket.read(f"{ID[:2]}/{ID}.damaged") == b"damaged"


def test_no_space_remote(bucket: Bucket) -> None:
    blobs = BlobStore(bucket.url, OTHER_KEY)
    bucket.fail_with(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StorageError, match=r"cannot write .* \(no space left on device\): free space"):
        blobs.put(SECRET)
    assert not blobs.has(ID)


def test_no_space_local(tmp_path: Path) -> None:
    """A real refusal by the kernel: this process may write files of 1,000 bytes at most."""
    script = f"""
import resource
from expunge.errors import StorageError
from expunge.requests.blobs import BlobStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
blobs = BlobStore({str(tmp_path / "blobs")!r}, bytes(32))
small = blobs.put(b"small")
try:
    blobs.put(bytes(5000))
except StorageError as error:
    print(error)
assert blobs.get(small) == b"small"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the blob store cannot write ")
    assert "free space" in done.stdout
    assert len(files(tmp_path / "blobs")) == 1


def test_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file")
    with pytest.raises(StorageError, match="the blob store cannot"):
        BlobStore(str(tmp_path / "blobs"), OTHER_KEY).put(SECRET)


@pytest.mark.parametrize("url", ["nonesuch://bucket", "lakefs://no/driver/for/this", "dropbox://blobs"])
def test_driver_not_installed(url: str) -> None:
    with pytest.raises(InputError, match=r"^blob_url: .*: (install the driver|use a local path)"):
        BlobStore(url, OTHER_KEY)


@pytest.mark.parametrize(
    "url",
    [
        "memory://blobs",
        "http://host/blobs",
        "https://host/blobs",
        "data://x",
        "zip://blobs",
        "github://a:b@/blobs",
        "simplecache://blobs",
        "simplecache::memory://blobs",
        "filecache::s3://bucket/blobs",
    ],
)
def test_a_store_that_keeps_nothing_is_refused(url: str) -> None:
    with pytest.raises(InputError, match=r"^blob_url: .*does not keep"):
        BlobStore(url, OTHER_KEY)


@pytest.mark.parametrize("url", ["s3:bucket/blobs", "s3:/bucket/blobs", "memory:blobs"])
def test_a_url_without_its_slashes_is_no_folder(url: str) -> None:
    with pytest.raises(InputError, match=r"^blob_url: neither a path nor a URL: write"):
        BlobStore(url, OTHER_KEY)


@pytest.mark.parametrize("name", ["a b", "a?b=c", "a#b", "a%20b", "ä", "a::b", "a[1]*", "a/", "a/../b", "file://{}/a"])
def test_any_folder_will_do(tmp_path: Path, name: str) -> None:
    url = name.format(tmp_path) if "{}" in name else f"{tmp_path}/{name}"
    blobs = BlobStore(url, KEY)
    blobs.put(SECRET)
    assert BlobStore(url, KEY).ids() == [ID]
    folder = (tmp_path / name.removeprefix("file://{}/")).resolve()
    assert (folder / ID[:2] / ID).is_file()


def test_key_is_made_once(settings: Settings) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(open_blobs, [settings] * 16))
    for i, blobs in enumerate(opened):
        assert opened[-1 - i].get(blobs.put(bytes([i]))) == bytes([i])
    key = settings.home / "blob.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(base64.b64decode(key.read_text())) == 32
    assert [path.name for path in settings.home.iterdir() if path.is_file()] == ["blob.key"]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("where", ["local", "object store"])
def test_a_new_key_is_not_made_for_blobs_of_a_lost_one(
    settings: Settings, bucket: Bucket, where: str, marked: bool
) -> None:
    if where == "object store":
        settings = settings.model_copy(update={"blob_url": bucket.url})
    blobs = open_blobs(settings)
    blobs.put(SECRET)
    if marked:
        blobs.delete(ID)  # the marker stays
    elif where == "local":
        (settings.home / "blobs" / MARKER).unlink()
    else:
        bucket.delete(MARKER)
    (settings.home / "blob.key").unlink()
    with pytest.raises(StorageError, match=r"blob\.key is gone, and .* holds blobs sealed with it: restore it"):
        open_blobs(settings)
    assert not (settings.home / "blob.key").exists()


def test_a_foreign_key_does_not_touch_a_home(settings: Settings) -> None:
    open_blobs(settings).put(SECRET)
    foreign = settings.model_copy(update={"blob_key": encoded(OTHER_KEY)})
    with pytest.raises(StorageError, match="another key"):
        open_blobs(foreign)
    assert open_blobs(settings).get(ID) == SECRET


def test_lost_key_is_not_replaced(settings: Settings) -> None:
    open_blobs(settings).put(SECRET)
    (settings.home / "blob.key").unlink()
    with pytest.raises(StorageError, match=r"blob\.key is gone, and .* holds blobs sealed with it: restore it"):
        open_blobs(settings)


def test_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", base64.b64encode(OTHER_KEY).decode())
    settings = load_settings()
    open_blobs(settings).put(SECRET)
    assert BlobStore(settings.blobs, OTHER_KEY).get(ID) == SECRET
    assert not (settings.home / "blob.key").exists()


@pytest.mark.parametrize(("key", "message"), [("%%%", "not base64"), ("c2hvcnQ=", "5 bytes where 32 are needed")])
def test_malformed_key(monkeypatch: pytest.MonkeyPatch, key: str, message: str) -> None:
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", key)
    with pytest.raises(InputError, match=f"^blob_key: {message}: make one with"):
        open_blobs(load_settings())


def test_a_damaged_key_file_is_restored_and_never_made_anew() -> None:
    settings = load_settings()
    blob = open_blobs(settings).put(SECRET)
    file = settings.home / "blob.key"
    whole = file.read_text()
    file.write_text(whole[:20])
    with pytest.raises(InputError, match=r"blob\.key: .*: restore it from a backup or set EXPUNGE_BLOB_KEY$"):
        open_blobs(settings)
    file.write_text(whole)
    assert open_blobs(settings).get(blob) == SECRET
