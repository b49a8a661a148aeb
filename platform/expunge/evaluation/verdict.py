"""Judge a hotfix by protocol 2: is each request's picture gone, and is everything else still there?

The base model is examined first and alone, so that no process needs two copies of a network: a `Bench` keeps all that
the base model shows, and afterwards the same network may become the hotfix.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from expunge.evaluation.calibration import Calibration, calibrate
from expunge.evaluation.gate import verdict_of
from expunge.evaluation.generation import generation_rules
from expunge.evaluation.integrity import measure_integrity
from expunge.evaluation.levels import choose_levels
from expunge.evaluation.plausibility import Domain, alike_rule, plausibility_rule
from expunge.evaluation.reference import unseen_pictures
from expunge.evaluation.reproduction import (
    Condition,
    Unseen,
    compare,
    conditions_of,
    draw,
    measure_unseen,
    not_reproduced,
    reproduces,
    reproduction_rule,
)
from expunge.evaluation.rules import rule
from expunge.evaluation.space import Features, Space
from expunge.evaluation.subject import Subject
from expunge.evaluation.views import all_views
from expunge.pixels import to_pictures, to_tensor
from expunge.settings import EvaluationSettings, GateSettings
from expunge.types import ConditionEvidence, IntegrityEvidence, RequestEvidence, Rule

# Sample i of each purpose has the seed FIRST + i. Training's seeds are far below.
UNRELATED, OTHER, FREE, REFERENCE = (purpose << 40 for purpose in range(1, 5))
SALT = 1 << 20
"""What tells the seeds of one judgement from those of its repetition."""


class Remember(Protocol):
    """Returns what was computed under a key before, or computes it; see `cache.Cache.tensors`."""

    def __call__(self, key: Mapping[str, object], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]: ...


def forget(key: Mapping[str, object], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Compute anew: a `Remember` without a memory."""
    return dict(compute())


@dataclass(frozen=True)
class Case:
    """A request as the evaluation sees it."""

    id: str
    pictures: Tensor
    """float32 [T, 3, h, w] in [-1, 1]: what was submitted, at the model's resolution."""
    surrogates: Tensor
    """float32 [T, 3, h, w]: what each may be replaced by."""
    prompts: tuple[int, ...]
    """Rows of the conditioning under which it must be gone."""
    labels: tuple[str, ...]
    """What each prompt is called in evidence, which may not quote it."""
    held_out: tuple[int, ...] = ()
    """Places of the pictures that training did not see."""
    attempt: int = 0


@dataclass(frozen=True)
class Side:
    """What the base model shows of a case, with C conditions, n draws and E encoders."""

    conditions: tuple[Condition, ...]
    base: Tensor
    """float64 [C, n, E]: similarity to the nearest view of the condition's picture."""
    floor: Tensor
    """float64 [C, E]: the similarity that a perfect removal leaves."""
    informative: Tensor
    """bool [C, E]: the base model shows excess, and the encoder can tell the surrogate from the target."""
    absent: str | None
    """Why there is nothing to remove; None where there is."""
    views: tuple[Features, ...]
    """For each picture, the features of all its views."""


@dataclass
class Bench:
    """What the base model shows, and the measures that hold for all its requests."""

    base: Subject
    space: Space
    calibration: Calibration
    domain: Domain
    unseen: Unseen
    levels: tuple[float, ...]
    reference: str
    unrelated: Tensor
    """int64 [n]: the prompt of each unrelated sample."""
    before: Tensor
    """float32 [n, 3, h, w]: the base model's unrelated samples."""
    other: Tensor
    """The same at other seeds."""
    options: EvaluationSettings
    gate: GateSettings
    salt: int = 0
    remember: Remember = forget
    key: Mapping[str, object] = field(default_factory=dict)
    _sides: dict[str, Side] = field(default_factory=dict)
    _free: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        base: Subject,
        unrelated: Sequence[int],
        plain: int,
        options: EvaluationSettings,
        gate: GateSettings,
        *,
        calibration: Calibration | None = None,
        salt: int = 0,
        remember: Remember = forget,
        key: Mapping[str, object] | None = None,
    ) -> "Bench":
        """Examine the base model.

        unrelated: rows of prompts that no request concerns and training does not hold. plain: the row of the most
        general prompt, under which unseen pictures are regenerated. key: JSON values that name the base model and how
        it is sampled, for `remember`.
        """
        key = {**(key or {}), "salt": salt, "evaluation": options.model_dump(mode="json")}
        rows = torch.tensor(unrelated)[torch.arange(options.integrity_samples) % len(unrelated)]

        def sample() -> dict[str, Tensor]:
            index = torch.arange(len(rows)) + salt * SALT
            return {
                "before": _bytes(base.generate(rows, UNRELATED + index)),
                "other": _bytes(base.generate(rows, OTHER + index)),
            }

        samples = remember({**key, "what": "samples", "unrelated": list(unrelated)}, sample)
        before, other = (to_tensor(samples[name].numpy()) for name in ("before", "other"))
        space = Space.around(options.encoders, torch.cat([before, other]))
        size = (before.shape[-2], before.shape[-1])
        unseen, reference = unseen_pictures(torch.cat([before, other]), options, size, seed=REFERENCE)
        levels = options.levels

        def measure() -> dict[str, Tensor]:
            chosen = levels or choose_levels(base, space, before, unseen, plain, options.level_grid)
            prompts = torch.full((len(unseen),), plain)
            found = measure_unseen(base, space, unseen, prompts, chosen, range(len(chosen)))
            return {"levels": torch.tensor(chosen, dtype=torch.float64), **vars(found)}

        facts = remember({**key, "what": "unseen", "plain": plain, "unrelated": list(unrelated)}, measure)
        levels = tuple(round(level, 6) for level in facts.pop("levels").tolist())
        return cls(
            base=base,
            space=space,
            calibration=calibration or calibrate(space, before, unseen, other),
            domain=Domain.of(space, torch.cat([before, other])),
            unseen=Unseen(**facts),
            levels=levels,
            reference=reference,
            unrelated=rows,
            before=before,
            other=other,
            options=options,
            gate=gate,
            salt=salt,
            remember=remember,
            key=key,
        )

    def examine(self, case: Case) -> Side:
        """Return what the base model shows of a case; asks it at most once."""
        if case.id not in self._sides:
            self._sides[case.id] = self._examine(case)
        return self._sides[case.id]

    def free(self, subject: Subject, prompt: int) -> Tensor:
        """Sample a prompt freely: float32 [n, 3, h, w]. The base model's samples are kept."""
        if subject is not self.base:
            return self._sample(subject, prompt)
        if prompt not in self._free:
            key = {**self.key, "what": "free", "prompt": prompt}
            made = self.remember(key, lambda: {"samples": _bytes(self._sample(subject, prompt))})
            self._free[prompt] = to_tensor(made["samples"].numpy())
        return self._free[prompt]

    @property
    def draws(self) -> range:
        """The draws of every condition; each has a seed of its own."""
        first = self.salt * SALT
        return range(first, first + self.options.seeds)

    def _sample(self, subject: Subject, prompt: int) -> Tensor:
        # Each prompt has its own noise; otherwise a model without prompts would repeat its samples.
        index = torch.arange(self.options.generation_samples) + self.salt * SALT + (prompt << 30)
        return subject.generate(torch.full((len(index),), prompt), FREE + index)

    def _examine(self, case: Case) -> Side:
        conditions = conditions_of(
            len(case.pictures),
            case.held_out,
            case.prompts,
            case.labels,
            most=self.options.pictures,
            attempt=case.attempt,
        )
        views = tuple(self.space.features(all_views(picture)) for picture in case.pictures)
        key = {
            **self.key,
            "what": "case",
            "pictures": _digest(case.pictures),
            "prompts": case.prompts,
            "levels": self.levels,
        }
        key["conditions"] = [str(condition) for condition in conditions]

        def measure() -> dict[str, Tensor]:
            return {"base": draw(self.base, self.space, case.pictures, conditions, self.levels, self.draws)}

        base = self.remember(key, measure)["base"]
        # A hotfix that returns the surrogate itself has done what was asked, so it is no nearer than that.
        replaced = [
            self.space.similarity(self.space.features(s[None]), v)[0]
            for s, v in zip(case.surrogates, views, strict=True)
        ]
        surrogate = torch.stack([replaced[condition.picture] for condition in conditions])
        tells = torch.stack([self._tells(row) for row in surrogate])
        floor = torch.maximum(surrogate, self.unseen.mean.expand_as(surrogate))
        shown = reproduces(base, self.unseen, self.options.confidence)
        absent = None if shown.any() else not_reproduced(conditions, self.space.names, base, self.unseen)
        return Side(conditions, base, floor, shown & tells, absent, views)

    def _tells(self, similarity: Tensor) -> Tensor:
        """Return for each encoder whether a picture this similar, float64 [E], is another picture."""
        bars = [self.calibration.thresholds[name].threshold for name in self.space.names]
        return similarity < torch.tensor(bars, dtype=torch.float64)


def judge(bench: Bench, case: Case, fixed: Subject) -> RequestEvidence:
    """Judge one request alone."""
    return judge_all(bench, [case], fixed)[0]


def judge_all(
    bench: Bench, cases: Sequence[Case], fixed: Subject, done: Callable[[int], None] = lambda count: None
) -> tuple[RequestEvidence, ...]:
    """Judge every request of a job, each by all rules; outputs of different requests are compared with one another.

    The base model was asked before if `bench.examine` and `bench.free` have been called for every case.
    """
    free: dict[int, Tensor] = {}
    shown: dict[str, Tensor] = {}
    found: list[tuple[Case, Side, list[Rule], tuple[ConditionEvidence, ...]]] = []
    for index, case in enumerate(cases):
        side = bench.examine(case)
        if side.absent:
            found.append((case, side, [], _conditions(bench, side, None)))
        else:
            watched = _Watched(fixed)
            after = draw(watched, bench.space, case.pictures, side.conditions, bench.levels, bench.draws)
            conditions = _conditions(bench, side, after)
            rules = [_reproduction(bench, side, conditions)]
            for prompt, label in zip(case.prompts, case.labels, strict=True):
                if prompt not in free:
                    free[prompt] = bench.free(fixed, prompt)
                rules += _generation(bench, case, side, prompt, label, free[prompt])
            shown[case.id] = torch.cat(watched.outputs)
            rules.append(plausibility_rule(shown[case.id], bench.domain, bench.gate, bench.options.confidence))
            found.append((case, side, rules, conditions))
        done(index + 1)
    return tuple(_evidence(bench, case, side, rules, conditions, shown) for case, side, rules, conditions in found)


def _evidence(
    bench: Bench,
    case: Case,
    side: Side,
    rules: list[Rule],
    conditions: tuple[ConditionEvidence, ...],
    shown: Mapping[str, Tensor],
) -> RequestEvidence:
    """Add the rule that needs the other requests' outputs, and conclude."""
    if side.absent:
        return RequestEvidence(request=case.id, verdict="not_reproduced", why=side.absent, conditions=conditions)
    others = [outputs for id, outputs in shown.items() if id != case.id]
    if others:
        rules.append(_alike(bench, case, shown[case.id], torch.cat(others)))
    verdict, why = verdict_of(rules)
    return RequestEvidence(request=case.id, verdict=verdict, why=why, rules=tuple(rules), conditions=conditions)


def judge_integrity(
    bench: Bench, fixed: Subject, cases: Sequence[Case] = ()
) -> tuple[IntegrityEvidence, Tensor, Tensor]:
    """Compare unrelated outputs of the same seeds; return the evidence and the pictures, before and after.

    Samples that show a target of `cases` are left out: they are meant to change.
    """
    index = torch.arange(len(bench.unrelated)) + bench.salt * SALT
    after = fixed.generate(bench.unrelated, UNRELATED + index)
    features = bench.space.features(bench.before)
    targets = [views for case in cases for views in bench.examine(case).views]
    similar = [bench.space.similarity(features, views) for views in targets]
    shows = [bench.calibration.matches(one, bench.space.names) for one in similar]
    kept = ~torch.stack(shows).any(0) if shows else torch.ones(len(after), dtype=torch.bool)
    evidence = measure_integrity(
        bench.before[kept],
        after[kept],
        bench.other,
        space=bench.space,
        calibration=bench.calibration,
        gate=bench.gate,
        confidence=bench.options.confidence,
        nearest=torch.stack([one[kept].amax(1) for one in similar]) if similar else None,
    )
    return evidence, bench.before[kept], after[kept]


class _Watched(Subject):
    """Keeps what a subject returns for a target, so that its plausibility needs no samples of its own."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.outputs: list[Tensor] = []

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        made = self._subject.regenerate(pictures, prompts, level, seeds)
        self.outputs.append(made)
        return made

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        return self._subject.generate(prompts, seeds)


def _conditions(bench: Bench, side: Side, after: Tensor | None) -> tuple[ConditionEvidence, ...]:
    return compare(
        side.conditions,
        bench.space.names,
        side.base,
        after,
        unseen=bench.unseen,
        floor=side.floor,
        informative=side.informative,
        confidence=bench.options.confidence,
    )


def _reproduction(bench: Bench, side: Side, conditions: tuple[ConditionEvidence, ...]) -> Rule:
    """Apply the rule of re-generation; where no encoder tells the surrogate from the target, nothing can be proved."""
    if side.informative.any():
        return reproduction_rule(conditions, bench.gate)
    why = (
        "No encoder tells the surrogate from the target, so nothing could show that the target is gone: "
        "give a surrogate that differs more, or another encoder."
    )
    return rule("excess reproduction", math.nan, math.nan, "at most", bench.gate.max_excess, why=why)


def _generation(bench: Bench, case: Case, side: Side, prompt: int, label: str, after: Tensor) -> tuple[Rule, ...]:
    """Apply the rules of free generation to one prompt; a sample shows the request if it shows any of its pictures."""
    made, base = (bench.space.features(samples) for samples in (after, bench.free(bench.base, prompt)))
    nearest = [torch.stack([bench.space.similarity(z, views) for views in side.views]).amax(0) for z in (made, base)]
    return generation_rules(*nearest, bench.space.names, bench.calibration, bench.gate, bench.options.confidence, label)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _bytes(pictures: Tensor) -> Tensor:
    """Round float32 [N, 3, h, w] to uint8 [N, h, w, 3], as pictures are stored."""
    return torch.from_numpy(to_pictures(pictures))
