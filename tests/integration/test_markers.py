"""Markers in everything that a requester sends, and a night that is killed once: nothing may show them in the clear."""

import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image

from expunge.jobs.local_ray import PREFIX
from expunge.types import RequestState
from tests.integration.nights import SURROGATES, Nights, ended, night_arguments, night_in
from tests.integration.test_first_night import _ray_jobs
from tests.watching import processes

MODEL, BATCH, PERSON = "markers", "night-markers", 3
WORDS = {name: f"marker-{name}-4711-Zoe" for name in ("prompt", "reason", "ticket", "file", "exif", "surrogate")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_night_leaves_no_marker_in_the_clear_and_a_purge_leaves_no_picture(nights: Nights, tmp_path: Path) -> None:
    started = time.time() - 1
    target = marked(nights.face(PERSON), tmp_path / f"{WORDS['file']}.jpg")
    surrogate = marked(nights.face(SURROGATES[PERSON]), tmp_path / f"{WORDS['surrogate']}.jpg")
    texts = ("--prompt", WORDS["prompt"], "--reason", WORDS["reason"], "--external-id", WORDS["ticket"])
    done = nights.expunge("submit", str(target), "--surrogate", str(surrogate), "--model", MODEL, *texts)
    assert done.code == 0, done.err
    [record] = nights.store.list(MODEL)
    id = record.request.id
    secrets = [word.encode() for word in WORDS.values()]
    for path in (target, surrogate):
        picture = Image.open(path).convert("RGB")
        secrets += [picture.tobytes(), picture.convert("L").tobytes()]
    secrets += [nights.blobs.get(blob) for blob in record.request.blobs]

    with night_in("train", nights, BATCH, MODEL) as command:
        assert_clear(nights, secrets, started)
        shown = [*said_by_processes(nights)]
        assert len(shown) > 5, "Ray's processes are seen"
        assert not [text for text in shown if any(word in text for word in WORDS.values())]
        driver = nights.driver(BATCH)
        assert driver is not None
        driver.kill()
        killed = ended(command)
    last = nights.expunge(*night_arguments(BATCH))
    assert last.code == 0, last.out + last.err
    assert nights.store.get(id).state is RequestState.REMOVED
    listed = _ray_jobs(nights)
    assert BATCH in listed
    for said in (killed.out + killed.err, last.out + last.err, listed):
        assert not [word for word in WORDS.values() if word in said]
    assert_clear(nights, secrets, started)

    blobs = {*nights.blobs.ids()}
    assert nights.expunge("purge", id, "--yes").code == 0
    left = {*nights.blobs.ids()}
    assert blobs > left
    assert not left & {*record.request.blobs}
    assert "unbroken" in nights.expunge("audit", "verify").out
    assert_clear(nights, secrets, started)


def marked(face: Path, path: Path) -> Path:
    """The picture as a JPEG whose EXIF names a person."""
    picture = Image.open(io.BytesIO(face.read_bytes())).convert("RGB")
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = WORDS["exif"], WORDS["exif"]  # ImageDescription, Artist
    picture.save(path, quality=95, exif=exif)
    assert WORDS["exif"].encode() in path.read_bytes()
    return path


def assert_clear(nights: Nights, secrets: list[bytes], started: float) -> None:
    """Look through the home, MLflow, Ray's session folder and temporary files, names included."""
    seen = 0
    for path in files(nights, started):
        seen += 1
        assert not [word for word in WORDS.values() if word in str(path)], path
        try:
            content = path.read_bytes()
        except OSError:  # it is gone, or a socket
            continue
        found = [secret[:40] for secret in secrets if secret in content]
        assert not found, f"{path} holds {found}"
    assert seen > 50, "the places are there"


def files(nights: Nights, started: float) -> Iterator[Path]:
    ray = [path for path in Path("/tmp").glob(f"{PREFIX}*") if (path / "pids").exists()]
    mine = [path for path in ray if (path / "pids").read_text().split()[0] == str(os.getpid())]
    assert mine
    fresh = [path for path in Path(tempfile.gettempdir()).iterdir() if _is_mine(path, started)]
    for folder in (nights.home, *mine, *fresh):
        yield from (path for path in (folder, *folder.rglob("*")) if path.is_file() and not path.is_symlink())


def _is_mine(path: Path, started: float) -> bool:
    """A temporary file or folder that came while the test ran; pytest's own holds what was submitted."""
    try:
        return (
            path.lstat().st_ctime > started and not path.is_symlink() and not path.name.startswith(("pytest-", "wt-"))
        )
    except OSError:
        return False


def said_by_processes(nights: Nights) -> Iterator[str]:
    """The command line and the environment of everything that belongs to this Ray."""
    for process in processes(nights.home):
        try:
            yield " ".join(process.cmdline()) + " ".join(f"{k}={v}" for k, v in process.environ().items())
        except psutil.Error:
            continue
