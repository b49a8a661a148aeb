"""The decoding process: reads pictures from standard input, and writes pixels or a refusal to standard output.

It is started without the environment of its parent, so that a decoder that a file takes over finds no key. It ends
with its input, and by the kernel's hand when a picture takes too much time or memory.
"""

import json
import math
import os
import resource
import struct
import sys
from contextlib import suppress
from typing import BinaryIO

from expunge.errors import InputError
from expunge.requests.decoding.decode import decode

ASK = struct.Struct(">QQQ")
"""How many bytes follow, which are the file; the limit of pixels; the limit of seconds of computing."""
ANSWER = struct.Struct(">cQQ")
"""PICTURE with width and height, its RGB bytes follow; or REFUSED with the bytes of a JSON text, which follows."""
PICTURE, REFUSED, READY = b"P", b"R", b"+"

_MEMORY = 1 << 30
_MEMORY_PER_PIXEL = 48
"""A progressive CMYK JPEG or a lossless WEBP takes about 25 bytes at its peak."""


def main() -> None:
    # Whatever a library prints must not mix with the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    out.write(READY)
    out.flush()
    while len(ask := sys.stdin.buffer.read(ASK.size)) == ASK.size:
        length, max_pixels, seconds = ASK.unpack(ask)
        data = sys.stdin.buffer.read(length)
        _limit(seconds, max_pixels)
        _answer(out, data, max_pixels)
        out.flush()


def _answer(out: BinaryIO, data: bytes, max_pixels: int) -> None:
    try:
        image = decode(data, max_pixels)
        pixels = image.tobytes()
    except InputError as error:
        told = json.dumps([error.message, error.hint]).encode()
        out.write(ANSWER.pack(REFUSED, len(told), 0) + told)
        return
    out.write(ANSWER.pack(PICTURE, *image.size))
    out.write(pixels)


def _limit(seconds: int, max_pixels: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: math.ceil(used.ru_utime + used.ru_stime) + seconds,
        resource.RLIMIT_AS: _MEMORY + _MEMORY_PER_PIXEL * max_pixels,
        resource.RLIMIT_CORE: 0,
    }
    for kind, wanted in limits.items():
        _, most = resource.getrlimit(kind)
        with suppress(OSError, ValueError):  # not every system has each of them
            resource.setrlimit(kind, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


if __name__ == "__main__":
    main()
