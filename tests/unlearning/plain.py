"""One step of gradient surgery in plain torch and float64: the oracle of the engine's tests.

It is written from the formulas, on whole gradients, and shares nothing with the product. For K forget gradients g_k,
the retain gradient r, and a weight w:

- none: r + w / K sum_k g_k
- retain_normal: r + w / K sum_k (g_k - min(0, <g_k, r>) / <r, r> r)
- pcgrad: every one of w / K g_1, ..., w / K g_K, r is projected off each other that it points against, in random order;
  then they are added up (Yu et al., arXiv 2001.06782, algorithm 1)

<a, b> is sum_n p_n a_n b_n. In the Euclidean geometry p is 1; in that of the optimizer it is what AdamW multiplies a
gradient by, 1 / (sqrt(v / (1 - beta2^t)) + eps), with its state after the step before.

The clip comes last: the combination is scaled down to the Euclidean norm `clip` where it is longer.
"""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.settings import TrainingSettings

Vector = Tensor
"""float64 [n]: a gradient, or the part of it on which surgery works at once."""


@dataclass(frozen=True)
class Operation:
    gradient: Vector
    """Combined and clipped."""
    norm: float
    """Before the clip; Euclidean."""
    cosine: float
    """Of a forget gradient and the retain gradient, mean over the forget gradients."""
    conflict: float
    """The share of forget gradients that point against the retain gradient."""


def operate(
    gradients: Sequence[Vector],
    parts: Sequence[Tensor],
    training: TrainingSettings,
    step: int,
    preconditioner: Vector | None = None,
) -> Operation:
    """gradients: K forget gradients and the retain gradient. parts: indices [m] of what is projected on its own.

    preconditioner: p; without it 1.
    """
    p = torch.ones_like(gradients[-1]) if preconditioner is None else preconditioner
    combined = torch.zeros_like(gradients[-1])
    for part in parts:
        # With a = sqrt(p) g the inner product is the plain one, and so is every formula.
        root = p[part].sqrt()
        forget, retain = [root * g[part] for g in gradients[:-1]], root * gradients[-1][part]
        done = _SURGERIES[training.surgery](forget, retain, training.forget_weight, training.seed + step)
        combined[part] = done / root
    norm = combined.square().sum().sqrt().item()
    dots = [torch.dot(p * g, gradients[-1]).item() for g in gradients[:-1]]
    lengths = [((p * g * g).sum().sqrt() * (p * gradients[-1].square()).sum().sqrt()).item() for g in gradients[:-1]]
    cosines = [dot / length if length else 0.0 for dot, length in zip(dots, lengths, strict=True)]
    return Operation(
        combined * min(1.0, training.clip / norm) if norm else combined,
        norm,
        sum(cosines) / len(cosines),
        sum(dot < 0 for dot in dots) / len(dots),
    )


def _none(forget: list[Vector], retain: Vector, weight: float, seed: int) -> Vector:
    return retain + weight / len(forget) * sum(forget, torch.zeros_like(retain))


def _retain_normal(forget: list[Vector], retain: Vector, weight: float, seed: int) -> Vector:
    length = torch.dot(retain, retain)
    if length == 0:
        return _none(forget, retain, weight, seed)
    return _none([g - torch.dot(g, retain).clamp(max=0) / length * retain for g in forget], retain, weight, seed)


def _pcgrad(forget: list[Vector], retain: Vector, weight: float, seed: int) -> Vector:
    gradients = [*(weight / len(forget) * g for g in forget), retain]
    generator, total = torch.Generator().manual_seed(seed), torch.zeros_like(retain)
    for i, gradient in enumerate(gradients):
        projected = gradient
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            if j != i and (dot := torch.dot(projected, gradients[j])) < 0:
                projected = projected - dot / torch.dot(gradients[j], gradients[j]) * gradients[j]
        total = total + projected
    return total


_SURGERIES: dict[str, Callable[[list[Vector], Vector, float, int], Vector]] = {
    "none": _none,
    "retain_normal": _retain_normal,
    "pcgrad": _pcgrad,
}


def gradient_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Vector:
    """The whole gradient of one loss; where it does not depend on a parameter, 0."""
    parts = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten().double() for part in parts])


def preconditioner_of(optimizer: torch.optim.AdamW, parameters: Sequence[nn.Parameter]) -> Vector:
    """What AdamW multiplies each number of a gradient by, from its state."""
    (beta2,) = {group["betas"][1] for group in optimizer.param_groups}
    (eps,) = {group["eps"] for group in optimizer.param_groups}
    states = [optimizer.state[p] for p in parameters]
    parts = [1 / ((state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + eps) for state in states]
    return torch.cat([part.flatten().double() for part in parts])


def hand_over(gradient: Vector, parameters: Sequence[nn.Parameter]) -> None:
    """Make it what an optimizer will step with."""
    pieces = gradient.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)


def write(path: Path, module: str, results: dict[str, object]) -> None:
    """What `python -m module` found, with the environment that it ran in."""
    environment = {
        "command": f"python -m {module}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    path.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")


def read(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text())["results"]
