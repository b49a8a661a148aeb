"""A pipeline's components one by one: a stage reads those that it asks for, and holds no other.

A component whose float32 weights take up to SMALL bytes is computed in float32, which costs next to nothing; a larger
one keeps the precision of its files.
"""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from expunge.errors import InputError, first_line
from expunge.families.layout import Layout
from expunge.families.weights import COMPLETE
from expunge.logs import get_logger

SMALL = 2**30

_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}


class Components:
    """Reads components from `layout`, frozen and in evaluation mode, and keeps each until it is freed."""

    def __init__(self, layout: Layout, device: torch.device | str = "cpu", *, exact: bool = False) -> None:
        """Find the weight files; nothing is read. exact: compute everything in float32, whatever its size.

        Raises InputError where weights are missing.
        """
        self.layout, self.device = layout, torch.device(device)
        self._weights, self._exact = layout.weights(), exact
        self._held: dict[str, nn.Module] = {}
        self.read: list[str] = []
        """The networks that were read so far, in that order."""

    @property
    def held(self) -> frozenset[str]:
        """The networks that are in memory."""
        return frozenset(self._held)

    def network(self, name: str) -> nn.Module:
        """Return a network. Raises InputError where its files do not make one."""
        if name not in self._held:
            dtype = torch.float32 if self._exact else self.precision(name)
            network = self._read(name, dtype).eval().requires_grad_(False).to(self.device)
            self._held[name] = network
            self.read.append(name)
            get_logger("families").debug("read a network", network=name, dtype=str(dtype), device=str(self.device))
        return self._held[name]

    @contextmanager
    def borrowed(self, name: str) -> Iterator[nn.Module]:
        """Read a network and free it afterwards."""
        try:
            yield self.network(name)
        finally:
            self.free(name)

    def free(self, name: str) -> None:
        """Let go of a network, if it is held."""
        if self._held.pop(name, None) is None:
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        get_logger("families").debug("freed a network", network=name)

    def other(self, name: str) -> object:
        """Read a scheduler or a tokenizer, anew each time. Raises InputError where its files do not make one."""
        with self._explained():
            return self._class(name).from_pretrained(self.layout.part(name))

    def precision(self, name: str) -> torch.dtype:
        """Return the precision that a network is computed in. Raises InputError where its files are damaged."""
        files = self._weights.files[name]
        with self._explained():
            own = _HALF.get(_stored(files[0]), torch.float32)
        in_float32 = sum(path.stat().st_size for path in files) * (4 // own.itemsize)
        return torch.float32 if in_float32 <= SMALL else own

    def _read(self, name: str, dtype: torch.dtype) -> nn.Module:
        kind, variant = self._class(name), self._weights.variant
        # A component that has full precision is read in it, also where others have only a variant.
        own = variant if variant and any(f".{variant}" in path.name for path in self._weights.files[name]) else None
        given = {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype}
        with self._explained():
            network = kind.from_pretrained(self.layout.part(name), use_safetensors=True, variant=own, **given)
        assert isinstance(network, nn.Module)
        return network

    def _class(self, name: str):  # noqa: ANN202  # diffusers' and transformers' classes have no common base
        return getattr(importlib.import_module(self.layout.library_of(name)), str(self.layout.class_of(name)))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError, SafetensorError) as error:
            raise InputError(f"{self.layout.label}: {first_line(error).rstrip('.')}", hint=COMPLETE) from error


def _stored(path: Path) -> str:
    """Return how safetensors names the precision of the largest tensor in a file."""
    with safe_open(path, framework="np") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        return max(slices, key=lambda part: math.prod(part.get_shape())).get_dtype()
