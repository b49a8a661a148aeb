"""The decoding process: it bounds time and memory, knows no secret, and is replaced when it ends."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expunge.errors import ExpungeError, InputError
from expunge.requests.decoding.process import Decoder

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
READY = "import os, sys, time; os.write(1, b'+'); "


def png(image: Image.Image = NOISE) -> bytes:
    out = BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def child(code: str, *, seconds: float = 1.0) -> Decoder:
    return Decoder(seconds=seconds, command=(sys.executable, "-c", READY + code))


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


def test_pixels_come_back_as_they_are(decoder: Decoder) -> None:
    for _ in range(3):
        assert np.array_equal(np.asarray(decoder.decode(png(), 10**6)), np.asarray(NOISE))


def test_a_refusal_is_told_and_the_next_picture_is_decoded(decoder: Decoder) -> None:
    with pytest.raises(InputError, match=r"^is not an image of a known kind: convert it to one of PNG"):
        decoder.decode(b"words", 10**6)
    with pytest.raises(InputError, match="over the budget"):
        decoder.decode(png(), 100)
    assert decoder.decode(png(), 10**6).size == (32, 24)


def test_a_large_picture_goes_through_the_pipe(decoder: Decoder) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (1200, 1500, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decoder.decode(png(Image.fromarray(rows)), 2 * 10**6)), rows)


def test_threads_take_turns(decoder: Decoder) -> None:
    pictures = [Image.new("RGB", (8 + i, 9), (i, 2 * i, 3 * i)) for i in range(12)]
    found: dict[int, Image.Image] = {}

    def decode(i: int) -> None:
        found[i] = decoder.decode(png(pictures[i]), 10**6)

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i].tobytes() == picture.tobytes() for i, picture in enumerate(pictures))


def test_a_decoder_that_computes_without_end_is_ended() -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1)); sum(iter(int, 1))"
    decoder = child(code, seconds=5)
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"^(takes more than 5 seconds to decode|made the decoder fail)"):
        decoder.decode(b"x", 0)
    assert time.monotonic() - begun < 15


def test_a_decoder_that_sleeps_is_ended() -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match=r"^takes more than 0 seconds to decode: save it again as a plain PNG"):
        child("time.sleep(600)", seconds=0.1).decode(b"x", 0)
    assert time.monotonic() - begun < 10


def test_a_decoder_that_does_not_read_is_ended() -> None:
    with pytest.raises(InputError, match=r"^takes more than 0 seconds to decode"):
        child("time.sleep(600)", seconds=0.1).decode(bytes(10_000_000), 0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os.close(1); time.sleep(600)", r"made the decoder fail \(signal 9\)"),
        ("os.kill(os.getpid(), 11)", r"made the decoder fail \(signal 11\): save it again"),
        ("sys.stdin.buffer.read(24); sys.exit(3)", r"made the decoder fail \(code 3\)"),
        ("os.write(1, b'P' + b'\\xff' * 16); time.sleep(600)", "made the decoder fail"),
        ("os.write(1, b'R' + b'\\xff' * 16); time.sleep(600)", "made the decoder fail"),
        ("os.write(1, b'?' * 17); time.sleep(600)", "made the decoder fail"),
        ("os.write(1, b'R' + (5).to_bytes(8) + bytes(8) + b'words'); time.sleep(600)", "made the decoder fail"),
    ],
    ids=["closed", "crash", "exit", "too many pixels", "long refusal", "no answer", "no JSON"],
)
def test_a_decoder_that_a_picture_breaks_costs_this_picture_only(code: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        child(code, seconds=60).decode(b"x" * 10, 1000)


def test_a_decoder_that_does_not_start_is_no_fault_of_the_picture() -> None:
    for command in ((sys.executable, "-c", "pass"), ("/no/such/python",)):
        with pytest.raises(ExpungeError, match=r"^the picture decoder does not start") as caught:
            Decoder(command=command).decode(png(), 10**6)
        assert not isinstance(caught.value, InputError)


def test_a_decoder_that_was_killed_is_replaced(decoder: Decoder) -> None:
    decoder.decode(png(), 10**6)
    for child_id in _children():
        os.kill(child_id, signal.SIGKILL)
        time.sleep(0.2)
    assert decoder.decode(png(), 10**6).size == (32, 24)


def _children() -> list[int]:
    here = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    return [int(child) for child in here if b"decoding.child" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_the_decoder_knows_no_secret(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_BLOB_KEY", "the key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the key")
    decoder.decode(png(), 10**6)
    for child_id in _children():
        assert b"the key" not in Path(f"/proc/{child_id}/environ").read_bytes()


def test_memory_is_bounded_by_the_pixels_that_are_allowed(decoder: Decoder) -> None:
    decoder.decode(png(), 10**6)
    (child_id,) = _children()[-1:]
    lines = Path(f"/proc/{child_id}/limits").read_text().splitlines()[1:]
    limits = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert int(limits["Max address space"]) == (1 << 30) + 48 * 10**6
    assert limits["Max core file size"] == "0"
    assert int(limits["Max cpu time"]) < 60
