"""Decodes one picture file to upright sRGB pixels, within limits. Runs in the decoding process."""

import struct
import zlib
from io import BytesIO

from PIL import Image, ImageChops, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from expunge.errors import InputError, first_line
from expunge.requests.decoding import jpeg, png, webp
from expunge.requests.decoding.colour import to_srgb
from expunge.requests.decoding.container import BrokenError, Container, CostlyError, Parse

MIN_SIDE = 8

# Pillow's plugin classes are used directly instead of `Image.open`: the format is known from the first bytes, and
# Pillow's own bomb limit, which only warns up to twice its value, cannot contradict `max_pixels`.
_FORMATS: dict[str, tuple[Parse, type[ImageFile.ImageFile]]] = {
    "PNG": (png.parse, PngImageFile),
    "JPEG": (jpeg.parse, JpegImageFile),
    "WEBP": (webp.parse, WebPImageFile),
}
_ACCEPTED = ", ".join(_FORMATS)

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
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Returns an RGB image. Raises InputError whose message follows the file's name, as `is a broken PNG (...)`."""
    kind = _kind(data)
    parse, plugin = _FORMATS[kind]
    try:
        container = parse(data, _SizeCheck(max_pixels))
        if container.frames > 1:
            raise InputError(
                f"is an animated {kind} of {container.frames} frames", hint="send each frame as an image of its own"
            )
        image = _pixels(plugin, container)
        image = _flatten(image, container.profile)
    except _BOMBS:
        raise InputError("needs more memory than there is", hint="send a smaller copy") from None
    except CostlyError as error:
        raise InputError(f"would take too long to decode: {error}", hint="save it again as a plain PNG") from None
    except _BROKEN as error:
        raise InputError(f"is a broken or truncated {kind} ({first_line(error)})", hint="export it again") from None
    turn = _TURNS.get(container.orientation)
    return image if turn is None else image.transpose(turn)


def _kind(data: bytes) -> str:
    if data.startswith(png.SIGNATURE):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    hint = f"convert it to one of {_ACCEPTED}"
    if not data:
        raise InputError("is empty", hint="export it again")
    for magic, name in _REFUSED:
        if data.startswith(magic):
            raise InputError(f"is {name}, which is not accepted", hint=hint)
    if data[4:8] == b"ftyp":
        raise InputError("is an AVIF, HEIC or video file, which is not accepted", hint=hint)
    raise InputError("is not an image of a known kind", hint=hint)


class _SizeCheck:
    """Called before anything is decoded, and before memory for a canvas is taken."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels

    def __call__(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            size = f"{width} x {height} = {_mega(width * height)} megapixels"
            hint = "send a smaller copy or raise EXPUNGE_MAX_PIXELS"
            raise InputError(f"is {size}, over the budget of {_mega(self.max_pixels)}", hint=hint)
        if min(width, height) < MIN_SIDE:
            hint = f"each side needs at least {MIN_SIDE} pixels"
            raise InputError(f"is {width} x {height}, too small to recognise anything", hint=hint)


def _mega(pixels: int) -> str:
    return f"{pixels / 1e6:.6g}" if pixels < 1e12 else f"{pixels / 1e6:,.0f}"


def _pixels(plugin: type[ImageFile.ImageFile], container: Container) -> Image.Image:
    image = _load(plugin, container.data, container.size)
    if container.disturbed is not None:
        other = _load(plugin, container.disturbed, container.size)
        if ImageChops.difference(image, other).getbbox() is not None:
            raise BrokenError("it is cut off: pixels are missing")
    return image


def _load(plugin: type[ImageFile.ImageFile], data: bytes, size: tuple[int, int]) -> Image.Image:
    with plugin(BytesIO(data)) as image:
        if image.size != size:  # not the size that was checked
            raise BrokenError("it has two sizes")
        image.load()
        return image.copy()


def _flatten(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts to sRGB over white. 16-bit grey keeps its high byte: Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value * (1 / 256)).convert("L")
        image.info.pop("transparency", None)  # a level of 16 bits, which Pillow would look for among 8
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        flat = Image.alpha_composite(white, rgba).convert("RGB")
        return to_srgb(flat.getchannel("R") if image.mode in ("1", "L", "LA") else flat, profile)
    if image.mode == "1":
        image = image.convert("L")
    return to_srgb(image if image.mode in ("L", "CMYK") else image.convert("RGB"), profile)
