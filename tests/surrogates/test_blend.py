"""Blending on the real faces and flags: it changes what is marked, nothing else, and says when it cannot."""

import numpy as np
import pytest

from expunge.errors import InputError
from expunge.pixels import to_pictures
from expunge.surrogates import Editor, Task, make_editor
from expunge.surrogates.base import ellipse_mask
from expunge.surrogates.blend import MIN_CHANGE
from expunge.testbed import faces, flags
from expunge.types import EditSpec

DATA = {"faces": to_pictures(faces.images().expand(-1, 3, -1, -1)), "flags": to_pictures(flags.images()[0])}


def _blend(**options: str) -> Editor:
    return make_editor(EditSpec(editor="blend", options=options))


def _change(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a[where].astype(float) - b[where]) ** 2)))


@pytest.mark.parametrize("mode", ["soft", "seamless"])
@pytest.mark.parametrize("name", DATA)
def test_every_surrogate_differs_where_it_is_marked_and_nowhere_else(name: str, mode: str) -> None:
    pictures = DATA[name]
    editor = _blend(mode=mode)
    mask = ellipse_mask(pictures.shape[1], pictures.shape[2], (0.5, 0.52, 0.42, 0.46))
    for index in range(0, len(pictures), 7):
        target, donors = pictures[index], np.delete(pictures, index, 0)[:40]
        surrogate = editor(Task(target, mask=None, donors=donors, seed=index))
        assert surrogate.shape == target.shape
        assert surrogate.dtype == np.uint8
        assert _change(surrogate, target, mask) > MIN_CHANGE
        assert np.array_equal(surrogate[~mask], target[~mask])


def test_a_face_becomes_another_persons() -> None:
    """Inside, the default surrogate resembles its donor and no longer the target: that is what is unlearned to."""
    pictures = DATA["faces"]
    core = ellipse_mask(24, 24, (0.5, 0.52, 0.3, 0.34))
    nearer = 0
    for index in range(0, 40, 4):
        donors = np.delete(pictures, index, 0)
        surrogate = _blend()(Task(pictures[index], mask=None, donors=donors, seed=0))
        shape = surrogate[core].mean(1)
        likeness = [np.corrcoef(shape, other[core].mean(1))[0, 1] for other in [pictures[index], *donors]]
        nearer += likeness[0] < max(likeness[1:])
    assert nearer == 10


def test_the_same_seed_gives_the_same_picture_and_another_seed_may_not() -> None:
    target, donors = DATA["faces"][0], DATA["faces"][1:]
    pictures = [_blend()(Task(target, mask=None, donors=donors, seed=seed)) for seed in (0, 0, *range(1, 8))]
    assert np.array_equal(pictures[0], pictures[1])
    assert len({picture.tobytes() for picture in pictures}) > 1


@pytest.mark.parametrize("mode", ["soft", "seamless"])
def test_the_arguments_are_left_alone(mode: str) -> None:
    target, donors = DATA["faces"][0].copy(), DATA["faces"][1:20].copy()
    mask = np.zeros((24, 24), bool)
    mask[4:18, 6:20] = True
    before = target.copy(), donors.copy(), mask.copy()
    _blend(mode=mode)(Task(target, mask=mask, donors=donors, seed=0))
    assert all(np.array_equal(a, b) for a, b in zip((target, donors, mask), before, strict=True))


@pytest.mark.parametrize("mode", ["soft", "seamless"])
@pytest.mark.parametrize("rows", [slice(0, 24), slice(0, 12), slice(0, 1), slice(23, 24), slice(10, 12)], ids=str)
def test_masks_at_the_border_and_very_thin_ones(mode: str, rows: slice) -> None:
    """seamlessClone cannot take all of these: the soft blend steps in."""
    mask = np.zeros((24, 24), bool)
    mask[rows] = True
    target = DATA["faces"][3]
    surrogate = _blend(mode=mode)(Task(target, mask=mask, donors=DATA["faces"][10:60], seed=0))
    assert not np.array_equal(surrogate[mask], target[mask])
    assert np.array_equal(surrogate[~mask], target[~mask])


@pytest.mark.parametrize(("height", "width"), [(9, 13), (10, 14), (9, 14), (24, 24)])
def test_seamless_does_not_shift_the_donor(height: int, width: int) -> None:
    """A detail of the donor arrives where it was, whether the mask's bounding box is odd or even; off-centre too."""
    target = np.full((32, 48, 3), 120, np.uint8)
    donor = target.copy()
    donor[6:9, 26:29] = 250
    mask = np.zeros((32, 48), bool)
    mask[3 : 3 + height, 20 : 20 + width] = True
    result, soft = (
        _blend(mode=mode, match="false")(Task(target, mask=mask, donors=donor[None], seed=0))
        for mode in ("seamless", "soft")
    )
    assert not np.array_equal(result, soft)
    rise = result[..., 0].astype(float) - target[..., 0]
    y, x = np.mgrid[:32, :48]
    bright = rise > rise.max() / 2
    assert (y[bright].mean(), x[bright].mean()) == pytest.approx((7, 27), abs=0.01)


def test_a_flat_donor_falls_back_to_the_soft_blend() -> None:
    target = np.full((24, 24, 3), 200, np.uint8)
    donors = np.full((1, 24, 24, 3), 20, np.uint8)
    options = {"match": "false"}
    soft, seamless = (
        _blend(mode=mode, **options)(Task(target, mask=None, donors=donors, seed=0)) for mode in ("soft", "seamless")
    )
    assert np.array_equal(soft, seamless)
    assert soft[12, 12].tolist() == [20, 20, 20]


def test_strength() -> None:
    target, donors = DATA["faces"][0], DATA["faces"][1:30]
    mask = np.ones((24, 24), bool)
    none, half, full = (
        _blend(strength=strength)(Task(target, mask=mask, donors=donors, seed=0)) for strength in ("0", "0.5", "1")
    )
    assert np.array_equal(none, target)
    assert _change(half, target, mask) == pytest.approx(_change(full, target, mask) / 2, rel=0.02)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_donors_that_are_the_target_are_refused(count: int) -> None:
    target = DATA["faces"][0]
    with pytest.raises(InputError, match=rf"none of {count} retain pictures differs enough .*: give surrogates"):
        _blend()(Task(target, mask=None, donors=np.repeat(target[None], count, 0), seed=0))


def test_the_target_among_the_donors_is_not_taken() -> None:
    target = DATA["faces"][0]
    donors = np.concatenate([np.repeat(target[None], 30, 0), DATA["faces"][40:42]])
    surrogate = _blend()(Task(target, mask=None, donors=donors, seed=0))
    assert _change(surrogate, target, np.ones((24, 24), bool)) > MIN_CHANGE


def test_donors_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"edit: donors have shape \(256, 32, 48, 3\), the image \(24, 24, 3\)"):
        _blend()(Task(DATA["faces"][0], mask=None, donors=DATA["flags"], seed=0))
