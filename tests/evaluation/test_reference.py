"""Pictures that stand for those that the base model never saw."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from expunge.errors import InputError
from expunge.evaluation.reference import unseen_pictures, warped
from expunge.settings import EvaluationSettings

SIZE = (24, 20)


def samples(count: int = 6) -> Tensor:
    """Smooth pictures, unlike one another."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")


def options(folder: Path | None = None) -> EvaluationSettings:
    return EvaluationSettings(unseen_pictures=16, unseen_folder=folder)


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def test_without_a_folder_they_are_made_of_the_models_own_samples() -> None:
    made, words = unseen_pictures(samples(), options(), SIZE, seed=1)
    assert made.shape == (16, 3, *SIZE)
    assert made.abs().max() <= 1
    assert words.startswith("16 pictures, each a gently warped sample")
    for i, picture in enumerate(made):
        own, others = samples()[i % 6], [other for j, other in enumerate(samples()) if j != i % 6]
        assert 0.02 < distance(picture, own) < min(distance(picture, other) for other in others), "bent, not replaced"


def test_the_seed_alone_decides_what_is_made() -> None:
    first, again, other = (unseen_pictures(samples(), options(), SIZE, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_sample_that_is_used_twice_is_bent_in_two_ways() -> None:
    made, _ = unseen_pictures(samples(), options(), SIZE, seed=1)
    assert distance(made[0], made[6]) > 0.02


def test_a_stronger_warp_leaves_less_of_a_picture() -> None:
    distances = [distance(warped(samples(), 3, strength), samples()) for strength in (0.0, 0.05, 0.2)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances)


def test_without_samples_there_is_nothing_to_make_them_of() -> None:
    with pytest.raises(ValueError, match="no samples"):
        unseen_pictures(samples()[:0], options(), SIZE, seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty grey pictures, each of its own brightness."""
    for i in range(20):
        Image.new("RGB", (40, 48), (10 * i, 10 * i, 10 * i)).save(tmp_path / f"{i:02}.png")
    return tmp_path


def test_pictures_of_a_folder_are_used_as_they_are(folder: Path) -> None:
    pictures, words = unseen_pictures(samples(), options(folder), SIZE, seed=1)
    assert pictures.shape == (16, 3, *SIZE)
    brightness = ((pictures.mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()
    assert len(set(brightness)) == 16
    assert all(value in range(0, 200, 10) for value in brightness)
    assert str(folder) not in words, "a path may name people"
    others, _ = unseen_pictures(samples(), options(folder), SIZE, seed=2)
    assert not torch.equal(pictures, others), "which of them are used depends on the seed"


def test_a_folder_with_too_few_pictures_is_refused(folder: Path) -> None:
    for file in sorted(folder.iterdir())[:5]:
        file.unlink()
    with pytest.raises(InputError, match=r"evaluation.unseen_folder: .* holds 15 pictures, not 16"):
        unseen_pictures(samples(), options(folder), SIZE, seed=1)


def test_a_picture_of_the_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "03.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"evaluation.unseen_folder: 03.png"):
        unseen_pictures(samples(), options(folder), SIZE, seed=1)
