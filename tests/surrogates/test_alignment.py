"""A donor is laid over the target where that fits better, and left alone where it does not."""

import cv2
import numpy as np
import pytest

from expunge.pixels import to_pictures
from expunge.surrogates._alignment import align
from expunge.testbed import faces, flags

EVERYWHERE = np.ones((64, 64), bool)
CORE = np.s_[12:-12, 12:-12]


def _scene() -> np.ndarray:
    """Draw shapes that no transform but the identity maps onto themselves."""
    picture = np.full((64, 64, 3), 90, np.uint8)
    cv2.rectangle(picture, (20, 16), (34, 26), (200, 40, 40), -1)
    cv2.circle(picture, (40, 40), 7, (30, 180, 60), -1)
    cv2.line(picture, (18, 44), (28, 36), (240, 240, 240), 2)
    return picture


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a[CORE].astype(float) - b[CORE]).mean())


@pytest.mark.parametrize(
    ("angle", "scale", "shift"),
    [(0, 1.0, (3, -2)), (8, 1.0, (0, 0)), (0, 1.18, (0, 0)), (-6, 0.9, (2, 2)), (5, 1.1, (-2, 1))],
)
def test_a_moved_copy_is_moved_back(angle: float, scale: float, shift: tuple[int, int]) -> None:
    target = _scene()
    matrix = cv2.getRotationMatrix2D((31.5, 31.5), angle, scale)
    matrix[:, 2] += shift
    donor = cv2.warpAffine(target, matrix, (64, 64), borderMode=cv2.BORDER_REFLECT)
    assert _difference(align(donor, target, EVERYWHERE), target) < 0.4 * _difference(donor, target)


def test_colours_and_brightness_do_not_matter() -> None:
    target = _scene()
    donor = np.roll(255 - target // 2, (2, 3), (0, 1))
    back = align(donor, target, EVERYWHERE)
    assert _difference(back, 255 - target // 2) < 0.4 * _difference(donor, 255 - target // 2)


@pytest.mark.parametrize("picture", [np.zeros((24, 24, 3), np.uint8), _scene()[:24, :24]], ids=["flat", "cut"])
def test_a_picture_is_left_on_itself(picture: np.ndarray) -> None:
    assert np.array_equal(align(picture, picture, np.ones(picture.shape[:2], bool)), picture)


def test_a_donor_without_edges_stays_as_it_is() -> None:
    donor = np.full((64, 64, 3), 120, np.uint8)
    assert np.array_equal(align(donor, _scene(), EVERYWHERE), donor)


def test_noise_is_not_aligned() -> None:
    first, second = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert np.array_equal(align(first, second, EVERYWHERE), first)


@pytest.mark.parametrize("data", ["faces", "flags"])
def test_pictures_of_the_testbeds_are_not_carried_away(data: str) -> None:
    """Whatever is found is a similarity that two poses may differ by: the picture's colours stay within its range."""
    pictures = to_pictures(faces.images()[:8].expand(-1, 3, -1, -1) if data == "faces" else flags.images()[0][:8])
    where = np.ones(pictures.shape[1:3], bool)
    for donor, target in zip(pictures[:4], pictures[4:], strict=True):
        moved = align(donor, target, where)
        assert moved.shape == donor.shape
        assert moved.min() >= donor.min()
        assert moved.max() <= donor.max()


def test_faces_are_aligned_by_their_landmarks() -> None:
    pytest.importorskip("dlib")
    face = to_pictures(faces.images()[2:3].expand(-1, 3, -1, -1))[0]
    target = cv2.resize(face, (192, 192), interpolation=cv2.INTER_CUBIC)
    matrix = cv2.getRotationMatrix2D((96, 96), 10, 1.1)
    matrix[:, 2] += (12, 4)
    donor = cv2.warpAffine(target, matrix, (192, 192), borderMode=cv2.BORDER_REFLECT)
    back = align(donor, target, np.ones((192, 192), bool))
    assert _difference(back, target) < 0.4 * _difference(donor, target)
