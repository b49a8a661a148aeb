"""The peers of `bench_kernels`: the same work as others write it. A surgery overwrites the retain gradient.

A gradient is a list of tensors; `forget`, `retain` lists of the same shapes.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from unlearn_kernels import (
    clip_coefficient,
    combine_,
    gram,
    regression_loss,
    retain_normal,
    surgery,
    weighted_loss,
)

MAX_NORM = 1.0
Gradient = list[Tensor]
Surgery = Callable[[Gradient, Gradient], None]


def ours(forget: Gradient, retain: Gradient) -> None:
    matrix = gram([forget, retain])
    coefficients = retain_normal(matrix)
    combine_(retain, [forget, retain], coefficients * clip_coefficient(matrix, coefficients, MAX_NORM))


def eager(forget: Gradient, retain: Gradient) -> None:
    """Concatenate, dot, project, clip, write back."""
    f, r = torch.cat([g.flatten() for g in forget]), torch.cat([g.flatten() for g in retain])
    dot = torch.dot(f, r)
    if dot < 0:
        f = f - dot / torch.dot(r, r) * r
    total = f + r
    total = total * torch.clamp(MAX_NORM / torch.linalg.vector_norm(total), max=1.0)
    for gradient, part in zip(retain, total.split([g.numel() for g in retain]), strict=True):
        gradient.copy_(part.view_as(gradient))


def foreach(forget: Gradient, retain: Gradient) -> None:
    """Do the same with operations fused over the list, one pass each, without concatenating."""
    dot = torch.stack([product.sum() for product in torch._foreach_mul(forget, retain)]).sum()
    against = dot.clamp(max=0) / torch.stack(torch._foreach_norm(retain)).square().sum()
    torch._foreach_mul_(retain, 1 - against)
    torch._foreach_add_(retain, forget)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(retain)))
    torch._foreach_mul_(retain, torch.clamp(MAX_NORM / norm, max=1.0))


def _branchless(forget: Gradient, retain: Gradient) -> None:
    """`eager` without its branch, which would break the graph."""
    f, r = torch.cat([g.flatten() for g in forget]), torch.cat([g.flatten() for g in retain])
    total = f - torch.dot(f, r).clamp(max=0) / torch.dot(r, r) * r + r
    total = total * torch.clamp(MAX_NORM / torch.linalg.vector_norm(total), max=1.0)
    for gradient, part in zip(retain, total.split([g.numel() for g in retain]), strict=True):
        gradient.copy_(part.view_as(gradient))


compiled: Surgery = torch.compile(_branchless, fullgraph=True, dynamic=False)


def _gram_in_torch(forget: Gradient, retain: Gradient) -> None:
    """Write our algebra in torch, to see what the kernels themselves add: three dots in one pass, one combination."""
    pairs = list(zip(forget, retain, strict=True))
    ff = torch.stack([(f.float() * f.float()).sum() for f in forget]).sum()
    fr = torch.stack([(f.float() * r.float()).sum() for f, r in pairs]).sum()
    rr = torch.stack([(r.float() * r.float()).sum() for r in retain]).sum()
    c = 1 - fr.clamp(max=0) / rr
    norm = (ff + 2 * c * fr + c * c * rr).clamp(min=0).sqrt()
    clip = torch.clamp(MAX_NORM / norm, max=1.0)
    for f, r in pairs:
        r.copy_(clip * (f.float() + c * r.float()))


compiled_gram: Surgery = torch.compile(_gram_in_torch, fullgraph=True, dynamic=False)


def loop(gradients: Tensor) -> Tensor:
    """Run PCGrad as it is usually written: project every gradient off every other, [K, N] -> [N]."""
    projected = [gradient.clone() for gradient in gradients]
    for gradient in projected:
        others = list(gradients)
        random.shuffle(others)
        for other in others:
            dot = torch.dot(gradient, other)
            if dot < 0:
                gradient -= dot * other / other.norm() ** 2
    return torch.stack(projected).mean(0)


def loop_of_lists(forget: Gradient, retain: Gradient) -> None:
    """Do the same from and into the gradients of a model."""
    gradients = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in (forget, retain)])
    for gradient, part in zip(retain, loop(gradients).split([g.numel() for g in retain]), strict=True):
        gradient.copy_(part.view_as(gradient))


def libmtl(gradients: Tensor) -> Tensor:
    """Run the operations of LibMTL 1.1.5's PCGrad on its matrix of gradients, without its backward passes."""
    projected = gradients.clone()
    for i in range(len(gradients)):
        for j in random.sample(range(len(gradients)), len(gradients)):
            dot = torch.dot(projected[i], gradients[j])
            if dot < 0:
                projected[i] -= dot * gradients[j] / (gradients[j].norm().pow(2))
                (dot / (gradients[j].norm().pow(2))).item()
    return projected.sum(0).clone()


def torchjd(gradients: Tensor) -> Tensor:
    from torchjd.aggregation import PCGrad

    return PCGrad()(gradients)


def ours_matrix(gradients: Tensor) -> Tensor:
    """Do what TorchJD's PCGrad does, and overwrite the last row."""
    combine_(gradients[-1], gradients, surgery("pcgrad", gram(gradients)))
    return gradients[-1]


Loss = Callable[[Tensor, list[Tensor], Tensor, Tensor], Tensor]


def eager_loss(pred: Tensor, terms: list[Tensor], coefficients: Tensor, weight: Tensor) -> Tensor:
    """Compute the loss as training scripts do, including diffusers': target in the tensors' dtype, loss in float32."""
    target = _target(pred, terms, coefficients)
    weights = weight.view(-1, *[1] * (pred.ndim - 1)).to(torch.promote_types(torch.float32, pred.dtype))
    squares = weights * (pred.to(weights.dtype) - target.to(weights.dtype)) ** 2
    return squares.reshape(len(pred), -1).mean(1).mean()


def narrow_loss(pred: Tensor, terms: list[Tensor], coefficients: Tensor, weight: Tensor) -> Tensor:
    """Use the fewest passes that eager torch allows, in the tensors' dtype; in bfloat16 the error is 1e-3."""
    squares = (pred - _target(pred, terms, coefficients)).square().flatten(1).mean(1)
    return (weight.to(pred.dtype) * squares).mean()


def _target(pred: Tensor, terms: list[Tensor], coefficients: Tensor) -> Tensor:
    columns = [column.to(pred.dtype).view(-1, *[1] * (pred.ndim - 1)) for column in coefficients.unbind(1)]
    first, *others = (c * term for c, term in zip(columns, terms, strict=True))
    return sum(others, first)


compiled_loss: Loss = torch.compile(eager_loss, fullgraph=True, dynamic=False)


def our_loss(pred: Tensor, terms: list[Tensor], coefficients: Tensor, weight: Tensor) -> Tensor:
    if len(terms) == 3:
        eps, x_f, x_s = terms
        return weighted_loss(pred, eps, x_f, x_s, coefficients, weight)
    return regression_loss(pred, terms, coefficients, weight)
