"""Pictures in other colour spaces become sRGB; sRGB stays what it is. The profiles are written here, by hand."""

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms

from expunge.requests.imaging import normalise, to_array

# Columns of RGB to XYZ (D50): the red, green and blue primaries.
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))

_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def rgb_profile(primaries: Sequence[Sequence[float]], gamma: float | None = None) -> bytes:
    """A matrix profile; without a gamma, with sRGB's curve."""
    curve = _parametric(_SRGB_CURVE) if gamma is None else _gamma(gamma)
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249))}
    for name, primary in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True):
        tags[name] = _xyz(primary)
    return _profile(b"RGB ", b"XYZ ", b"mntr", {**tags, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"kTRC": _gamma(gamma)})


def cmyk_profile() -> bytes:
    """Two grid points an ink: L falls from 100 to 0 as cyan, magenta and yellow grow together; black leaves it 40."""
    ramp = bytes(range(256))
    grid = bytearray()
    for c in (0, 1):
        for m in (0, 1):
            for y in (0, 1):
                for k in (0, 1):
                    lightness = 255 * (1 - (c + m + y) / 3) * (0.4 if k else 1)
                    grid += bytes((round(lightness), 128 + 40 * (m - c), 128 + 40 * (y - c)))
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + bytes(grid) + ramp * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"A2B0": table, b"A2B1": table})


def _profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"test\0"
    tags = {b"desc": b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(78), b"cprt": b"text\0\0\0\0x\0", **tags}
    offset = 128 + 4 + 12 * len(tags)
    directory, bodies = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        body += bytes(-len(body) % 4)
        directory += name + struct.pack(">II", offset + len(bodies), len(body))
        bodies += body
    header = struct.pack(">I4sI4s4s4s", offset + len(bodies), b"test", 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061) + bytes(128)
    return header[:128] + directory + bodies


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _parametric(values: Sequence[float]) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH5i", 3, 0, *(round(v * 65536) for v in values))


KINDS = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}


def encoded(image: Image.Image, kind: str, profile: bytes | None) -> bytes:
    out = BytesIO()
    image.save(out, format=kind, icc_profile=profile, **KINDS[kind])
    return out.getvalue()


def normal(data: bytes) -> np.ndarray:
    return to_array(normalise(data, field="images[0]", max_pixels=10**6))


def patch(mode: str, colour: tuple[int, ...] | int) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


# The right values are those of the definitions of the spaces, worked out by hand with their curves and matrices.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("profile", "sent", "wanted"),
    [
        (rgb_profile(ADOBE, 2.19921875), (100, 150, 100), (66, 151, 97)),
        (rgb_profile(ADOBE, 2.19921875), (128, 128, 128), (128, 128, 128)),
        (rgb_profile(P3), (200, 100, 100), (215, 93, 97)),
        (rgb_profile(P3), (60, 160, 60), (0, 163, 40)),
        (rgb_profile(SRGB, 1.0), (55, 55, 55), (128, 128, 128)),
    ],
)
def test_a_picture_is_converted_by_its_profile(
    kind: str, profile: bytes, sent: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    shown = normal(encoded(patch("RGB", sent), kind, profile))
    assert np.abs(shown.astype(int) - wanted).max() <= 2
    assert not np.array_equal(shown[0, 0], normal(encoded(patch("RGB", sent), kind, None))[0, 0]) or sent == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "profile", [rgb_profile(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()]
)
def test_srgb_is_left_as_it_is(kind: str, profile: bytes) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    assert np.array_equal(normal(encoded(noise, kind, profile)), normal(encoded(noise, kind, None)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "profile",
    [
        b"profile",
        rgb_profile(ADOBE, 2.2)[:300],
        rgb_profile(ADOBE, 2.2)[:128] + b"\xff" * 300,
        cmyk_profile(),  # of another space than the picture
        grey_profile(1.0),
        b"RGB " * 3_000_000,  # larger than any real one
    ],
    ids=["words", "cut off", "nonsense", "CMYK", "grey", "huge"],
)
def test_a_profile_that_does_not_serve_changes_nothing(kind: str, profile: bytes) -> None:
    if kind == "JPEG" and len(profile) > 10**6:
        pytest.skip("a JPEG holds no profile of this size")
    colour = patch("RGB", (100, 150, 100))
    assert np.array_equal(normal(encoded(colour, kind, profile)), normal(encoded(colour, kind, None)))


def test_grey_is_converted_by_its_profile() -> None:
    for mode, sent in (("L", 55), ("LA", (55, 255))):
        shown = normal(encoded(patch(mode, sent), "PNG", grey_profile(1.0)))
        assert np.abs(shown.astype(int) - 128).max() <= 2


def test_cmyk_is_converted_by_its_profile() -> None:
    # Pillow writes CMYK inverted, with Adobe's marker, as Photoshop does.
    no_ink = normal(encoded(patch("CMYK", (0, 0, 0, 0)), "JPEG", cmyk_profile()))
    full_black = normal(encoded(patch("CMYK", (0, 0, 0, 255)), "JPEG", cmyk_profile()))
    assert no_ink.min() >= 250
    assert np.abs(full_black.astype(int) - 94).max() <= 25  # L = 40, where Pillow's formula says 0
    assert normal(encoded(patch("CMYK", (0, 0, 0, 255)), "JPEG", None)).max() == 0


def test_transparent_pixels_are_white_in_every_space() -> None:
    clear = encoded(patch("RGBA", (0, 0, 0, 0)), "PNG", rgb_profile(ADOBE, 2.2))
    assert normal(clear).min() == 255


def test_conversion_gives_the_same_bytes_each_time() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    data = encoded(noise, "PNG", rgb_profile(P3))
    once, again = (normalise(data, field="a", max_pixels=10**6) for _ in range(2))
    assert once == again
    assert once == normalise(once, field="b", max_pixels=10**6)


def test_a_profile_that_inflates_without_end_is_not_inflated() -> None:
    png = encoded(patch("RGB", (100, 150, 100)), "PNG", b"x")
    start = png.index(b"iCCP") - 4
    length = int.from_bytes(png[start : start + 4], "big")
    body = b"bomb\0\0" + zlib.compress(bytes(50_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"iCCP" + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    bomb = png[:start] + chunk + png[start + 12 + length :]
    assert normal(bomb)[0, 0].tolist() == [100, 150, 100]
