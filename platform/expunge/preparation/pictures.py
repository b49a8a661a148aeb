"""The pictures of a job at its model's resolution: targets, surrogates, and the owner's retain folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from expunge.errors import InputError
from expunge.requests.blobs import BlobStore
from expunge.requests.imaging import normalise, read_file, to_array
from expunge.settings import ModelSettings, Resolution
from expunge.surrogates import Studio, check_edit, make_editor
from expunge.types import BlobId, EditSpec, RemovalRequest


def load_picture(blobs: BlobStore, blob: BlobId, resolution: Resolution) -> np.ndarray:
    """Return a stored picture as uint8 [h, w, 3]. Raises NotFoundError, StorageError."""
    return _fit(to_array(blobs.get(blob)), resolution)


def load_surrogates(
    request: RemovalRequest,
    targets: Sequence[np.ndarray],
    studio: Studio,
    *,
    resolution: Resolution,
    seed: int,
    options: ModelSettings,
    blobs: BlobStore,
) -> list[np.ndarray]:
    """Return the requester's own surrogates or, without any, edited targets; uint8 [h, w, 3] each.

    Raises InputError if the edit is not allowed, or leads to no surrogate.
    """
    if request.surrogates:
        return [load_picture(blobs, blob, resolution) for blob in request.surrogates]
    spec = check_edit(request.edit or EditSpec(editor=options.editor), options)
    mask = load_picture(blobs, spec.mask, resolution).mean(2) > 127 if spec.mask else None
    return studio.make(make_editor(spec), targets, mask=mask, seed=seed)


def load_folder(
    folder: Path, resolution: Resolution, *, field: str, max_bytes: int, max_pixels: int
) -> list[np.ndarray]:
    """Return the pictures in `folder` by name, uint8 [h, w, 3] each. Raises InputError if one is unusable.

    field: the setting that names the folder, for messages.
    """
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise InputError(f"{field}: {folder} holds no image", hint="PNG, JPEG and WEBP files are read")
    pngs = (
        normalise(
            read_file(file, field=field, max_bytes=max_bytes), field=f"{field}: {file.name}", max_pixels=max_pixels
        )
        for file in files
    )
    return [_fit(to_array(png), resolution) for png in pngs]


def _fit(picture: np.ndarray, resolution: Resolution) -> np.ndarray:
    """Scale and centre-crop uint8 [H, W, 3] to (height, width)."""
    height, width = resolution
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS))
