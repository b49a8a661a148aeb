"""Bounded decoding: what is refused and how, and what a normalised picture is."""

import contextlib
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from expunge.errors import InputError, StorageError
from expunge.requests.imaging import normalise, read_file, to_array

BUDGET = 32_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that announce a vast picture; no scan line of it is ever built."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    first, *more = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    return encoded(first, kind, save_all=True, append_images=more)


def normal(data: bytes) -> np.ndarray:
    return to_array(normalise(data, field="images[0]", max_pixels=BUDGET))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            huge_png(30_000, 30_000),
            "30000 x 30000 = 900 megapixels, over the budget of 32: send a smaller copy or raise",
        ),
        (huge_png(10_000, 10_000), "10000 x 10000 = 100 megapixels, over the budget of 32"),
        (animated("GIF"), "a GIF, which is not accepted: convert it to one of PNG, JPEG, WEBP"),
        (animated("WEBP"), "an animated WEBP of 3 frames: send each frame"),
        (animated("PNG"), "an animated PNG of 3 frames"),
        (encoded(NOISE, "BMP"), "a BMP, which is not accepted"),
        (encoded(NOISE, "TIFF"), "a TIFF, which is not accepted"),
        (b"\0\0\0\x18ftypheic" + bytes(32), "an AVIF, HEIC or video file"),
        (b"just words\n", "not an image of a known kind"),
        (b"", "is empty"),
        (encoded(NOISE)[:-200], "a broken or truncated PNG"),
        (encoded(NOISE, "JPEG")[:-200], "a broken or truncated JPEG"),
        (encoded(NOISE, "WEBP", lossless=True)[:-200], "a broken or truncated WEBP"),
        (b"\x89PNG\r\n\x1a\n", "a broken or truncated PNG"),
        (encoded(Image.new("RGB", (7, 100))), "7 x 100, too small to recognise anything: each side needs at least 8"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"^images\[0\]: /x/a.png (is )?{message}"):
        normalise(data, field="images[0]: /x/a.png", max_pixels=BUDGET)


def test_raised_budget_goes_beyond_pillows_own_limit() -> None:
    # 100 megapixels is where Pillow warns: the own budget alone decides, so the file is refused for being broken.
    with pytest.raises(InputError, match="broken or truncated"):
        normalise(huge_png(100_000, 1_000)[:60], field="images[0]", max_pixels=200_000_000)


@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damaged_bytes_give_a_picture_or_an_input_error(noise: bytes, at: int, kind: str) -> None:
    data = bytearray(encoded(NOISE, kind))
    data[at : at + len(noise)] = noise
    with contextlib.suppress(InputError):
        assert normal(bytes(data)).shape[2] == 3


def test_orientation_is_applied_and_metadata_removed() -> None:
    left = Image.new("RGB", (32, 16), "black")
    left.paste("white", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise: what is left comes to the top
    exif[0x010E] = "taken at home"
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "somebody")
    png = normalise(
        encoded(left, exif=exif, pnginfo=text, icc_profile=b"profile"), field="images[0]", max_pixels=BUDGET
    )
    array = to_array(png)
    assert array.shape == (32, 16, 3)
    assert array[0, 8].tolist() == [255, 255, 255]
    assert array[31, 8].tolist() == [0, 0, 0]
    with Image.open(BytesIO(png)) as image:
        assert image.mode == "RGB"
        assert not image.info
        assert not image.getexif()
    for trace in (b"home", b"somebody", b"profile", b"eXIf", b"tEXt"):
        assert trace not in png


def test_lossless_pixels_are_kept_and_the_bytes_are_canonical() -> None:
    png, webp = encoded(NOISE), encoded(NOISE, "WEBP", lossless=True)
    assert np.array_equal(normal(png), np.asarray(NOISE))
    once = normalise(webp, field="a", max_pixels=BUDGET)
    assert once == normalise(png, field="b", max_pixels=BUDGET)
    assert once == normalise(once, field="c", max_pixels=BUDGET)


def test_alpha_lies_on_white() -> None:
    assert normal(encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0))))[0, 0].tolist() == [255, 255, 255]
    assert normal(encoded(Image.new("LA", (9, 9), (0, 128))))[0, 0].tolist() == [127, 127, 127]
    palette = Image.new("P", (9, 9), 0)
    assert normal(encoded(palette, transparency=0))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert normal(encoded(NOISE.convert(mode), kind)).shape == (24, 32, 3)


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    grey = Image.fromarray(np.full((9, 9), 0x8040, dtype=np.uint16))
    assert normal(encoded(grey))[0, 0].tolist() == [0x80] * 3


def test_a_jpeg_with_a_second_picture_behind_it_is_one_jpeg() -> None:
    data = encoded(NOISE, "MPO", save_all=True, append_images=[NOISE])
    assert normal(data).shape == (24, 32, 3)


def test_array_of_something_else() -> None:
    with pytest.raises(StorageError, match="not a PNG"):
        to_array(b"words")
    with pytest.raises(StorageError, match="not 8-bit RGB"):
        to_array(encoded(Image.new("L", (9, 9))))


def test_read_file(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"12345678")
    assert read_file(file, field="images[0]", max_bytes=8) == b"12345678"
    with pytest.raises(
        InputError, match=r"^images\[0\]: .*a\.png is 8 bytes, over the limit of 7: .*EXPUNGE_MAX_BYTES"
    ):
        read_file(file, field="images[0]", max_bytes=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "does not exist: check the path"),
        ("folder", "is a directory: name the image file in it"),
        ("pipe", "is not a regular file"),
        ("a.png/b", r"cannot be read \(not a directory\)"),
        ("nul\0.png", "is not a path"),
        ("x" * 300, r"cannot be read \(file name too long\)"),
    ],
)
def test_unreadable(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=rf"^surrogates\[2\]: .*{message}"):
        read_file(tmp_path / name, field="surrogates[2]", max_bytes=100)
