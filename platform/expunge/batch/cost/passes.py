"""What the stages of a job ask of the model's networks, from the settings alone.

Passes are counted as `Basis.passes` counts them: one per sample and denoising step, three where a gradient is taken.
Guidance asks the network twice in one pass; those further calls are counted apart.

An upper estimate. It takes every request for one that the base model reproduces and the hotfix removes, and all rounds
of draws as drawn. It does not know which noise levels a model will be given and takes the middle three of the grid, and
it leaves out two things: the surrogates that the model paints itself, at most 134 passes per picture at 20 steps,
and what a failed verification of one earlier removal adds, that of all others.
"""

from dataclasses import dataclass
from typing import Literal

from expunge.batch.cost.amounts import Amounts
from expunge.batch.cost.load import Load
from expunge.evaluation.levels import DRAWS
from expunge.evaluation.measure import CONTROLS
from expunge.evaluation.reproduction import LOOKS, draws_for
from expunge.evaluation.robustness import (
    BATCH,
    FINE_TUNE_STEPS,
    RELEARN_PICTURES,
    RELEARN_STEPS,
    SCALES,
    SEARCH_ITERATIONS,
    SEARCH_STARTS,
    SEARCH_STEPS,
)
from expunge.evaluation.robustness import LOOKS as RELEARN_LOOKS
from expunge.evaluation.rotation import quota
from expunge.evaluation.weights import PRECISIONS
from expunge.families.base import steps_from
from expunge.families.flops import Flops
from expunge.preparation.prepare import SURPLUS
from expunge.settings import EvaluationSettings, ModelSettings, TrainingSettings

Stage = Literal["prepare", "examine", "train", "evaluate"]
STAGES: tuple[Stage, ...] = ("prepare", "examine", "train", "evaluate")

GRADIENT = 3
"""Passes of a forward and a backward pass, of which the latter counts as two."""


@dataclass(frozen=True)
class Calls(Amounts):
    """How often the networks are asked for one sample. Calls add up."""

    passes: float = 0
    guided: float = 0
    """Further calls of the network, which guidance adds to passes."""
    encodes: float = 0
    decodes: float = 0
    prompts: float = 0
    """Prompts through the text encoders."""

    def times(self, count: float) -> "Calls":
        return self._each(lambda amount: count * amount)

    def operations(self, flops: Flops) -> float:
        return (
            (self.passes + self.guided) * flops.network
            + self.encodes * flops.encode
            + self.decodes * flops.decode
            + self.prompts * flops.prompt
        )


def night_calls(
    new: Load,
    ledger: Load,
    model: ModelSettings,
    training: TrainingSettings,
    evaluation: EvaluationSettings,
    *,
    cached: bool = False,
    rounds: int = LOOKS,
) -> dict[Stage, Calls]:
    """Return what a job of `new` requests, and of a `ledger` removed earlier, asks in each stage.

    cached: an earlier night has left what depends on the base model alone, for the ledger's requests, too.
    rounds: of draws, 1 to LOOKS.
    """
    sampling = _Sampling(model, evaluation)
    due = ledger.share(quota(evaluation.ledger_share, ledger.requests))
    asked = Calls(prompts=len({*model.retain_prompts, *model.forget_prompts}) + new.prompts + ledger.prompts + 1)
    return {
        "prepare": _prepare(new + ledger, model, training, sampling) + asked,
        "examine": _examine(new, ledger, sampling, cached, rounds) + Calls(prompts=1),
        "train": _train(new, ledger, training),
        "evaluate": _evaluate(new, ledger, due, sampling, cached, rounds) + Calls(prompts=1),
    }


@dataclass(frozen=True)
class _Sampling:
    """How a model is sampled in the evaluation."""

    model: ModelSettings
    evaluation: EvaluationSettings

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels that are set, else those that are likely."""
        grid = sorted(self.evaluation.level_grid)
        first = max(0, (len(grid) - 3) // 2)
        return self.evaluation.levels or tuple(grid[first : first + 3])

    def steps(self, levels: tuple[float, ...]) -> int:
        """Return the denoising steps of one re-generation from each of `levels`."""
        return sum(steps_from(level, self.evaluation.sampling_steps) for level in levels)

    def samples(self, count: float, guided: float) -> Calls:
        """Return samples from pure noise; a share `guided` of them is not under the empty prompt."""
        passes = count * self.evaluation.sampling_steps
        return Calls(passes=passes, guided=guided * self._twice * passes, decodes=count)

    def regenerations(self, count: float, guided: float, levels: tuple[float, ...]) -> Calls:
        """Return re-generations of `count` pictures from each of `levels`; guided: the share as in `samples`."""
        passes, outputs = count * self.steps(levels), count * len(levels)
        return Calls(passes, guided * self._twice * passes, encodes=outputs, decodes=outputs)

    def rounds(self, load: Load, rounds: int) -> Calls:
        """Return that many rounds of draws of a load's conditions."""
        draws = rounds * draws_for(self.evaluation.seeds, self.levels) // len(self.levels)
        share = load.guided / load.conditions if load.conditions else 0
        return self.regenerations(draws * load.conditions, share, self.levels)

    @property
    def unrelated(self) -> float:
        """The share of the unrelated prompts that are not empty."""
        return sum(prompt != "" for prompt in self.model.retain_prompts) / len(self.model.retain_prompts)

    @property
    def plain(self) -> float:
        """1 if the most general prompt is not the empty one."""
        return float((self.model.forget_prompts or self.model.retain_prompts)[0] != "")

    @property
    def _twice(self) -> int:
        return int(self.model.guidance > 1)


def _prepare(load: Load, model: ModelSettings, training: TrainingSettings, sampling: _Sampling) -> Calls:
    pairs = Calls(encodes=2 * load.pictures * training.views)
    if training.retain_folder:
        return pairs
    count = round(SURPLUS * training.retain_size)
    return pairs + sampling.samples(count, sampling.unrelated) + Calls(prompts=len(model.retain_prompts) + 1)


def _examine(new: Load, ledger: Load, sampling: _Sampling, cached: bool, rounds: int) -> Calls:
    """The base model: what does not depend on requests, then every condition of every request."""
    if cached:
        return sampling.rounds(new, rounds)
    options, plain = sampling.evaluation, sampling.plain
    unrelated = sampling.samples(2 * options.integrity_samples, sampling.unrelated)
    general = sampling.samples(options.integrity_samples, plain)
    draws = draws_for(options.seeds, sampling.levels) // len(sampling.levels)
    unseen = sampling.regenerations(options.unseen_pictures * draws, plain, sampling.levels)
    known = options.integrity_samples + options.unseen_pictures
    choice = Calls() if options.levels else sampling.regenerations(DRAWS * known, plain, options.level_grid)
    return unrelated + general + choice + unseen + sampling.rounds(new + ledger, rounds)


def _train(new: Load, ledger: Load, training: TrainingSettings) -> Calls:
    counted = new.requests if ledger.requests else (new + ledger).requests
    steps = training.steps_for(counted)
    forget, retain = training.forget_batch, training.retain_batch
    if training.objectives == "request":
        apart = min((new + ledger).requests, training.objectives_per_step)
        forget = max(forget, apart * training.workers)
    gradient = GRADIENT + training.activation_checkpointing
    passes = forget * (gradient + (training.forget_target == "recognition"))
    passes += retain * (gradient + (training.retain_target == "distill"))
    rows = (new + ledger).rows * training.views
    probes = 2 * rows * (steps // training.probe_every + 1) if training.adaptive else 0
    return Calls(passes=steps * passes + probes)


def _evaluate(new: Load, ledger: Load, due: Load, sampling: _Sampling, cached: bool, rounds: int) -> Calls:
    options, judged = sampling.evaluation, new + due
    prompts, sides = sampling.model.forget_prompts, 1 if cached else 2
    own = judged.prompts + new.prompts + (0 if cached else ledger.prompts)
    calls = sampling.regenerations(2 * judged.pictures, sampling.plain, sampling.levels)
    calls += sampling.samples(options.integrity_samples, sampling.unrelated)
    calls += sampling.samples(own * options.generation_samples, 1)
    for prompt in prompts:
        calls += sampling.samples(sides * options.generation_samples, float(prompt != ""))
    return calls + sampling.rounds(judged, rounds) + _robustness(judged, sampling, rounds)


def _robustness(judged: Load, sampling: _Sampling, rounds: int) -> Calls:
    """Looks at the worst condition of every request, and the trainings; guidance is taken as in all conditions."""
    if sampling.evaluation.robustness == "off" or not judged.requests:
        return Calls()
    share = judged.guided / judged.conditions if judged.conditions else 0
    worst = Load(judged.requests, conditions=judged.requests, guided=round(share * judged.requests))
    look = sampling.rounds(worst, rounds)
    if sampling.evaluation.robustness == "small":
        trained = GRADIENT * BATCH * FINE_TUNE_STEPS[0]
        return look.times(2 + len(PRECISIONS)) + Calls(passes=trained)
    looks = look.times(1 + len(PRECISIONS) + len(FINE_TUNE_STEPS) + len(SCALES))
    learners = len(RELEARN_PICTURES) * (1 + CONTROLS) * judged.requests
    mean = RELEARN_LOOKS // len(sampling.levels)
    relearned = sampling.regenerations(mean * len(RELEARN_STEPS) * learners, share, sampling.levels)
    relearned += Calls(passes=learners * GRADIENT * BATCH * RELEARN_STEPS[-1])
    searches = 2 * judged.requests + CONTROLS
    searched = Calls(passes=searches * SEARCH_STARTS * SEARCH_STEPS * (GRADIENT * SEARCH_ITERATIONS + 1))
    return looks + relearned + searched + Calls(passes=GRADIENT * BATCH * FINE_TUNE_STEPS[-1])
