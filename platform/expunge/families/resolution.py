"""The resolution that a model is used at: its own, and what its network can divide."""

from collections.abc import Sequence

from pydantic import TypeAdapter, ValidationError

from expunge.errors import InputError
from expunge.families.layout import Layout
from expunge.settings import Resolution

_LARGEST = 4096
_RESOLUTION = TypeAdapter(Resolution)


def own_resolution(layout: Layout, sides: Sequence[int]) -> Resolution:
    """Turn the pipeline's own height and width into a resolution. Raises InputError where they are out of range."""
    try:
        return _RESOLUTION.validate_python(sides)
    except ValidationError:
        why = f"{layout.label}: its own resolution, {sides[0]}x{sides[1]}, is outside of 8 to {_LARGEST}"
        raise InputError(why, hint="set the model's resolution") from None


def divisible(layout: Layout, resolution: Resolution, by: int, why: str) -> Resolution:
    """Return `resolution` if both sides are multiples of `by`. Raises InputError, with the nearest ones, otherwise."""
    if by > _LARGEST:
        raise InputError(f"{layout.label}: no resolution is possible: {why}", hint="compare it with a published model")
    if any(side % by for side in resolution):
        low, high = (tuple(max(by, (side + up) // by * by) for side in resolution) for up in (0, by - 1))
        raise InputError(
            f"{layout.label}: resolution {list(resolution)}: both sides must be multiples of {by} ({why})",
            hint=f"set it to {list(low)} or {list(high)}",
        )
    return resolution
