"""The views of a pair that training sees."""

import torch
from torch import Tensor

from expunge.evaluation.views import VIEWS
from expunge.preparation.views import views_of_pair
from expunge.testbed import faces


def face(place: int) -> Tensor:
    return faces.images()[place].expand(3, -1, -1)


def test_the_pair_itself_comes_first_and_mirrored_second() -> None:
    targets, surrogates = views_of_pair(face(0), face(1), 5, seed=0)
    assert targets.shape == surrogates.shape == (5, 3, 24, 24)
    assert torch.equal(targets[0], face(0))
    assert torch.equal(surrogates[0], face(1))
    assert torch.equal(targets[1], face(0).flip(-1))
    assert torch.equal(surrogates[1], face(1).flip(-1))
    assert targets.abs().max() <= 1
    assert all(one.unique(dim=0).shape[0] == 5 for one in (targets, surrogates))


def test_one_view_is_the_picture_alone() -> None:
    targets, _ = views_of_pair(face(0), face(1), 1, seed=0)
    assert torch.equal(targets, face(0)[None])


def test_both_are_transformed_alike() -> None:
    """The same picture on both sides stays the same in every view."""
    targets, surrogates = views_of_pair(face(0), face(0), 12, seed=0)
    assert torch.equal(targets, surrogates)


def test_views_depend_on_seed_and_target_alone() -> None:
    first = views_of_pair(face(0), face(1), 6, seed=0)[0]
    assert torch.equal(first[:4], views_of_pair(face(0), face(2), 4, seed=0)[0])
    assert not torch.equal(first, views_of_pair(face(0), face(1), 6, seed=1)[0])


def test_a_wide_picture_is_rotated_without_being_sheared() -> None:
    """A disc on a wide picture stays as wide as it is high, in every view."""
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(128) - 63.5, indexing="ij")
    disc = torch.where(x**2 + y**2 < 15**2, 1.0, -1.0).expand(3, -1, -1)
    bar = torch.where((x.abs() < 25) & (y.abs() < 2), 1.0, -1.0).expand(3, -1, -1)
    for view in views_of_pair(disc, disc, 12, seed=0)[0]:
        inside = view[0] > view[0].mean()
        assert abs(int(inside.any(0).sum()) - int(inside.any(1).sum())) <= 2
    lengths = [int((view[0] > view[0].mean()).any(0).sum()) for view in views_of_pair(bar, bar, 12, seed=0)[0]]
    assert min(lengths) >= 45
    assert max(lengths) <= 56


def test_the_evaluations_own_views_are_not_among_them() -> None:
    """Except for the picture itself and its mirror image: what is judged must not be what was trained on."""
    judged = [view(face(0)[None])[0] for name, view in VIEWS.items() if name not in ("as submitted", "mirrored")]
    targets, _ = views_of_pair(face(0), face(1), 64, seed=0)
    assert len(judged) == len(VIEWS) - 2
    for view in judged:
        assert (targets - view).abs().mean((1, 2, 3)).min() > 0.01
