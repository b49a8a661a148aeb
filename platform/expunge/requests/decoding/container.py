"""Strips a picture file of everything that does not make pixels.

Metadata is where most broken files are broken. It is dropped before a decoder sees it, so that only pixels that cannot
be decoded are an error; what changes how the pixels look (orientation, colour profile) is read here, with bounds, and
counts as absent where it is malformed.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

MAX_PROFILE = 8 << 20
"""Bytes of a colour profile. Those of printing presses have 0.5 to 4 MB."""

MAX_ENTRIES = 512
"""Entries of the first EXIF directory that are looked at; cameras write about 15."""

_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class BrokenError(ValueError):
    """The pixels cannot be decoded; the message says why."""


class CostlyError(ValueError):
    """The pixels would take an unreasonable time to decode; the message says why."""


@dataclass(frozen=True)
class Container:
    """`data` is a file of the same kind that holds the pixels and nothing else; `size` is its (width, height).

    `disturbed`, of a JPEG alone, is the same file with noise behind each scan: it decodes to the same pixels if, and
    only if, no scan ends early.
    """

    data: bytes
    size: tuple[int, int]
    frames: int = 1
    orientation: int = 1
    profile: bytes | None = None
    disturbed: bytes | None = None


Parse = Callable[[bytes, Callable[[int, int], None]], Container]
"""Parses a file. It calls the second argument with width and height before it does anything costly."""


def orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """Returns 1 to 8, from the first directory of the EXIF data, else from XMP; 1 if neither can be read."""
    found = None if exif is None else _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if found is None and xmp is not None and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found or 1


def _exif_orientation(tiff: bytes) -> int | None:
    """Reads this one field; it does not matter if others are malformed."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * min(count, MAX_ENTRIES), 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", tiff, entry + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None
