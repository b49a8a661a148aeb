"""Excess reproduction: how much better a model reproduces a picture than it would if it had never seen it.

Noise a picture, let the model denoise it, and compare what comes back. Any model returns any picture to some degree:
that is its ability, and pictures that it never saw measure it. What a picture has beyond them is memory.

    s = mean similarity of the outputs to the picture, over seeds and noise levels
    u = the same for pictures that the base model never saw
    excess = s - u          ratio = excess of the hotfix / excess of the base model

A condition is one picture in one view under one prompt, and each encoder judges each condition by itself. C conditions,
n draws, E encoders, L noise levels; draw i is a seed and the level i % L, the same ones for base model and hotfix.

- A request is reproduced if any of its C x E figures lies above what a picture that the base model never saw may give
  (`reproduces`). A step-up test over all of them holds the chance of that at 1 - confidence for unseen pictures,
  however many conditions there are, and costs little power where most conditions agree.
- A removal passes if the upper bound of the ratio is low enough in every condition that shows memory, and at every
  noise level over the views of a picture under a prompt (`compare_levels`): the mean over levels would hide one at
  which the target still comes back. As all must pass, a false pass is no likelier with more of them, and no correction
  is needed.
- Draws are added in up to LOOKS rounds. Each round's bounds are at confidence 1 - (1 - confidence) / LOOKS, so that
  the chance of a false pass in any of them is at most 1 - confidence.

What remains uncertain, at the default `gate.max_excess` of 0.8 (`python -m tests.benchmarks.max_excess`, 250 requests
of two pictures under two prompts, abilities that deviate by 0.13 between pictures):

- The ability for one picture is not known: u is that of the average one. A perfect removal leaves a picture its own, so
  it may fail by chance, however many draws there are: in 2 % at an excess of 0.6, in 9 % at 0.5, in 31 % at 0.4; with
  one picture under one prompt (200 requests) in 0, 2 and 14 %. With `max_excess` 0.7 it is 6 % at 0.6 and 19 % at 0.5
  (100 requests). With similarities measured on `faces`, of known faces before and unseen ones after, 4 of 240 fail.
- A condition that keeps 85 % of its memory passed in none of the 250, nor did a level that keeps it in all views under
  a prompt. Where only one encoder sees the memory, about 1.5 % of such conditions pass, and with 0.85 5 to 7 % (300
  requests of a simpler simulation, which is not kept; nor are those of one picture and of `faces` above).
- A single level in a single view under a single prompt may keep all: in 87 % of 100 requests it was not noticed. So may
  a level at which the base model shows less than LEAST_EXCESS. Their figures are too close to a picture's own ability.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from scipy import stats
from torch import Tensor

from expunge.evaluation.rules import rule
from expunge.evaluation.space import Features, Space
from expunge.evaluation.subject import CHUNK, Subject
from expunge.evaluation.views import VIEWS, all_views
from expunge.settings import GateSettings
from expunge.types import ConditionEvidence, Rule

T = TypeVar("T")

LOOKS = 3
"""Rounds of draws at most."""
ALL_VIEWS = "all views"
"""The view of evidence about one noise level."""
LEAST_EXCESS = 0.7
"""A noise level is judged by itself where the base model's excess is at least this share of its mean over the levels.

Less is hard to tell from a picture's own ability.
"""
FIRST_SEED = 8 << 40
"""Far from the seeds of retain pictures and free samples. Training's are hashes of 63 bits."""


@dataclass(frozen=True)
class Condition:
    """One picture of a request in one view under one prompt. It does not hold the prompt's text: personal data."""

    picture: int
    """Its place among the request's pictures."""
    held_out: bool
    """Training never saw it."""
    view: str
    """A name in VIEWS."""
    prompt: int
    """Row of the conditioning."""
    label: str
    """The prompt in words, such as "own prompt" or "empty prompt"."""


Draw = Callable[[Sequence[Condition], range], Tensor]
"""Gives the draws of some conditions, float64 [C, n, E]: `draw` with a subject and everything else filled in."""


@dataclass(frozen=True)
class Unseen:
    """How well the base model reproduces M pictures that it never saw, M at least 2."""

    values: Tensor
    """float64 [M, n, E]: the similarity of each, equally often at every level; draw i is at level i % L."""
    levels: tuple[float, ...]
    """The noise levels that it was measured at, and for which alone it holds."""

    @property
    def mean(self) -> Tensor:
        """Over pictures and levels, float64 [E]."""
        return self._pictures.mean(0)

    @property
    def spread(self) -> Tensor:
        """Standard deviation over pictures, float64 [E]."""
        return self._pictures.std(0)

    @property
    def high(self) -> Tensor:
        """float64 [E]: 95 % of further unseen pictures lie below it, taking them as normally distributed."""
        return self.mean + float(stats.t.ppf(0.95, len(self.values) - 1)) * self._deviation

    def chance(self, means: Tensor) -> Tensor:
        """Return the chance that a picture that the base model never saw has a mean as high as each of `means` [C, E].

        float64 of the same shape.
        """
        return torch.from_numpy(stats.t.sf((means - self.mean) / self._deviation, len(self.values) - 1))

    def at(self, level: int) -> "Unseen":
        """Return the same pictures at one level alone, given by its place."""
        return Unseen(self.values[:, level :: len(self.levels)], self.levels[level : level + 1])

    @property
    def _pictures(self) -> Tensor:
        """The mean similarity of each picture, float64 [M, E]."""
        return self.values.mean(1)

    @property
    def _deviation(self) -> Tensor:
        """Of a further picture from the mean of these M, which is itself uncertain."""
        return (self.spread * math.sqrt(1 + 1 / len(self.values))).clamp(min=1e-6)


def conditions_of(
    held_out: Sequence[bool], prompts: Sequence[int], labels: Sequence[str], *, most: int, attempt: int = 0
) -> tuple[Condition, ...]:
    """Return every view under every prompt of at most `most` of a request's pictures.

    held_out: for each picture, whether training never saw it; those and the others are taken in turn, beginning with
    those. prompts, labels: the rows of the conditioning, and each in words. attempt: a number of the night; those
    that follow one another go on with the pictures where the one before stopped.
    """
    kept, trained = ([i for i, out in enumerate(held_out) if out is held] for held in (True, False))
    # Whatever one kind leaves of its half, the other takes.
    first = min(len(kept), max(most - most // 2, most - len(trained)))
    chosen = _in_turn(_rotated(kept, first, attempt), _rotated(trained, min(most - first, len(trained)), attempt))
    return tuple(
        Condition(picture, held_out[picture], view, prompt, label)
        for picture in chosen
        for view in VIEWS
        for prompt, label in zip(prompts, labels, strict=True)
    )


def draw(
    subject: Subject,
    space: Space,
    pictures: Tensor,
    conditions: Sequence[Condition],
    levels: Sequence[float],
    draws: range,
    seen: Callable[[Tensor, Features], None] = lambda outputs, features: None,
) -> Tensor:
    """Return how similar the subject's outputs are to the nearest view of each condition's picture, float64 [C, n, E].

    pictures: float32 [T, 3, h, w] in [-1, 1]. Draw i of a condition is at level i % L. Its seed depends on i, the view
    and the picture's place: it is the same for base model and hotfix, and under every prompt. seen: called with the
    outputs, float32 [N, 3, h, w], and their features, as they come.
    """
    sources = torch.cat([VIEWS[c.view](pictures[c.picture, None]) for c in conditions])
    prompts = torch.tensor([c.prompt for c in conditions])
    views = list(VIEWS)
    streams = torch.tensor([FIRST_SEED + (views.index(c.view) << 16) + c.picture for c in conditions])
    owners = torch.tensor([c.picture for c in conditions])
    references = {i: space.features(all_views(pictures[i])) for i in sorted({c.picture for c in conditions})}
    numbers = torch.tensor(draws)
    similarity = torch.full((len(conditions), len(draws), len(space.names)), math.nan, dtype=torch.float64)
    for place, level in enumerate(levels):
        (columns,) = torch.nonzero(numbers % len(levels) == place, as_tuple=True)
        pairs = torch.cartesian_prod(torch.arange(len(conditions)), columns)
        for row, column in (part.T for part in pairs.split(CHUNK) if len(part)):
            seeds = streams[row] + (numbers[column] << 20)
            outputs = subject.regenerate(sources[row], prompts[row], level, seeds)
            features = space.features(outputs)
            seen(outputs, features)
            for picture, reference in references.items():
                mine = owners[row] == picture
                if mine.any():
                    values = space.similarity(tuple(feature[mine] for feature in features), reference)
                    similarity[row[mine], column[mine]] = values
    return similarity


def draws_for(seeds: int, levels: Sequence[float]) -> int:
    """Return the number of draws in a round: at least `seeds`, and equally many at every level, at least two."""
    return max(2, -(-seeds // len(levels))) * len(levels)


def measure_unseen(
    subject: Subject, space: Space, pictures: Tensor, prompts: Sequence[int], levels: Sequence[float], draws: range
) -> Unseen:
    """Measure how well the base model reproduces `pictures` [M, 3, h, w], which it never saw.

    prompts: rows of the conditioning. Views and prompts are taken in turn over the pictures, so that the spread between
    pictures contains that between views. Use as many draws as for a condition, so that it contains their noise, too.
    """
    views = list(VIEWS)
    conditions = [
        Condition(i, True, views[i % len(views)], prompts[i // len(views) % len(prompts)], "unseen")
        for i in range(len(pictures))
    ]
    return Unseen(draw(subject, space, pictures, conditions, levels, draws), tuple(levels))


def reproduces(base: Tensor, unseen: Unseen, confidence: float) -> Tensor:
    """Return where the base model shows memory, bool [C, E], from its draws `base` [C, n, E]; nowhere: not reproduced.

    For pictures that it never saw, "nowhere" comes out with probability `confidence`, over all conditions and encoders
    together (Benjamini and Hochberg 1995, which holds for the positively correlated figures of one picture). Where it
    shows memory in some, the share of those that do not is held below 1 - confidence. A figure that is not finite is
    taken as memory: `compare` cannot bound it, so it never passes.
    """
    chances = unseen.chance(_over_levels(base, len(unseen.levels))).nan_to_num(0.0)
    adjusted = stats.false_discovery_control(chances.flatten().numpy())
    return torch.from_numpy(adjusted <= 1 - confidence).view(chances.shape)


def ratio_bounds(base: Tensor, after: Tensor, unseen: Unseen, confidence: float) -> tuple[Tensor, Tensor]:
    """Return one-sided lower and upper bounds of the ratio of excesses, float64 [C, E], from paired draws [C, n, E].

    Fieller's bounds (1954): the ratios r for which the mean of (after - u) - r (base - u) is not below or not above 0.
    Its variance is pooled within levels, so that differences between levels do not count as noise; the uncertainty of
    u adds to it, and is shared by both excesses. Where the base model's excess is not above 0 with the same confidence,
    the bounds are infinite; they are NaN where a draw is not finite.
    Raises ValueError unless there are two draws at each level, and equally many.
    """
    levels, n = len(unseen.levels), base.shape[1]
    if n < 2 * levels:
        raise ValueError(f"{n} draws at {levels} levels leave nothing to estimate noise from")
    x, y = (_over_levels(draws, levels) - unseen.mean for draws in (base, after))
    rest_x, rest_y = (draws - _by_level(draws, levels).repeat(1, n // levels, 1) for draws in (base, after))
    shared = unseen.spread.square() / len(unseen.values)

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1) / (n - levels) / n + shared

    t2 = float(stats.t.ppf(confidence, n - levels)) ** 2
    a = x.square() - t2 * covariance(rest_x, rest_x)
    b = x * y - t2 * covariance(rest_x, rest_y)
    c = y.square() - t2 * covariance(rest_y, rest_y)
    root = (b.square() - a * c).clamp(min=0).sqrt()
    bounded = (a > 0) & (x > 0) | a.isnan()
    lower, upper = ((b + sign * root) / a for sign in (-1, 1))
    return lower.where(bounded | b.isnan(), -math.inf), upper.where(bounded | b.isnan(), math.inf)


def compare(
    conditions: Sequence[Condition],
    names: Sequence[str],
    base: Tensor,
    after: Tensor | None,
    unseen: Unseen,
    informative: Tensor,
    confidence: float,
) -> tuple[ConditionEvidence, ...]:
    """Return the evidence of each condition by each encoder, C x E of them.

    names: of the E encoders. base, after: paired draws, float64 [C, n, E]; `after` is None where only the base model
    was drawn. informative: bool [C, E], of `reproduces`. confidence: of the upper bound of the ratio.
    """
    levels = len(unseen.levels)
    means = _over_levels(base, levels)
    nothing = torch.full_like(means, math.nan)
    after_means = nothing if after is None else _over_levels(after, levels)
    ratios = (after_means - unseen.mean) / (means - unseen.mean)
    bounds = nothing if after is None else ratio_bounds(base, after, unseen, confidence)[1]
    return tuple(
        ConditionEvidence(
            picture=condition.picture,
            held_out=condition.held_out,
            view=condition.view,
            prompt=condition.label,
            encoder=name,
            draws=base.shape[1],
            unseen=unseen.mean[e].item(),
            base=means[c, e].item(),
            after=_finite(after_means[c, e]),
            ratio=_finite(ratios[c, e]),
            bound=_finite(bounds[c, e]),
            informative=bool(informative[c, e]),
        )
        for c, condition in enumerate(conditions)
        for e, name in enumerate(names)
    )


def compare_levels(
    conditions: Sequence[Condition],
    names: Sequence[str],
    base: Tensor,
    after: Tensor,
    unseen: Unseen,
    informative: Tensor,
    confidence: float,
) -> tuple[ConditionEvidence, ...]:
    """Return the evidence of the noise level that kept most, for each picture under each prompt and by each encoder.

    Arguments as in `compare`. A level is judged by the draws of all views in which the encoder sees memory; differences
    between views count as noise. Where it sees memory in a single view, no level is judged: even all rounds together
    draw too little there to tell a level from a picture's own ability. Levels that show little of the memory
    (LEAST_EXCESS) are left out.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    for row, condition in enumerate(conditions):
        groups.setdefault((condition.picture, condition.label), []).append(row)
    worst = []
    for members in groups.values():
        whole = replace(conditions[members[0]], view=ALL_VIEWS)
        for e in range(len(names)):
            rows = [row for row in members if informative[row, e]]
            found = []
            for i, level in enumerate(unseen.levels if len(rows) > 1 else ()):
                known, fixed = (draws[rows, i :: len(unseen.levels)].flatten(0, 1)[None] for draws in (base, after))
                each = compare([whole], names, known, fixed, unseen.at(i), torch.ones(1, len(names)), confidence)
                found.append(each[e].model_copy(update={"level": level}))
            least = LEAST_EXCESS * sum(one.base - one.unseen for one in found) / max(len(found), 1)
            told = [one for one in found if not one.base - one.unseen < least]
            worst += sorted(told, key=_bound_of)[-1:]
    return tuple(worst)


def compare_in_rounds(
    conditions: Sequence[Condition],
    names: Sequence[str],
    base: Draw,
    after: Draw,
    unseen: Unseen,
    informative: Tensor,
    *,
    draws: range,
    max_excess: float,
    confidence: float,
) -> tuple[ConditionEvidence, ...]:
    """Compare as `compare` and `compare_levels` do, in up to LOOKS rounds; return the evidence of both.

    The rounds end when all is decided, or once a condition has failed for certain.

    draws: the first round, equally many at every level, of which the others are as long.
    A condition is decided once its upper bound is at most `max_excess`, and has failed for certain once its lower bound
    is above it, or a draw is not finite. While a noise level is undecided, all the conditions that it is judged by are
    drawn again. The hotfix is not drawn in conditions that show no memory.
    """
    if len(draws) % len(unseen.levels):
        raise ValueError(f"{len(draws)} draws per round are not equally many at {len(unseen.levels)} levels")
    each = 1 - (1 - confidence) / LOOKS
    first = base(conditions, draws)
    evidence = list(compare(conditions, names, first, None, unseen, informative, each))
    left = torch.nonzero(informative.any(1)).flatten()
    before, fixed = first[left], first[left, :0]
    open_levels = {(condition.picture, condition.label) for condition in conditions}
    by_level: dict[tuple[int, str, str], ConditionEvidence] = {}
    for look in range(LOOKS):
        if not len(left):
            break
        asked = [conditions[c] for c in left.tolist()]
        more = range(draws.start + look * len(draws), draws.stop + look * len(draws))
        if look:
            before = torch.cat([before, base(asked, more)], dim=1)
        fixed = torch.cat([fixed, after(asked, more)], dim=1)
        found = compare(asked, names, before, fixed, unseen, informative[left], each)
        for i, c in enumerate(left.tolist()):
            evidence[c * len(names) : (c + 1) * len(names)] = found[i * len(names) : (i + 1) * len(names)]
        for one in compare_levels(asked, names, before, fixed, unseen, informative[left], each):
            if (one.picture, one.prompt) in open_levels:
                by_level[one.picture, one.prompt, one.encoder] = one
        lower, upper = ratio_bounds(before, fixed, unseen, each)
        if (informative[left] & ((lower > max_excess) | upper.isnan())).any():
            break
        undecided = (informative[left] & (upper > max_excess)).any(1)
        open_levels = {(one.picture, one.prompt) for one in by_level.values() if _bound_of(one) > max_excess}
        undecided |= torch.tensor([(condition.picture, condition.label) in open_levels for condition in asked])
        left, before, fixed = left[undecided], before[undecided], fixed[undecided]
    return (*evidence, *by_level.values())


def reproduction_rule(evidence: Sequence[ConditionEvidence], gate: GateSettings) -> Rule:
    """Judge the worst condition that shows memory: the upper bound of its ratio must be at most `gate.max_excess`.

    A bound that is missing or not finite never passes. Raises ValueError if no condition shows memory: then there is
    nothing to judge.
    """
    informative = [one for one in evidence if one.informative]
    if not informative:
        raise ValueError("no condition shows memory: the request is not reproduced")
    # A measured failure says more than one that was not measured.
    failed = [one for one in informative if one.bound is not None and one.bound > gate.max_excess]
    worst = max(failed or informative, key=_bound_of)
    return rule(
        "reproduction",
        math.nan if worst.ratio is None else worst.ratio,
        math.nan if worst.bound is None else worst.bound,
        "at most",
        gate.max_excess,
        base=worst.base - worst.unseen,
        condition=condition_in_words(worst),
        why=_why(worst, gate.max_excess, sum(one.level is None for one in informative)),
    )


def condition_in_words(one: ConditionEvidence) -> str:
    """Return, for example, "picture 2, mirrored, under the empty prompt, by edges"; pictures count from 1."""
    level = "" if one.level is None else f" at noise level {one.level:g}"
    return f"picture {one.picture + 1}, {one.view}{level}, under the {one.prompt}, by {one.encoder}"


def why_not_reproduced(
    conditions: Sequence[Condition], names: Sequence[str], base: Tensor, unseen: Unseen, confidence: float
) -> str:
    """Say why nothing is trained for a request of which `reproduces` finds no memory."""
    nothing = torch.zeros(len(conditions), len(names), dtype=torch.bool)
    evidence = compare(conditions, names, base, None, unseen, nothing, confidence)
    excess = (_over_levels(base, len(unseen.levels)) - unseen.mean) / unseen.spread.clamp(min=1e-6)
    place = int(excess.flatten().argmax())
    most, high = evidence[place], unseen.high[place % len(names)].item()
    return (
        "The base model does not reproduce this request's pictures, so there is nothing to remove, and nothing was "
        f"trained. Of {len(evidence)} conditions it came closest in {condition_in_words(most)}: similarity "
        f"{most.base:.2f}. Pictures that it never saw come to {most.unseen:.2f} on average, and 19 in 20 of them stay "
        f"below {high:.2f}."
    )


def _why(one: ConditionEvidence, allowed: float, count: int) -> str:
    origin = "that training did not use" if one.held_out else "that training used"
    levels = "" if one.level is None else ", and of the noise levels"
    start = (
        f"Worst of {count} conditions in which the base model shows memory{levels}: {condition_in_words(one)}, "
        f"a picture {origin}. Noised and denoised again, it comes back with similarity {one.base:.2f} from the base "
        f"model. Pictures that the base model never saw come back with {one.unseen:.2f}; the difference is memory. "
    )
    if one.after is None or one.ratio is None:
        return start + "The hotfix was not measured here, so nothing is proved."
    figures = f"From the hotfix it comes back with {one.after:.2f}: {one.ratio:.0%} of the memory is left"
    if one.bound is None:
        return start + figures + ", but the draws scatter too much to say how much at most."
    if one.bound <= allowed:
        sure = f", and at most {one.bound:.0%} at the stated confidence. "
        return start + figures + sure + f"Up to {allowed:.0%} counts as removed."
    return start + figures + f", and it may be {one.bound:.0%}. Only up to {allowed:.0%} counts as removed."


def _by_level(draws: Tensor, levels: int) -> Tensor:
    """Average [C, n, E] within each level: [C, L, E]. Draws i and i + L are at the same level."""
    if not draws.shape[1] or draws.shape[1] % levels:
        raise ValueError(f"{draws.shape[1]} draws are not equally many at {levels} levels")
    return draws.unflatten(1, (-1, levels)).mean(1)


def _over_levels(draws: Tensor, levels: int) -> Tensor:
    """Average [C, n, E] within each level, then over levels: [C, E]."""
    return _by_level(draws, levels).mean(1)


def _bound_of(one: ConditionEvidence) -> float:
    return math.inf if one.bound is None else one.bound


def _finite(value: Tensor) -> float | None:
    return value.item() if value.isfinite() else None


def _rotated(items: Sequence[int], count: int, attempt: int) -> list[int]:
    return [items[(attempt * count + i) % len(items)] for i in range(count)]


def _in_turn(first: Sequence[T], second: Sequence[T]) -> list[T]:
    paired = [one for pair in zip(first, second, strict=False) for one in pair]
    shorter = min(len(first), len(second))
    return [*paired, *first[shorter:], *second[shorter:]]
