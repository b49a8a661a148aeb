"""What an editor is, and how one is found by its name."""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from expunge.errors import InputError
from expunge.settings import ModelSettings
from expunge.validation import Problem, input_error
from expunge.words import EditSpec


class Editor(Protocol):
    def __call__(self, target: np.ndarray, *, mask: np.ndarray | None, donors: np.ndarray, seed: int) -> np.ndarray:
        """Return the surrogate, uint8 [H, W, 3]; the arguments are left as they were.

        target: uint8 RGB [H, W, 3]. mask: bool [H, W], true where it may change; None: the editor's default.
        donors: uint8 RGB [M, H, W, 3], pictures of the retain set. Same seed and arguments, same picture.
        Raises InputError where no surrogate can be made.
        """
        ...


class Options(BaseModel):
    """Base of an editor's options, which arrive as text. The option `model` is for an editor that loads a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OptionsT = TypeVar("OptionsT", bound=Options)
MakerT = TypeVar("MakerT", bound=Callable[[Any], Editor])

_editors: dict[str, tuple[type[Options], Callable[[Any], Editor]]] = {}


def editor(name: str, options: type[Options]) -> Callable[[MakerT], MakerT]:
    """Make what is decorated known as the editor `name`, which is also the name of its module.

    It is called with the `options` that were read, and returns the editor.
    """

    def add(make: MakerT) -> MakerT:
        _editors[name] = options, make
        return make

    return add


def editor_names() -> list[str]:
    """Name every editor, without importing any: their packages are large. A helper's module begins with `_`."""
    names = (module.name for module in iter_modules(import_module("expunge.surrogates").__path__))
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def make_editor(spec: EditSpec) -> Editor:
    """Raises InputError naming an unknown editor or option."""
    options, make = _find(spec.editor)
    return make(read_options(options, spec.options))


def _find(name: str) -> tuple[type[Options], Callable[[Any], Editor]]:
    if name not in editor_names():
        raise InputError(f"edit.editor: {name!r} is unknown", hint=f"use one of {', '.join(editor_names())}")
    import_module(f"expunge.surrogates.{name}")
    return _editors[name]


def check_edit(spec: EditSpec, model: ModelSettings) -> EditSpec:
    """The edit as it will be made: with the model of `editor_models` where there is one alone and none is named.

    A request comes from anyone: it may use the editors of `editors` (and the model's own), and of models those of
    `editor_models`. Loads nothing. Raises InputError naming what is not allowed and what is, or an option that is
    wrong.
    """
    allowed = tuple(dict.fromkeys((*model.editors, model.editor)))
    if spec.editor in editor_names() and spec.editor not in allowed:
        raise InputError(
            f"edit.editor: {spec.editor!r} is not allowed here", hint=f"use {' or '.join(allowed)}, or give a surrogate"
        )
    asked, models = spec.options.get("model"), list(model.editor_models)
    if asked is not None and asked not in models:
        hint = f"use {' or '.join(models)}" if models else "the model's editor_models names none"
        raise InputError(f"edit.options.model: {asked!r} is not allowed here", hint=hint)
    options, _ = _find(spec.editor)
    if "model" in options.model_fields and asked is None and models:
        if len(models) > 1:
            hint = f"use {' or '.join(models)}"
            raise InputError("edit.options.model: there are several, and none is named", hint=hint)
        spec = spec.model_copy(update={"options": {**spec.options, "model": models[0]}})
    make_editor(spec)
    return spec


def read_options(kind: type[OptionsT], options: dict[str, str]) -> OptionsT:
    """Raises InputError naming the first option that is unknown, missing or wrong."""
    try:
        return kind.model_validate(options)
    except ValidationError as error:

        def hint(problem: Problem) -> str:
            name = problem.path[2] if len(problem.path) > 2 else ""
            field = kind.model_fields.get(name)
            return f"{name} is {field.description}" if field else f"known are {', '.join(kind.model_fields)}"

        raise input_error(error, where=("edit", "options"), noun="option", hint=hint) from None


def _split(value: object) -> object:
    return value.split("/") if isinstance(value, str) else value


Share = Annotated[float, Field(ge=0, le=1)]
Ellipse = Annotated[tuple[Share, Share, Share, Share], BeforeValidator(_split)]
"""`cx/cy/rx/ry`: centre and half axes, as shares of the width and the height."""


def ellipse_mask(height: int, width: int, ellipse: Ellipse) -> np.ndarray:
    """bool [H, W], true inside."""
    cx, cy, rx, ry = ellipse
    y, x = np.mgrid[:height, :width]
    return ((x + 0.5) / width - cx) ** 2 * ry**2 + ((y + 0.5) / height - cy) ** 2 * rx**2 <= (rx * ry) ** 2


def region(target: np.ndarray, mask: np.ndarray | None, ellipse: Ellipse) -> np.ndarray:
    """The mask in force, bool [H, W]: the given one, else the ellipse.

    Raises InputError where it does not fit the image or marks nothing.
    """
    height, width = target.shape[:2]
    if mask is None:
        mask = ellipse_mask(height, width, ellipse)
    if mask.shape != (height, width):
        raise InputError(
            f"edit.mask: {mask.shape[1]}x{mask.shape[0]} pixels, the image has {width}x{height}",
            hint="give a mask of the image's size",
        )
    if not mask.any():
        raise InputError("edit.mask: nothing is marked", hint="white is what may change")
    return mask
