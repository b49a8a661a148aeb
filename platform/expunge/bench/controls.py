"""The published controls, each written from its equations: a function from (lesson, step) to the step's gradient.

Notation: p(x) is what the network predicts at a noised picture, and p*(x) its ordinary target, which for an epsilon
model is the noise; L(x) = |p(x) - p*(x)|^2 is the ordinary loss, meaned over samples and pixels. x_f is a target, x_s
its surrogate, x_r a retain image. Times are uniform, as published.

All arms share optimizer, schedule, clip, batch sizes, views of the targets, and the retain images, which the base model
made. What a publication sets otherwise (its learning rate, the number of steps, real training data) is not taken over.
"""

import math

import torch

from expunge.bench.lesson import Batch, Gradient, Lesson, combine, dot, over, squared
from expunge.errors import InputError

ETA = 0.5
"""EraseDiff: how fast the forget loss must fall, relative to its own gradient."""
MIXTURE = 0.5
"""SISS's lambda: the share of samples that are noised from targets."""
FORGET_NORM = 0.1
"""SISS: the norm of the subtracted gradient, as a share of the other one's."""
GUIDANCE = 1.0
"""ESD: how far beyond the unconditional prediction the target lies."""


def fine_tune(lesson: Lesson, step: int) -> Gradient:
    """Return the gradient of L(x_s): the surrogate is one more training picture, and the target is not mentioned."""
    return lesson.gradient(lesson.surrogates(step, lesson.both).loss())


def neg_grad(lesson: Lesson, step: int) -> Gradient:
    """Return the gradient of L(x_r) - L(x_f).

    Ascent on what is to be forgotten (Golatkar et al., arXiv 1911.04933), beside descent on the rest, without which
    the network is ruined at once (NegGrad+: Kurmanji et al., arXiv 2302.09880).
    """
    retain = lesson.gradient(_others(lesson, step).loss())
    forget = lesson.gradient(_targets(lesson, step).loss())
    return combine(retain, forget, -1.0)


def erase_diff(lesson: Lesson, step: int) -> Gradient:
    """Return the gradient of F = L(x_r), plus lambda times that of f = |p(x_f) - p*'|^2 (Wu et al., arXiv 2401.05779).

    p*' has noise from the uniform distribution on [0, 1) instead of the noise in x_t. The paper's inner problem is
    solved as BOME does (arXiv 2209.08709): the constraint is g = f(theta) - f(theta_K), where theta_K comes from K
    steps of descent and is held fixed, so that grad g = grad f; and
        lambda = max(0, eta - <grad F, grad g> / |grad g|^2).
    The K steps enter through the value of g alone, on which lambda does not depend, so no pass is spent on them.
    """
    targets = _targets(lesson, step)
    drawn = torch.rand(targets.noise.shape, generator=_generator(lesson, step)).to(targets.noise.device)
    forget = lesson.gradient(targets.loss(targets.with_noise(drawn)))
    retain = lesson.gradient(_others(lesson, step).loss())
    length = dot(forget, forget)
    weight = max(0.0, ETA - dot(retain, forget) / length) if length else 0.0
    return combine(retain, forget, weight)


def siss(lesson: Lesson, step: int) -> Gradient:
    """Return grad E[w_r |p(m) - p_r|^2] - s grad E[w_f |p(m) - p_f|^2] (SISS: Alberti et al., ICLR 2025).

    m is noised from x_f with probability lambda, otherwise from x_r; p_r and p_f are the predictions that lead from m
    back to x_r and to x_f. With q(m | x) = N(m; a x, b^2) the importance weights are
        w_r = q(m | x_r) / ((1 - lambda) q(m | x_r) + lambda q(m | x_f)),  and w_f likewise.
    s makes the second gradient a tenth as long as the first. Retain images stand for the whole training set, of which
    targets are a small share. With prompts, m has that of the picture that it was noised from.
    """
    targets, others = lesson.targets(step, lesson.both), lesson.others(step, lesson.both)
    x_f, x_r, point = targets.x_0, others.x_0, targets.point
    from_target = torch.rand(len(x_f), generator=_generator(lesson, step)).to(x_f.device) < MIXTURE
    m = torch.where(over(from_target), targets.x_t, targets.replaced(x_r).x_t)
    conditioning = {
        name: torch.where(from_target.view(-1, *[1] * (table.ndim - 1)), table, others.conditioning[name])
        for name, table in targets.conditioning.items()
    }
    prediction = lesson.model.predict(m, targets.time, conditioning)

    a, b, alpha, beta = (over(part) for part in (point.a, point.b, point.alpha, point.beta))
    noise_f, noise_r = (m - a * x_f) / b, (m - a * x_r) / b
    # log q up to what both have in common.
    log_f, log_r = (-noise.double().square().flatten(1).sum(1) / 2 for noise in (noise_f, noise_r))
    w_f = 1 / (MIXTURE + (1 - MIXTURE) * (log_r - log_f).exp())
    w_r = 1 / ((1 - MIXTURE) + MIXTURE * (log_f - log_r).exp())
    loss_f = (w_f * squared(prediction - (alpha * noise_f + beta * x_f))).mean()
    loss_r = (w_r * squared(prediction - (alpha * noise_r + beta * x_r))).mean()
    retain = lesson.gradient(loss_r, again=True)
    return _subtracted(retain, lesson.gradient(loss_f))


def siss_without_sampling(lesson: Lesson, step: int) -> Gradient:
    """Return grad L(x_r) - s grad L(x_f): SISS without importance sampling ("No IS" in the same paper)."""
    retain = lesson.gradient(_others(lesson, step).loss())
    return _subtracted(retain, lesson.gradient(_targets(lesson, step).loss()))


def esd(lesson: Lesson, step: int) -> Gradient:
    """Return the gradient of |p(x, c) - (p'(x, none) - eta (p'(x, c) - p'(x, none)))|^2 (Gandikota et al., 2303.07345).

    c is the prompt of the request, and p' the base model. The paper takes x from half-finished samples under c; here x
    is a noised target, so that passes go into steps. Raises InputError where no target has a prompt of its own.
    """
    prompts = lesson.forget.prompt
    same = [_same(table[prompts], lesson.empty[name]) for name, table in lesson.conditioning.items()]
    named = ~torch.stack(same).all(0) if same else torch.zeros(len(prompts), dtype=torch.bool)
    if not named.any():
        raise InputError("--arms: esd needs targets with prompts of their own", hint="leave it out")
    batch = lesson.targets(step, lesson.both, torch.nonzero(named).flatten())
    first = torch.zeros(len(batch.x_0), dtype=torch.long)
    nothing = {name: table[first].to(batch.x_0.device) for name, table in lesson.empty.items()}
    with torch.no_grad(), lesson.frozen():
        unguided, guided = batch.predict(nothing), batch.predict()
    return lesson.gradient(batch.loss(unguided - GUIDANCE * (guided - unguided)))


def _targets(lesson: Lesson, step: int) -> Batch:
    return lesson.targets(step, lesson.training.forget_batch)


def _others(lesson: Lesson, step: int) -> Batch:
    return lesson.others(step, lesson.training.retain_batch)


def _subtracted(retain: Gradient, forget: Gradient) -> Gradient:
    length = math.sqrt(dot(forget, forget))
    return combine(retain, forget, -FORGET_NORM * math.sqrt(dot(retain, retain)) / length if length else 0.0)


def _same(tables: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Tell which rows of `tables` [N, ...] are the one of `row` [1, ...], bool [N]; batches round differently."""
    return torch.isclose(tables, row, 1e-4, 1e-4).reshape(len(tables), -1).all(1)


def _generator(lesson: Lesson, step: int) -> torch.Generator:
    """Return the generator of what a step draws besides rows, times and noise."""
    return torch.Generator().manual_seed(lesson.training.seed * 1_000_003 + step)
