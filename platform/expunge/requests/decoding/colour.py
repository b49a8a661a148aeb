"""Converts to sRGB, in which models are trained; an absent or broken profile, or sRGB itself, changes nothing."""

from functools import cache
from io import BytesIO

from PIL import Image, ImageChops, ImageCms

SAME = 2
"""Levels of 255. sRGB profiles differ from each other by this much, as they round; other spaces by 10 or more."""

# Relative colorimetric: what both spaces can show stays what it is.
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # by the profile's header


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts an image of mode RGB, L or CMYK by its ICC profile, or by Pillow's formula if that cannot be used."""
    if profile is not None and _MODES.get(profile[16:20]) == image.mode:
        try:
            opened = ImageCms.ImageCmsProfile(BytesIO(profile))
            transform = ImageCms.buildTransform(opened, _srgb(), image.mode, "RGB", _INTENT, _FLAGS)
            if image.mode == "CMYK" or _changes(transform, image.mode):
                return transform.apply(image)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _changes(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """True if a probe moves by more than sRGB profiles differ from each other."""
    levels = range(0, 256, 15)
    if mode == "L":
        probe = Image.frombytes("L", (256, 1), bytes(range(256)))
    else:
        cube = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b))
        probe = Image.frombytes("RGB", (len(levels) ** 3, 1), cube)
    moved = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    return max(moved.tobytes()) > SAME
