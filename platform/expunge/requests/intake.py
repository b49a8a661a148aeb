"""From what a person writes to an accepted request: checked, its pictures normalised and sealed, and then its row.

The pictures are stored first, so that an accepted row never lacks them; nothing is stored of a request that is refused.
"""

import hashlib
import json
import re
import secrets
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Self, TypeVar

import numpy as np
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from expunge.errors import InputError
from expunge.requests.blobs import BlobStore
from expunge.requests.box import Box, Size, cut_companion, one_or_more, pixels, same_shape
from expunge.requests.imaging import decode, encode
from expunge.requests.inventory import NEEDED
from expunge.requests.locations import Location, Picture, beside, read_location
from expunge.requests.schema import RequestRecord
from expunge.requests.store import RequestStore, check_same
from expunge.requests.together import store_together
from expunge.settings import IDENTIFIER, Settings
from expunge.words import EXTERNAL_ID, TEXT, EditSpec, ExternalId, Identifier, RemovalRequest, Text

Model = TypeVar("Model", bound=BaseModel)

Check = Callable[[RemovalRequest, tuple[Size, ...]], None]
"""Asked of a new request and the sizes of its images, before anything is stored. Raises InputError to refuse it."""

# A comma ends an option only where another KEY= follows: an instruction may be a sentence with commas.
_OPTION = re.compile(r",(?=[A-Za-z_][A-Za-z0-9_-]*=)")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def _option_text(value: object) -> object:
    """Options are text; in JSON a number or a truth value may be written as one."""
    if isinstance(value, dict):
        return {k: json.dumps(v) if isinstance(v, bool | int | float) else v for k, v in value.items()}
    return value


def _parsed(value: object) -> object:
    return parse_edit(value) if isinstance(value, str) else value


def _list_of_paths(value: object) -> object:
    if isinstance(value, str | Path):
        raise ValueError('give a list, even of one: ["a.png"]')
    return value


def _day(value: object) -> object:
    """Without this, numbers and times of day would become dates."""
    if isinstance(value, str) and _DAY.fullmatch(value):
        return value
    if value is None or (isinstance(value, date) and not isinstance(value, datetime)):
        return value
    raise ValueError("Input should be a valid date, written YYYY-MM-DD")


def _named(value: str | None) -> str | None:
    if value is not None and not 1 <= len(canonical(value)) <= 200:
        raise ValueError("String should have 1 to 200 characters, spaces at its ends not counted")
    return value


Pictures = Annotated[tuple[Picture, ...], BeforeValidator(_list_of_paths)]


class EditInput(BaseModel):
    """An edit as written: the mask is still a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    editor: Identifier
    mask: Picture | None = None
    options: Annotated[dict[Text, Text], BeforeValidator(_option_text)] = Field(default_factory=dict)


class Submission(BaseModel):
    """One removal request as a person writes it: pictures are paths or URLs.

    An edit may be spelled as on the command line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: Identifier
    images: Pictures = Field(min_length=1, max_length=64)
    box: Annotated[tuple[Box, ...], BeforeValidator(one_or_more)] = Field(
        (), description="left, top, right, bottom of what counts: one for all images, or one for each"
    )
    prompt: Text | None = None
    surrogates: Pictures = ()
    edit: Annotated[EditInput | None, BeforeValidator(_parsed)] = None
    external_id: Annotated[ExternalId | None, AfterValidator(_named)] = Field(
        None, description="the requester's own; default: a hash of the content"
    )
    reason: Text = ""
    due: Annotated[date | None, BeforeValidator(_day)] = None
    priority: int = Field(0, ge=-10, le=10, strict=True)

    @model_validator(mode="after")
    def _one_way_to_a_surrogate(self) -> Self:
        if self.surrogates and self.edit is not None:
            raise ValueError("surrogates and edit exclude each other: keep one of them")
        if len(self.surrogates) not in (0, len(self.images)):
            message = (
                f"{len(self.surrogates)} surrogates for {len(self.images)} images: give one for each image, or none"
            )
            raise ValueError(message)
        if len(self.box) not in (0, 1, len(self.images)):
            message = f"{len(self.box)} boxes for {len(self.images)} images: give one for all, one for each, or none"
            raise ValueError(message)
        return self


def accept(
    submission: Submission,
    *,
    settings: Settings,
    store: RequestStore,
    blobs: BlobStore,
    base: Location,
    check: Check | None = None,
) -> tuple[RequestRecord, bool]:
    """Accepts one request; paths are relative to `base`. False: it was known, and the known one is returned.

    Pictures of a known request that were lost or damaged are stored again.

    Raises InputError naming the field for anything wrong with it, StorageError and UnavailableError of the stores.
    """
    settings.model(submission.model)
    taken = _Pictures(settings, base)
    request = _request(submission, taken)
    known = None
    # Those accepted before ids had one form are still found.
    for written in _spellings(submission.external_id or request.external_id):
        known = known or store.find(request.model, written)
    if known is not None:
        check_same(known.request, request.model_copy(update={"external_id": known.request.external_id}))
        # Those of a withdrawn request may have been purged, and nothing would purge them twice.
        if known.state in NEEDED:
            for png in taken.pictures.values():
                blobs.put(png)
        return known, False
    # Not of a known one: what was accepted once is not refused when its file is submitted again.
    _check_new(request, taken)
    if check is not None:
        check(request, tuple(taken.sizes))
    return store_together(request, taken.pictures, store=store, blobs=blobs)


def canonical(external_id: str) -> str:
    """The one form of an id that can be written in several: composed characters, no spaces at its ends."""
    return unicodedata.normalize("NFC", external_id).strip()


def _spellings(external_id: str) -> tuple[str, ...]:
    one = canonical(external_id)
    return tuple(dict.fromkeys((one, external_id, unicodedata.normalize("NFD", one))))


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
        first, *more = error.errors(include_url=False, include_input=False)
        name = prefix + ".".join(_short(part) for part in first["loc"] if part != "[key]")
        what = _plain(first)
        also = f" (and {len(more)} more)" if more else ""
        hint = f"the fields are {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else None
        raise InputError(f"{name}: {what}{also}" if name else f"{what}{also}", hint=hint) from None


_PLAIN = {
    "string_unicode": "it is not text: a character in it is half of a pair",
    "path_type": 'give the path of a file in quotes: "a.png"',
    "tuple_type": "give a list",
    "dict_type": 'give an object: {"name": "value"}',
    "model_type": 'give an object: {"editor": "blend"}',
}
"""In place of what pydantic says in words of Python."""

_PLAIN_PATTERNS = {
    IDENTIFIER: "use letters, digits, dot, dash and underscore, at most 63, and a letter or digit first",
    EXTERNAL_ID: "it holds a control character: leave it out",
    TEXT: "it holds a control character: leave it out",
}


def _plain(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return _PLAIN_PATTERNS[context["pattern"]]
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        return f"give at {'least' if few else 'most'} {context['min_length' if few else 'max_length']}"
    return _PLAIN.get(kind) or error["msg"].removeprefix("Value error, ")


def _short(part: str | int) -> str:
    """A name may be somebody's whole prompt: of what is no field of ours, the beginning is enough."""
    text = str(part)
    return text if len(text) <= 50 else f"{text[:50]}..."


@dataclass
class _Pictures:
    """The pictures of one request as they will be stored, by blob id, and what the checks ask about them."""

    settings: Settings
    base: Location
    pictures: dict[str, bytes] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=list)
    mask_size: Size | None = None
    mask_is_empty: bool = False

    def read(self, picture: Location, name: str) -> Image.Image:
        where = beside(self.base, picture)
        data = read_location(where, field=name, max_bytes=self.settings.max_bytes)
        return decode(data, field=f"{name}: {where}", max_pixels=self.settings.max_pixels)

    def keep(self, image: Image.Image) -> str:
        png = encode(image)
        blob = hashlib.sha256(png).hexdigest()
        self.pictures[blob] = png
        return blob


def _request(submission: Submission, taken: _Pictures) -> RemovalRequest:
    images, surrogates = [], []
    wholes: list[Size] = []
    boxes: list[tuple[int, int, int, int]] = []
    for i, path in enumerate(submission.images):
        image = taken.read(path, f"images[{i}]")
        wholes.append(image.size)
        if submission.box:
            boxes.append(pixels(submission.box[i % len(submission.box)], image.size, f"images[{i}]"))
            image = image.crop(boxes[i])
        taken.sizes.append(image.size)
        images.append(taken.keep(image))
    for i, path in enumerate(submission.surrogates):
        image = taken.read(path, f"surrogates[{i}]")
        if boxes:
            image = cut_companion(image, f"surrogates[{i}]", whole=wholes[i], box=boxes[i])
        surrogates.append(taken.keep(image))
    edit = _edit(submission.edit, taken, wholes, boxes)
    return RemovalRequest(
        id=f"req-{secrets.token_hex(6)}",
        model=submission.model,
        images=tuple(images),
        prompt=submission.prompt,
        surrogates=tuple(surrogates),
        edit=edit,
        external_id=canonical(submission.external_id)
        if submission.external_id
        else _content(tuple(images), submission.prompt, tuple(surrogates), edit),
        reason=submission.reason,
        due=submission.due,
        priority=submission.priority,
    )


def _edit(
    edit: EditInput | None, taken: _Pictures, wholes: list[Size], boxes: list[tuple[int, int, int, int]]
) -> EditSpec | None:
    if edit is None or edit.mask is None:
        return None if edit is None else EditSpec(editor=edit.editor, options=edit.options)
    image = taken.read(edit.mask, "edit.mask")
    if len({*boxes}) == 1 and len({*wholes}) == 1:
        image = cut_companion(image, "edit.mask", whole=wholes[0], box=boxes[0])
    taken.mask_size = image.size
    taken.mask_is_empty = not (np.asarray(image).sum(2, dtype=np.uint16) > 3 * 127).any()
    return EditSpec(editor=edit.editor, mask=taken.keep(image), options=edit.options)


def _check_new(request: RemovalRequest, taken: _Pictures) -> None:
    """What would only come to light at night."""
    if request.due is not None and request.due < date.today():
        raise InputError(f"due: {request.due} is past", hint="give today or a later day, or leave it out")
    for i, (image, surrogate) in enumerate(zip(request.images, request.surrogates, strict=False)):
        if image == surrogate:
            raise InputError(
                f"surrogates[{i}] is the same picture as images[{i}]", hint="give the scene without what must go"
            )
    if taken.mask_size is None:
        return
    for i, size in enumerate(taken.sizes):
        if not same_shape(size, taken.mask_size):
            (width, height), (across, down) = taken.mask_size, size
            message = f"edit.mask: {width} x {height} pixels do not fit images[{i}], which has {across} x {down}"
            raise InputError(message, hint="give a mask of the image's size; images of other sizes need other requests")
    if taken.mask_is_empty:
        raise InputError("edit.mask: nothing is marked", hint="white is what may change")


def _content(images: tuple[str, ...], prompt: str | None, surrogates: tuple[str, ...], edit: EditSpec | None) -> str:
    """The external id of a request that brings none: the same content is the same request."""
    parts = [images, prompt, surrogates, None if edit is None else edit.model_dump()]
    return f"sha256-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"
