"""From what a person writes to an accepted request: checked, its pictures normalised and sealed, and then its row.

The pictures are stored first, so that an accepted row never lacks them; nothing is stored of a request that is refused.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expunge.errors import InputError
from expunge.requests.blobs import BlobStore
from expunge.requests.imaging import normalise, read_file
from expunge.requests.inventory import NEEDED
from expunge.requests.schema import RequestRecord
from expunge.requests.store import RequestStore, check_same
from expunge.requests.together import store_together
from expunge.settings import Settings
from expunge.words import EditSpec, ExternalId, Identifier, RemovalRequest, Text

Model = TypeVar("Model", bound=BaseModel)

# A comma ends an option only where another KEY= follows: an instruction may be a sentence with commas.
_OPTION = re.compile(r",(?=[A-Za-z_][A-Za-z0-9_-]*=)")


class EditInput(BaseModel):
    """An edit as written: the mask is still a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    editor: Identifier
    mask: Path | None = None
    options: dict[str, str] = Field(default_factory=dict)


class Submission(BaseModel):
    """One removal request as a person writes it: pictures are paths, an edit may be its command-line spelling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Identifier
    images: tuple[Path, ...] = Field(min_length=1, max_length=64)
    prompt: Text | None = None
    surrogates: tuple[Path, ...] = ()
    edit: str | EditInput | None = None
    external_id: ExternalId | None = Field(None, description="the requester's own; default: a hash of the content")
    reason: Text = ""
    due: date | None = None
    priority: int = Field(0, ge=-10, le=10)

    @model_validator(mode="after")
    def _one_way_to_a_surrogate(self) -> Self:
        if self.surrogates and self.edit is not None:
            raise ValueError("surrogates and edit exclude each other: keep one of them")
        if len(self.surrogates) not in (0, len(self.images)):
            message = (
                f"{len(self.surrogates)} surrogates for {len(self.images)} images: give one for each image, or none"
            )
            raise ValueError(message)
        return self


def accept(
    submission: Submission, *, settings: Settings, store: RequestStore, blobs: BlobStore, base: Path
) -> tuple[RequestRecord, bool]:
    """Accepts one request; paths are relative to `base`. False: it was known, and the known one is returned.

    Pictures of a known request that were lost or damaged are stored again.

    Raises InputError naming the field for anything wrong with it, StorageError and UnavailableError of the stores.
    """
    settings.model(submission.model)
    edit = parse_edit(submission.edit) if isinstance(submission.edit, str) else submission.edit
    pictures: dict[str, bytes] = {}

    def take(path: Path, field: str) -> str:
        data = read_file(base / path, field=field, max_bytes=settings.max_bytes)
        png = normalise(data, field=f"{field}: {base / path}", max_pixels=settings.max_pixels)
        blob = hashlib.sha256(png).hexdigest()
        pictures[blob] = png
        return blob

    request = _request(submission, edit, take)
    known = store.find(request.model, request.external_id)
    if known is None:
        return store_together(request, pictures, store=store, blobs=blobs)
    check_same(known.request, request)
    # Those of a withdrawn request may have been purged, and nothing would purge them twice.
    if known.state in NEEDED:
        for png in pictures.values():
            blobs.put(png)
    return known, False


def parse_edit(text: str) -> EditInput:
    """`EDITOR[:key=value,...]`; `mask=FILE` names a picture, white where the edit goes. Raises InputError."""
    editor, _, rest = text.partition(":")
    options: dict[str, str] = {}
    for part in _OPTION.split(rest) if rest else ():
        key, equals, value = part.partition("=")
        if not equals or not key or key in options:
            why = "is given twice" if key in options else "is not key=value"
            raise InputError(f"edit: {part!r} {why}", hint="write EDITOR:key=value,key=value")
        options[key] = value
    mask = options.pop("mask", None)
    return validated(EditInput, {"editor": editor, "mask": mask, "options": options}, prefix="edit.")


def validated(kind: type[Model], values: object, *, prefix: str = "") -> Model:
    """`values` as a `kind`. Raises InputError with the first thing that is wrong, and how many more there are."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False, include_context=False)
        name = prefix + ".".join(str(part) for part in first["loc"] if not isinstance(part, int) or part >= 0)
        what = first["msg"].removeprefix("Value error, ")
        also = f" (and {len(more)} more)" if more else ""
        hint = f"the fields are {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else None
        raise InputError(f"{name}: {what}{also}" if name else f"{what}{also}", hint=hint) from None


def _request(submission: Submission, edit: EditInput | None, take: Callable[[Path, str], str]) -> RemovalRequest:
    images = tuple(take(path, f"images[{i}]") for i, path in enumerate(submission.images))
    surrogates = tuple(take(path, f"surrogates[{i}]") for i, path in enumerate(submission.surrogates))
    spec = None
    if edit is not None:
        mask = None if edit.mask is None else take(edit.mask, "edit.mask")
        spec = EditSpec(editor=edit.editor, mask=mask, options=edit.options)
    return RemovalRequest(
        id=f"req-{secrets.token_hex(6)}",
        model=submission.model,
        images=images,
        prompt=submission.prompt,
        surrogates=surrogates,
        edit=spec,
        external_id=submission.external_id or _content(images, submission.prompt, surrogates, spec),
        reason=submission.reason,
        due=submission.due,
        priority=submission.priority,
    )


def _content(images: tuple[str, ...], prompt: str | None, surrogates: tuple[str, ...], edit: EditSpec | None) -> str:
    """The external id of a request that brings none: the same content is the same request."""
    parts = [images, prompt, surrogates, None if edit is None else edit.model_dump()]
    return f"sha256-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"
