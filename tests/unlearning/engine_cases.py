"""The cases of `test_engine.py`: small problems, the settings they run under, and the same steps in plain torch."""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.settings import OFFLOAD_STAGES, TrainingSettings
from tests.unlearning import plain

# The size of the targets, step by step. AdamW divides by the size of gradients, so equal ones would hide the clip.
SIZES = (4.0, 0.25, 2.0, 0.5)
STEPS = len(SIZES)
# After so many steps AdamW's second moment decides the geometry: fewer than a checkpoint's, so that resuming reads it.
WARM_UP = 1
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
    """Objectives whose targets differ from the network's outputs by `signs` times one vector: -1 and 1 conflict."""

    signs: tuple[float, ...]
    sizes: tuple[int, ...] = (5, 7, 3)
    """The widths of layers. They are odd, so two ranks pad the partition, whose boundary falls inside a tensor."""
    bias: bool = True
    training: tuple[tuple[str, object], ...] = ()

    def network(self) -> Network:
        """Make the network; its last layer is frozen."""
        torch.manual_seed(3)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(self.sizes):
            layers += [nn.Linear(wide, narrow, bias=self.bias), nn.Tanh()]
        return Network(*layers, nn.Linear(self.sizes[-1], self.sizes[0]).requires_grad_(False))

    def batches(self) -> list[list[Batch]]:
        """Make one batch per step and objective. The objectives of a step have the same inputs."""
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
    return Case(signs, training=tuple({"clip": 0.05, "forget_weight": 0.5, **training}.items()))


CASES: dict[str, Case] = {
    "conflict": case((-1, 1)),
    "aligned": case((1, 1)),
    "unclipped": case((-1, 1), clip=1e6),
    "three": case((-1, 1, 1), forget_weight=0.7),
    "summed": case((-1, 1), surgery="none"),
    # With one trainable number the second rank's shard is nothing but padding.
    "tiny": replace(case((-1, 1)), sizes=(1, 1), bias=False),
    "layer": case((-1, 1, 1), surgery_granularity="layer"),
    "tensor": case((-1, 1, 1), surgery_granularity="tensor"),
    "preconditioned": case((-1, 1, 1), surgery_geometry="optimizer"),
    "preconditioned-layer": case((-1, 1, 1), surgery_geometry="optimizer", surgery_granularity="layer"),
    "preconditioned-tensor": case((-1, 1, 1), surgery_geometry="optimizer", surgery_granularity="tensor"),
    "preconditioned-tiny": replace(case((-1, 1), surgery_geometry="optimizer"), sizes=(1, 1), bias=False),
    "pcgrad": case((-1, 1, 1), surgery="pcgrad"),
    # The retain objective does not see the first layer.
    "unused": case((-1, 1)),
    # The forget objective does not. It is the first of a step, so the step before must have left no gradient behind.
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
# Cases that depend on where a stage keeps a gradient run on every stage; what the host decides from the Gram matrix
# runs on one.
EVERYWHERE = ("conflict", "tiny", "unused", "late", "layer", "tensor")
PRECONDITIONED = ("preconditioned", "preconditioned-layer", "preconditioned-tensor", "preconditioned-tiny")
ONCE = {"aligned": 0, "pcgrad": 0, "summed": 1, "unclipped": 2}
# One of each behaviour, and each stage: these run in the fast tier, on two ranks.
FAST = {
    *(f"conflict-stage{stage}-fp32-1x" for stage in STAGES),
    *(f"preconditioned-stage{stage}-fp32-1x" for stage in STAGES),
    "preconditioned-tiny-stage1-fp32-1x",
    "preconditioned-tensor-stage2-fp32-1x",
    "aligned-stage0-fp32-1x",
    "pcgrad-stage0-fp32-1x",
    "tensor-stage0-fp32-1x",
    "summed-stage1-fp32-1x",
    "tiny-stage1-fp32-1x",
    "three-stage1-fp32-2x",
    "conflict-stage1-bf16-1x",
    "conflict-stage1-fp32-1x-offload",
    "layer-stage2-fp32-1x",
    "unclipped-stage2-fp32-1x",
    "late-stage3-fp32-1x",
    "unused-stage3-fp32-1x",
}
VARIANTS = {
    variant.name: variant
    for variant in [
        *(Variant(name, stage) for name in EVERYWHERE for stage in STAGES),
        *(Variant(name, stage) for name in PRECONDITIONED for stage in STAGES),
        *(Variant("preconditioned", stage, "bf16") for stage in (1, 2, 3)),
        *(Variant("preconditioned", 3, precision, offload=True) for precision in ("fp32", "bf16")),
        *(Variant(name, stage) for name, stage in ONCE.items()),
        *(Variant("three", stage, micro_batches=2) for stage in STAGES),
        *(Variant("conflict", stage, micro_batches=4) for stage in STAGES),
        *(Variant("conflict", stage, "bf16") for stage in (1, 2, 3)),
        *(Variant("three", stage, "bf16", micro_batches=4) for stage in (1, 2, 3)),
        *(Variant(name, stage, offload=True) for name in ("conflict", "tiny") for stage in OFFLOAD_STAGES),
        *(Variant("three", stage, micro_batches=2, offload=True) for stage in OFFLOAD_STAGES),
        *(Variant("conflict", stage, "bf16", offload=True) for stage in OFFLOAD_STAGES),
    ]
}

# Those that run on one rank, too, where nothing is padded and nothing is sent.
ALONE = {name for name, variant in VARIANTS.items() if variant.case in ("conflict", "three", "tiny", "preconditioned")}
# Those that go on on another number of ranks. In "tiny" the second rank holds nothing.
ELASTIC_CASES = ("conflict", "tiny", "preconditioned", "preconditioned-tiny")
ELASTIC = {
    name
    for name, variant in VARIANTS.items()
    if variant.micro_batches == 1 and variant.case in ELASTIC_CASES and not variant.offload
}


def loss_of(name: str, network: nn.Module, objective: int, batch: Batch) -> Tensor:
    x, y = batch
    if (name, objective) in (("unused", 1), ("late", 0)):
        return nn.functional.mse_loss(network(nn.functional.pad(x, (0, 2)), start=2), y)
    return nn.functional.mse_loss(network(x), y)


def reference(name: str) -> tuple[list[Tensor], list[Record]]:
    """The same steps in one process and in float64: final weights of every parameter, and what each step said."""
    this = CASES[name]
    network, training = this.network().double(), this.settings()
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    parameters, parts = list(trained.values()), parts_of(trained, training.surgery_granularity)
    optimizer = torch.optim.AdamW(parameters, lr=training.rate("full"), weight_decay=0.0)
    records: list[Record] = []
    for step, batches in enumerate(this.batches()):
        losses = [loss_of(name, network, k, (x.double(), y.double())) for k, (x, y) in enumerate(batches)]
        gradients = [plain.gradient_of(loss, parameters) for loss in losses]
        warm = training.surgery_geometry == "optimizer" and step >= WARM_UP
        p = plain.preconditioner_of(optimizer, parameters) if warm else None
        done = plain.operate(gradients, parts, training, step, p)
        plain.hand_over(done.gradient, parameters)
        optimizer.step()
        figures = {"cosine": done.cosine, "conflict": done.conflict, "norm": done.norm}
        records.append({"losses": [loss.item() for loss in losses], **figures})
    return [p.detach() for p in network.parameters()], records


def parts_of(trained: dict[str, nn.Parameter], granularity: str) -> list[Tensor]:
    """Where in a whole gradient lies what is projected on its own; a layer's tensors are `0.weight` and `0.bias`."""
    depth = {"global": 0, "layer": 1, "tensor": 2}[granularity]
    owners = [name.split(".")[:depth] for name, parameter in trained.items() for _ in range(parameter.numel())]
    distinct = [owner for index, owner in enumerate(owners) if owner not in owners[:index]]
    return [torch.tensor([i for i, mine in enumerate(owners) if mine == owner]) for owner in distinct]


def commit() -> None:
    """`python -m tests.unlearning.engine_cases` writes the trajectories anew, after a change that is meant."""
    found: dict[str, object] = {}
    for name in CASES:
        weights, records = reference(name)
        found[name] = {"records": records, "weights": [[float(f"{v:.9g}") for v in w.flatten()] for w in weights]}
    plain.write(COMMITTED, "tests.unlearning.engine_cases", found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    commit()
