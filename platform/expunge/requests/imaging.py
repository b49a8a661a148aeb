"""Bounded decoding of pictures that strangers send. What leaves `normalise` is an RGB PNG without metadata.

Pillow's plugin classes are used directly instead of `Image.open`: the format is known from the first bytes, Pillow's
own bomb limit (a process-wide global that only warns up to twice its value) cannot contradict `max_pixels`, and a
phone's JPEG with a second picture behind the first (MPO) stays one JPEG.
"""

import os
import stat
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from expunge.errors import InputError, StorageError

MIN_SIDE = 8

_DECODERS: dict[str, type[ImageFile.ImageFile]] = {"PNG": PngImageFile, "JPEG": JpegImageFile, "WEBP": WebPImageFile}
_ACCEPTED = ", ".join(_DECODERS)

# What Pillow's decoders are known to raise on hostile or broken bytes, beside OSError.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)

# Formats people do send: named in the refusal, never decoded.
_REFUSED = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"II*\x00", "a TIFF"),
    (b"MM\x00*", "a TIFF"),
    (b"%PDF", "a PDF"),
    (b"\x00\x00\x01\x00", "an ICO"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000"),
)


def read_file(path: Path, *, field: str, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises InputError naming field, path and hint."""
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise InputError(f"{field}: {path} is a directory", hint="name the image file in it")
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{field}: {path} is not a regular file", hint="copy it to a file first")
        # A file may grow between stat and read: the size that counts is the one that is read.
        with path.open("rb") as file:
            data = b"" if found.st_size > max_bytes else file.read(max_bytes + 1)
            size = max(found.st_size, len(data))
    except FileNotFoundError:
        raise InputError(f"{field}: {path} does not exist", hint="check the path") from None
    except OSError as error:
        reason = (error.strerror or os.strerror(error.errno or 0)).lower()
        raise InputError(
            f"{field}: {path} cannot be read ({reason})", hint="check the path and its permissions"
        ) from None
    except ValueError as error:
        raise InputError(f"{field}: {str(path)!r} is not a path ({error})", hint="check the path") from None
    if size > max_bytes:
        hint = "send a smaller copy or raise EXPUNGE_MAX_BYTES"
        raise InputError(f"{field}: {path} is {size:,} bytes, over the limit of {max_bytes:,}", hint=hint)
    return data


def normalise(data: bytes, *, field: str, max_pixels: int) -> bytes:
    """Canonical PNG bytes: 8-bit RGB, upright (EXIF orientation applied), alpha over white, no metadata.

    `field` begins the error, e.g. `images[0]` or `images[0]: /x/a.png`. Equal pixels give equal bytes under one Pillow
    and zlib. Raises InputError for any other format than PNG, JPEG and WEBP, for animations, for a side under 8
    pixels, for more than `max_pixels` (read from the header, before anything is decoded) and for broken files.
    """
    kind = _kind(data, field)
    try:
        with _DECODERS[kind](BytesIO(data)) as image:
            _check_header(image, kind, field, max_pixels)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _encode(_flatten(upright))
    except _BOMBS:
        raise InputError(f"{field} needs more memory than there is", hint="send a smaller copy") from None
    except _BROKEN as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{field} is a broken or truncated {kind} ({detail})", hint="export it again") from None


def to_array(png: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of bytes that came from `normalise`. Raises StorageError if they did not."""
    try:
        with PngImageFile(BytesIO(png)) as image:
            array = np.array(image)
    except _BROKEN:
        raise StorageError("a stored picture is not a PNG", hint="submit its request again") from None
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise StorageError("a stored picture is not 8-bit RGB", hint="submit its request again")
    return array


def _kind(data: bytes, field: str) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    hint = f"convert it to one of {_ACCEPTED}"
    if not data:
        raise InputError(f"{field} is empty", hint="export it again")
    for magic, name in _REFUSED:
        if data.startswith(magic):
            raise InputError(f"{field} is {name}, which is not accepted", hint=hint)
    if data[4:8] == b"ftyp":
        raise InputError(f"{field} is an AVIF, HEIC or video file, which is not accepted", hint=hint)
    raise InputError(f"{field} is not an image that is known here", hint=hint)


def _check_header(image: ImageFile.ImageFile, kind: str, field: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        size = f"{width} x {height} = {_mega(width * height)} megapixels, over the budget of {_mega(max_pixels)}"
        raise InputError(f"{field} is {size}", hint="send a smaller copy or raise EXPUNGE_MAX_PIXELS")
    if min(width, height) < MIN_SIDE:
        hint = f"each side needs at least {MIN_SIDE} pixels"
        raise InputError(f"{field} is {width} x {height}, too small to recognise anything", hint=hint)
    frames = image.n_frames if isinstance(image, PngImageFile | WebPImageFile) else 1
    if frames > 1:
        raise InputError(
            f"{field} is an animated {kind} of {frames} frames", hint="send each frame as an image of its own"
        )


def _mega(pixels: int) -> str:
    return f"{pixels / 1e6:.6g}"


def _flatten(image: Image.Image) -> Image.Image:
    """RGB over white. 16-bit grey keeps its high byte: Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image) -> bytes:
    # A fresh picture: `info` (ICC profile, EXIF, text chunks) would otherwise be written along.
    clean = Image.new("RGB", image.size)
    clean.paste(image)
    out = BytesIO()
    clean.save(out, format="PNG", compress_level=6)
    return out.getvalue()
