"""PNG: the chunks that make pixels are kept, the rest is dropped.

As in browsers, an ancillary chunk that is damaged counts as absent, and a critical one makes the file broken.
"""

import struct
import zlib
from collections.abc import Callable, Iterator

from expunge.requests.decoding.container import MAX_PROFILE, BrokenError, Container, CostlyError, orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 100_000
"""A file of `max_bytes`, in the chunks of 8 KiB that libpng writes, has 8,000."""

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_XMP = b"XML:com.adobe.xmp\0\0\0"
_STEP = 1 << 16


def parse(data: bytes, check: Callable[[int, int], None]) -> Container:
    """Raises BrokenError, CostlyError, and what `check` raises for (width, height)."""
    chunks = _chunks(data)
    kind, header = next(chunks, (b"", b""))
    if kind != b"IHDR" or len(header) != 13:
        raise BrokenError("it does not begin with a header")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if not width or not height or colour not in _CHANNELS:
        raise BrokenError("its header is malformed")
    check(width, height)

    first: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    frames = 1
    for kind, body in chunks:
        if kind == b"IDAT":
            pixels.append(body)
        elif kind == b"IEND":
            break
        elif kind == b"acTL" and len(body) == 8 and not pixels:
            frames = max(frames, int.from_bytes(body[:4], "big"))
        elif (kind == b"iTXt" and body.startswith(_XMP)) or kind in (b"PLTE", b"tRNS", b"iCCP", b"eXIf"):
            first.setdefault(kind, body)
        elif kind[0] & 0x20 == 0:
            raise BrokenError(f"it holds an unknown critical chunk {kind.decode('latin-1')!r}")
    stream = b"".join(pixels)
    if frames == 1:
        _check_complete(stream, _raw_size(width, height, depth * _CHANNELS[colour], bool(interlaced)))
    kept = [(b"IHDR", header), *((k, first[k]) for k in (b"PLTE", b"tRNS") if k in first)]
    body = b"".join(_chunk(*part) for part in (*kept, (b"IDAT", stream), (b"IEND", b"")))
    return Container(
        SIGNATURE + body,
        (width, height),
        frames=frames,
        orientation=orientation(first.get(b"eXIf"), first.get(b"iTXt")),
        profile=_profile(first.get(b"iCCP")),
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        ancillary = bool(kind[0] & 0x20)
        at += 12 + length
        if len(body) < length:
            if kind == b"IDAT":
                yield kind, body  # the rows that matter may all be in it
            return
        if checksum == struct.pack(">I", zlib.crc32(body, zlib.crc32(kind))) or (kind == b"IDAT" and len(checksum) < 4):
            yield kind, body
        elif not ancillary and kind != b"IEND":
            raise BrokenError(f"the checksum of {kind.decode('latin-1')!r} is wrong")
    raise CostlyError(f"it has more than {MAX_CHUNKS:,} chunks")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))


def _raw_size(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Returns the number of bytes of the inflated rows, each of which begins with one byte for its filter."""
    passes = _PASSES if interlaced else ((0, 0, 1, 1),)
    total = 0
    for x, y, dx, dy in passes:
        columns, rows = -(-max(width - x, 0) // dx), -(-max(height - y, 0) // dy)
        total += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return total


def _check_complete(pixels: bytes, wanted: int) -> None:
    """Pillow paints rows black that are missing from a stream that ends as it should."""
    # Behind the two bytes of the header, and without the checksum at the end, which follows all pixels.
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    found = 0
    try:
        for start in range(2, len(pixels), _STEP):
            pending = pixels[start : start + _STEP]
            while found < wanted and not inflate.eof:
                rows = inflate.decompress(pending, wanted - found)
                found += len(rows)
                pending = inflate.unconsumed_tail
                if not rows and not pending:
                    break
    except zlib.error:
        raise BrokenError("its pixels are damaged") from None
    if found < wanted:
        raise BrokenError("it is cut off: rows are missing")


def _profile(body: bytes | None) -> bytes | None:
    """Inflates up to a limit: a few bytes may stand for gigabytes."""
    name, separator, rest = (body or b"").partition(b"\0")
    if not separator or len(name) > 79 or rest[:1] != b"\0":
        return None
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(rest[1:], MAX_PROFILE)
    except zlib.error:
        return None
    return profile if inflate.eof else None
