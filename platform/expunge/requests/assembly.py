"""Reads and normalises the pictures that a submission names, and makes the request that goes with them."""

import hashlib
import json
import secrets
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from expunge.requests.box import Size, cut_companion, pixels
from expunge.requests.imaging import decode, encode
from expunge.requests.locations import Location, beside, read_location
from expunge.requests.submission import EditInput, Submission, canonical
from expunge.requests.uploads import Uploads
from expunge.settings import Settings
from expunge.types import EditSpec, RemovalRequest


@dataclass
class Pictures:
    """The pictures of one request as they will be stored, by blob id, and what the checks need to know about them."""

    settings: Settings
    base: Location | Uploads
    """Where the request's pictures are: beside this location, or in what was uploaded."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=list)
    mask_size: Size | None = None
    mask_is_empty: bool = False

    def read(self, picture: Location, name: str) -> Image.Image:
        if isinstance(self.base, Uploads):
            data = self.base.read(picture, field=name, max_bytes=self.settings.max_bytes)
            return decode(data, field=name, max_pixels=self.settings.max_pixels)
        where = beside(self.base, picture)
        data = read_location(where, field=name, max_bytes=self.settings.max_bytes)
        return decode(data, field=f"{name}: {where}", max_pixels=self.settings.max_pixels)

    def keep(self, image: Image.Image) -> str:
        png = encode(image)
        blob = hashlib.sha256(png).hexdigest()
        self.pictures[blob] = png
        return blob


def assemble(submission: Submission, taken: Pictures) -> RemovalRequest:
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
    edit: EditInput | None, taken: Pictures, wholes: list[Size], boxes: list[tuple[int, int, int, int]]
) -> EditSpec | None:
    if edit is None or edit.mask is None:
        return None if edit is None else EditSpec(editor=edit.editor, options=edit.options)
    image = taken.read(edit.mask, "edit.mask")
    if len({*boxes}) == 1 and len({*wholes}) == 1:
        image = cut_companion(image, "edit.mask", whole=wholes[0], box=boxes[0])
    taken.mask_size = image.size
    taken.mask_is_empty = not (np.asarray(image).sum(2, dtype=np.uint16) > 3 * 127).any()
    return EditSpec(editor=edit.editor, mask=taken.keep(image), options=edit.options)


def _content(images: tuple[str, ...], prompt: str | None, surrogates: tuple[str, ...], edit: EditSpec | None) -> str:
    """Makes an external id from the content, so that the same content is the same request."""
    parts = [images, prompt, surrogates, None if edit is None else edit.model_dump()]
    return f"sha256-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"
