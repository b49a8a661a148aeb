"""Lay a donor over a target by a similarity transform: scale, rotation and translation."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

SCALES = (0.85, 0.92, 1.0, 1.09, 1.18)
"""Scales of the donor that the fit starts from; it finds rotation and translation by itself."""
MOST_SCALE, MOST_ANGLE, MOST_SHIFT = 1.5, 25.0, 0.25
"""A transform beyond these (degrees, and shares of the smaller side) is no alignment of two poses but a mistake."""
GAIN = 0.1
"""What a fit must add to the correlation of the edges, more than chance does between two pictures of noise."""
FACE_SIDE = 192
"""Pixels that the smaller side is scaled up to before faces are looked for: the detector needs faces of about 80."""


def align(donor: np.ndarray, target: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return the donor, uint8 [H, W, 3], moved onto the target.

    By the landmarks of the face, where the extra `faces` is installed and both pictures show one. Otherwise by the
    edges in `where`, bool [H, W], and only if they fit better afterwards. Where nothing fits, the donor stays as it is.
    """
    matrix = _by_landmarks(donor, target)
    if matrix is None:
        matrix = _by_edges(donor, target, where)
    return donor if matrix is None else _moved(donor, matrix)


def _by_landmarks(donor: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """Return the transform of the donor's face onto the target's, float64 [2, 3]; None if there are not two faces."""
    find = _landmark_finder()
    if find is None:
        return None
    there = find(target)
    here = None if there is None else find(donor)
    if here is None or there is None:
        return None
    return _sensible(_similarity(here, there), donor.shape)


def _similarity(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return the least-squares similarity of points [N, 2] to others, float64 [2, 3] (Umeyama 1991)."""
    from skimage.transform import estimate_transform

    return np.asarray(estimate_transform("similarity", here, there).params)[:2]


@cache
def _landmark_finder() -> Callable[[np.ndarray], np.ndarray | None] | None:
    """Return what finds the five landmarks of the largest face, float64 [5, 2]; None without the extra `faces`."""
    models = find_spec("face_recognition_models")
    if find_spec("dlib") is None or models is None or models.origin is None:
        return None
    import dlib  # pyright: ignore[reportMissingImports]  # an extra

    detect = dlib.get_frontal_face_detector()  # pyright: ignore[reportAttributeAccessIssue]  # compiled
    # Read as a file: importing the package needs setuptools, which newer Pythons come without.
    file = Path(models.origin).parent / "models" / "shape_predictor_5_face_landmarks.dat"
    predict = dlib.shape_predictor(str(file))  # pyright: ignore[reportAttributeAccessIssue]

    def find(picture: np.ndarray) -> np.ndarray | None:
        scale = max(1.0, FACE_SIDE / min(picture.shape[:2]))
        large = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        face = max(detect(large), key=lambda box: box.area(), default=None)
        if face is None:
            return None
        return np.array([(point.x, point.y) for point in predict(large, face).parts()], np.float64) / scale

    return find


def _by_edges(donor: np.ndarray, target: np.ndarray, where: np.ndarray) -> np.ndarray | None:
    """Return the transform under which the edges correlate best (ECC, Evangelidis and Psarakis 2008), or None."""
    wanted, given = _edges(target), _edges(donor)
    best, found = _correlation(given, wanted, where) + GAIN, None
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 50, 1e-4)
    height, width = given.shape
    for scale in SCALES:
        scaled = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 0, scale)
        start = np.eye(2, 3, dtype=np.float32)
        try:
            _, back = cv2.findTransformECC(
                wanted, _moved(given, scaled), start, cv2.MOTION_EUCLIDEAN, criteria, where.astype(np.uint8), 3
            )
        except cv2.error:  # it does not converge
            continue
        # ECC says where each pixel of the target comes from.
        matrix = cv2.invertAffineTransform(back) @ np.vstack([scaled, [0, 0, 1]])
        fit = _correlation(_moved(given, matrix), wanted, where)
        if fit > best and _sensible(matrix, donor.shape) is not None:
            best, found = fit, matrix
    return found


def _sensible(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the transform unless it moves the picture further than two poses differ."""
    height, width = shape[:2]
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    angle = abs(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = np.linalg.norm(matrix[:, :2] @ centre + matrix[:, 2] - centre)
    near = 1 / MOST_SCALE <= scale <= MOST_SCALE and angle <= MOST_ANGLE and shift <= MOST_SHIFT * min(height, width)
    return matrix if near else None


def _edges(picture: np.ndarray) -> np.ndarray:
    """Return the strength of the edges of uint8 [H, W, 3], float32 [H, W]: independent of brightness."""
    grey = picture.astype(np.float32).mean(2)
    return cv2.GaussianBlur(np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)), (3, 3), 0)


def _correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    x, y = a[where] - a[where].mean(), b[where] - b[where].mean()
    return float((x * y).sum() / max(1e-6, float(np.linalg.norm(x) * np.linalg.norm(y))))


def _moved(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
