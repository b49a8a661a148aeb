"""`arcface`, which tells people apart: an ONNX file of a face recognition network. Needs the extra `arcface`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from expunge.errors import InputError, first_line
from expunge.evaluation.encoders.base import Encoder, in_chunks, need_packages
from expunge.evaluation.encoders.files import check_file, find_file, read_file

if TYPE_CHECKING:
    from torch import Tensor


class ArcFace(Encoder):
    """Embedding of a network that takes [B, 3, 112, 112] in [-1, 1] (Deng et al. 2019), D = 512 in InsightFace's files.

    The whole picture is scaled to the network's input; no face is looked for. This suits models that generate faces in
    the middle of the picture, as the network wants them, and little else.
    """

    usage = "arcface:FILE@SHA256, an .onnx file that takes faces of 112 x 112 px, such as InsightFace's"
    packages: ClassVar = {"onnxruntime": "onnxruntime"}
    size = (112, 112)

    def __init__(self, reference: str) -> None:
        self.name = f"arcface:{reference}"
        self.find(reference)
        import onnxruntime  # pyright: ignore[reportMissingImports]  # an extra

        data = read_file(reference)
        try:
            # From bytes, so that the model cannot name files beside it. Operators in ONNX are no programs.
            self._session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
            (given,) = self._session.get_inputs()
        except Exception as error:  # onnxruntime's exceptions have no common type; several inputs are a ValueError
            raise InputError(
                f"evaluation.encoders: {find_file(reference)} is no such network ({first_line(error)})",
                hint=f"use {self.usage}",
            ) from None
        if list(given.shape[1:]) != [3, *self.size]:
            raise InputError(
                f"evaluation.encoders: {find_file(reference)} takes {given.shape}, not [B, 3, 112, 112]",
                hint=f"use {self.usage}",
            )
        self._input = given.name

    @classmethod
    def check(cls, reference: str) -> None:
        check_file(reference, cls.usage)

    @classmethod
    def find(cls, reference: str) -> str:
        need_packages("arcface", cls.packages, "expunge[arcface]")
        return str(find_file(reference))

    def __call__(self, images: Tensor) -> Tensor:
        return in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        import torch

        # One at a time: some files fix the batch at 1.
        rows = [self._session.run(None, {self._input: image[None].numpy()})[0] for image in images]
        return torch.cat([torch.as_tensor(row) for row in rows])
