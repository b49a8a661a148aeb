"""Pictures that strangers send. What leaves `normalise` is an upright sRGB PNG without metadata."""

import os
import stat
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from expunge.errors import InputError, StorageError
from expunge.requests.decoding.process import Decoder

# One process for all pictures, as each costs as much to start as ten pictures to decode.
_decoder = Decoder()


def read_file(path: Path, *, field: str, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`. Raises InputError naming field, path and hint."""
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
    """Return canonical PNG bytes: 8-bit sRGB, upright (EXIF orientation applied), alpha over white, no metadata.

    `field` begins the error, e.g. `images[0]` or `images[0]: /x/a.png`. Equal pixels give equal bytes under one Pillow
    and zlib. Raises InputError for any other format than PNG, JPEG and WEBP, for animations, for a side under 8
    pixels, for more than `max_pixels` (read from the header, before anything is decoded), for files whose pixels are
    broken or missing, and for those that take too much time or memory to decode.
    """
    return encode(decode(data, field=field, max_pixels=max_pixels))


def decode(data: bytes, *, field: str, max_pixels: int) -> Image.Image:
    """Return the picture of `normalise` before it becomes a PNG. Raises InputError as `normalise` does."""
    try:
        return _decoder.decode(data, max_pixels)
    except InputError as error:
        raise InputError(f"{field} {error.message}", hint=error.hint) from None


def encode(image: Image.Image) -> bytes:
    """Return an image of mode RGB as PNG bytes."""
    out = BytesIO()
    # `info` may hold metadata, which would be written too.
    clean = Image.new("RGB", image.size)
    clean.paste(image)
    clean.save(out, format="PNG", compress_level=6)
    return out.getvalue()


def to_array(png: bytes) -> np.ndarray:
    """Return uint8 [H, W, 3] from bytes that `normalise` made. Raises StorageError for others."""
    try:
        with PngImageFile(BytesIO(png)) as image:
            array = np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error):
        raise StorageError("a stored picture is not a PNG", hint="submit its request again") from None
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise StorageError("a stored picture is not 8-bit RGB", hint="submit its request again")
    return array
