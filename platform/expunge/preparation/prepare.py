"""The prepare stage: decode pictures, make surrogates, encode latents and prompts, generate the retain set."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from expunge.errors import ExpungeError, InputError, StorageError, UnavailableError
from expunge.families import load_model
from expunge.families.base import Conditioning, DiffusionModel
from expunge.generation.placement import device
from expunge.pixels import to_png, to_tensor
from expunge.preparation.dataset import ForgetSet, RetainSet, join, store_set, store_tensors
from expunge.preparation.pictures import load_folder, load_picture, load_surrogates
from expunge.preparation.retain import DONORS, encoded, generate_latents, pictures_of, prompt_rows, unlike
from expunge.preparation.views import views_of_pair
from expunge.requests.blobs import BlobStore, DamagedBlobError
from expunge.runs.job import JobFolder
from expunge.settings import ModelSettings, Settings
from expunge.surrogates import Judging, Painter, Studio
from expunge.types import BlobId, PreparedJob, RemovalRequest, UnlearnJob

SAME = 1e-3
"""Latents that differ by less everywhere are the same picture: a surrogate like that would change nothing."""

HELD_OUT_OF = 4
"""Of every four retain prompts, one is kept out of training, so that the evaluation has some of its own."""

SURPLUS = 1.25
"""Ratio of generated to required retain images, because those that resemble a target are dropped."""


MakeJudging = Callable[[UnlearnJob, np.ndarray], Judging]
"""Makes what judges the surrogates of a job, from pictures that the base model generated, uint8 [B, h, w, 3]."""


def prepare(folder: JobFolder, settings: Settings, blobs: BlobStore, judging: MakeJudging | None = None) -> PreparedJob:
    """Make what training and evaluation read, and store it in `blobs`.

    judging: rejects surrogates that are still the target or not plausible; None takes whatever the editor makes.

    A request that cannot be prepared is skipped with its reason; it never fails the job. Raises InputError if the model
    cannot be loaded or no request is left, and StorageError or UnavailableError if the blob store fails.
    """
    job = folder.job.expect()
    options = settings.model(job.model)
    model = load_model(options, job.resolution, job.base, device=device())
    prompts = Prompts.of(job, options)
    # One kind of network after the other, so that the largest alone decides how much memory this takes.
    rows = model.condition([*prompts.all, ""])
    conditioning = {name: table[:-1] for name, table in rows.items()}
    empty = {name: table[-1:] for name, table in rows.items()}
    generated = _generate_retain(job, model, options, len(prompts.unrelated), conditioning, empty, settings)
    model.release()
    donors = pictures_of(model, generated.x_0[:DONORS])
    general = prompts.unrelated[0]
    painter = Painter(
        model,
        general,
        options.guidance,
        settings.evaluation.sampling_steps,
        {"": empty, general: {name: table[:1] for name, table in conditioning.items()}},
    )
    studio = Studio(donors, painter, judging(job, donors) if judging else None)
    pairs = _Pairing(job, model, options, prompts, studio, settings.evaluation.held_out, blobs).all()
    forget = join(pairs.forget)
    retain = _keep_apart(generated, forget, job)
    if "" in options.forget_prompts:
        retain = _also_under(retain, prompts.row(""))
    return PreparedJob(
        job=job.id,
        forget=store_set(blobs, forget),
        retain=store_set(blobs, retain),
        conditioning=store_tensors(blobs, conditioning),
        empty=store_tensors(blobs, empty),
        unrelated_prompts=len(prompts.unrelated),
        held_out_prompts=len(prompts.held_out),
        held_out=pairs.held_out,
        surrogates=pairs.surrogates,
        skipped=pairs.skipped,
    )


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a job; a prompt's index in `all` is its row of the conditioning."""

    unrelated: tuple[str, ...]
    """The first prompts of `all`, for which retain images are generated."""
    held_out: tuple[str, ...]
    """The prompts after those: unrelated, too, but only the evaluation uses them."""
    all: tuple[str, ...]
    shared: tuple[str, ...]
    """The prompts that every request is removed under, besides its own."""

    @classmethod
    def of(cls, job: UnlearnJob, options: ModelSettings, *, hold_out: bool = True) -> "Prompts":
        """hold_out: keep some unrelated prompts out of training; earlier releases did not."""
        own = [request.prompt for request in job.everything if request.prompt]
        given = tuple(dict.fromkeys(options.retain_prompts))
        kept = len(given) - (len(given) // HELD_OUT_OF if hold_out else 0)
        forgotten = {*own, *options.forget_prompts}
        unrelated, rest = given[:kept], (*given[kept:], *options.evaluation_prompts) if hold_out else ()
        held_out = tuple(p for p in dict.fromkeys(rest) if p not in forgotten and p not in unrelated)
        everything = tuple(dict.fromkeys([*unrelated, *held_out, *options.forget_prompts, *own]))
        return cls(unrelated, held_out, everything, options.forget_prompts)

    def row(self, prompt: str) -> int:
        return self.all.index(prompt)

    def rows_of(self, request: RemovalRequest) -> list[int]:
        """Return the rows of the prompts that a request is removed under, its own first."""
        own = (request.prompt,) if request.prompt else ()
        return [self.row(prompt) for prompt in dict.fromkeys((*own, *self.shared))]


@dataclass(frozen=True)
class _Pairs:
    """Targets with their surrogates, and the reason for each request that was skipped."""

    forget: list[ForgetSet] = field(default_factory=list)
    held_out: dict[str, tuple[int, ...]] = field(default_factory=dict)
    surrogates: dict[str, tuple[BlobId, ...]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pairing:
    """Pairs the targets of a job's requests with surrogates."""

    job: UnlearnJob
    model: DiffusionModel
    options: ModelSettings
    prompts: Prompts
    studio: Studio
    held_out: float
    """Share of a request's pictures that training does not see."""
    blobs: BlobStore

    def all(self) -> _Pairs:
        """Prepare the requests one by one. Raises InputError if none can be prepared."""
        pairs = _Pairs()
        for index, request in enumerate(self.job.everything):
            held_out = held_out_pictures(request, self.job.batch, self.held_out)
            try:
                rows, replacements = self._one(index, request, held_out)
            except ExpungeError as error:
                # A store that cannot be reached is not the request's fault.
                if isinstance(error, StorageError | UnavailableError) and not isinstance(error, DamagedBlobError):
                    raise
                pairs.skipped[request.id] = str(error)
                continue
            pairs.forget.append(rows)
            if held_out:
                pairs.held_out[request.id] = held_out
            pairs.surrogates[request.id] = tuple(self.blobs.put(to_png(picture)) for picture in replacements)
        if not pairs.forget:
            why = next(iter(pairs.skipped.values()))
            raise InputError(f"job {self.job.id}: no request could be prepared: {why}")
        return pairs

    def _one(
        self, index: int, request: RemovalRequest, held_out: tuple[int, ...]
    ) -> tuple[ForgetSet, list[np.ndarray]]:
        """Return a request's rows, each view of a target once per prompt, and the surrogates of all its pictures."""
        size, seed = self.job.resolution, self.job.training.seed
        targets = [load_picture(self.blobs, blob, size) for blob in request.images]
        replacements = load_surrogates(
            request, targets, self.studio, resolution=size, seed=seed, options=self.options, blobs=self.blobs
        )
        seen = [i for i in range(len(targets)) if i not in held_out]
        originals, edited = (to_tensor([made[i] for i in seen]) for made in (targets, replacements))
        views = [views_of_pair(*pair, self.job.training.views, seed) for pair in zip(originals, edited, strict=True)]
        x_f, x_s = (torch.cat([self.model.encode(one) for one in side]) for side in zip(*views, strict=True))
        if (x_f - x_s).flatten(1).abs().amax(1).min() < SAME:
            raise InputError("a surrogate is the same picture as its target at the model's resolution")
        used = self.prompts.rows_of(request)
        if not used:
            raise InputError(f"it has no prompt, and models.{self.job.model}.forget_prompts is empty")
        rows = ForgetSet(
            x_f.repeat_interleave(len(used), 0),
            x_s.repeat_interleave(len(used), 0),
            torch.tensor(used).repeat(len(x_f)),
            torch.full((len(x_f) * len(used),), index),
        )
        return rows, replacements


def held_out_pictures(request: RemovalRequest, batch: str, share: float) -> tuple[int, ...]:
    """Return which of a request's pictures training does not see this night, so that they can test it.

    A request with fewer than four pictures needs them all. Others take turns, by night.
    """
    count = len(request.images)
    if count < 4 or share == 0:
        return ()
    first = turn(f"{batch} {request.id}") % count
    return tuple(sorted((first + i) % count for i in range(max(1, round(share * count)))))


def turn(night: str) -> int:
    """Return a number that is always the same for one night and differs from night to night."""
    return int.from_bytes(hashlib.sha256(night.encode()).digest()[:4])


def _generate_retain(
    job: UnlearnJob,
    model: DiffusionModel,
    options: ModelSettings,
    prompts: int,
    conditioning: Conditioning,
    empty: Conditioning,
    settings: Settings,
) -> RetainSet:
    """Generate or load the retain images, cycling through the conditioning's first `prompts` rows."""
    training = job.training
    if training.retain_folder:
        limits = {"max_bytes": settings.max_bytes, "max_pixels": settings.max_pixels}
        pictures = load_folder(training.retain_folder, job.resolution, field="training.retain_folder", **limits)
        return RetainSet(encoded(model, pictures), prompt_rows(len(pictures), prompts))
    prompt = prompt_rows(round(SURPLUS * training.retain_size), prompts)
    latents = generate_latents(
        model,
        conditioning,
        prompt,
        seed=training.seed,
        steps=settings.evaluation.sampling_steps,
        guidance=options.guidance,
        empty=empty,
    )
    return RetainSet(latents, prompt)


def _keep_apart(retain: RetainSet, forget: ForgetSet, job: UnlearnJob) -> RetainSet:
    """Drop images that resemble a target, then the surplus. Raises InputError if none is left."""
    keep = unlike(retain.x_0, forget.x_f)
    if not keep.any():
        raise InputError(
            f"job {job.id}: every retain image resembles a target", hint="set other retain_prompts, or a retain_folder"
        )
    size = job.training.retain_size
    return RetainSet(retain.x_0[keep][:size], retain.prompt[keep][:size])


def _also_under(retain: RetainSet, prompt: int) -> RetainSet:
    """Repeat every image under the empty prompt, whose row is `prompt`, unless that is its own prompt already.

    Guidance uses the empty prompt for every sample: if targets are removed there, other images must be kept there.
    """
    others = retain.prompt != prompt
    bare = torch.full_like(retain.prompt[others], prompt)
    return RetainSet(torch.cat([retain.x_0, retain.x_0[others]]), torch.cat([retain.prompt, bare]))
