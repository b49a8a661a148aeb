"""The two stages that measure a job: the base model before anything is trained, and the hotfix afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from expunge.errors import InputError
from expunge.evaluation.cache import Cache
from expunge.evaluation.calibration import find_calibration
from expunge.evaluation.gate import loosened, verdict_of
from expunge.evaluation.pictures import grid, rows_that_fit
from expunge.evaluation.robustness import Known, Lab, Memory, not_tested, robustness_rule
from expunge.evaluation.robustness import examine as attack
from expunge.evaluation.rotation import detection_time
from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.evaluation.subject import ModelSubject
from expunge.evaluation.verdict import Bench, Case, judge_all, judge_integrity, worst_bounds
from expunge.evaluation.views import VIEWS, all_views
from expunge.evaluation.weights import State, state_of
from expunge.families import load_model, source_digest
from expunge.families.family import Family
from expunge.families.switch import Switch
from expunge.generation.placement import device
from expunge.pixels import to_tensor
from expunge.preparation.dataset import RetainSet, load_set, load_tensors
from expunge.preparation.pictures import load_picture
from expunge.preparation.prepare import Prompts, turn
from expunge.requests.blobs import BlobStore
from expunge.runs.job import JobFolder
from expunge.settings import EvaluationSettings, GateSettings, Settings
from expunge.text import counted
from expunge.types import (
    UNRELATED,
    Baseline,
    Basis,
    BlobId,
    Evidence,
    PreparedJob,
    RemovalRequest,
    RequestEvidence,
    Robustness,
    UnlearnJob,
)

CONTROLS = 3
"""Pictures that the model never knew, to compare attacks with."""
SHOWN = 12
"""Unrelated outputs in the picture of a report."""


def examine(folder: JobFolder, settings: Settings, blobs: BlobStore) -> Baseline:
    """Return what the base model shows of the job's requests, and keep the figures for `measure`.

    Raises StorageError if the output of an earlier stage is missing or damaged.
    """
    work = _Work.open(folder, settings, blobs)
    progress = partial(folder.progress, "examine")
    progress(0, len(work.cases))
    absent: dict[str, str] = {}
    for index, case in enumerate(work.cases):
        why = work.bench.examine(case).absent
        if why and case.id not in work.earlier:
            absent[case.id] = why
        progress(index + 1, len(work.cases))
    return Baseline(job=work.job.id, levels=work.bench.levels, not_reproduced=absent, passes=work.subject.passes)


def nothing_to_do(folder: JobFolder, settings: Settings, blobs: BlobStore) -> Evidence:
    """Return the evidence of a job of which the base model reproduces nothing, so that nothing was trained."""
    work = _Work.open(folder, settings, blobs)
    new = [case for case in work.cases if case.id not in work.earlier]
    return Evidence(
        job=work.job.id,
        protocol_version=PROTOCOL_VERSION,
        requests=work.all(judge_all(work.bench, new, work.subject)),
        integrity=None,
        unverified=tuple(request.id for request in work.job.ledger),
        basis=work.basis(0, len(work.job.ledger)),
    )


def measure(folder: JobFolder, settings: Settings, blobs: BlobStore) -> Evidence:
    """Return evidence for the job's requests; seal the pictures in `blobs`.

    Earlier removals are verified in turn; if one of them has come back, all are. Raises StorageError if the output of
    an earlier stage is missing or damaged.
    """
    work, hotfix = _Work.open(folder, settings, blobs), folder.hotfix.expect()
    due = [case for case in work.cases if work.job.is_due(case.id)]
    others = [case for case in work.cases if case not in due]
    total = len(due) + 1
    progress = partial(folder.progress, "evaluate")
    progress(0, total)
    before = {case.id: work.show(case, work.subject) for case in due}
    for case in work.cases:  # while the network is still the base model
        work.bench.examine(case)
        for prompt in case.prompts:
            work.bench.free(work.bench.base, prompt)
    full = settings.evaluation.robustness == "full"
    base = state_of(work.model.network) if full else {}
    switch = Switch(work.model, hotfix.kind, hotfix.path)
    fixed = work.hotfixed(switch)

    integrity, was, now = judge_integrity(work.bench, fixed, work.cases)
    pictures = {UNRELATED: blobs.put(_pairs(was, now))}
    progress(1, total)
    judged = judge_all(work.bench, due, fixed, lambda count: progress(count + 1, total))
    if any(evidence.verdict == "failed" and evidence.request in work.earlier for evidence in judged):
        due, others = [*due, *others], []
        judged = judge_all(work.bench, due, fixed)
    robustness = _attacked(work, blobs, due, judged, fixed, base, switch)
    for case in (case for case in due if case.id in before):
        pictures[case.id] = blobs.put(_grid(case, work.bench.levels, before[case.id], work.show(case, fixed)))
    return Evidence(
        job=work.job.id,
        protocol_version=PROTOCOL_VERSION,
        requests=work.all(_with_robustness(judged, robustness, work.bench.gate)),
        integrity=integrity,
        robustness=robustness,
        unverified=tuple(case.id for case in others),
        basis=work.basis(fixed.passes + _passes_before(folder), len(others)),
        pictures=pictures,
    )


def _passes_before(folder: JobFolder) -> int:
    """Return what `examine` took; nothing where an earlier release trained the job without it."""
    baseline = folder.baseline.read()
    return baseline.passes if baseline else 0


def _attacked(
    work: "_Work",
    blobs: BlobStore,
    cases: Sequence[Case],
    judged: Sequence[RequestEvidence],
    fixed: ModelSubject,
    base: State,
    switch: Switch,
) -> tuple[Robustness, ...]:
    """Attack the hotfix, as far as the settings ask for it and a request has passed. base: its weights, if `full`."""
    amount, bench = work.settings.evaluation.robustness, work.bench
    judge = worst_bounds(bench, cases, judged)
    passed = [case for case, evidence in zip(cases, judged, strict=True) if evidence.verdict == "passed"]
    if amount == "off" or not passed:
        return ()
    switch.settle()
    lab = Lab(
        subject=fixed,
        judge=judge,
        before=judge(fixed),
        max_excess=bench.gate.max_excess,
        unrelated=load_set(blobs, work.prepared.retain, RetainSet),
        learning_rate=work.job.training.rate("full"),
    )
    if amount == "small":
        return attack(lab, amount)
    known = [Known(case.id, case.pictures[0], _similar(case), case.prompts[0]) for case in passed]
    controls = [Known("", one, all_views(one)[1:], work.plain) for one in bench.strangers[:CONTROLS]]
    return attack(lab, amount, Memory(base, bench.space, bench.levels, known, controls))


def _similar(case: Case) -> Tensor:
    """Return what somebody who wants the target back may have: views of pictures that training did not see, if any."""
    pictures = case.pictures[list(case.held_out)] if case.held_out else case.pictures[:1]
    return torch.cat([all_views(picture)[1:] for picture in pictures])


def _with_robustness(
    judged: Sequence[RequestEvidence], results: Sequence[Robustness], gate: GateSettings
) -> tuple[RequestEvidence, ...]:
    """Add the rule about the attacks that decide, and conclude anew."""
    concluded = []
    for evidence in judged:
        added = robustness_rule(results, evidence.request, gate.max_excess)
        if added is not None:
            rules = (*evidence.rules, added)
            verdict, why = verdict_of(rules)
            evidence = evidence.model_copy(update={"rules": rules, "verdict": verdict, "why": why})
        concluded.append(evidence)
    return tuple(concluded)


@dataclass(frozen=True)
class _Work:
    """A job's requests, and the model that they are measured on."""

    job: UnlearnJob
    prepared: PreparedJob
    settings: Settings
    model: Family
    subject: ModelSubject
    bench: Bench
    cases: tuple[Case, ...]
    plain: int
    """The row of the most general prompt."""

    @classmethod
    def open(cls, folder: JobFolder, settings: Settings, blobs: BlobStore) -> "_Work":
        job, prepared = folder.job.expect(), folder.prepared.expect()
        options = settings.model(job.model)
        model = load_model(options, job.resolution, job.base, device=device())
        conditioning = load_tensors(blobs, prepared.conditioning)
        empty = load_tensors(blobs, prepared.empty) if prepared.empty else model.condition([""])
        steps = settings.evaluation.sampling_steps
        subject = ModelSubject(model, conditioning, empty, guidance=options.guidance, steps=steps)
        prompts = Prompts.of(job, options, hold_out=prepared.held_out_prompts > 0)
        counts = (len(prompts.unrelated), len(prompts.held_out), *map(len, conditioning.values()))
        if counts != (prepared.unrelated_prompts, prepared.held_out_prompts, *[len(prompts.all)] * len(conditioning)):
            raise InputError(
                f"job {job.id}: the prompts of model {job.model} have changed since the night was prepared",
                hint="set them as they were, or run the requests in a new night",
            )
        cases = tuple(
            _case(request, job, prepared, prompts, blobs)
            for request in job.everything
            if request.id not in prepared.skipped
        )
        first = prepared.unrelated_prompts
        held_out = range(first, first + prepared.held_out_prompts)
        plain = prompts.row(prompts.shared[0]) if prompts.shared else 0
        bench = Bench.of(
            subject,
            tuple(held_out) or tuple(range(first)),
            plain,
            settings.evaluation,
            settings.gate_for(job.model),
            calibration=find_calibration(settings, job.model, base=job.base),
            remember=Cache(settings.home / "cache" / "evaluation", blobs.derive("cache")).tensors,
            key={
                "base": job.base or source_digest(options),
                "prompt_tokens": options.prompt_tokens,
                "source": job.source,
                "size": job.resolution,
                "guidance": options.guidance,
            },
            prompts=prompts.all,
        )
        return cls(job, prepared, settings, model, subject, bench, cases, plain)

    @property
    def earlier(self) -> set[str]:
        return {request.id for request in self.job.ledger}

    def hotfixed(self, switch: Switch) -> ModelSubject:
        """Return the hotfix. It shares its network with the base model: each becomes itself before it is asked."""
        base = self.subject
        base.ready = partial(switch.become, "base")
        return ModelSubject(
            self.model,
            base.conditioning,
            base.empty,
            guidance=base.guidance,
            steps=base.steps,
            ready=partial(switch.become, "hotfix"),
        )

    def all(self, judged: Sequence[RequestEvidence]) -> tuple[RequestEvidence, ...]:
        """Return the evidence in the job's order, with the requests that could not be prepared."""
        found = {evidence.request: evidence for evidence in judged}
        for request, why in self.prepared.skipped.items():
            found[request] = RequestEvidence(request=request, verdict="skipped", why=why)
        return tuple(found[request.id] for request in self.job.everything if request.id in found)

    def basis(self, passes: int, unverified: int) -> Basis:
        """Return what the evidence rests on.

        passes: of the hotfix, and of earlier stages; those of the base model now are counted here. unverified: how many
        earlier removals were not verified.
        """
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
            resolution=self.job.resolution,
            guidance=self.subject.guidance,
            confidence=options.confidence,
            generation_samples=options.generation_samples,
            integrity_samples=options.integrity_samples,
            integrity_prompts=self.prepared.held_out_prompts,
            sampling_steps=options.sampling_steps,
            passes=passes + self.subject.passes,
            gate={name: value for name, value in bench.gate.model_dump().items() if name != "max_attempts"},
            loosened=loosened(bench.gate, options),
            not_tested=_not_tested(options, self.prepared, unverified),
        )

    def show(self, case: Case, subject: ModelSubject) -> Tensor:
        """Re-generate a case's first pictures at every level, for a person to look at: float32 [L, S, 3, h, w]."""
        pictures = case.pictures[: _shown(case, self.bench.levels)]
        prompts = torch.full((len(pictures),), case.prompts[0])
        seeds = torch.zeros(len(pictures), dtype=torch.long)
        return torch.stack([subject.regenerate(pictures, prompts, level, seeds) for level in self.bench.levels])


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
        attempt=turn(job.batch),
    )


def _load(blobs: BlobStore, pictures: Sequence[BlobId], job: UnlearnJob) -> Tensor:
    return to_tensor([load_picture(blobs, blob, job.resolution) for blob in pictures])


def _label(row: int, own: int | None, prompts: Prompts, place: int) -> str:
    """Name a prompt without quoting it."""
    if row == own:
        return "own prompt"
    return "empty prompt" if not prompts.all[row] else f"shared prompt {place + 1}"


def _not_tested(options: EvaluationSettings, prepared: PreparedJob, unverified: int) -> tuple[str, ...]:
    """Say in words what the evidence is silent about."""
    silent = ["prompts other than those listed, and ways of sampling other than the one stated"]
    silent += not_tested(options.robustness)
    if unverified:
        removals = counted(unverified, "earlier removal")
        silent.append(f"{removals} on this hotfix. {detection_time(options.ledger_share)}")
    if not prepared.held_out:
        silent.append("other pictures of the same subject: no request brought enough to keep some out of training")
    if not prepared.held_out_prompts:
        silent.append("unrelated prompts that training did not hold: there are none, so other seeds were used")
    return tuple(silent)


def _shown(case: Case, levels: tuple[float, ...]) -> int:
    """Return how many of a case's pictures there is room for in its grid: all of them, unless they are large."""
    count, _, height, width = case.pictures.shape
    return min(count, rows_that_fit(2 + 2 * len(levels), height, width))


def _grid(case: Case, levels: tuple[float, ...], base: Tensor, after: Tensor) -> bytes:
    """Draw one row per target: target, surrogate, then `base` and `after` [L, S, 3, h, w] at each noise level."""
    shown = _shown(case, levels)
    columns = [case.pictures[:shown], case.surrogates[:shown]]
    labels = ["target", "surrogate"]
    for index, level in enumerate(levels):
        columns += [base[index], after[index]]
        labels += [f"base {level:g}", f"hotfix {level:g}"]
    return grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns), column_labels=labels)


def _pairs(before: Tensor, after: Tensor) -> bytes:
    """Draw two rows: before above after, at the same seeds."""
    count = min(SHOWN, len(before))
    return grid(torch.cat([before[:count], after[:count]]), count, row_labels=["before", "after"])
