"""What `test_engine.py` compares: small problems, the settings they run under, and the same steps in plain torch."""

import copy
import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.settings import OFFLOAD_STAGES, TrainingSettings
from unlearn_kernels import clip_coefficient, combine_, conflicts, cosines, gram, retain_normal

# Of the targets, a step each: without gradients of different size AdamW, which divides by it, would hide the clip.
SIZES = (4.0, 0.25, 2.0, 0.5)
STEPS = len(SIZES)
SAMPLES = 8
COMMITTED = Path(__file__).with_name("trajectories.json")

Batch = tuple[Tensor, Tensor]
Record = dict[str, Any]


class Network(nn.Sequential):
    def forward(self, x: Tensor, start: int = 0) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        for layer in list(self)[start:]:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Case:
    """Objectives whose targets lie `signs` times one way from what the network says: -1 against 1 conflict."""

    signs: tuple[float, ...]
    sizes: tuple[int, ...] = (5, 7, 3)
    """Odd: two ranks pad the partition, and its boundary falls inside a tensor."""
    bias: bool = True
    training: tuple[tuple[str, object], ...] = ()

    def network(self) -> Network:
        """The last layer is frozen."""
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(self.sizes):
            layers += [nn.Linear(wide, narrow, bias=self.bias), nn.Tanh()]
        return Network(*layers, nn.Linear(self.sizes[-1], self.sizes[0]).requires_grad_(False))

    def batches(self) -> list[list[Batch]]:
        """Per step one batch an objective, all on the same inputs."""
        network, generator = self.network(), torch.Generator().manual_seed(11)
        steps = []
        for size in SIZES:
            x = torch.randn(SAMPLES, self.sizes[0], generator=generator)
            with torch.no_grad():
                here = network(x)
            away = size * (1 + 0.1 * torch.randn(here.shape, generator=generator))
            noise = [0.3 * size * torch.randn(here.shape, generator=generator) for _ in self.signs]
            steps.append([(x, here + sign * away + n) for sign, n in zip(self.signs, noise, strict=True)])
        return steps

    def settings(self, **more: object) -> TrainingSettings:
        return TrainingSettings.model_validate({"learning_rate": 1e-2, **dict(self.training), **more})


def case(signs: tuple[float, ...], **training: object) -> Case:
    return Case(signs, training=tuple({"clip": 0.05, **training}.items()))


CASES: dict[str, Case] = {
    "conflict": case((-1, 1)),
    "aligned": case((1, 1)),
    "unclipped": case((-1, 1), clip=1e6),
    "three": case((-1, 1, 1), forget_weight=0.7),
    "summed": case((-1, 1), surgery="none"),
    # One trainable number: the second rank's shard is nothing but padding.
    "tiny": replace(case((-1, 1)), sizes=(1, 1), bias=False),
    "layer": case((-1, 1, 1), surgery_granularity="layer"),
    "tensor": case((-1, 1, 1), surgery_granularity="tensor"),
    "pcgrad": case((-1, 1, 1), surgery="pcgrad"),
    # The retain objective does not see the first layer.
    "unused": case((-1, 1)),
    # The forget objective, the first of a step, does not: the step before must have left it nothing.
    "late": case((-1, 1)),
}


@dataclass(frozen=True)
class Variant:
    """One way to run a case."""

    case: str
    stage: int
    precision: str = "fp32"
    micro_batches: int = 1
    offload: bool = False

    @property
    def name(self) -> str:
        end = "-offload" if self.offload else ""
        return f"{self.case}-stage{self.stage}-{self.precision}-{self.micro_batches}x{end}"

    def settings(self) -> TrainingSettings:
        return CASES[self.case].settings(
            zero_stage=self.stage, precision=self.precision, offload_optimizer=self.offload
        )


STAGES = (0, 1, 2, 3)
VARIANTS = {
    variant.name: variant
    for variant in [
        *(Variant(name, stage) for name in CASES for stage in STAGES),
        *(Variant(name, stage, micro_batches=n) for name in ("conflict", "three") for stage in STAGES for n in (2, 4)),
        *(Variant(name, stage, "bf16") for name in ("conflict", "aligned", "three") for stage in (1, 2, 3)),
        *(Variant("conflict", stage, "bf16", micro_batches=4) for stage in (1, 2, 3)),
        *(Variant(name, stage, offload=True) for name in ("conflict", "tiny") for stage in OFFLOAD_STAGES),
        *(Variant("three", stage, micro_batches=2, offload=True) for stage in OFFLOAD_STAGES),
        *(Variant("conflict", stage, "bf16", offload=True) for stage in OFFLOAD_STAGES),
    ]
}


# In "tiny" the second rank holds nothing.
ELASTIC = [
    name
    for name, variant in VARIANTS.items()
    if variant.micro_batches == 1 and variant.case in ("conflict", "unused", "tiny")
]


def loss_of(name: str, network: nn.Module, objective: int, batch: Batch) -> Tensor:
    x, y = batch
    if (name, objective) in (("unused", 1), ("late", 0)):
        return nn.functional.mse_loss(network(nn.functional.pad(x, (0, 2)), start=2), y)
    return nn.functional.mse_loss(network(x), y)


def reference(name: str) -> tuple[list[Tensor], list[Record]]:
    """The same steps in one process: one `autograd.grad` an objective, surgery on whole gradients, plain AdamW."""
    this = CASES[name]
    network, training = this.network(), this.settings()
    names, trained = zip(*[(n, p) for n, p in network.named_parameters() if p.requires_grad], strict=True)
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    records: list[Record] = []
    for step, batches in enumerate(this.batches()):
        losses = [loss_of(name, network, k, batch) for k, batch in enumerate(batches)]
        gradients = [
            list(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)) for loss in losses
        ]
        parts = _parts(list(names), training.surgery_granularity)
        grams = [gram([[g[i] for i in part] for g in gradients]) for part in parts]
        chosen = [_coefficients(matrix, training, step) for matrix in grams]
        square = sum(float(c @ matrix @ c) for c, matrix in zip(chosen, grams, strict=True))
        clip = clip_coefficient(torch.tensor([[square]]), torch.ones(1), training.clip)
        combined = copy.deepcopy(gradients[-1])
        for part, c in zip(parts, chosen, strict=True):
            combine_([combined[i] for i in part], [[g[i] for i in part] for g in gradients], c * clip)
        for parameter, gradient in zip(trained, combined, strict=True):
            parameter.grad = gradient
        optimizer.step()
        whole = gram(gradients)
        records.append(
            {
                "losses": [loss.item() for loss in losses],
                "cosine": cosines(whole).mean().item(),
                "conflict": conflicts(whole).double().mean().item(),
                "norm": max(0.0, square) ** 0.5,
            }
        )
    return [p.detach() for p in network.parameters()], records


def _coefficients(matrix: Tensor, training: TrainingSettings, step: int) -> Tensor:
    count = len(matrix) - 1
    if training.surgery == "none":
        return torch.tensor([*[training.forget_weight / count] * count, 1.0], dtype=torch.float64)
    if training.surgery == "retain_normal":
        return retain_normal(matrix, training.forget_weight)
    from unlearn_kernels import weighting

    return weighting(training.surgery, matrix, training.forget_weight, seed=training.seed + step)


def _parts(names: list[str], granularity: str) -> list[list[int]]:
    """For an `nn.Sequential`, whose names are `0.weight`, `0.bias`, `2.weight`, ..."""
    if granularity == "global":
        return [list(range(len(names)))]
    if granularity == "tensor":
        return [[i] for i in range(len(names))]
    layers = dict.fromkeys(name.split(".")[0] for name in names)
    return [[i for i, name in enumerate(names) if name.split(".")[0] == layer] for layer in layers]


def commit() -> None:
    """`python -m tests.unlearning.engine_cases` writes the trajectories anew, after a change that is meant."""
    found = {}
    for name in CASES:
        weights, records = reference(name)
        found[name] = {"records": records, "weights": [[float(f"{v:.7g}") for v in w.flatten()] for w in weights]}
    COMMITTED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    commit()
