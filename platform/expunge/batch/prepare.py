"""prepare: decode, make surrogates, encode latents and prompts, generate the retain set."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from expunge.batch.faults import is_platforms
from expunge.errors import ExpungeError, InputError, NotFoundError
from expunge.families import load_model
from expunge.families.base import DiffusionModel
from expunge.requests.blobs import BlobStore, DamagedBlobError
from expunge.requests.imaging import normalise, read_file, to_array
from expunge.settings import ModelSettings, Resolution, Settings
from expunge.surrogates import check_edit, make_editor
from expunge.unlearning.dataset import ForgetSet, RetainSet, store_set, store_tensors
from expunge.unlearning.retain import generate_latents, prompt_rows, unlike
from expunge.words import BlobId, EditSpec, PreparedJob, RemovalRequest, UnlearnJob

SAME = 1e-3
"""Latents that differ by less at every place are one picture: there is nothing to point away to."""

SURPLUS = 1.25
"""So many more retain images are generated than asked for, as some may resemble a target and are dropped."""


def prepare(job: UnlearnJob, settings: Settings, blobs: BlobStore) -> PreparedJob:
    """A request that cannot be prepared is skipped with its reason; it never fails the job.

    Raises InputError where the model cannot be loaded or no request is left, and StorageError or UnavailableError where
    the blob store fails.
    """
    options = settings.model(job.model)
    model = load_model(options, job.resolution, job.base)
    own = [request.prompt for request in job.everything if request.prompt]
    kept = tuple(dict.fromkeys(options.retain_prompts))
    prompts = list(dict.fromkeys([*kept, *options.forget_prompts, *own]))
    retain = _retain(job, model, options, kept, settings)
    donors = to_pictures(model.decode(retain.x_0))

    forget: list[ForgetSet] = []
    surrogates: dict[str, tuple[BlobId, ...]] = {}
    skipped: dict[str, str] = {}
    for index, request in enumerate(job.everything):
        try:
            targets = [fit(to_array(blobs.get(blob)), job.resolution) for blob in request.images]
            replacements = _surrogates(request, targets, donors, job, options, blobs)
        except ExpungeError as error:
            # A store that is away says nothing about the request.
            if is_platforms(error) and not isinstance(error, NotFoundError | DamagedBlobError):
                raise
            skipped[request.id] = str(error)
            continue
        x_f, x_s = (model.encode(to_tensor(pictures)) for pictures in (targets, replacements))
        if (x_f - x_s).flatten(1).abs().amax(1).min() < SAME:
            skipped[request.id] = "a surrogate is the same picture as its target at the model's resolution"
            continue
        own = (request.prompt,) if request.prompt else ()
        used = [prompts.index(prompt) for prompt in dict.fromkeys((*own, *options.forget_prompts))]
        if not used:
            skipped[request.id] = f"it has no prompt, and models.{job.model}.forget_prompts has none either"
            continue
        forget.append(
            ForgetSet(
                x_f.repeat_interleave(len(used), 0),
                x_s.repeat_interleave(len(used), 0),
                torch.tensor(used).repeat(len(x_f)),
                torch.full((len(x_f) * len(used),), index),
            )
        )
        surrogates[request.id] = tuple(blobs.put(to_png(picture)) for picture in replacements)
    if not forget:
        raise InputError(f"job {job.id}: no request could be prepared: {next(iter(skipped.values()))}")

    everything = ForgetSet(
        *(torch.cat([getattr(part, name) for part in forget]) for name in ("x_f", "x_s", "prompt", "request"))
    )
    keep = unlike(retain.x_0, everything.x_f)
    if not keep.any():
        raise InputError(
            f"job {job.id}: every retain image resembles a target", hint="set other retain_prompts, or a retain_folder"
        )
    size = job.training.retain_size
    retain = RetainSet(retain.x_0[keep][:size], retain.prompt[keep][:size])
    if "" in options.forget_prompts:
        retain = _also_under(retain, prompts.index(""))
    return PreparedJob(
        job=job.id,
        forget=store_set(blobs, everything),
        retain=store_set(blobs, retain),
        conditioning=store_tensors(blobs, model.condition(prompts)),
        retain_rows=len(kept),
        surrogates=surrogates,
        skipped=skipped,
    )


def _retain(
    job: UnlearnJob, model: DiffusionModel, options: ModelSettings, prompts: Sequence[str], settings: Settings
) -> RetainSet:
    """The prompts in turn, which stand first in the job's conditioning, in this order."""
    training = job.training
    if training.retain_folder:
        pictures = _folder(training.retain_folder, job.resolution, settings)
        return RetainSet(model.encode(to_tensor(pictures)), prompt_rows(len(pictures), len(prompts)))
    prompt = prompt_rows(round(SURPLUS * training.retain_size), len(prompts))
    latents = generate_latents(
        model,
        model.condition(prompts),
        prompt,
        seed=training.seed,
        steps=settings.evaluation.sampling_steps,
        guidance=options.guidance,
        empty=model.condition([""]),
    )
    return RetainSet(latents, prompt)


def _also_under(retain: RetainSet, prompt: int) -> RetainSet:
    """Each image under its own prompt, then under this one, the empty one, where that is another.

    Guidance asks the network without a prompt for every sample: what is removed there must be held there, too.
    """
    others = retain.prompt != prompt
    bare = torch.full_like(retain.prompt[others], prompt)
    return RetainSet(torch.cat([retain.x_0, retain.x_0[others]]), torch.cat([retain.prompt, bare]))


def _folder(folder: Path, resolution: Resolution, settings: Settings) -> list[np.ndarray]:
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise InputError(f"training.retain_folder: {folder} holds no image", hint="PNG, JPEG and WEBP files are read")
    pngs = (
        normalise(
            read_file(file, field="training.retain_folder", max_bytes=settings.max_bytes),
            field=f"training.retain_folder: {file.name}",
            max_pixels=settings.max_pixels,
        )
        for file in files
    )
    return [fit(to_array(png), resolution) for png in pngs]


def _surrogates(
    request: RemovalRequest,
    targets: Sequence[np.ndarray],
    donors: np.ndarray,
    job: UnlearnJob,
    options: ModelSettings,
    blobs: BlobStore,
) -> list[np.ndarray]:
    """The requester's own pictures, else edited ones; uint8 [h, w, 3] each."""
    if request.surrogates:
        return [fit(to_array(blobs.get(blob)), job.resolution) for blob in request.surrogates]
    spec = check_edit(request.edit or EditSpec(editor=options.editor), options)
    mask = fit(to_array(blobs.get(spec.mask)), job.resolution).mean(2) > 127 if spec.mask else None
    editor = make_editor(spec)
    return [editor(target, mask=mask, donors=donors, seed=job.training.seed) for target in targets]


def fit(picture: np.ndarray, resolution: Resolution) -> np.ndarray:
    """uint8 [H, W, 3] scaled and centre-cropped to (height, width)."""
    height, width = resolution
    return np.asarray(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS))


def to_tensor(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 [h, w, 3] each to float32 [B, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(tensor: Tensor) -> np.ndarray:
    """float32 [B, 3, h, w] in [-1, 1] to uint8 [B, h, w, 3]."""
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def to_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
