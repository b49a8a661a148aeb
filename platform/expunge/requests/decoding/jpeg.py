"""JPEG: tables, frame and scans are kept, the rest is dropped; how many scans there are is known before decoding.

libjpeg paints grey what is missing from a scan, and says so only in a warning that Pillow does not pass on. So each
file is rebuilt twice, once with noise behind each scan. A decoder reads on where a scan ends early, and never looks at
the noise where it does not: the pixels differ if, and only if, some are missing.
"""

import hashlib
import re
import struct
from collections.abc import Callable, Iterator

from expunge.requests.decoding.container import MAX_PROFILE, BrokenError, Container, CostlyError, orientation

MAX_SCANS = 100
"""Encoders write at most about 20. Each costs a pass over all coefficients, however few bytes it has."""
MAX_SEGMENTS = 10_000

_SOI, _EOI, _SOS, _APP0, _APP1, _APP2, _APP14, _COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_ARITHMETIC = {0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_DROPPED = {*range(0xE0, 0xF0), _COM}

_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_RESTART = re.compile(rb"\xff+[\xd0-\xd7]")
_NOISE = hashlib.sha512(b"noise behind a scan").digest().replace(b"\xff", b"\x5a")
# A decoder that misses restart intervals finds them all here; one that misses none skips them.
_NOISE_AT_END = _NOISE + b"".join(bytes((0xFF, 0xD0 + i)) + _NOISE for i in range(8))

_JFIF = b"JFIF\0\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_EXIF, _XMP, _ICC, _ADOBE = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"Adobe"


def parse(data: bytes, check: Callable[[int, int], None]) -> Container:
    """Raises BrokenError, CostlyError, and what `check` raises for (width, height)."""
    plain, disturbed = [b"\xff\xd8"], [b"\xff\xd8"]
    coverage: _Coverage | None = None
    scans = 0
    ended = False
    exif = xmp = None
    profile: dict[int, bytes] = {}
    for marker, body, scan in _segments(data):
        if marker in _FRAMES and coverage is None:
            coverage = _Coverage(marker, body)
            check(*coverage.size)
        elif marker == _APP1 and body.startswith(_EXIF):
            exif = exif or body
        elif marker == _APP1 and body.startswith(_XMP):
            xmp = xmp or body
        elif marker == _APP2 and body.startswith(_ICC) and len(body) > 14:
            profile.setdefault(body[12], body)
        ended = marker == _EOI
        kept = _kept(marker, body)
        if kept is None:
            continue
        segment = struct.pack(">BBH", 0xFF, marker, len(kept) + 2) + kept
        plain += (segment, scan)
        disturbed.append(segment)
        if marker == _SOS and coverage is not None:
            coverage.add(body)
            scans += 1
            if scans > MAX_SCANS:
                raise CostlyError(f"it has more than {MAX_SCANS} scans")
            disturbed += (_RESTART.sub(_after_noise, scan), _NOISE_AT_END)
    if coverage is None or not scans:
        raise BrokenError("it has no pixels")
    coverage.check(ended)
    plain.append(b"\xff\xd9")
    disturbed.append(b"\xff\xd9")
    return Container(
        b"".join(plain),
        coverage.size,
        orientation=orientation(exif, xmp),
        profile=_profile(profile),
        # An arithmetic coder leaves out zeros at a scan's end, and counts on the decoder to put them there.
        disturbed=None if coverage.frame in _ARITHMETIC else b"".join(disturbed),
    )


class _Coverage:
    """Keeps account of the coefficients that the scans have brought for each component, and down to which bit."""

    def __init__(self, frame: int, header: bytes) -> None:
        if len(header) < 6 or len(header) != 6 + 3 * header[5]:
            raise BrokenError("its header is malformed")
        self.frame = frame
        height, width = struct.unpack_from(">HH", header, 1)
        self.size: tuple[int, int] = (width, height)
        self._missing = {component: [16] * 64 for component in header[6::3]}

    def add(self, scan: bytes) -> None:
        if not scan or len(scan) != 4 + 2 * scan[0]:
            raise BrokenError("the header of a scan is malformed")
        first, last, bits = scan[-3:] if self.frame in _PROGRESSIVE else (0, 63, 0)
        for component in scan[1:-3:2]:
            missing = self._missing.get(component, [])
            for coefficient in range(first, min(last + 1, len(missing))):
                missing[coefficient] = bits & 15

    def check(self, ended: bool) -> None:
        """The finest detail may be left out on purpose, but not by a file that stops without its end marker."""
        for missing in self._missing.values():
            if missing[0] > 0 or (not ended and any(missing)):
                raise BrokenError("it is cut off: scans are missing")


def _after_noise(restart: re.Match[bytes]) -> bytes:
    return _NOISE + restart[0]


def _segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yields marker, content, and a scan's entropy-coded data, up to the first end of image or the end of the file."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            return
        marker, at = data[found.end() - 1], found.end()
        if marker == _EOI:
            yield marker, b"", b""
            return
        if marker in (0x01, _SOI) or 0xD0 <= marker <= 0xD7:  # these stand alone
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + length]
        if length < 2 or len(body) != length - 2:
            if marker in _DROPPED:
                return
            raise BrokenError("it is cut off")
        at += length
        scan = b""
        if marker == _SOS:
            end = _SCAN_END.search(data, at)
            stop = len(data) if end is None else end.start()
            scan, at = data[at:stop].rstrip(b"\xff"), stop
        yield marker, body, scan
    raise CostlyError(f"it has more than {MAX_SEGMENTS:,} segments")


def _kept(marker: int, body: bytes) -> bytes | None:
    """Two of the application segments decide how the components become colours."""
    if marker == _APP0 and body.startswith(b"JFIF\0"):
        return _JFIF
    if marker == _APP14 and body.startswith(_ADOBE) and len(body) >= 12:
        return body[:12]
    return None if marker in _DROPPED or marker == _EOI else body


def _profile(parts: dict[int, bytes]) -> bytes | None:
    """Joins the parts, which are numbered from 1; each says how many there are."""
    total = len(parts)
    if not parts or sorted(parts) != list(range(1, total + 1)) or any(part[13] != total for part in parts.values()):
        return None
    whole = b"".join(parts[number][14:] for number in sorted(parts))
    return whole if len(whole) <= MAX_PROFILE else None
