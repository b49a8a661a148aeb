"""One network that is the base model or the hotfix, as it is asked: no process holds a denoiser twice."""

from pathlib import Path
from typing import Literal

import torch
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor

from expunge.families.family import Family

Which = Literal["base", "hotfix"]


class Switch:
    """Turns `model.network` into the hotfix and back, bit for bit.

    An adapter stays beside weights in half precision, where most of its small change would be rounded away, and is
    turned on and off. Anything else changes the weights in place, which is faster (on `flags` a pass takes two thirds
    of the time), and the tensors that are not in use wait on the host.
    """

    def __init__(self, model: Family, kind: Literal["lora", "full"], folder: Path) -> None:
        """Apply the hotfix in `folder`. Raises what `Family.apply_hotfix` raises."""
        self._model = model
        self._is: Which = "hotfix"
        self._settled = False
        self._waiting: dict[str, Tensor] = {}
        self._beside = model.stays_beside(model.network, kind)
        if self._beside:
            model.apply_hotfix(model.network, kind, folder)
            return
        before = {name: tensor.to("cpu", copy=True) for name, tensor in model.network.state_dict().items()}
        model.apply_hotfix(model.network, kind, folder)
        now = model.network.state_dict()
        self._waiting = {name: tensor for name, tensor in before.items() if not torch.equal(tensor, now[name].cpu())}

    @torch.no_grad()
    def become(self, which: Which) -> None:
        """Make the network this one, unless it is it already."""
        if which == self._is:
            return
        assert not self._settled, "the base model is gone"
        if self._beside:
            turn = self._adapters.enable_adapters if which == "hotfix" else self._adapters.disable_adapters
            turn()
        state = self._model.network.state_dict()
        for name, tensor in self._waiting.items():
            kept = state[name].to("cpu", copy=True)
            state[name].copy_(tensor)
            self._waiting[name] = kept
        self._is = which

    def settle(self) -> None:
        """Make the network the hotfix for good, with plain weights that can be rounded and trained."""
        self.become("hotfix")
        self._settled = True
        self._waiting.clear()
        if self._beside:
            self._adapters.fuse_lora()
            self._adapters.unload_lora()
            self._beside = False

    @property
    def _adapters(self) -> PeftAdapterMixin:
        assert isinstance(self._model.network, PeftAdapterMixin)
        return self._model.network
