"""The views in which a target is tested."""

import pytest
import torch
from torch import Tensor

from expunge.evaluation.views import VIEWS, all_views


def picture(height: int = 24, width: int = 32) -> Tensor:
    """A bright square on a dark ground, a quarter of the width from the left."""
    canvas = torch.full((3, height, width), -0.8)
    canvas[:, height // 2 - 2 : height // 2 + 2, width // 4 - 2 : width // 4 + 2] = 0.9
    return canvas


def centre_of(image: Tensor) -> tuple[float, float]:
    """Of what is bright, in pixels from the top left corner."""
    weight = (image.mean(0) + 0.8).clamp(min=0)
    rows, columns = (torch.arange(size) + 0.5 for size in weight.shape)
    total = weight.sum()
    return ((weight.sum(1) * rows).sum() / total).item(), ((weight.sum(0) * columns).sum() / total).item()


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_always_the_same_and_stays_a_picture(name: str) -> None:
    pictures = torch.rand(3, 3, 17, 23, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = VIEWS[name](pictures)
    assert seen.shape == pictures.shape
    assert seen.abs().max() <= 1
    assert torch.equal(seen, VIEWS[name](pictures))
    assert VIEWS[name](pictures[1:2]).allclose(seen[1:2], atol=1e-6), "whatever else is in the batch"


def test_only_the_first_view_is_the_picture_itself() -> None:
    views = all_views(picture())
    assert views.shape == (len(VIEWS), 3, 24, 32)
    assert torch.equal(views[0], picture())
    distances = [(view - views[0]).abs().mean().item() for view in views[1:]]
    assert min(distances) > 0.01
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_the_mirrored_view_is_mirrored_from_left_to_right() -> None:
    assert torch.equal(VIEWS["mirrored"](picture()[None])[0], picture().flip(-1))


def test_the_shifted_view_lies_further_to_the_right_and_is_larger() -> None:
    shifted = VIEWS["shifted and scaled"](picture()[None])[0]
    # The square is at (12, 8): a quarter of the width left of the centre (12, 16), where scaling moves it outwards.
    assert centre_of(shifted) == pytest.approx((12, 16 - 1.05 * 8 + 0.04 * 32), abs=0.1)
    area = ((shifted.mean(0) + 0.8).clamp(min=0).sum() / (picture().mean(0) + 0.8).sum()).item()
    assert area == pytest.approx(1.05**2, rel=0.05)


def test_the_photometric_view_is_lighter_and_flatter_where_it_was_dark() -> None:
    lit = VIEWS["photometric"](picture()[None])[0]
    assert lit.min() == pytest.approx(0.85 * -0.8 + 0.08)
    assert lit.max() - lit.min() == pytest.approx(0.85 * 1.7)
