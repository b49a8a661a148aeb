"""WEBP: the picture and its alpha are kept, the rest is dropped."""

import struct
from collections.abc import Callable, Iterator

from expunge.requests.decoding.container import MAX_PROFILE, BrokenError, Container, CostlyError, orientation

MAX_CHUNKS = 10_000
_ALPHA, _ANIMATION = 0x10, 0x02
_PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")


def parse(data: bytes, check: Callable[[int, int], None]) -> Container:
    """Raises BrokenError, CostlyError, and what `check` raises for (width, height)."""
    kept: list[bytes] = []
    found: dict[bytes, bytes] = {}
    frames = 0
    size: tuple[int, int] | None = None
    for kind, body in _chunks(data):
        if size is None and (size := _size(kind, body)):
            check(*size)
        if kind == b"VP8X" and not kept:
            flags = body[0] & (_ALPHA | _ANIMATION)
            kept.append(_chunk(kind, bytes((flags,)) + body[1:10]))
        elif kind in _PIXELS:
            frames += kind == b"ANMF"
            kept.append(_chunk(kind, body))
        elif kind in (b"ICCP", b"EXIF", b"XMP "):
            found.setdefault(kind, body)
    if size is None:
        raise BrokenError("it has no pixels")
    inner = b"WEBP" + b"".join(kept)
    profile = found.get(b"ICCP")
    return Container(
        b"RIFF" + struct.pack("<I", len(inner)) + inner,
        size,
        frames=max(1, frames),
        orientation=orientation(found.get(b"EXIF"), found.get(b"XMP ")),
        profile=None if profile is None or len(profile) > MAX_PROFILE else profile,
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if len(body) < length:
            if kind in _PIXELS:
                raise BrokenError("it is cut off")
            return
        yield kind, body
        at += 8 + length + (length & 1)
    raise CostlyError(f"it has more than {MAX_CHUNKS:,} chunks")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def _size(kind: bytes, body: bytes) -> tuple[int, int] | None:
    """Returns (width, height) of the canvas, or of the only picture."""
    if kind == b"VP8X" and len(body) >= 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 " and len(body) >= 10:
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
