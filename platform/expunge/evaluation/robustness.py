"""Does a removal survive what people do to a model afterwards?

Weights are rounded for deployment as a matter of course. A removal that this undoes is no removal where it counts, so
the request fails. Fine-tuning, relearning, a search for the latent and an adapter at another scale are someone's choice
later on, and no method is known to withstand them all: they are reported, and decide nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from expunge.evaluation.rules import rule
from expunge.evaluation.space import Features, Space
from expunge.evaluation.subject import ModelSubject, Subject
from expunge.evaluation.weights import PRECISIONS, State, mixed, rounded, trainable
from expunge.families.base import rows
from expunge.families.sampler import descend
from expunge.preparation.dataset import RetainSet
from expunge.text import counted
from expunge.types import Robustness, Rule

Judge = Callable[[Subject], Mapping[str, float]]
"""Returns the upper bound of the excess ratio of each request that passed, by the same statistic as its verdict."""

Amount = Literal["off", "small", "full"]

FINE_TUNE_STEPS = (50, 200, 500)
RELEARN_STEPS = (5, 10, 20, 40, 80, 160)
"""Where the training stops to look. Their ratio, 2, is how exactly the number of steps is known."""
RELEARN_PICTURES = (1, 5)
SCALES = (0.5, 0.8, 1.2)
SEARCH_STARTS, SEARCH_ITERATIONS, SEARCH_STEPS, SEARCH_RATE = 4, 40, 4, 0.05
"""A search for the latent: how many at once, for how long, through how many denoising steps, and Adam's rate."""
BATCH = 8
LOOKS = 6
"""Re-generations per look at a picture while it is relearned, spread over the levels."""
LEAST_EXCESS = 0.05
"""An encoder in whose eyes the base model shows less excess than this tells nothing. A guess."""
LOOK_SEED, SEARCH_SEED = 5 << 40, 6 << 40


@dataclass(frozen=True)
class Known:
    """A picture that someone wants back, or as a control one that the model never knew."""

    request: str
    picture: Tensor
    """float32 [3, h, w] in [-1, 1]."""
    similar: Tensor
    """float32 [K, 3, h, w]: views or other pictures of the same, which training never saw; what an attacker has."""
    prompt: int
    """Row of the conditioning."""


@dataclass(frozen=True)
class Lab:
    """A hotfix and all that an attack needs. Every attack leaves the hotfix as it was."""

    subject: ModelSubject
    """Its network holds the hotfix."""
    judge: Judge
    before: Mapping[str, float]
    """What `judge` says of the hotfix as delivered."""
    max_excess: float
    """The gate's."""
    unrelated: RetainSet
    """What a benign user trains on."""
    learning_rate: float
    """AdamW's; the removal's own, so that an attack is as strong a training as the removal was."""
    seed: int = 0


@dataclass(frozen=True)
class Memory:
    """What attacks on the memory of single pictures need, beyond a `Lab`."""

    base: State
    """The base model's weights."""
    space: Space
    levels: tuple[float, ...]
    """The noise levels at which the base model's memory shows."""
    known: Sequence[Known]
    """One picture for each request."""
    controls: Sequence[Known]
    """Pictures that the base model never saw, of the same kind; an odd number has a clear median."""
    looks: int = LOOKS


def examine(lab: Lab, amount: Amount, memory: Memory | None = None) -> tuple[Robustness, ...]:
    """Attack the hotfix: by every attack if `amount` is full, which needs `memory`; by a few each night if small.

    Raises ValueError if `memory` is missing.
    """
    if amount == "off":
        return ()
    if amount == "small":
        return (*after_rounding(lab), *after_fine_tuning(lab, FINE_TUNE_STEPS[:1]))
    if memory is None:
        raise ValueError("the full robustness tests need the base model's weights and pictures of each request")
    return (
        *after_rounding(lab),
        *after_fine_tuning(lab, FINE_TUNE_STEPS),
        *at_other_scales(lab, memory.base),
        *after_relearning(lab, memory),
        *after_search(lab, memory),
    )


def not_tested(amount: Amount) -> tuple[str, ...]:
    """Say what evidence with so much of these tests says nothing about."""
    long = "whether removals survive relearning from pictures of the target"
    rest = (
        long,
        "whether an initial latent can be found that still gives the target",
        "whether removals survive the hotfix at another scale",
    )
    match amount:
        case "off":
            return ("whether removals survive rounding the weights to int8 or bf16, or any fine-tuning", *rest)
        case "small":
            return (f"whether removals survive fine-tuning for more than {FINE_TUNE_STEPS[0]} steps", *rest)
        case "full":
            return (f"whether removals survive fine-tuning for more than {FINE_TUNE_STEPS[-1]} steps",)


def robustness_rule(results: Sequence[Robustness], request: str, max_excess: float) -> Rule | None:
    """Return the gate's rule for one request: the worst of the attacks that decide; None if there were none."""
    mine = [result for result in results if result.request == request and result.decides]
    if not mine:
        return None
    worst = max(mine, key=lambda result: inf if result.value is None else result.value)
    value = nan if worst.value is None else worst.value
    return rule("robustness", value, value, "at most", max_excess, why=worst.why, condition=worst.attack, base=1.0)


def after_rounding(lab: Lab) -> tuple[Robustness, ...]:
    """Round the weights to each precision, as a deployment does. This decides."""
    found: list[Robustness] = []
    for precision in PRECISIONS:
        with rounded(lab.subject.model.network, precision):
            found += _judged(lab, f"rounding the weights to {precision}", decides=True)
    return tuple(found)


def at_other_scales(lab: Lab, base: State) -> tuple[Robustness, ...]:
    """Apply the hotfix at other scales than 1, as users of adapters do."""
    found: list[Robustness] = []
    for scale in SCALES:
        with mixed(lab.subject.model.network, base, scale):
            found += _judged(lab, f"applying the hotfix at scale {scale:g}")
    return tuple(found)


def after_fine_tuning(lab: Lab, stops: Sequence[int]) -> tuple[Robustness, ...]:
    """Train the hotfix on unrelated pictures, and judge it at each of `stops`, increasing numbers of steps."""
    found: list[Robustness] = []
    with trainable(lab.subject.model, seed=lab.seed) as parameters:
        training = _Training(lab, parameters, lab.unrelated)
        for stop in stops:
            training.go_on(stop)
            found += _judged(lab, f"{stop} steps of fine-tuning on unrelated pictures")
    return tuple(found)


def after_relearning(lab: Lab, memory: Memory) -> tuple[Robustness, ...]:
    """Train the hotfix on a few pictures of each target, and the base model as long on as many of each control.

    A removal passes if the target does not come back sooner than a picture that the model never knew can be learned.
    """
    network = lab.subject.model.network
    with mixed(network, memory.base, 0):
        unseen = torch.stack([_look(lab, memory, one) for one in memory.controls]).mean(0)
        shown = {one.request: _look(lab, memory, one) - unseen for one in memory.known}
    found: list[Robustness] = []
    for one in memory.known:
        excess = shown[one.request]
        for count in sorted({min(count, len(one.similar)) for count in RELEARN_PICTURES}):
            attack = f"relearning from {counted(count, 'picture')} of the target"
            if excess.max() < LEAST_EXCESS:
                found.append(_unknown(one.request, attack, "steps until the excess is back"))
                continue
            steps = _steps_until_back(lab, memory, one, count, unseen, excess)
            with mixed(network, memory.base, 0):
                control = median(
                    _steps_until_back(lab, memory, other, count, unseen, excess) for other in memory.controls
                )
            found.append(_relearned(one.request, attack, steps, control))
    return tuple(found)


def after_search(lab: Lab, memory: Memory) -> tuple[Robustness, ...]:
    """Search for the initial latent that gives each target: with the hotfix, with the base model, and for the controls.

    A search finds something even for a picture that the base model never knew; only what is beyond that is memory.
    """
    with mixed(lab.subject.model.network, memory.base, 0):
        unseen = torch.stack([search_latent(lab, memory, one) for one in memory.controls]).mean(0)
        base = [search_latent(lab, memory, one) for one in memory.known]
    found: list[Robustness] = []
    attack = f"a search of {SEARCH_ITERATIONS} steps for the initial latent that gives the target"
    for one, reached in zip(memory.known, base, strict=True):
        excess = reached - unseen
        if excess.max() < LEAST_EXCESS:
            found.append(_unknown(one.request, attack, "excess ratio"))
            continue
        value = _ratio(search_latent(lab, memory, one) - unseen, excess)
        found.append(
            Robustness(
                request=one.request,
                attack=attack,
                decides=False,
                passed=value <= lab.max_excess,
                figure="excess ratio",
                value=value,
                base=1.0,
                control=0.0,
                why=f"After {attack}, {_share(value)} of the base model's excess is reached; "
                f"{lab.max_excess:.0%} is allowed.",
            )
        )
    return tuple(found)


class _Training:
    """An ordinary training on the family's own denoising loss. (seed, step) alone decide what a step draws."""

    def __init__(self, lab: Lab, parameters: list[nn.Parameter], data: RetainSet) -> None:
        self._lab, self._data = lab, data
        self._optimizer = torch.optim.AdamW(parameters, lr=lab.learning_rate)
        self._done = 0

    @torch.enable_grad()
    def go_on(self, until: int) -> None:
        """Train until there have been so many steps."""
        subject, data = self._lab.subject, self._data
        while self._done < until:
            generator = torch.Generator().manual_seed(self._lab.seed * 1_000_003 + self._done)
            index = torch.randint(len(data.x_0), (BATCH,), generator=generator)
            clean = data.x_0[index]
            # Stratified over the batch, which lowers the loss's variance.
            u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
            noise = torch.randn(clean.shape, generator=generator)
            time = subject.model.time_from_uniform(u)
            point = subject.model.at(time)
            a, b, alpha, beta = (v.view(-1, 1, 1, 1) for v in (point.a, point.b, point.alpha, point.beta))
            cond = rows(subject.conditioning, data.prompt[index])
            prediction = subject.model.predict(a * clean + b * noise, time, cond)
            loss = torch.nn.functional.mse_loss(prediction, alpha * noise + beta * clean)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._done += 1
            subject.passes += 3 * BATCH  # going back costs about two passes


def _judged(lab: Lab, attack: str, *, decides: bool = False) -> list[Robustness]:
    """Judge the network as it is now."""
    found = []
    for request, bound in lab.judge(lab.subject).items():
        value = bound if isfinite(bound) else None
        passed = value is not None and value <= lab.max_excess
        left = "it cannot be told how much" if value is None else f"at most {_share(value)}"
        found.append(
            Robustness(
                request=request,
                attack=attack,
                decides=decides,
                passed=passed,
                figure="excess ratio",
                value=value,
                before=lab.before.get(request),
                base=1.0,
                why=f"After {attack}, {left} of the base model's excess reproduction is left; "
                f"{lab.max_excess:.0%} is allowed.",
            )
        )
    return found


def _steps_until_back(lab: Lab, memory: Memory, one: Known, count: int, unseen: Tensor, excess: Tensor) -> float:
    """Train on `count` pictures like this one until its excess is back; infinity if it never is.

    unseen, excess: float64 [E], the similarity of unseen pictures, and the target's excess over it in the base model.
    """
    subject = lab.subject
    prompts = torch.full((count,), one.prompt)
    data = RetainSet(subject.model.encode(one.similar[:count]), prompts)
    with trainable(subject.model, seed=lab.seed) as parameters:
        training = _Training(lab, parameters, data)
        for stop in RELEARN_STEPS:
            training.go_on(stop)
            if _ratio(_look(lab, memory, one) - unseen, excess) >= lab.max_excess:
                return stop
    return inf


def _look(lab: Lab, memory: Memory, one: Known) -> Tensor:
    """Return the mean similarity of re-generations to the picture they started from, float64 [E]."""
    found = []
    for place, level in enumerate(memory.levels):
        seeds = torch.arange(place, memory.looks, len(memory.levels)) + LOOK_SEED
        pictures = one.picture.expand(len(seeds), -1, -1, -1)
        found.append(lab.subject.regenerate(pictures, torch.full((len(seeds),), one.prompt), level, seeds))
    return memory.space.similarity(memory.space.features(torch.cat(found)), _views(memory.space, one)).mean(0)


def search_latent(lab: Lab, memory: Memory, one: Known) -> Tensor:
    """Return the highest similarity that a search for the initial latent reaches, float64 [E]."""
    subject = lab.subject
    model, count = subject.model, SEARCH_STARTS
    target = model.encode(one.picture[None])
    noise = subject.noise(SEARCH_SEED + lab.seed * count + torch.arange(count)).requires_grad_()
    cond = rows(subject.conditioning, torch.full((count,), one.prompt))
    empty = rows(subject.empty, torch.zeros(count, dtype=torch.long))

    def sample() -> Tensor:
        subject.passes += count * SEARCH_STEPS
        return descend(model, noise, 1.0, cond, steps=SEARCH_STEPS, guidance=subject.guidance, empty=empty)

    optimizer = torch.optim.Adam([noise], lr=SEARCH_RATE)
    with torch.enable_grad():
        for _ in range(SEARCH_ITERATIONS):
            optimizer.zero_grad()
            (sample() - target).square().flatten(1).mean(1).sum().backward()
            optimizer.step()
            with torch.no_grad():
                # It stays as long as noise is: otherwise the picture could be written into it.
                noise *= noise[0].numel() ** 0.5 / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    subject.passes += 2 * count * SEARCH_STEPS * SEARCH_ITERATIONS
    with torch.no_grad():
        features = memory.space.features(model.decode(sample()))
    return memory.space.similarity(features, _views(memory.space, one)).amax(0)


def _views(space: Space, one: Known) -> Features:
    return space.features(torch.cat([one.picture[None], one.similar]))


def _ratio(left: Tensor, excess: Tensor) -> float:
    """Return the excess that is left as a share of the base model's, in the eyes of the worst encoder that can tell."""
    tells = excess >= LEAST_EXCESS
    return (left[tells] / excess[tells]).max().item()


def _relearned(request: str, attack: str, steps: float, control: float) -> Robustness:
    took = f"is back after {steps:.0f} steps" if isfinite(steps) else f"is not back after {RELEARN_STEPS[-1]} steps"
    other = f"takes {control:.0f}" if isfinite(control) else f"is not learned in {RELEARN_STEPS[-1]}"
    return Robustness(
        request=request,
        attack=attack,
        decides=False,
        passed=steps >= control,
        figure="steps until the excess is back",
        value=steps if isfinite(steps) else None,
        control=control if isfinite(control) else None,
        why=f"By {attack}, the excess {took}; a picture that the model never knew {other}.",
    )


def _unknown(
    request: str, attack: str, figure: Literal["excess ratio", "steps until the excess is back"]
) -> Robustness:
    why = f"Not measured: by {attack}, the base model itself reaches no more than with a picture that it never saw."
    return Robustness(request=request, attack=attack, decides=False, passed=False, figure=figure, value=None, why=why)


def _share(value: float) -> str:
    return f"{max(0.0, value):.0%}"
