"""Measure a hotfix against its base model: what is gone, what stayed, and how much of either is noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expunge.evaluation.encoders import Encoder, load_encoder
from expunge.evaluation.gate import judge_integrity, judge_request
from expunge.evaluation.metrics import centred_cosine, kid, psnr, shift, ssim
from expunge.evaluation.pictures import grid
from expunge.families import load_model
from expunge.families.base import Conditioning, DiffusionModel, rows
from expunge.families.sampler import denoise
from expunge.preparation.dataset import ForgetSet, load_set, load_tensors
from expunge.preparation.retain import generate_latents, prompt_rows, unlike
from expunge.requests.blobs import BlobStore
from expunge.runs.job import JobFolder
from expunge.settings import EvaluationSettings, GateSettings, ModelSettings
from expunge.types import (
    UNRELATED,
    Evidence,
    IntegrityEvidence,
    Measured,
    RequestEvidence,
)

# Different from the training seeds, so that the evaluation uses no sample that training has seen.
SEED_AFTER, SEED_FLOOR = 7_001, 7_002
FLOOR_SPLITS = 8

Judge = Callable[..., tuple[bool, str]]


@dataclass(frozen=True)
class _Bench:
    """Holds the two models and what every measurement of them needs."""

    base: DiffusionModel
    fixed: DiffusionModel
    encoder: Encoder
    conditioning: Conditioning
    empty: Conditioning
    options: EvaluationSettings
    guidance: float
    centre: Tensor
    """[D]: mean feature of the base model's unrelated samples."""

    def features(self, latents: Tensor) -> Tensor:
        return self.encoder(self.base.decode(latents))

    def generate(self, model: DiffusionModel, prompt: Tensor, seed: int) -> Tensor:
        return generate_latents(
            model,
            self.conditioning,
            prompt,
            seed=seed,
            steps=self.options.sampling_steps,
            guidance=self.guidance,
            empty=self.empty,
        )

    def regenerate(self, model: DiffusionModel, x_f: Tensor, prompt: Tensor, level: float) -> Tensor:
        """Noise x_f [R, C, H, W] up to `level` and denoise it again; return [S, R, C, H, W] for S fixed seeds."""
        seeds, count = self.options.seeds, len(x_f)
        noise = torch.randn(seeds, *x_f.shape, generator=torch.Generator().manual_seed(SEED_AFTER)).flatten(0, 1)
        point = model.at(model.time_at(torch.tensor([level])))
        x_t = point.a.view(-1, 1, 1, 1) * x_f.repeat(seeds, 1, 1, 1) + point.b.view(-1, 1, 1, 1) * noise
        cond = rows(self.conditioning, prompt.repeat(seeds))
        blank = rows(self.empty, torch.zeros(len(x_t), dtype=torch.long))
        steps = max(2, round(level * self.options.sampling_steps))
        return denoise(model, x_t, level, cond, steps=steps, guidance=self.guidance, empty=blank).unflatten(
            0, (seeds, count)
        )


def measure(
    folder: JobFolder, blobs: BlobStore, *, model: ModelSettings, options: EvaluationSettings, gate: GateSettings
) -> Evidence:
    """Return evidence for every request of the job, including those of earlier nights; seal the pictures in `blobs`.

    Raises StorageError if the output of an earlier stage is missing or damaged.
    """
    job, prepared, hotfix = folder.job.expect(), folder.prepared.expect(), folder.hotfix.expect()
    progress = partial(folder.progress, "evaluate")
    forget, conditioning = load_set(blobs, prepared.forget, ForgetSet), load_tensors(blobs, prepared.conditioning)
    base, fixed = (load_model(model, job.resolution, job.base) for _ in range(2))
    fixed.apply_hotfix(fixed.network, hotfix.kind, hotfix.path)
    encoder = load_encoder(options.encoder)
    total = len(job.everything) + 1
    progress(0, total)

    bench = _Bench(base, fixed, encoder, conditioning, base.condition([""]), options, model.guidance, torch.zeros(1))
    prompt = prompt_rows(options.integrity_samples, prepared.unrelated_prompts)
    before, other, after = (
        bench.generate(base, prompt, SEED_AFTER),
        bench.generate(base, prompt, SEED_FLOOR),
        bench.generate(fixed, prompt, SEED_AFTER),
    )
    keep = unlike(before, forget.x_f)
    bench = _Bench(
        base, fixed, encoder, conditioning, bench.empty, options, model.guidance, bench.features(before).mean(0)
    )
    integrity = _integrity(bench, before[keep], other, after[keep], partial(judge_integrity, gate=gate))
    pictures = {UNRELATED: blobs.put(_pairs(base.decode(before[keep]), base.decode(after[keep])))}
    progress(1, total)

    free = _FreeGeneration(bench)
    evidence = []
    for index, request in enumerate(job.everything):
        if request.id in prepared.skipped:
            evidence.append(RequestEvidence(request=request.id, verdict="skipped", why=prepared.skipped[request.id]))
            continue
        mine = _rows_of(forget, index)
        measured = _forgetting(bench, mine, free)
        verdict, why = judge_request(measured.shift, measured.target, measured.surrogate, measured.nearest, gate)
        evidence.append(
            RequestEvidence(
                request=request.id,
                verdict=verdict,
                why=why,
                shift=measured.shift,
                target=measured.target,
                surrogate=measured.surrogate,
                nearest=measured.nearest,
                levels=measured.levels,
            )
        )
        pictures[request.id] = blobs.put(measured.picture)
        progress(index + 2, total)
    return Evidence(job=job.id, requests=tuple(evidence), integrity=integrity, pictures=pictures)


@dataclass(frozen=True)
class _Forgetting:
    shift: Measured
    target: Measured
    surrogate: Measured
    nearest: Measured
    levels: dict[str, Measured]
    picture: bytes


class _FreeGeneration:
    """Computes the features of each model's samples for a prompt, once for all requests that share the prompt."""

    def __init__(self, bench: _Bench) -> None:
        self._bench = bench
        self._cache: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [n, D] of the hotfix, the base model at the same seeds, and the base model at other seeds.

        prompts: the prompt of each of one request's rows, its own prompt first. Every prompt gets the same number of
        samples; n is `generation_samples` or slightly more.
        """
        each = list(dict.fromkeys(reversed(prompts.tolist())))  # those that all requests share come first
        count = math.ceil(self._bench.options.generation_samples / len(each))
        runs = (self._samples(prompt, place, count) for place, prompt in enumerate(each))
        after, before, other = zip(*runs, strict=True)
        return torch.cat(after), torch.cat(before), torch.cat(other)

    def _samples(self, prompt: int, place: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        key = (prompt, place, count)
        if key not in self._cache:
            bench, same = self._bench, torch.full((count,), prompt)
            # Each prompt of a request has its own noise; otherwise a model without prompts would repeat its samples.
            # The seed does not depend on `prompt`: a request gets the same noise whatever else is in its job.
            seeds = [seed + 10 * place for seed in (SEED_AFTER, SEED_AFTER, SEED_FLOOR)]
            runs = zip((bench.fixed, bench.base, bench.base), seeds, strict=True)
            after, before, other = (bench.features(bench.generate(model, same, seed)) for model, seed in runs)
            self._cache[key] = (after, before, other)
        return self._cache[key]


def _forgetting(bench: _Bench, data: ForgetSet, free: _FreeGeneration) -> _Forgetting:
    z_f, z_s = bench.features(data.x_f), bench.features(data.x_s)

    def scores(model: DiffusionModel) -> tuple[Tensor, Tensor]:
        """Return [L, S, 3] (shift, similarity to target, to surrogate, per level and seed) and latents [L, R, ...]."""
        figures, shown = [], []
        for level in bench.options.levels:
            latents = bench.regenerate(model, data.x_f, data.prompt, level)
            z = bench.features(latents.flatten(0, 1))
            again = [v.repeat(len(latents), 1) for v in (z_f, z_s)]
            triple = [shift(z, *again), *(centred_cosine(z, v, bench.centre) for v in again)]
            figures.append(torch.stack(triple, dim=1).unflatten(0, latents.shape[:2]).mean(1))
            shown.append(latents[0])
        return torch.stack(figures), torch.stack(shown)

    after, after_latents = scores(bench.fixed)
    base, base_latents = scores(bench.base)
    floor = base.mean(0).std(0, correction=0)  # deviation between seeds of the mean over levels
    shift_, target, surrogate = (
        Measured(after=after[..., i].mean().item(), base=base[..., i].mean().item(), floor=floor[i].item())
        for i in range(3)
    )
    levels = {
        f"{level:g}": Measured(
            after=after[i, :, 1].mean().item(),
            base=base[i, :, 1].mean().item(),
            floor=base[i, :, 1].std(correction=0).item(),
        )
        for i, level in enumerate(bench.options.levels)
    }
    picture = _request_picture(bench, data, base_latents, after_latents)
    return _Forgetting(shift_, target, surrogate, _nearest(bench, data, z_f, free), levels, picture)


def _nearest(bench: _Bench, data: ForgetSet, z_f: Tensor, free: _FreeGeneration) -> Measured:
    def highest(features: Tensor) -> float:
        return max(centred_cosine(features, z, bench.centre).max().item() for z in z_f)

    after, before, other = map(highest, free(data.prompt))
    return Measured(after=after, base=before, floor=abs(before - other))


def _integrity(bench: _Bench, before: Tensor, other: Tensor, after: Tensor, judge: Judge) -> IntegrityEvidence:
    """Compare latents `before` and `after` [n, ...] of the same seeds; `other` [m, ...] is the base at other seeds."""
    a, b, c = (bench.base.decode(latents) for latents in (before, after, other))
    pairs, unrelated = min(len(a), len(c)), c.roll(1, 0)
    z_a, z_b, z_c = (bench.encoder(pictures) for pictures in (a, b, c))
    figures = {
        "psnr": psnr(a, b).mean().item(),
        "psnr_unrelated": psnr(a[:pairs], unrelated[:pairs]).mean().item(),
        "ssim": ssim(a, b).mean().item(),
        "ssim_unrelated": ssim(a[:pairs], unrelated[:pairs]).mean().item(),
        "kid": kid(z_b, z_c),
        "kid_floor": _kid_floor(torch.cat([z_a, z_c])),
    }
    passed, why = judge(**figures)
    return IntegrityEvidence(**figures, passed=passed, why=why)


def _kid_floor(features: Tensor) -> float:
    """Return the largest |distance| between random halves of the base's samples: one split may be near 0 by luck."""
    half = len(features) // 2
    splits = (torch.randperm(len(features), generator=torch.Generator().manual_seed(i)) for i in range(FLOOR_SPLITS))
    return max(abs(kid(features[order[:half]], features[order[half:]])) for order in splits)


def _rows_of(forget: ForgetSet, request: int) -> ForgetSet:
    mine = forget.request == request
    return ForgetSet(forget.x_f[mine], forget.x_s[mine], forget.prompt[mine], forget.request[mine])


def _request_picture(bench: _Bench, data: ForgetSet, base: Tensor, after: Tensor) -> bytes:
    """Draw one row per target: target, surrogate, then `base` and `after` [L, R, C, H, W] at each noise level."""
    columns = [data.x_f, data.x_s]
    for level in range(len(base)):
        columns += [base[level], after[level]]
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    labels = ["target", "surrogate"]
    for level in bench.options.levels:
        labels += [f"base {level:g}", f"hotfix {level:g}"]
    return grid(bench.base.decode(cells), len(columns), column_labels=labels)


def _pairs(before: Tensor, after: Tensor, shown: int = 12) -> bytes:
    """Draw two rows: before above after, at the same seeds."""
    count = min(shown, len(before))
    return grid(torch.cat([before[:count], after[:count]]), count, row_labels=["before", "after"])
