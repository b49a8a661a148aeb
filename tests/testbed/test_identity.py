"""The identifier knows the people of `people` from pictures that it has not seen, and does not know strangers."""

import pytest
import torch
from torch import Tensor

from expunge.testbed import people
from expunge.testbed.identity import UNKNOWN, Identifier, classifier


@pytest.fixture(scope="module")
def identifier() -> Identifier:
    return classifier()


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return people.images()[:36, 8:].flatten(0, 1)


WHO = torch.arange(36).repeat_interleave(2)


def test_it_knows_at_least_95_percent_of_held_out_pictures(identifier: Identifier, held_out: Tensor) -> None:
    probabilities = identifier.probabilities(held_out)
    assert probabilities.shape == (72, 36)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(72, dtype=torch.double))
    assert (probabilities.argmax(1) == WHO).double().mean() >= 0.95


def test_a_mirror_image_shows_the_same_person(identifier: Identifier, held_out: Tensor) -> None:
    assert (identifier.probabilities(held_out.flip(-1)).argmax(1) == WHO).double().mean() >= 0.9


def test_brightness_contrast_and_colour_channels_do_not_matter(identifier: Identifier, held_out: Tensor) -> None:
    other = (0.5 * held_out + 0.2).expand(-1, 3, -1, -1)
    torch.testing.assert_close(identifier.probabilities(other), identifier.probabilities(held_out), atol=1e-4, rtol=0)


def test_known_people_are_seldom_rejected_and_strangers_mostly(identifier: Identifier, held_out: Tensor) -> None:
    strangers = people.images()[36:].flatten(0, 1)
    assert (identifier.identify(held_out) == UNKNOWN).double().mean() <= 0.1
    assert (identifier.identify(strangers) == UNKNOWN).double().mean() >= 0.75


def test_nobody_is_on_a_grey_picture_or_noise(identifier: Identifier) -> None:
    noise = torch.randn(20, 1, 32, 28, generator=torch.Generator().manual_seed(0))
    assert identifier.identify(torch.zeros(1, 3, 32, 28)).tolist() == [UNKNOWN]
    assert (identifier.identify(noise) == UNKNOWN).double().mean() >= 0.75
