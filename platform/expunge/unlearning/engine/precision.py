"""bf16 at the network's door: inputs in, outputs out, and the time untouched."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn


def keep_times_exact(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast what goes into `network` to `dtype`, and what comes out back to float32, where losses are computed.

    Not the time, the one input with one number a sample [B]: of a time up to 1000, bf16 would leave 8 bits.
    """

    def narrow(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return cast(tuple[object, dict[str, object]], _cast((args, kwargs), dtype))

    network.register_forward_pre_hook(narrow, with_kwargs=True)
    network.register_forward_hook(lambda _, args, output: _cast(output, torch.float32, least_ndim=0))


def _cast(value: object, dtype: torch.dtype, least_ndim: int = 2) -> object:
    """Floating tensors in tuples, lists and mappings (diffusers' outputs are such) of their own type."""
    if isinstance(value, Tensor):
        wanted = value.is_floating_point() and value.ndim >= least_ndim
        return value.to(dtype) if wanted else value
    if isinstance(value, Mapping):
        named = cast(Mapping[str, object], value)
        return type(value)(**{name: _cast(part, dtype, least_ndim) for name, part in named.items()})
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, dtype, least_ndim) for part in value)
    return value
