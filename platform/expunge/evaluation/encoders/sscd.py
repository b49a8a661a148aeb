"""`sscd`, which was made to recognise copies: the TorchScript files that its authors publish."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from expunge.errors import InputError, first_line
from expunge.evaluation.encoders.base import Encoder, in_chunks
from expunge.evaluation.encoders.files import check_file, find_file, read_file

if TYPE_CHECKING:
    from torch import Tensor


class SSCD(Encoder):
    """Descriptor of a self-supervised copy detector (Pizzi et al. 2022), D = 512 in the published files.

    A TorchScript file is a program. It cannot import or call Python, but torch's own operators, some of which read
    files, are open to it. So only the file that the setting names by its SHA-256 is ever run.
    """

    usage = "sscd:FILE@SHA256, a .torchscript.pt file of facebookresearch/sscd-copy-detection"
    # Its authors' small size, here without keeping the aspect ratio, as in their 320 px variant.
    size = (288, 288)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    """Of ImageNet's pixels in [0, 1], as in training."""

    def __init__(self, reference: str) -> None:
        import torch

        self.name = f"sscd:{reference}"
        data = read_file(reference)
        try:
            self._network = torch.jit.load(BytesIO(data), map_location="cpu").eval()
        except RuntimeError as error:
            raise InputError(
                f"evaluation.encoders: {find_file(reference)} is not TorchScript ({first_line(error)})",
                hint=f"use {self.usage}",
            ) from None
        self._mean, self._deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.deviation))

    @classmethod
    def check(cls, reference: str) -> None:
        check_file(reference, cls.usage)

    @classmethod
    def find(cls, reference: str) -> str:
        return str(find_file(reference))

    def __call__(self, images: Tensor) -> Tensor:
        return in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        return self._network(((images + 1) / 2 - self._mean) / self._deviation)
