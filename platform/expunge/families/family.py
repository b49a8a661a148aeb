"""Everything that the platform must know of a kind of diffusers pipeline: a model family, each in one file.

A submit looks at a model's config files and must not wait seconds for torch and diffusers. So this module and those of
the families import them where a method needs them, not above.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from expunge.errors import InputError
from expunge.families.base import DiffusionModel
from expunge.families.weights import FULL_FILE, LORA_FILE

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from diffusers import DiffusionPipeline
    from diffusers.loaders import PeftAdapterMixin
    from torch import Tensor, nn

    from expunge.families.architectures import Architecture
    from expunge.families.base import Conditioning
    from expunge.families.components import Components
    from expunge.families.layout import Layout
    from expunge.settings import ModelSettings, Resolution

MOST_TIMESTEPS = 100_000
"""A scheduler computes its whole schedule when it is made: at a config's ten billion timesteps it would not end."""


class Family(DiffusionModel):
    """A subclass is a family, and an instance of it a loaded model.

    The class methods take a pipeline's files and know nothing of its weights; they raise InputError naming the file and
    the field.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """The pipeline classes of the family, as model_index.json names them."""
    classes: ClassVar[Mapping[str, tuple[str, ...]]]
    """The classes that each component may have; "" where it may be absent."""
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})
    """Configs of published networks by name, so that a memory plan needs none of their files."""

    @abstractmethod
    def __init__(self, parts: Components, resolution: Resolution, settings: ModelSettings) -> None:
        """Take the components of a pipeline whose files passed `check`. Reads no network."""
        self.parts, self.device = parts, parts.device

    @abstractmethod
    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the output of `network`; everything given is on its device, and in its precision but for the time."""

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        # Through `self.network`: the frozen copy takes its place while the base model is asked.
        network = self.network
        weight = next(network.parameters())
        given = {name: table.to(weight.device, weight.dtype) for name, table in conditioning.items()}
        return self.call(network, x_t.to(weight.device, weight.dtype), time.to(weight.device), given).to(x_t)

    def release(self) -> None:
        """Let go of all networks; one that is asked for later is read again."""
        self._network = None
        for name in self.parts.held:
            self.parts.free(name)

    def _read_network(self) -> nn.Module:
        return self.parts.network(self.component)

    @classmethod
    @abstractmethod
    def check(cls, layout: Layout) -> None:
        """Refuse configs that this family cannot follow. The components are there and of a class in `classes`.

        A setting that changes what the pipeline itself would sample is either followed or refused.
        """

    @classmethod
    @abstractmethod
    def resolution(cls, layout: Layout, configured: Resolution | None) -> Resolution:
        """Return (height, width) in pixels: the configured one, else the pipeline's own; refuse an impossible one."""

    @classmethod
    @abstractmethod
    def architecture(cls, layout: Layout, resolution: Resolution) -> Architecture:
        """Build the network from its config alone."""

    @classmethod
    def published_architecture(cls, name: str) -> Architecture:
        """Build the network that is called `name` in `published`."""
        raise NotImplementedError

    @classmethod
    def other_networks(cls, layout: Layout, resolution: Resolution) -> dict[str, nn.Module]:
        """Build the other networks that a picture passes through, by component, and pass one through them."""
        return {}

    @classmethod
    def index_at_root(cls, network: str, scheduler: str) -> dict[str, object] | None:
        """Make the model_index.json of a repository that has none, and the files of two such classes at its root.

        Returns None where this family has no such repositories.
        """
        return None

    @classmethod
    def read(cls, layout: Layout, variant: str | None, dtype: torch.dtype) -> DiffusionPipeline:
        """Read the whole pipeline in this precision from safetensors alone. Raises whatever diffusers raises."""
        from expunge.families.loading import read_pipeline

        return read_pipeline(layout, variant, dtype)

    @classmethod
    def apply_hotfix(cls, network: nn.Module, kind: str, folder: Path) -> None:
        """Turn the base model's `network` into the hotfixed one, in place; `folder` holds the hotfix of this `kind`.

        An adapter goes into the weights, or stays beside them where `stays_beside` says so.

        Raises InputError where a LoRA adapter has no layer in this network, FileNotFoundError where the hotfix is of
        another component, and whatever torch raises where the shapes differ.
        """
        from safetensors.torch import load_file

        if kind == "full":
            network.load_state_dict(load_file(folder / cls.component / FULL_FILE))
            return
        adapted = cls.attach_adapter(network, folder / LORA_FILE)
        if not cls.stays_beside(network, kind):
            # One matrix product per layer instead of three.
            adapted.fuse_lora()
            adapted.unload_lora()

    @staticmethod
    def stays_beside(network: nn.Module, kind: str) -> bool:
        """Tell whether the hotfix is an adapter beside weights in half precision, which would round most of it away."""
        return kind == "lora" and next(network.parameters()).itemsize < 4

    @classmethod
    def attach_adapter(cls, network: nn.Module, file: Path) -> PeftAdapterMixin:
        """Put a LoRA adapter beside the weights of `network`, which is returned.

        Raises InputError where it has no layer in this network.
        """
        from diffusers.loaders import PeftAdapterMixin
        from safetensors.torch import load_file

        layers = load_file(file) if isinstance(network, PeftAdapterMixin) else {}
        # Where no layer is meant for the network, diffusers only warns, and it would stay the base model's.
        if not isinstance(network, PeftAdapterMixin) or not any(
            name.startswith(f"{cls.component}.") for name in layers
        ):
            raise InputError(
                f"hotfix: a LoRA adapter has no place in {type(network).__name__}", hint="train with adapter = full"
            )
        network.load_lora_adapter(layers, prefix=cls.component)
        return network
