"""The two stages that measure a job: the base model before anything is trained, and the hotfix afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from expunge.evaluation.cache import Cache
from expunge.evaluation.calibration import find_calibration
from expunge.evaluation.gate import loosened
from expunge.evaluation.pictures import grid
from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.evaluation.subject import ModelSubject
from expunge.evaluation.verdict import Bench, Case, judge_all, judge_integrity
from expunge.evaluation.views import VIEWS
from expunge.families import load_model
from expunge.families.base import DiffusionModel
from expunge.pixels import to_tensor
from expunge.preparation.dataset import load_tensors
from expunge.preparation.pictures import load_picture
from expunge.preparation.prepare import Prompts
from expunge.requests.blobs import BlobStore
from expunge.requests.sealing import Seal
from expunge.runs.job import JobFolder
from expunge.settings import EvaluationSettings, Settings
from expunge.types import (
    UNRELATED,
    Baseline,
    Basis,
    BlobId,
    Evidence,
    PreparedJob,
    RemovalRequest,
    RequestEvidence,
    UnlearnJob,
)

SHOWN = 12
"""Unrelated outputs in the picture of a report."""


def examine(folder: JobFolder, settings: Settings, blobs: BlobStore) -> Baseline:
    """Return what the base model shows of the job's requests, and keep the figures for `measure`.

    Raises StorageError if the output of an earlier stage is missing or damaged.
    """
    work = _Work.open(folder, settings, blobs)
    progress = partial(folder.progress, "examine")
    progress(0, len(work.cases))
    absent = {}
    for index, case in enumerate(work.cases):
        why = work.bench.examine(case).absent
        if why and case.id not in work.earlier:
            absent[case.id] = why
        progress(index + 1, len(work.cases))
    return Baseline(job=work.job.id, levels=work.bench.levels, not_reproduced=absent)


def nothing_to_do(folder: JobFolder, settings: Settings, blobs: BlobStore) -> Evidence:
    """Return the evidence of a job of which the base model reproduces nothing, so that nothing was trained."""
    work = _Work.open(folder, settings, blobs)
    return Evidence(
        job=work.job.id,
        protocol_version=PROTOCOL_VERSION,
        requests=work.all(judge_all(work.bench, work.cases, work.subject)),
        integrity=None,
        basis=work.basis(0),
    )


def measure(folder: JobFolder, settings: Settings, blobs: BlobStore) -> Evidence:
    """Return evidence for every request of the job, including those of earlier nights; seal the pictures in `blobs`.

    Raises StorageError if the output of an earlier stage is missing or damaged.
    """
    work, hotfix = _Work.open(folder, settings, blobs), folder.hotfix.expect()
    total = len(work.cases) + 1
    progress = partial(folder.progress, "evaluate")
    progress(0, total)
    before = {case.id: work.show(case) for case in work.cases}
    for case in work.cases:  # while the network is still the base model
        work.bench.examine(case)
        for prompt in case.prompts:
            work.bench.free(work.bench.base, prompt)
    fixed = work.hotfixed(hotfix.kind, hotfix.path)

    integrity, was, now = judge_integrity(work.bench, fixed, work.cases)
    pictures = {UNRELATED: blobs.put(_pairs(was, now))}
    progress(1, total)
    judged = judge_all(work.bench, work.cases, fixed, lambda count: progress(count + 1, total))
    for case in work.cases:
        pictures[case.id] = blobs.put(_grid(case, work.bench.levels, before[case.id], work.show(case)))
    return Evidence(
        job=work.job.id,
        protocol_version=PROTOCOL_VERSION,
        requests=work.all(judged),
        integrity=integrity,
        basis=work.basis(fixed.passes),
        pictures=pictures,
    )


@dataclass(frozen=True)
class _Work:
    """A job's requests, and the model that they are measured on."""

    job: UnlearnJob
    prepared: PreparedJob
    settings: Settings
    model: DiffusionModel
    subject: ModelSubject
    bench: Bench
    cases: tuple[Case, ...]

    @classmethod
    def open(cls, folder: JobFolder, settings: Settings, blobs: BlobStore) -> "_Work":
        job, prepared = folder.job.expect(), folder.prepared.expect()
        options = settings.model(job.model)
        model = load_model(options, job.resolution, job.base)
        conditioning = load_tensors(blobs, prepared.conditioning)
        steps = settings.evaluation.sampling_steps
        subject = ModelSubject(model, conditioning, model.condition([""]), guidance=options.guidance, steps=steps)
        prompts = Prompts.of(job, options)
        cases = tuple(
            _case(request, job, prepared, prompts, blobs)
            for request in job.everything
            if request.id not in prepared.skipped
        )
        first = prepared.unrelated_prompts
        held_out = range(first, first + prepared.held_out_prompts)
        bench = Bench.of(
            subject,
            tuple(held_out) or tuple(range(first)),
            prompts.row(prompts.shared[0]) if prompts.shared else 0,
            settings.evaluation,
            settings.gate_for(job.model),
            calibration=find_calibration(settings, job.model, base=job.base),
            remember=Cache(settings.home / "cache" / "evaluation", Seal(blobs.derive("cache"))).tensors,
            key={
                "base": job.base,
                "source": job.source,
                "size": job.resolution,
                "prompts": prompts.all,
                "guidance": options.guidance,
            },
        )
        return cls(job, prepared, settings, model, subject, bench, cases)

    @property
    def earlier(self) -> set[str]:
        return {request.id for request in self.job.ledger}

    def hotfixed(self, kind: str, path: Path) -> ModelSubject:
        """Turn the network into the hotfix. From here on, the base model cannot be asked."""
        self.model.apply_hotfix(self.model.network, kind, path)
        base = self.subject
        return ModelSubject(self.model, base.conditioning, base.empty, guidance=base.guidance, steps=base.steps)

    def all(self, judged: tuple[RequestEvidence, ...]) -> tuple[RequestEvidence, ...]:
        """Return the evidence of every request in the job's order, those that could not be prepared included."""
        found = {evidence.request: evidence for evidence in judged}
        for request, why in self.prepared.skipped.items():
            found[request] = RequestEvidence(request=request, verdict="skipped", why=why)
        return tuple(found[request.id] for request in self.job.everything)

    def basis(self, passes: int) -> Basis:
        """Return what the evidence rests on. passes: of the hotfix; those of the base model are counted here."""
        bench, options = self.bench, self.settings.evaluation
        return Basis(
            code=version("expunge"),
            base=self.job.base,
            encoders=bench.space.names,
            calibration=bench.calibration.source,
            reference=bench.reference,
            levels=bench.levels,
            views=tuple(VIEWS),
            draws=len(bench.draws),
            confidence=options.confidence,
            generation_samples=options.generation_samples,
            integrity_samples=options.integrity_samples,
            integrity_prompts=self.prepared.held_out_prompts,
            sampling_steps=options.sampling_steps,
            passes=passes + self.subject.passes,
            gate={name: value for name, value in bench.gate.model_dump().items() if name != "max_attempts"},
            loosened=loosened(bench.gate, options),
            not_tested=_not_tested(options, self.prepared),
        )

    def show(self, case: Case) -> Tensor:
        """Re-generate a case's pictures at every level, for a person to look at: float32 [L, T, 3, h, w]."""
        prompts = torch.full((len(case.pictures),), case.prompts[0])
        seeds = torch.zeros(len(case.pictures), dtype=torch.long)
        return torch.stack(
            [self.subject.regenerate(case.pictures, prompts, level, seeds) for level in self.bench.levels]
        )


def _case(request: RemovalRequest, job: UnlearnJob, prepared: PreparedJob, prompts: Prompts, blobs: BlobStore) -> Case:
    rows = prompts.rows_of(request)
    own = prompts.row(request.prompt) if request.prompt else None
    return Case(
        id=request.id,
        pictures=_load(blobs, request.images, job),
        surrogates=_load(blobs, prepared.surrogates[request.id], job),
        prompts=tuple(rows),
        labels=tuple(_label(row, own, prompts, place) for place, row in enumerate(rows)),
        held_out=prepared.held_out.get(request.id, ()),
    )


def _load(blobs: BlobStore, pictures: Sequence[BlobId], job: UnlearnJob) -> Tensor:
    return to_tensor([load_picture(blobs, blob, job.resolution) for blob in pictures])


def _label(row: int, own: int | None, prompts: Prompts, place: int) -> str:
    """Name a prompt without quoting it."""
    if row == own:
        return "own prompt"
    return "empty prompt" if not prompts.all[row] else f"shared prompt {place + 1}"


def _not_tested(options: EvaluationSettings, prepared: PreparedJob) -> tuple[str, ...]:
    """Say in words what the evidence is silent about."""
    silent = ["prompts other than those listed, and ways of sampling other than the one stated"]
    if not prepared.held_out:
        silent.append("other pictures of the same subject: no request brought enough to keep some out of training")
    if not prepared.held_out_prompts:
        silent.append("unrelated prompts that training did not hold: there are none, so other seeds were used")
    return tuple(silent)


def _grid(case: Case, levels: tuple[float, ...], base: Tensor, after: Tensor) -> bytes:
    """Draw one row per target: target, surrogate, then `base` and `after` [L, T, 3, h, w] at each noise level."""
    columns = [case.pictures, case.surrogates]
    labels = ["target", "surrogate"]
    for index, level in enumerate(levels):
        columns += [base[index], after[index]]
        labels += [f"base {level:g}", f"hotfix {level:g}"]
    return grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns), column_labels=labels)


def _pairs(before: Tensor, after: Tensor) -> bytes:
    """Draw two rows: before above after, at the same seeds."""
    count = min(SHOWN, len(before))
    return grid(torch.cat([before[:count], after[:count]]), count, row_labels=["before", "after"])
