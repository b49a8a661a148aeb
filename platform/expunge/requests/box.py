"""The part of a picture that counts: a box given by the requester, which is cut out before anything is stored."""

from typing import Annotated

from PIL import Image
from pydantic import BeforeValidator, Field

from expunge.errors import InputError
from expunge.requests.decoding.decode import MIN_SIDE

Size = tuple[int, int]
"""(width, height) in pixels."""


def _numbers(value: object) -> object:
    """`left,top,right,bottom` is how it is written on the command line."""
    wrong = ValueError("write four numbers: left,top,right,bottom")
    if isinstance(value, str):
        try:
            value = [float(part) for part in value.split(",")]
        except ValueError:
            raise wrong from None
    if isinstance(value, list | tuple) and len(value) != 4:
        raise wrong
    return value


Edge = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Box = Annotated[tuple[Edge, Edge, Edge, Edge], BeforeValidator(_numbers)]
"""Left, top, right, bottom of the upright picture: in pixels or, if none is over 1, as fractions of its sides."""


def one_or_more(value: object) -> object:
    """Reads a single box as a list of one."""
    single = isinstance(value, str) or (
        isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(edge, int | float) for edge in value)
    )
    return [value] if single else value


def pixels(box: Box, size: Size, field: str) -> tuple[int, int, int, int]:
    """Returns the box in whole pixels. Raises InputError if it is not inside the picture `field`, or is too small."""
    width, height = size
    left, top, right, bottom = box
    if max(box) <= 1:
        left, right, top, bottom = left * width, right * width, top * height, bottom * height
    edges = (round(left), round(top), round(right), round(bottom))
    if edges[2] > width or edges[3] > height:
        raise InputError(
            f"box: {_written(box)} reaches beyond {field}, which is {width} x {height}",
            hint="write left,top,right,bottom in pixels of the upright picture, or as fractions from 0 to 1",
        )
    across, down = edges[2] - edges[0], edges[3] - edges[1]
    if min(across, down) < MIN_SIDE:
        why = "is upside down" if min(across, down) < 0 else f"leaves {across} x {down} pixels of {field}"
        raise InputError(
            f"box: {_written(box)} {why}",
            hint=f"write left,top,right,bottom; each side needs at least {MIN_SIDE} pixels",
        )
    return edges


def cut_companion(image: Image.Image, field: str, *, whole: Size, box: tuple[int, int, int, int]) -> Image.Image:
    """A surrogate or mask beside a picture that a box was cut from: cut alike, or as it is where it is cut already.

    Raises InputError where it is neither of the size of the whole picture nor of that of its box.
    """
    left, top, right, bottom = box
    if image.size == whole:
        return image.crop(box)
    if image.size == (right - left, bottom - top):
        return image
    width, height = image.size
    raise InputError(
        f"{field}: {width} x {height} pixels, but its image has {whole[0]} x {whole[1]} and the box "
        f"{right - left} x {bottom - top}",
        hint="give it in one of these two sizes",
    )


def same_shape(one: Size, other: Size) -> bool:
    """True if both show the same section at any scale: their sides differ by no more than rounding."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def lost(size: Size, resolution: tuple[int, int]) -> tuple[float, str]:
    """Returns what share of which side is cut away when a picture is scaled to (height, width) without distortion."""
    width, height = size
    ratio = width * resolution[0] / (height * resolution[1])
    return (1 - 1 / ratio, "width") if ratio > 1 else (1 - ratio, "height")


def _written(box: Box) -> str:
    return ",".join(f"{edge:g}" for edge in box)
