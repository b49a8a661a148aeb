"""Metadata is dropped before anything is decoded: only pixels that are broken, missing or too costly are an error."""

import re
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from expunge.errors import InputError
from expunge.requests.imaging import normalise, to_array

BUDGET = 32_000_000
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
JPEGS: dict[str, dict[str, object]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1},
    "progressive restarts": {"progressive": True, "restart_marker_rows": 1},
    "full chroma": {"subsampling": 0, "optimize": True},
}

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def encoded(kind: str, image: Image.Image = NOISE, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def normal(data: bytes) -> np.ndarray:
    return to_array(normalise(data, field="images[0]", max_pixels=BUDGET))


def chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_chunk(added: bytes, png: bytes | None = None) -> bytes:
    """Behind the header, where every ancillary chunk may be."""
    png = encoded("PNG") if png is None else png
    return png[:33] + added + png[33:]


def with_segment(added: bytes, jpeg: bytes | None = None) -> bytes:
    jpeg = encoded("JPEG") if jpeg is None else jpeg
    return jpeg[:2] + added + jpeg[2:]


def with_riff(added: bytes) -> bytes:
    webp = encoded("WEBP", exif=b"Exif\0\0" + b"x" * 20)
    inner = webp[8:] + added
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


WORKFLOW = zlib.compress(b"a workflow " * 300_000)


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(chunk(b"zTXt", b"workflow\0\0" + WORKFLOW)),
        with_chunk(chunk(b"iTXt", b"workflow\0\1\0\0\0" + WORKFLOW)),
        with_chunk(chunk(b"tEXt", b"workflow\0" + b"a workflow " * 300_000)),
        with_chunk(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(60_000_000), 9))),
        with_chunk(chunk(b"zTXt", b"x\0\0no deflate")),
        with_chunk(chunk(b"tEXt", b"a\0b", checksum=7)),
        with_chunk(chunk(b"pHYs", b"short")),
        with_chunk(chunk(b"gAMA", b"")),
        with_chunk(chunk(b"iCCP", b"name\0\1")),
        with_chunk(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
        with_chunk(chunk(b"eXIf", b"MM\0*" + struct.pack(">IH", 8, 60_000) + b"\x01\x12")),
        with_chunk(chunk(b"tRNS", b"\0" * 6, checksum=7)),
        encoded("PNG") + b"junk" * 100,
        encoded("PNG")[:-12],  # without its end
    ],
    ids=range(14),
)
def test_what_is_wrong_beside_the_pixels_of_a_png_does_not_matter(data: bytes) -> None:
    assert np.array_equal(normal(data), np.asarray(NOISE))


@pytest.mark.parametrize(
    "added",
    [
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        segment(0xE1, b"Exif\0\0" + b"\xff" * 100),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"),
        segment(0xE2, b"ICC_PROFILE\0\5\2" + b"x" * 50),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"MPF\0" + b"\xff" * 30),
        segment(0xED, b"Photoshop 3.0\0" + b"\xff" * 50),
        segment(0xE0, b"JFIF\0"),
        segment(0xEE, b"Adobe"),
        segment(0xFE, b"a comment"),
        segment(0xFE, b"") + b"junk between segments",
        segment(0xFE, b"") + b"\xff\xff\xff",
    ],
    ids=range(12),
)
def test_what_is_wrong_beside_the_pixels_of_a_jpeg_does_not_matter(added: bytes) -> None:
    assert np.array_equal(normal(with_segment(added)), normal(encoded("JPEG")))


@pytest.mark.parametrize(
    "added",
    [
        b"EXIF" + struct.pack("<I", 12) + b"II*\0\xff\xff\xff\xff\xff\xff\xff\xff",
        b"XMP " + struct.pack("<I", 2) + b"<x",
        b"ICCP" + struct.pack("<I", 4) + b"nono",
        b"JUNK" + struct.pack("<I", 4) + b"junk",
        b"XMP " + struct.pack("<I", 2_000) + b"cut off",
    ],
    ids=range(5),
)
def test_what_is_wrong_beside_the_pixels_of_a_webp_does_not_matter(added: bytes) -> None:
    assert np.array_equal(normal(with_riff(added)), normal(encoded("WEBP")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_is_read_from_exif_whose_other_fields_are_broken(kind: str, turn: int) -> None:
    broken = struct.pack("<HHII", 0x010F, 2, 0xFFFFFFF0, 0xFFFFFFF0)  # a text beyond the end
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + broken + struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0)
    exact = {"lossless": True} if kind == "WEBP" else {}
    whole = Image.Exif()
    whole[0x0112] = turn
    plain = Image.open(BytesIO(encoded(kind, NOISE, exif=whole, **exact)))
    expected = np.asarray(_transposed(plain, turn).convert("RGB"))
    assert np.array_equal(normal(encoded(kind, NOISE, exif=exif, **exact)), expected)


def _transposed(image: Image.Image, turn: int) -> Image.Image:
    way = Image.Transpose
    order = [way.FLIP_LEFT_RIGHT, way.ROTATE_180, way.FLIP_TOP_BOTTOM, way.TRANSPOSE]
    order += [way.ROTATE_270, way.TRANSVERSE, way.ROTATE_90]
    return image if turn == 1 else image.transpose(order[turn - 2])


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_with_all_its_pixels_is_accepted_whatever_follows(options: dict[str, object], mode: str) -> None:
    data = encoded("JPEG", NOISE.convert(mode), **options)
    expected = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    for whole in (data, data[:-2], data[:-1], data[:-2] + b"\xff\xff\xd9", data + b"junk" * 50, data + data):
        assert np.array_equal(normal(whole), expected)


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_jpeg_without_all_its_pixels_is_refused(
    options: dict[str, object], mode: str, kept: float, end: bytes
) -> None:
    data = encoded("JPEG", NOISE.convert(mode), **options)
    scan = data.index(b"\xff\xda")
    scan += 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    cut = data[: scan + int(kept * (len(data) - 2 - scan))].rstrip(b"\xff") + end
    with pytest.raises(InputError, match=r"is a broken or truncated JPEG \(it is cut off.*\): export it again"):
        normal(cut)


def test_a_jpeg_with_an_early_scan_cut_short_is_refused() -> None:
    data = encoded("JPEG", progressive=True)
    second = [match.start() for match in re.finditer(rb"\xff\xda", data)][1]
    tables = data.rindex(b"\xff\xc4", 0, second)
    with pytest.raises(InputError, match="pixels are missing"):
        normal(data[: tables - 30] + data[tables:])


def test_a_jpeg_whose_colours_never_came_is_refused() -> None:
    data = encoded("JPEG", NOISE.convert("L"))
    frame = data.index(b"\xff\xc0")
    three = segment(0xC0, data[frame + 4 : frame + 9] + b"\3" + b"\1\x11\0\2\x11\0\3\x11\0")
    with pytest.raises(InputError, match="scans are missing"):
        normal(data[:frame] + three + data[frame + 13 :])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded("JPEG")[: encoded("JPEG").index(b"\xff\xda")] + b"\xff\xd9", "it has no pixels"),
        (b"\xff\xd8\xff\xd9", "it has no pixels"),
        (b"\xff\xd8\xff\xc0\x00\x04\x08\x00", "its header is malformed"),
        (encoded("PNG")[:33] + chunk(b"IEND", b""), "it is cut off: rows are missing"),
        (encoded("PNG")[:33] + chunk(b"IDAT", zlib.compress(bytes(5000))) + chunk(b"IEND", b""), "rows are missing"),
        (encoded("PNG")[:33] + chunk(b"IDAT", b"x\x9cno deflate") + chunk(b"IEND", b""), "its pixels are damaged"),
        (encoded("PNG")[:29] + b"\0\0\0\0" + encoded("PNG")[33:], "the checksum of 'IHDR' is wrong"),
        (with_chunk(chunk(b"ABCD", b"")), "an unknown critical chunk 'ABCD'"),
        (b"RIFF\4\0\0\0WEBP", "it has no pixels"),
        (encoded("WEBP")[:-20], "it is cut off"),
    ],
    ids=range(10),
)
def test_pixels_that_are_missing_or_damaged_are_an_error(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"is a broken or truncated (PNG|JPEG|WEBP) \(.*{message}"):
        normal(data)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("size", [(8, 8), (9, 11), (33, 8), (64, 17)])
def test_an_interlaced_png_is_whole(mode: str, size: tuple[int, int]) -> None:
    """Written by hand, as Pillow writes none: the rows of each pass are empty, the picture is black."""
    depth, colour, channels = {
        "1": (1, 0, 1),
        "L": (8, 0, 1),
        "P": (2, 3, 1),
        "RGB": (16, 2, 3),
        "LA": (8, 4, 2),
        "RGBA": (8, 6, 4),
    }[mode]
    rows = b""
    for x, y, dx, dy in [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]:
        columns, count = len(range(x, size[0], dx)), len(range(y, size[1], dy))
        rows += bytes(1 + (columns * depth * channels + 7) // 8) * count if columns else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 1))
    palette = chunk(b"PLTE", bytes(12)) if mode == "P" else b""
    for cut, whole in ((0, True), (1, False)):
        body = chunk(b"IDAT", zlib.compress(rows[: len(rows) - cut]))
        png = b"\x89PNG\r\n\x1a\n" + header + palette + body + chunk(b"IEND", b"")
        if whole:
            assert normal(png).shape == (size[1], size[0], 3)
        else:
            with pytest.raises(InputError, match="rows are missing"):
                normal(png)


def test_a_transparent_level_of_sixteen_bits_hides_no_other_level() -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    png = with_chunk(chunk(b"tRNS", b"\x80\x40"), encoded("PNG", Image.fromarray(levels)))
    assert np.array_equal(normal(png)[..., 0], levels >> 8)


def many_scans(scans: int) -> bytes:
    """A vast grey picture in a few bytes: each scan says that nothing changes, and costs a pass over all of it."""
    data = encoded("JPEG", Image.new("L", (64, 64), 128), progressive=True)
    frame = data.index(b"\xff\xc2")
    data = data[: frame + 5] + struct.pack(">HH", 5000, 6400) + data[frame + 9 :]
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + b"\xff\xd9"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (many_scans(6000), "would take too long to decode: it has more than 100 scans: save it again as a plain PNG"),
        (encoded("JPEG")[:2] + segment(0xFE, b"") * 3_000_000, "it has more than 10,000 segments"),
        (encoded("PNG")[:33] + chunk(b"IDAT", b"") * 1_000_000, "it has more than 100,000 chunks"),
        (encoded("WEBP")[:12] + b"JUNK\0\0\0\0" * 1_000_000, "it has more than 10,000 chunks"),
    ],
    ids=["scans", "segments", "PNG chunks", "WEBP chunks"],
)
def test_what_costs_more_time_than_its_pixels_are_worth_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        normal(data)


@pytest.mark.timeout(60)
def test_the_most_scans_that_are_decoded_take_seconds() -> None:
    with pytest.raises(InputError, match="pixels are missing"):  # decoded, and found to be empty
        normal(many_scans(100))


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("alpha", [True, False])
def test_an_over_budget_webp_is_refused_by_its_size(lossless: bool, alpha: bool) -> None:
    image = Image.new("RGBA" if alpha else "RGB", (100, 50), (255, 0, 0, 9) if alpha else "red")
    data = encoded("WEBP", image, lossless=lossless)
    with pytest.raises(InputError, match=r"^images\[0\] is 100 x 50 = 0\.005 megapixels, over the budget of 0\.004"):
        normalise(data, field="images[0]", max_pixels=4000)
    assert normalise(data, field="images[0]", max_pixels=5000)


def test_a_webp_canvas_is_not_taken_before_its_size_is_known() -> None:
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff\xff\x3f" * 2
    inner = b"WEBP" + canvas + encoded("WEBP")[12:]
    with pytest.raises(InputError, match="4194304 x 4194304 = 17,592,186 megapixels"):
        normal(b"RIFF" + struct.pack("<I", len(inner)) + inner)
