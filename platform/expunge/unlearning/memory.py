"""What a job needs of each GPU, before one is rented: counted from the network's architecture, without its weights.

Bytes a GPU, P parameters, T of them trained, N GPUs, K forget gradients beside the retain gradient:

- weights: all of them; sharded over the GPUs from stage 3 on. Full fine-tuning holds the frozen model beside
  them, whole and in float32.
- gradient: T; from stage 2 on the reduced shard alone, and at stage 1 both, as it keeps the memory of its shards.
- stash: K shards of T / N; at stage 0, K whole gradients.
- optimizer: float32 moments and weights, 12 bytes a trained parameter, sharded from stage 1 on. In float32, stages 0
  and 3 step the network's own weights and need 8, while 1 and 2 make a copy.
- activations: what autograd keeps, counted on fake tensors; in full, or recomputed block by block.

With the optimizer on the host (stages 1 and 3) its bytes are there, with float32 weights in either precision, a float32
gradient, and T / N numbers more: new weights on their way at stage 1, the reduced gradient at stage 3. There stage 3
has its stash, too.

Not counted: the CUDA context, fragmentation, communication buckets (`RESERVE` stands for them), the text encoders and
the autoencoder, which the training loop does not need.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expunge.families.architectures import Architecture, architecture
from expunge.settings import OFFLOAD_STAGES, ModelSettings, TrainingSettings
from expunge.unlearning.objectives import Mode

STAGES = (0, 1, 2, 3)

RESERVE = 0.08
"""Share of a GPU that is left free for what is not counted. A guess: no GPU has run this."""

OFFLOADED_BYTES = 16
"""A trained parameter, in float32 on the host: two moments, the weight, and the gradient."""


@dataclass(frozen=True)
class Footprint:
    """What memory depends on, of one model under one way of training it."""

    parameters: int
    trained: int
    frozen_copy: bool
    weight_bytes: int
    """Of one weight and of one gradient element."""
    largest: int
    """Parameters of the largest block: stage 3 gathers one at a time."""
    activations: int
    """Bytes that autograd keeps of one micro-batch."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, and of host memory for each."""

    stage: int
    tasks: Mode
    weights: int
    gradient: int
    stash: int
    optimizer: int
    activations: int
    host: int
    """Of the optimizer where that is offloaded; else 0."""

    @property
    def total(self) -> int:
        """Of the GPU."""
        return self.weights + self.gradient + self.stash + self.optimizer + self.activations

    def fits(self, gpu_bytes: int) -> bool:
        return self.total <= (1 - RESERVE) * gpu_bytes

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "total": self.total}


def footprint(
    name: str, models: Mapping[str, ModelSettings], training: TrainingSettings, micro_batch: int
) -> Footprint:
    """Count a published or configured model. Raises InputError where there is no such model."""
    dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
    with _default_dtype(dtype), FakeTensorMode(allow_non_fake_inputs=True):
        model = architecture(name, models)
        lora = training.adapter != "full" and bool(model.lora_targets)
        parameters = _count(model.network.parameters())
        model.network.requires_grad_(not lora)
        trained = add_lora(model, training.lora_rank) if lora else parameters
        kept = activation_bytes(model, micro_batch, dtype, checkpointing=training.activation_checkpointing)
        return Footprint(
            parameters=parameters + (trained if lora else 0),
            trained=trained,
            frozen_copy=not lora,
            weight_bytes=dtype.itemsize,
            largest=max(_count(block.parameters()) for block in model.blocks),
            activations=kept,
        )


def estimate(
    footprint: Footprint, stage: int, tasks: Mode, *, gpus: int, requests: int, offload: bool = False
) -> Estimate:
    """Bytes a GPU for a ZeRO stage; `tasks` says whether the forget gradients are kept apart per request.

    offload: the optimizer is on the host. The stage is then one of OFFLOAD_STAGES.
    """
    f = footprint
    gpus_or_one = gpus if stage >= 1 else 1
    shard = -(-f.trained // gpus_or_one)
    weights = f.parameters * f.weight_bytes
    if stage == 3:
        weights = -(-weights // gpus) + f.largest * f.weight_bytes
    if f.frozen_copy:
        # It stands outside of DeepSpeed: every GPU has all of it, in float32.
        weights += f.parameters * torch.float32.itemsize
    gradient = ((f.trained if stage < 2 else 0) + (shard if stage >= 1 else 0)) * f.weight_bytes
    stash = (requests if tasks == "request" else 1) * shard * f.weight_bytes
    optimizer = shard * (8 if f.weight_bytes == 4 and stage in (0, 3) else 12)
    host = 0
    if offload:
        host, optimizer = shard * (OFFLOADED_BYTES + f.weight_bytes), 0
        if stage == 3:
            host, gradient, stash = host + stash, 0, 0
    return Estimate(stage, tasks, weights, gradient, stash, optimizer, f.activations, host)


def estimates(footprint: Footprint, *, gpus: int, requests: int, offload: bool = False) -> list[Estimate]:
    """Every stage that there is with either kind of tasks, the cheaper communication first."""
    kinds: tuple[Mode, ...] = ("request", "batch")
    stages = OFFLOAD_STAGES if offload else STAGES
    return [
        estimate(footprint, stage, kind, gpus=gpus, requests=requests, offload=offload)
        for stage in stages
        for kind in kinds
    ]


def choose(options: list[Estimate], gpu_bytes: int) -> Estimate | None:
    """Gradients per request if any stage holds them, by the lowest stage from 1 on; None where nothing fits.

    Stage 0 is left out: it replicates the optimizer and saves no communication against stage 1.
    """
    fitting = [option for option in options if option.stage >= 1 and option.fits(gpu_bytes)]
    return min(fitting, key=lambda option: (option.tasks != "request", option.stage), default=None)


def tasks_that_fit(
    footprint: Footprint, training: TrainingSettings, *, gpus: int, requests: int, gpu_bytes: int
) -> Mode:
    """What `tasks = "auto"` means: a gradient a request where it costs no sample more and there is room for as many.

    Every worker takes part in each gradient: more of them than a worker has forget samples would add samples.
    """
    if requests > training.forget_batch // training.workers:
        return "batch"
    stage, offload = training.zero_stage, training.offload_optimizer
    apart = estimate(footprint, stage, "request", gpus=gpus, requests=requests, offload=offload)
    return "request" if apart.fits(gpu_bytes) else "batch"


class _Lora(nn.Module):
    """A linear layer with a low-rank path beside it: what peft makes of it, which it cannot on fake tensors."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


def add_lora(model: Architecture, rank: int) -> int:
    """Put low-rank paths beside the model's targets; returns how many parameters they have."""
    targets = [
        (name, module)
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in model.lora_targets)
    ]
    for name, module in targets:
        parent, _, leaf = name.rpartition(".")
        setattr(model.network.get_submodule(parent), leaf, _Lora(module, rank))
    return sum(rank * (module.in_features + module.out_features) for _, module in targets)


def activation_bytes(model: Architecture, batch: int, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps of one forward pass of `batch` samples, weights aside.

    With checkpointing: what enters each block, what is kept outside of them, and the one block that is recomputed.
    """
    weights = {_storage(p) for p in model.network.parameters()} | {_storage(b) for b in model.network.buffers()}
    seen: dict[int, Tensor] = {}  # holding the tensors keeps their storages, hence the keys, from being used again
    kept: dict[int | None, int] = {}
    entering: dict[int, int] = {}
    here: list[int | None] = [None]

    def keep(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in weights and key not in seen:
            seen[key] = tensor
            kept[here[-1]] = kept.get(here[-1], 0) + tensor.untyped_storage().nbytes()
        return tensor

    def enter(index: int, values: tuple[object, ...], named: Mapping[str, object]) -> None:
        tensors = [v for v in (*values, *named.values()) if isinstance(v, Tensor)]
        entering[index] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        here.append(index)

    def leave(*_: object) -> None:
        here.pop()

    hooks = []
    for index, block in enumerate(model.blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, a, k, index=index: enter(index, a, k), with_kwargs=True))
        hooks.append(block.register_forward_hook(leave))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.call(batch, dtype)
    finally:
        for hook in hooks:
            hook.remove()
    if not checkpointing:
        return sum(kept.values())
    largest = max((size for index, size in kept.items() if index is not None), default=0)
    return kept.get(None, 0) + sum(entering.values()) + largest


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _count(parameters: "Iterator[nn.Parameter] | list[nn.Parameter]") -> int:
    return sum(p.numel() for p in parameters)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
