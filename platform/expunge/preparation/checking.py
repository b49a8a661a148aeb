"""Refuse at intake what preparation could not do at night, and note how it will cut the pictures."""

from pathlib import Path

from expunge.errors import InputError
from expunge.requests.box import Size, lost
from expunge.settings import ModelSettings, Resolution, Settings
from expunge.types import EditSpec, RemovalRequest

MOST_LOST = 0.05
"""The share of a side that may be cut away without a note."""


class SubmitCheck:
    """Refuses what would only fail at night: a model or an edit that cannot work.

    Collects a note for each picture of which the model will see too little.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._resolutions: dict[str, Resolution | InputError | None] = {}
        self._edits: dict[str, InputError | None] = {}
        self._notes: list[str] = []

    def __call__(self, request: RemovalRequest, sizes: tuple[Size, ...]) -> None:
        resolution = self._resolution(request.model)
        if request.edit is not None:
            self._check_edit(request.model, request.edit)
        if resolution is not None:
            self._notes += _notes(sizes, resolution)

    def take_notes(self) -> list[str]:
        """The notes since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _resolution(self, name: str) -> Resolution | None:
        """Return None if it is not known here: a submission must not wait for a download."""
        if name not in self._resolutions:
            self._resolutions[name] = _looked_at(name, self._settings.model(name))
        found = self._resolutions[name]
        if isinstance(found, InputError):
            raise InputError(found.message, hint=found.hint)
        return found

    def _check_edit(self, model: str, edit: EditSpec) -> None:
        """Create each editor once per set of options, because its packages may take seconds to import."""
        spec = edit.model_copy(update={"mask": None})
        name = f"{model} {spec.fingerprint()}"
        if name not in self._edits:
            self._edits[name] = _refusal(spec, self._settings.model(model))
        if (refusal := self._edits[name]) is not None:
            raise InputError(refusal.message, hint=refusal.hint)


def _refusal(edit: EditSpec, model: ModelSettings) -> InputError | None:
    from expunge.surrogates import check_edit

    try:
        check_edit(edit, model)
    except InputError as error:
        return error
    except ImportError as error:
        return InputError(f"edit.editor: {edit.editor} cannot be used here: {error}", hint="use another editor")
    return None


def _looked_at(name: str, model: ModelSettings) -> Resolution | InputError | None:
    """Return the model's resolution, or why it cannot be used; the configured one if its files are elsewhere."""
    if not model.source.startswith("testbed:") and not Path(model.source).expanduser().is_dir():
        return model.resolution
    from expunge.families import preflight

    try:
        return preflight(name, model)
    except InputError as error:
        return error


def _notes(sizes: tuple[Size, ...], resolution: Resolution) -> list[str]:
    height, width = resolution
    notes = []
    for i, size in enumerate(sizes):
        share, side = lost(size, resolution)
        if share > MOST_LOST:
            ends = "left and right" if side == "width" else "top and bottom"
            notes.append(
                f"images[{i}] is {size[0]} x {size[1]} and the model makes {width} x {height}: {share:.0%} of its "
                f"{side} will be cut away, in equal parts at {ends}; if the part to remove is not in the middle, "
                "submit it again with a box around it"
            )
    return notes
