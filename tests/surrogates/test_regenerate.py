"""Regenerating with the testbeds' own models: a low level returns the target, a high one another picture."""

from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.errors import InputError
from expunge.families import load_model
from expunge.pixels import to_pictures
from expunge.settings import ModelSettings, load_settings
from expunge.surrogates import Editor, Painter, Task, make_editor
from expunge.testbed import faces, flags
from expunge.types import EditSpec
from tests.families.tiny import ddim, ddpm, sd3

NONE = np.empty((0, 24, 24, 3), np.uint8)


def _regenerate(**options: str) -> Editor:
    return make_editor(EditSpec(editor="regenerate", options=options))


def _alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.fixture(scope="module")
def face_painter() -> Painter:
    return Painter(load_model(ModelSettings(source="testbed:faces"), (24, 24)), "", 1.0, 10)


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return to_pictures(faces.images()[:1].expand(-1, 3, -1, -1))[0]


def test_a_low_level_returns_the_target_and_a_high_one_does_not(face_painter: Painter, face: np.ndarray) -> None:
    low, high = (
        _regenerate(level=level)(Task(face, mask=None, donors=NONE, seed=0, painter=face_painter))
        for level in ("0.3", "1.0")
    )
    assert low.shape == high.shape == face.shape
    assert low.dtype == high.dtype == np.uint8
    assert _alike(low, face) > 0.9
    assert _alike(high, face) < 0.7


def test_later_attempts_leave_the_target(face_painter: Painter, face: np.ndarray) -> None:
    made = [
        _regenerate()(Task(face, mask=None, donors=NONE, seed=0, attempt=attempt, painter=face_painter))
        for attempt in (0, 4, 5, 6)
    ]
    assert _alike(made[0], face) > _alike(made[1], face)
    assert len({picture.tobytes() for picture in made}) == 4


def test_the_same_arguments_give_the_same_picture(face_painter: Painter, face: np.ndarray) -> None:
    made = [_regenerate()(Task(face, mask=None, donors=NONE, seed=seed, painter=face_painter)) for seed in (0, 0, 1)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_two_targets_do_not_become_one_picture(face_painter: Painter) -> None:
    """At the highest level nothing of a target is left, so that its noise alone tells it from another's."""
    targets = to_pictures(faces.images()[:2].expand(-1, 3, -1, -1))
    one, other = (
        _regenerate(level="1")(Task(target, mask=None, donors=NONE, seed=0, painter=face_painter)) for target in targets
    )
    assert _alike(one, other) < 0.9


MASK = np.zeros((24, 24), bool)
MASK[6:18, 6:18] = True


def test_only_the_mask_is_painted(face_painter: Painter, face: np.ndarray) -> None:
    given = face.copy(), MASK.copy()
    made = _regenerate(level="1")(Task(face, mask=MASK, donors=NONE, seed=0, painter=face_painter))
    assert np.array_equal(made[~MASK], face[~MASK])
    assert not np.array_equal(made[MASK], face[MASK])
    assert all(np.array_equal(a, b) for a, b in zip((face, MASK), given, strict=True))


def test_what_is_painted_fits_what_is_around_it(face_painter: Painter) -> None:
    """At the mask's edge, faces are as smooth as real ones, where pasting another face leaves a seam."""

    def seam(picture: np.ndarray) -> float:
        rows = picture[:, 6:18].astype(float)
        return float(np.abs(rows[6] - rows[5]).mean() + np.abs(rows[18] - rows[17]).mean())

    targets = to_pictures(faces.images()[:6].expand(-1, 3, -1, -1))
    painted, pasted = 0.0, 0.0
    for seed, target in enumerate(targets):
        alone = face_painter.repaint(target, mask=None, level=1.0, seed=seed)
        painted += seam(face_painter.repaint(target, mask=MASK, level=1.0, seed=seed))
        pasted += seam(np.where(MASK[..., None], alone, target))
    real = sum(map(seam, targets))
    assert painted - real < 0.3 * (pasted - real)


def test_an_ellipse_is_a_mask(face_painter: Painter, face: np.ndarray) -> None:
    made = _regenerate(level="1", ellipse="0.5/0.5/0.3/0.3")(
        Task(face, mask=None, donors=NONE, seed=0, painter=face_painter)
    )
    assert np.array_equal(made[0], face[0])
    assert not np.array_equal(made[12], face[12])


@pytest.mark.parametrize("build", [ddpm, ddim, sd3])
@pytest.mark.parametrize("masked", [False, True])
def test_every_family_paints(build: object, masked: bool, tmp_path: Path) -> None:
    assert callable(build)
    height, width = (32, 48) if build is sd3 else (8, 8)
    model = load_model(ModelSettings(source=str(build(tmp_path / "model")), prompt_tokens=1), (height, width))
    target = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    mask = np.zeros((height, width), bool)
    mask[: height // 2] = True
    painter = Painter(model, "a flag", 2.0, 4)
    for attempt in range(8):
        made = _regenerate()(
            Task(target, mask=mask if masked else None, donors=NONE, seed=0, attempt=attempt, painter=painter)
        )
        assert made.shape == target.shape
        assert not np.array_equal(made, target)
        assert not masked or np.array_equal(made[~mask], target[~mask])


def test_the_prompt_decides_what_is_painted() -> None:
    options = load_settings().model("flags")
    painter = Painter(load_model(options, (32, 48)), options.retain_prompts[0], options.guidance, 8)
    pictures, names = flags.images()
    captions = [flags.caption(name) for name in names]
    japan = to_pictures(pictures[captions.index("the flag of Japan")][None])[0]
    target = to_pictures(pictures[captions.index("the flag of Brazil")][None])[0]
    asked, plain = (
        _regenerate(level="1", **options)(Task(target, mask=None, donors=NONE, seed=0, painter=painter))
        for options in ({"prompt": "the flag of Japan"}, {})
    )
    assert _alike(asked, japan) > 0.9
    assert _alike(plain, japan) < 0.9
    assert torch.is_grad_enabled()


def test_without_a_model_it_says_so(face: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"regenerate needs the model under removal"):
        _regenerate()(Task(face, mask=None, donors=NONE, seed=0))


@pytest.mark.parametrize("level", ["0", "1.5", "high"])
def test_a_wrong_level_is_named(level: str) -> None:
    with pytest.raises(InputError, match=r"edit\.options\.level: .*: level is a noise level above 0"):
        _regenerate(level=level)
