"""Mixed precision at the network's boundary: casts inputs and outputs, and leaves the time alone."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn


def keep_times_exact(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the inputs of `network` to `dtype`, and its outputs back to float32, in which losses are computed.

    The time [B] is the one input with a single number per sample. It stays as it is: bf16 has 8 bits, too few for times
    up to 1000.
    """

    def narrow(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return cast(tuple[object, dict[str, object]], _cast((args, kwargs), dtype))

    network.register_forward_pre_hook(narrow, with_kwargs=True)
    network.register_forward_hook(lambda _, args, output: _cast(output, torch.float32, least_ndim=0))


def _cast(value: object, dtype: torch.dtype, least_ndim: int = 2) -> object:
    """Cast floating tensors, also in tuples, lists and mappings such as diffusers' outputs, which keep their type."""
    if isinstance(value, Tensor):
        wanted = value.is_floating_point() and value.ndim >= least_ndim
        return value.to(dtype) if wanted else value
    if isinstance(value, Mapping):
        named = cast(Mapping[str, object], value)
        return type(value)(**{name: _cast(part, dtype, least_ndim) for name, part in named.items()})
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, dtype, least_ndim) for part in value)
    return value
