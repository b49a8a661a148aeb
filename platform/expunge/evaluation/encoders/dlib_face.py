"""`dlib-face`, which tells people apart: dlib's descriptor of a face's identity. Needs the extra `faces`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from expunge.evaluation.encoders.base import Encoder, in_chunks, need_packages, package_folder, refuse_reference

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class DlibFace(Encoder):
    """dlib's ResNet descriptor of the largest face in a picture (King 2017), D = 128.

    A face is found from about 80 of the 192 px that a picture is scaled to, so from 40 % of its side. Where none is
    found, the whole picture is taken for one and aligned by the landmarks that are looked for there: every picture has
    a descriptor, and never none, which would read as "not this person". But it is a poor one. A target whose face is
    found and an output whose face is not look unlike each other, which looks like removal; two pictures without faces
    look alike. So this encoder is for models of faces, and for use beside others, never alone.
    """

    usage = name = "dlib-face"
    packages: ClassVar = {"dlib": "dlib-bin", "face_recognition_models": "face-recognition-models"}
    # The detector needs faces of about 80 px. On the testbed's faces, 24 px scaled up to this size, it finds 36 of 40.
    size = (192, 192)
    chip, padding = 150, 0.25
    """Side of an aligned face in px, and the margin around it as a share of it: what the network was trained on."""

    def __init__(self, reference: str = "") -> None:
        self.find(reference)
        import dlib  # pyright: ignore[reportMissingImports]  # an extra

        # Found as files: importing the package needs setuptools, which newer Pythons come without.
        models = package_folder("face_recognition_models") / "models"
        self._dlib: Any = dlib
        self._detect = self._dlib.get_frontal_face_detector()
        self._landmarks = self._dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
        self._network = self._dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))

    @classmethod
    def check(cls, reference: str) -> None:
        refuse_reference(cls.name, reference)

    @classmethod
    def find(cls, reference: str) -> str:
        need_packages(cls.name, cls.packages, "expunge[faces]")
        return cls.packages["face_recognition_models"]

    def __call__(self, images: Tensor) -> Tensor:
        return in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        import numpy as np
        import torch

        from expunge.pixels import to_pictures

        return torch.from_numpy(np.stack([self._descriptor(picture) for picture in to_pictures(images)]))

    def _descriptor(self, picture: np.ndarray) -> np.ndarray:
        import numpy as np

        height, width = picture.shape[:2]
        whole = self._dlib.rectangle(0, 0, width - 1, height - 1)
        face = max(self._detect(picture), key=lambda box: box.area(), default=whole)
        aligned = self._dlib.get_face_chip(picture, self._landmarks(picture, face), self.chip, self.padding)
        return np.asarray(self._network.compute_face_descriptor(aligned))
