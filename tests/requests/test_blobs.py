"""Sealed storage: what comes back, what does not, and what a full disk leaves behind."""

import base64
import errno
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from expunge.errors import InputError, NotFoundError, StorageError
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.settings import Settings, load_settings

SECRET = b"a face that must not be at rest in the clear"
ID = hashlib.sha256(SECRET).hexdigest()
OTHER_KEY = bytes(32)


class FullFileSystem(MemoryFileSystem):
    """A remote store without space."""

    protocol = "full"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full() -> str:
    fsspec.register_implementation("full", FullFileSystem, clobber=True)
    return "full://blobs"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


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
    with pytest.raises(StorageError, match="does not open: it was altered, or the key is another: restore it"):
        blobs.get(ID)
    blobs.put(SECRET)  # whoever brings the content again repairs it
    assert blobs.get(ID) == SECRET


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


def test_wrong_key(blobs: BlobStore, tmp_path: Path) -> None:
    blobs.put(SECRET)
    with pytest.raises(StorageError, match="the key is another"):
        BlobStore(str(tmp_path / "blobs"), OTHER_KEY).get(ID)


@pytest.mark.parametrize("name", ["", "abc", "../" * 20 + "etcd", "Z" * 64, ID.upper()])
def test_only_hashes_are_ids(blobs: BlobStore, name: str) -> None:
    with pytest.raises(NotFoundError, match="is no SHA-256"):
        blobs.get(name)


def test_remote() -> None:
    blobs = BlobStore("memory://blobs", OTHER_KEY)
    assert blobs.get(blobs.put(SECRET)) == SECRET
    blobs.delete(ID)
    assert not blobs.has(ID)


def test_no_space_remote(full: str) -> None:
    blobs = BlobStore(full, OTHER_KEY)
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


def test_driver_not_installed() -> None:
    with pytest.raises(InputError, match=r"^blob_url: .*: install the driver"):
        BlobStore("nonesuch://bucket", OTHER_KEY)


def test_key_is_made_once(settings: Settings) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(open_blobs, [settings] * 16))
    for i, blobs in enumerate(opened):
        assert opened[-1 - i].get(blobs.put(bytes([i]))) == bytes([i])
    key = settings.home / "blob.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(base64.b64decode(key.read_text())) == 32
    assert [path.name for path in settings.home.iterdir() if path.is_file()] == ["blob.key"]


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
