"""The protocol of an editor, and how an editor is found by its name."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from expunge.errors import InputError
from expunge.settings import ModelSettings
from expunge.types import EditSpec
from expunge.validation import Problem, input_error

if TYPE_CHECKING:
    from expunge.surrogates._painter import Painter


@dataclass(frozen=True)
class Task:
    """What an editor is asked for: the surrogate of one target, and what it may use for that."""

    target: np.ndarray
    """uint8 RGB [H, W, 3]."""
    mask: np.ndarray | None
    """bool [H, W], true where the target may change; None means the editor's default."""
    donors: np.ndarray
    """uint8 RGB [M, H, W, 3]: pictures of the retain set."""
    seed: int
    attempt: int = 0
    """0 at first, and one more whenever the surrogate would not do; it leads to another picture."""
    painter: "Painter | None" = None
    """The model that the target is removed from."""


class Editor(Protocol):
    def __call__(self, task: Task) -> np.ndarray:
        """Return the surrogate, uint8 [H, W, 3]; the task's arrays are not changed.

        Equal tasks give the same picture. Raises InputError if no surrogate can be made.
        """
        ...


class Options(BaseModel):
    """The base class of an editor's options, which arrive as text. `model` is that of an editor that loads a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OptionsT = TypeVar("OptionsT", bound=Options)
MakerT = TypeVar("MakerT", bound=Callable[..., Editor])

_editors: dict[str, tuple[type[Options], Callable[..., Editor]]] = {}


def editor(name: str, options: type[Options]) -> Callable[[MakerT], MakerT]:
    """Register a class, or another maker of an editor, under the editor's name, which is also its module's name.

    It is called with an instance of `options`.
    """

    def add(make: MakerT) -> MakerT:
        _editors[name] = options, make
        return make

    return add


def editor_names() -> list[str]:
    """Return the names of all editors without importing them, because their packages are large.

    A module whose name begins with `_` is a helper.
    """
    names = (module.name for module in iter_modules(import_module("expunge.surrogates").__path__))
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def make_editor(spec: EditSpec) -> Editor:
    """Make the editor that `spec` names. Raises InputError for an unknown editor or option."""
    options, make = _find(spec.editor)
    return make(read_options(options, spec.options))


def _find(name: str) -> tuple[type[Options], Callable[..., Editor]]:
    if name not in editor_names():
        raise InputError(f"edit.editor: {name!r} is unknown", hint=f"use one of {', '.join(editor_names())}")
    import_module(f"expunge.surrogates.{name}")
    return _editors[name]


def check_edit(spec: EditSpec, model: ModelSettings) -> EditSpec:
    """Return the edit; if it names no model and `editor_models` has exactly one, that one is filled in.

    A request may come from anyone, so it may only use the editors in `editors`, the model's default editor, and the
    models in `editor_models`. Loads nothing. Raises InputError if an editor, a model or an option is not allowed.
    """
    allowed = tuple(dict.fromkeys((*model.editors, model.editor)))
    if spec.editor in editor_names() and spec.editor not in allowed:
        raise InputError(
            f"edit.editor: {spec.editor!r} is not allowed here", hint=f"use {' or '.join(allowed)}, or give a surrogate"
        )
    asked, models = spec.options.get("model"), list(model.editor_models)
    if asked is not None and asked not in models:
        hint = f"use {' or '.join(models)}" if models else "the model's editor_models is empty"
        raise InputError(f"edit.options.model: {asked!r} is not allowed here", hint=hint)
    options, _ = _find(spec.editor)
    if "model" in options.model_fields and asked is None and models:
        if len(models) > 1:
            hint = f"use {' or '.join(models)}"
            raise InputError("edit.options.model: name one, because several are allowed", hint=hint)
        spec = spec.model_copy(update={"options": {**spec.options, "model": models[0]}})
    make_editor(spec)
    return spec


def read_options(kind: type[OptionsT], options: dict[str, str]) -> OptionsT:
    """Parse an editor's options. Raises InputError naming the first option that is unknown, missing or wrong."""
    try:
        return kind.model_validate(options)
    except ValidationError as error:

        def hint(problem: Problem) -> str:
            name = problem.path[2] if len(problem.path) > 2 else ""
            field = kind.model_fields.get(name)
            return f"{name} is {field.description}" if field else f"use one of {', '.join(kind.model_fields)}"

        raise input_error(error, where=("edit", "options"), noun="option", hint=hint) from None


def _split(value: object) -> object:
    return value.split("/") if isinstance(value, str) else value


Share = Annotated[float, Field(ge=0, le=1)]
Ellipse = Annotated[tuple[Share, Share, Share, Share], BeforeValidator(_split)]
"""`cx/cy/rx/ry`: centre and half axes, as fractions of the width and the height."""


def ellipse_mask(height: int, width: int, ellipse: Ellipse) -> np.ndarray:
    """Return bool [H, W], true inside the ellipse."""
    cx, cy, rx, ry = ellipse
    y, x = np.mgrid[:height, :width]
    return ((x + 0.5) / width - cx) ** 2 * ry**2 + ((y + 0.5) / height - cy) ** 2 * rx**2 <= (rx * ry) ** 2


def region(target: np.ndarray, mask: np.ndarray | None, ellipse: Ellipse) -> np.ndarray:
    """Return the mask to use, bool [H, W]: the given one, or the ellipse if there is none.

    Raises InputError if it does not fit the image or marks nothing.
    """
    height, width = target.shape[:2]
    if mask is None:
        mask = ellipse_mask(height, width, ellipse)
    if mask.shape != (height, width):
        raise InputError(
            f"edit.mask: it has {mask.shape[1]}x{mask.shape[0]} pixels, but the image has {width}x{height}",
            hint="give a mask of the image's size",
        )
    if not mask.any():
        raise InputError("edit.mask: nothing is marked", hint="paint the part that may change white")
    return mask
