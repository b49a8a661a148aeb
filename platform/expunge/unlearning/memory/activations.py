"""The bytes that autograd keeps of a forward pass, counted on fake or real tensors."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from expunge.families.architectures import Architecture


def activation_bytes(model: Architecture, batch: int, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Count the bytes that autograd keeps of one forward pass of `batch` samples, weights aside.

    With checkpointing these are the inputs of each block, what is kept outside of the blocks, and the one block that is
    recomputed.
    """
    kept = _Kept(model.network)
    with ExitStack() as hooks:
        for block in model.blocks:
            for handle in (
                block.register_forward_pre_hook(kept.enter, with_kwargs=True),
                block.register_forward_hook(kept.leave),
            ):
                hooks.callback(handle.remove)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            model.call(batch, dtype)
    if not checkpointing:
        return kept.outside + sum(kept.inside.values())
    return kept.outside + sum(kept.entering.values()) + max(kept.inside.values(), default=0)


class _Kept:
    """Adds up, by block, the bytes of the tensors that autograd keeps."""

    def __init__(self, network: nn.Module) -> None:
        self.outside = 0
        self.inside: dict[nn.Module, int] = {}
        self.entering: dict[nn.Module, int] = {}
        self._weights = {_storage(tensor) for tensor in (*network.parameters(), *network.buffers())}
        self._seen: dict[int, Tensor] = {}  # holding the tensors keeps their storages, hence the keys, from reuse
        self._blocks: list[nn.Module] = []

    def enter(self, block: nn.Module, values: tuple[object, ...], named: Mapping[str, object]) -> None:
        tensors = [value for value in (*values, *named.values()) if isinstance(value, Tensor)]
        self.entering[block] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._blocks.append(block)

    def leave(self, *_: object) -> None:
        self._blocks.pop()

    def keep(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key in self._weights or key in self._seen:
            return tensor
        self._seen[key] = tensor
        size = tensor.untyped_storage().nbytes()
        if self._blocks:
            block = self._blocks[-1]
            self.inside[block] = self.inside.get(block, 0) + size
        else:
            self.outside += size
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
