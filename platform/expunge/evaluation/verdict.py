"""Judge a hotfix by protocol 2: is each request's picture gone, and is everything else still there?

The base model is examined first and alone, so that no process needs two copies of a network: a `Bench` keeps all that
the base model shows, and afterwards the same network may become the hotfix.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from expunge.errors import InputError
from expunge.evaluation.calibration import Calibration, calibrate
from expunge.evaluation.gate import REPRODUCTION, verdict_of
from expunge.evaluation.generation import generation_rules
from expunge.evaluation.integrity import measure_integrity, nearest_neighbours
from expunge.evaluation.levels import choose_levels
from expunge.evaluation.plausibility import Domain, alike_pairs, alike_rule, diversity_rule, plausibility_rule
from expunge.evaluation.recognition import Drawn, recognition_rule
from expunge.evaluation.reference import unseen_pictures
from expunge.evaluation.reproduction import (
    LOOKS,
    Condition,
    Unseen,
    compare,
    compare_in_rounds,
    conditions_of,
    draw,
    draws_for,
    measure_unseen,
    ratio_bounds,
    reproduces,
    reproduction_rule,
    why_not_reproduced,
)
from expunge.evaluation.rules import rule
from expunge.evaluation.space import Features, Space
from expunge.evaluation.subject import Subject
from expunge.evaluation.views import all_views
from expunge.pixels import to_pictures, to_tensor
from expunge.settings import EvaluationSettings, GateSettings
from expunge.types import ConditionEvidence, IntegrityEvidence, RequestEvidence, Rule

# Sample i of each purpose has the seed FIRST + i. Training's seeds are far below.
UNRELATED, OTHER, FREE, REFERENCE, GENERAL = (purpose << 40 for purpose in (1, 2, 3, 4, 7))
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
    """float64 [C, n, E]: similarity to the nearest view of the condition's picture, for all rounds of draws."""
    informative: Tensor
    """bool [C, E]: the base model shows memory, and the encoder can tell the surrogate from the target."""
    absent: str | None
    """Why there is nothing to remove; None where there is."""
    views: tuple[Features, ...]
    """For each picture, the features of all its views."""
    surrogates: Features
    """Of each picture's surrogate."""


@dataclass
class Bench:
    """What the base model shows, and the measures that hold for all its requests."""

    base: Subject
    space: Space
    calibration: Calibration
    domain: Domain
    unseen: Unseen
    levels: tuple[float, ...]
    strangers: Tensor
    """float32 [M, 3, h, w]: pictures that stand for those that the base model never saw."""
    reference: str
    """What they are, in words."""
    unrelated: Tensor
    """int64 [n]: the prompt of each unrelated sample."""
    before: Tensor
    """float32 [n, 3, h, w]: the base model's unrelated samples."""
    other: Tensor
    """The same at other seeds."""
    samples: Tensor
    """float32 [N, 3, h, w]: these, and as many of the most general prompt."""
    options: EvaluationSettings
    gate: GateSettings
    salt: int = 0
    remember: Remember = forget
    key: Mapping[str, object] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    """The text of each prompt's row, where it is known."""
    _sides: dict[str, Side] = field(default_factory=dict)
    _free: dict[int, Features] = field(default_factory=dict)

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
        prompts: Sequence[str] = (),
    ) -> "Bench":
        """Examine the base model.

        unrelated: rows of prompts that no request concerns and training does not hold. plain: the row of the most
        general prompt, under which unseen pictures are regenerated. key: JSON values that name the base model and how
        it is sampled, for `remember`. prompts: the text of each row, which tells it from those of other nights.
        """
        rest = {"robustness", "ledger_share", "pictures", "held_out", "confidence"}
        key = {
            **(key or {}),
            "salt": salt,
            "evaluation": options.model_dump(mode="json", exclude=rest),
            "plain": _named(prompts, plain),
            "unrelated": [_named(prompts, row) for row in unrelated],
        }
        rows = torch.tensor(unrelated)[torch.arange(options.integrity_samples) % len(unrelated)]

        def sample() -> dict[str, Tensor]:
            index = torch.arange(len(rows)) + salt * SALT
            return {
                "before": _bytes(base.generate(rows, UNRELATED + index)),
                "other": _bytes(base.generate(rows, OTHER + index)),
                # Few unrelated prompts may show few pictures; the most general prompt shows the rest of the domain.
                "general": _bytes(base.generate(torch.full_like(rows, plain), GENERAL + index)),
            }

        samples = remember({**key, "what": "samples"}, sample)
        # Each picture once, as floats: 192 of 1024 x 1024 take 2.4 GB.
        everything = to_tensor(torch.cat([samples[name] for name in ("before", "other", "general")]).numpy())
        before, other, general = everything.split(len(rows))
        space, features = Space.around(options.encoders, everything)
        size = (before.shape[-2], before.shape[-1])
        # The last first: they differ most from one another.
        last = everything[-options.unseen_pictures :].flip(0)
        unseen, reference = unseen_pictures(last, options, size, seed=REFERENCE)
        # Similarities depend on the encoders and their centre, and so on the samples.
        key |= {"centre": [_digest(z) for z in space.centre], "reference": _digest(unseen)}

        def measure() -> dict[str, Tensor]:
            chosen = options.levels or choose_levels(base, space, general, unseen, plain, options.level_grid)
            # Where no level stands out, the model's own samples are no memory of it, and nor will a request's be.
            chosen = chosen or options.level_grid[len(options.level_grid) // 2 :][:1]
            first = range(draws_for(options.seeds, chosen))
            found = measure_unseen(base, space, unseen, [plain], chosen, first)
            return {"levels": torch.tensor(chosen, dtype=torch.float64), "values": found.values}

        facts = remember({**key, "what": "unseen by draw"}, measure)
        levels = tuple(round(level, 6) for level in facts["levels"].tolist())
        if calibration is None:
            calibration = calibrate(space, None, None, everything, source="the base model's own samples")
        return cls(
            base=base,
            space=space,
            calibration=calibration,
            domain=Domain.of(space, everything, calibration, features=features),
            unseen=Unseen(facts["values"], levels),
            levels=levels,
            strangers=unseen,
            reference=reference,
            unrelated=rows,
            before=before,
            other=other,
            samples=everything,
            options=options,
            gate=gate,
            salt=salt,
            remember=remember,
            key=key,
            prompts=tuple(prompts),
        )

    def examine(self, case: Case) -> Side:
        """Return what the base model shows of a case; asks it at most once."""
        if case.id not in self._sides:
            self._sides[case.id] = self._examine(case)
        return self._sides[case.id]

    def free(self, subject: Subject, prompt: int) -> Features:
        """Sample a prompt freely, and return the features of the n samples. The base model's are kept."""
        if subject is not self.base:
            return self.space.features(_stored(self._sample(subject, prompt)))
        if prompt not in self._free:
            key = {**self.key, "what": "free", "prompt": _named(self.prompts, prompt)}
            made = self.remember(key, lambda: {"samples": _bytes(self._sample(subject, prompt))})
            self._free[prompt] = self.space.features(to_tensor(made["samples"].numpy()))
        return self._free[prompt]

    @property
    def draws(self) -> range:
        """The first round of draws of every condition; each draw has a seed of its own."""
        count = draws_for(self.options.seeds, self.levels)
        first = self.salt * LOOKS * count
        return range(first, first + count)

    def _sample(self, subject: Subject, prompt: int) -> Tensor:
        # Each prompt has noise of its own, the same every night whatever its row: else a model without prompts would
        # repeat its samples.
        stream = zlib.crc32(_named(self.prompts, prompt).encode()) << 30
        index = torch.arange(self.options.generation_samples) + self.salt * SALT + stream
        return subject.generate(torch.full((len(index),), prompt), FREE + index)

    def _examine(self, case: Case) -> Side:
        held_out = [place in case.held_out for place in range(len(case.pictures))]
        conditions = conditions_of(
            held_out, case.prompts, case.labels, most=self.options.pictures, attempt=case.attempt
        )
        views = tuple(self.space.features(all_views(picture)) for picture in case.pictures)
        surrogates = self.space.features(case.surrogates)
        first = self._draw(case, conditions, self.draws)
        shown = reproduces(first, self.unseen, self.options.confidence)
        if not shown.any():
            names, confidence = self.space.names, self.options.confidence
            absent = why_not_reproduced(conditions, names, first, self.unseen, confidence)
            return Side(conditions, first, shown, absent, views, surrogates)
        later = range(self.draws.stop, self.draws.start + LOOKS * len(self.draws))
        base = torch.cat([first, self._draw(case, conditions, later)], dim=1)
        informative = shown & self._tells(conditions, base, views, surrogates)
        return Side(conditions, base, informative, None, views, surrogates)

    def _draw(self, case: Case, conditions: Sequence[Condition], draws: range) -> Tensor:
        """Draw the base model, float64 [C, n, E], one picture at a time: another night may need other pictures."""
        parts = []
        for place, mine in groupby(conditions, lambda condition: condition.picture):
            asked = list(mine)
            key = {
                **self.key,
                "what": "case",
                "picture": [place, _digest(case.pictures[place])],
                "conditions": [(condition.view, _named(self.prompts, condition.prompt)) for condition in asked],
                "levels": self.levels,
                "draws": [draws.start, draws.stop],
            }
            compute = partial(draw, self.base, self.space, case.pictures, asked, self.levels, draws)
            parts.append(self.remember(key, lambda compute=compute: {"base": compute()})["base"])
        return self._finite(torch.cat(parts))

    def _tells(
        self, conditions: Sequence[Condition], base: Tensor, views: Sequence[Features], surrogates: Features
    ) -> Tensor:
        """Return bool [C, E]: a hotfix that returned the surrogate itself, as was asked, could pass.

        Otherwise this encoder sees too little difference between the two, and can prove nothing.
        """
        each = [
            self.space.similarity(tuple(z[place, None] for z in surrogates), features)[0]
            for place, features in enumerate(views)
        ]
        surrogate = torch.stack([each[condition.picture] for condition in conditions])
        return surrogate - self.unseen.mean <= self.gate.max_excess * (base.mean(1) - self.unseen.mean)

    @staticmethod
    def _finite(base: Tensor) -> Tensor:
        if not bool(base.isfinite().all()):
            raise InputError(
                "the base model returns pictures that are not finite numbers", hint="sample it by hand, and repair it"
            )
        return base


def judge(bench: Bench, case: Case, fixed: Subject) -> RequestEvidence:
    """Judge one request alone."""
    return judge_all(bench, [case], fixed)[0]


def judge_all(
    bench: Bench, cases: Sequence[Case], fixed: Subject, done: Callable[[int], None] = lambda count: None
) -> tuple[RequestEvidence, ...]:
    """Judge every request of a job, each by all rules; outputs of different requests are compared with one another.

    The base model was asked before if `bench.examine` and `bench.free` have been called for every case.
    """
    free: dict[int, Features] = {}
    found: list[_Found] = []
    for index, case in enumerate(cases):
        side = bench.examine(case)
        if side.absent:
            conditions = compare(
                side.conditions,
                bench.space.names,
                side.base,
                None,
                bench.unseen,
                side.informative,
                bench.options.confidence,
            )
            found.append(_Found(case, side, conditions))
        else:
            for prompt in case.prompts:
                if prompt not in free:
                    free[prompt] = bench.free(fixed, prompt)
            found.append(_measured(bench, case, side, fixed, free))
        done(index + 1)
    return tuple(_concluded(bench, one, found) for one in found)


def worst_bounds(
    bench: Bench, cases: Sequence[Case], judged: Sequence[RequestEvidence]
) -> Callable[[Subject], dict[str, float]]:
    """Return a function that judges a changed hotfix: the upper bound of the excess ratio of each request that passed.

    It looks at each request's worst condition alone, so that it costs little.
    """
    conditions: dict[str, tuple[Case, Condition, int]] = {}
    for case, evidence in zip(cases, judged, strict=True):
        shown = [
            (c.bound, place)
            for place, c in enumerate(evidence.conditions)
            if c.informative and c.bound is not None and c.level is None
        ]
        if evidence.verdict == "passed" and shown:
            worst = max(shown)[1]
            condition = bench.examine(case).conditions[worst // len(bench.space.names)]
            conditions[case.id] = case, condition, evidence.conditions[worst].draws

    def judge(subject: Subject) -> dict[str, float]:
        return {id: _bound(bench, *one, subject) for id, one in conditions.items()}

    return judge


def _bound(bench: Bench, case: Case, condition: Condition, draws: int, subject: Subject) -> float:
    """Bound what is left in one condition as its verdict was: by as many draws, at the confidence of one round."""
    side = bench.examine(case)
    row = side.conditions.index(condition)
    asked = range(bench.draws.start, bench.draws.start + draws)
    after = draw(subject, bench.space, case.pictures, [condition], bench.levels, asked)
    confidence = 1 - (1 - bench.options.confidence) / LOOKS
    upper = ratio_bounds(side.base[row, None, :draws], after, bench.unseen, confidence)[1][0]
    return upper[side.informative[row]].max().item()


def judge_integrity(
    bench: Bench, fixed: Subject, cases: Sequence[Case] = ()
) -> tuple[IntegrityEvidence, Tensor, Tensor]:
    """Compare unrelated outputs of the same seeds; return the evidence and the pictures, before and after.

    Samples that show a target of `cases` are left out: they are meant to change.
    """
    index = torch.arange(len(bench.unrelated)) + bench.salt * SALT
    # Rounded as the base model's stored samples are: an unchanged model must give the very same pictures.
    after = _stored(fixed.generate(bench.unrelated, UNRELATED + index))
    features, sides = bench.space.features(bench.before), [bench.examine(case) for case in cases]
    pictures = [views for side in sides for views in side.views]

    def unrelated(samples: Features) -> Tensor:
        """Return which samples show none of the pictures, bool [n]."""
        rest = torch.ones(len(samples[0]), dtype=torch.bool)
        for views in pictures:
            rest &= ~bench.calibration.matches(bench.space.similarity(samples, views), bench.space.names)
        return rest

    kept = unrelated(features)
    kept = kept if kept.sum() >= 2 else torch.ones_like(kept)  # a model that shows nothing else must not change at all
    before, after, other = bench.before[kept], after[kept], bench.other[kept]
    samples = tuple(z[kept] for z in features)
    targets = [tuple(z[:1] for z in views) for views in pictures]
    nearest = [nearest_neighbours(bench.space, samples, target) for target in targets]
    evidence = measure_integrity(
        before,
        after,
        other,
        bench.space,
        bench.calibration,
        bench.gate,
        bench.options.confidence,
        nearest=torch.cat(nearest) if nearest else None,
        comparable=unrelated(bench.space.features(bench.other))[kept],
    )
    return evidence, before, after


@dataclass(frozen=True)
class _Found:
    """What was measured of one case, before it is compared with the others."""

    case: Case
    side: Side
    conditions: tuple[ConditionEvidence, ...]
    rules: tuple[Rule, ...] = ()
    outputs: Features = ()
    """Of the hotfix's re-generations."""


def _measured(bench: Bench, case: Case, side: Side, fixed: Subject, free: Mapping[int, Features]) -> _Found:
    outputs: list[Tensor] = []
    encoded: list[Features] = []
    rounds: list[Drawn] = []

    def base(conditions: Sequence[Condition], draws: range) -> Tensor:
        rows = [side.conditions.index(condition) for condition in conditions]
        return side.base[rows, draws.start - bench.draws.start : draws.stop - bench.draws.start]

    def seen(pictures: Tensor, features: Features) -> None:
        outputs.append(pictures)
        encoded.append(features)

    def after(asked: Sequence[Condition], draws: range) -> Tensor:
        similarity = draw(fixed, bench.space, case.pictures, asked, bench.levels, draws, seen)
        rounds.append(Drawn(asked, base(asked, draws), similarity))
        return similarity

    conditions = compare_in_rounds(
        side.conditions,
        bench.space.names,
        base,
        after,
        bench.unseen,
        side.informative,
        draws=bench.draws,
        max_excess=bench.gate.max_excess,
        confidence=bench.options.confidence,
    )
    rules = [_reproduction(bench, side, conditions)]
    for prompt, label in zip(case.prompts, case.labels, strict=True):
        rules += _generation(bench, side, prompt, label, free[prompt])
    if not outputs:  # no encoder could tell anything, so nothing was drawn
        return _Found(case, side, conditions, tuple(rules))
    measured = bench.unseen, bench.space.names, bench.calibration, bench.gate, bench.options.confidence
    rules.append(recognition_rule(rounds, *measured))
    features = tuple(torch.cat(parts) for parts in zip(*encoded, strict=True))
    rules.append(plausibility_rule(torch.cat(outputs), bench.domain, bench.gate, features=features))
    return _Found(case, side, conditions, tuple(rules), features)


def _concluded(bench: Bench, mine: _Found, found: Sequence[_Found]) -> RequestEvidence:
    """Add the rule that needs the other requests' outputs, and conclude."""
    id = mine.case.id
    if mine.side.absent:
        why = mine.side.absent
        return RequestEvidence(request=id, verdict="not_reproduced", why=why, conditions=mine.conditions)
    rules, others = mine.rules, [other for other in found if other is not mine and other.outputs]
    if mine.outputs and others:
        same = [_same(bench, mine.side.surrogates, other.side.surrogates) for other in others]
        outputs = [other.outputs for other in others]
        confidence = bench.options.confidence
        alike = alike_rule(mine.outputs, outputs, bench.space, bench.calibration, bench.gate, confidence, same)
        rules = (*rules, alike)
    verdict, why = verdict_of(rules)
    return RequestEvidence(request=id, verdict=verdict, why=why, rules=rules, conditions=mine.conditions)


def _same(bench: Bench, one: Features, other: Features) -> bool:
    return bool(alike_pairs(bench.space, bench.calibration, one, other).any())


def _reproduction(bench: Bench, side: Side, conditions: tuple[ConditionEvidence, ...]) -> Rule:
    """Apply the rule of re-generation; where no encoder tells the surrogate from the target, nothing can be proved."""
    if side.informative.any():
        return reproduction_rule(conditions, bench.gate)
    why = (
        "No encoder tells the surrogate from the target, so nothing could show that the target is gone: "
        "give a surrogate that differs more, or another encoder."
    )
    return rule(REPRODUCTION, math.nan, math.nan, "at most", bench.gate.max_excess, why=why)


def _generation(bench: Bench, side: Side, prompt: int, label: str, after: Features) -> tuple[Rule, ...]:
    """Apply the rules of free generation to one prompt; a sample shows the request if it shows any of its pictures."""
    base = bench.free(bench.base, prompt)
    ours, theirs = (
        torch.stack([bench.space.similarity(z, views) for views in side.views]).amax(0) for z in (after, base)
    )
    names, gate, confidence = bench.space.names, bench.gate, bench.options.confidence
    return (
        *generation_rules(ours, theirs, names, bench.calibration, gate, confidence, label),
        diversity_rule(after, base, bench.space, bench.calibration, gate, confidence, label),
    )


def _named(prompts: Sequence[str], row: int) -> str:
    return prompts[row] if row < len(prompts) else str(row)


def _stored(pictures: Tensor) -> Tensor:
    """Round as stored pictures are; what is no finite number stays so, because it must never pass for a picture."""
    return to_tensor(_bytes(pictures).numpy()).where(pictures.isfinite(), math.nan)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _bytes(pictures: Tensor) -> Tensor:
    """Round float32 [N, 3, h, w] to uint8 [N, h, w, 3], as pictures are stored."""
    return torch.from_numpy(to_pictures(pictures))
