"""Change a network's weights in place for a while: there is one network, and it comes back bit for bit.

What is put back is kept on the host, so the device never holds a second network.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from expunge.families.base import DiffusionModel

State = Mapping[str, Tensor]
"""A network's tensors by name, on the host."""

ADAPTER_RANK = 8
"""Of the adapters that people fine-tune with; a guess at the common one."""


def state_of(network: nn.Module, names: Collection[str] | None = None) -> State:
    """Copy the network's weights and buffers to the host: all, or those that `names` names."""
    state = network.state_dict()
    return {name: state[name].detach().to("cpu", copy=True) for name in (state if names is None else names)}


@contextmanager
def restored(network: nn.Module, names: Collection[str] | None = None) -> Iterator[None]:
    """Whatever happens inside, the network's weights are the same afterwards, bit for bit; so is what is trainable.

    names: the only tensors that will change; default: any of them.
    """
    kept = state_of(network, names)
    trainable = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    finally:
        state = network.state_dict()
        for name, tensor in kept.items():
            state[name].copy_(tensor)
        for parameter, was in trainable:
            parameter.requires_grad_(was).grad = None


@contextmanager
def mixed(network: nn.Module, base: State, scale: float) -> Iterator[None]:
    """Inside, the weights are base + scale * (weights - base): the base model's exactly at 0.

    For a LoRA adapter that is the adapter at another scale, because the weights' change is linear in it.
    """
    now = network.state_dict()
    differing = [name for name, tensor in now.items() if not torch.equal(tensor.cpu(), base[name])]
    with restored(network, differing):
        for name in differing:
            origin = base[name].to(now[name].device)
            now[name].copy_(origin + scale * (now[name] - origin))
        yield


@contextmanager
def rounded(network: nn.Module, precision: str) -> Iterator[None]:
    """Inside, the weights are rounded to a precision that `PRECISIONS` names; the network still computes as before."""
    with restored(network):
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(PRECISIONS[precision](tensor))
        yield


@contextmanager
def trainable(model: DiffusionModel, *, seed: int) -> Iterator[list[nn.Parameter]]:
    """Inside, the model can be trained as people do: by a new LoRA adapter where its family takes one, else in full.

    Yields the parameters to train. seed: of the adapter's first values.
    """
    network = model.network
    if not model.lora_targets:
        with restored(network):
            network.requires_grad_(True)
            yield list(network.parameters())
        return

    from diffusers.loaders import PeftAdapterMixin
    from peft import LoraConfig

    assert isinstance(network, PeftAdapterMixin)
    adapter = LoraConfig(r=ADAPTER_RANK, lora_alpha=ADAPTER_RANK, target_modules=list(model.lora_targets))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network.add_adapter(adapter)
        yield [parameter for parameter in network.parameters() if parameter.requires_grad]
    finally:
        network.unload_lora()


def _to_int8(weight: Tensor) -> Tensor:
    """Round to 255 levels per output channel, symmetric about 0. Biases and norms stay as they are, as is usual."""
    if weight.ndim < 2:
        return weight
    step = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-30) / 127
    return (weight / step).round() * step


def _to_bf16(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).to(weight.dtype)


PRECISIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({"int8": _to_int8, "bf16": _to_bf16})
