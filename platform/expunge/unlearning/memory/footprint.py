"""The properties of a model and of its training that memory depends on, counted without weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expunge.families.architectures import Architecture, architecture
from expunge.settings import ModelSettings, TrainingSettings
from expunge.unlearning.adapter import kind_of
from expunge.unlearning.memory.activations import activation_bytes


@dataclass(frozen=True)
class Footprint:
    """One model under one way of training it."""

    parameters: int
    trained: int
    frozen_copy: bool
    """The frozen model is held beside the trained one, as its weights are trained in full."""
    weight_bytes: int
    """Bytes per weight, and per element of the gradient."""
    largest: int
    """Parameters of the largest block: stage 3 gathers one at a time."""
    activations: int
    """Bytes that autograd keeps of one micro-batch."""


def footprint(
    name: str, models: Mapping[str, ModelSettings], training: TrainingSettings, micro_batch: int
) -> Footprint:
    """Count a published or configured model.

    micro_batch: samples in the network at once. Raises InputError where there is no such model, or where it cannot be
    trained as `training.adapter` asks.
    """
    return footprint_of(lambda: architecture(name, models), training, micro_batch)


def footprint_of(build: Callable[[], Architecture], training: TrainingSettings, micro_batch: int) -> Footprint:
    """Count what `build` makes on fake tensors. Raises InputError as `footprint` does."""
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    with _default_dtype(dtype), FakeTensorMode(allow_non_fake_inputs=True):
        model = build()
        lora = kind_of(model.family.lora_targets, training) == "lora"
        parameters = _count(model.network.parameters())
        model.network.requires_grad_(not lora)
        trained = add_lora(model.network, model.family.lora_targets, training.lora_rank) if lora else parameters
        kept = activation_bytes(model, micro_batch, dtype, checkpointing=training.activation_checkpointing)
        return Footprint(
            parameters=parameters + (trained if lora else 0),
            trained=trained,
            frozen_copy=not lora,
            weight_bytes=dtype.itemsize,
            largest=max(_count(block.parameters()) for block in model.blocks),
            activations=kept,
        )


class _Lora(nn.Module):
    """A linear layer with a low-rank path beside it, as peft makes it, which cannot work on fake tensors."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


def add_lora(network: nn.Module, targets: tuple[str, ...], rank: int) -> int:
    """Put low-rank paths beside the linear layers whose names end as one of `targets`.

    Returns how many parameters they have.
    """
    layers = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets)
    ]
    for name, module in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, _Lora(module, rank))
    return sum(rank * (module.in_features + module.out_features) for _, module in layers)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
