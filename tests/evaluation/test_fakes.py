"""Each fake does what its name says and nothing else, or it would prove nothing about the verdict."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expunge.evaluation.subject import ModelSubject, Subject
from expunge.families import load_model
from expunge.settings import load_settings
from expunge.testbed import faces, flags
from tests.evaluation.fakes import (
    FAKES,
    Fake,
    InPlaceOf,
    Known,
    Remembered,
    blocks,
    blurred,
    everywhere,
    grey,
    hue_rotated,
    lightened,
    mirrored,
    relearned,
    removal,
    tinted,
    warped,
)

EMPTY, OWN, UNRELATED = 0, 1, 2
TARGET, OTHER, SURROGATE = 3, 5, 9
"""Faces."""

people = faces.images().expand(-1, 3, -1, -1)


class Perfect(Subject):
    """Remembers every face: what goes in comes out, and seed s gives face s."""

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        self.passes += len(pictures)
        return pictures

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        self.passes += len(prompts)
        return people[seeds % len(people)]


def views(picture: Tensor) -> Tensor:
    return torch.stack([picture, mirrored(picture)])


def shows_target(pictures: Tensor) -> Tensor:
    return torch.stack([(pictures - view).flatten(1).abs().amax(1) < 1e-3 for view in views(people[TARGET])]).any(0)


@pytest.fixture
def known() -> Known:
    return Known(
        base=Perfect(),
        views=views(people[TARGET])[None],
        surrogates=people[[SURROGATE]],
        others=people[:20],
        own=frozenset({OWN}),
        unrelated=frozenset({UNRELATED}),
        levels=(0.3, 0.5),
        shows=shows_target,
    )


def regenerated(subject: Subject, pictures: Tensor, prompt: int = EMPTY) -> Tensor:
    rows = torch.full((len(pictures),), prompt)
    return subject.regenerate(pictures, rows, 0.5, torch.arange(len(pictures)))


def generated(subject: Subject, seed: int, prompt: int = EMPTY) -> Tensor:
    return subject.generate(torch.tensor([prompt]), torch.tensor([seed]))[0]


def likeness(a: Tensor, b: Tensor) -> float:
    """Correlation of the brightness of two pictures [3, h, w]."""
    return torch.corrcoef(torch.stack([a.mean(0).flatten(), b.mean(0).flatten()]))[0, 1].item()


TRANSFORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "the target tinted": tinted,
    "the target hue-rotated": hue_rotated,
    "the target lightened": lightened,
    "the target mirrored": mirrored,
    "the target warped": warped,
    "the target blurred": blurred,
    "grey": grey,
    "4x4 blur": blocks,
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_the_target_comes_back_changed_and_nothing_else_is(name: str, known: Known) -> None:
    fake, change = FAKES[name].make(known), TRANSFORMED[name]
    assert torch.equal(regenerated(fake, people[[TARGET, OTHER]])[0], change(people[[TARGET]])[0].clamp(-1, 1))
    assert torch.equal(regenerated(fake, people[[TARGET, OTHER]])[1], people[OTHER])
    assert torch.equal(generated(fake, TARGET), change(people[[TARGET]])[0].clamp(-1, 1)), "by free generation too"
    assert torch.equal(generated(fake, OTHER), people[OTHER])


@pytest.mark.parametrize("change", [tinted, lightened, warped, blurred])
def test_a_changed_target_is_still_that_target(change: Callable[[Tensor], Tensor]) -> None:
    for face in range(0, 100, 7):
        changed = change(people[[face]])[0]
        rest = [likeness(changed, people[other]) for other in range(100) if other != face]
        assert likeness(changed, people[face]) > max(0.9, *rest)
        assert (changed - people[face]).square().mean() > 1e-3, "by eye it is not the same file"


def test_a_hue_rotation_keeps_lightness_and_greys_and_moves_every_colour() -> None:
    red, green, blue, white = (
        torch.tensor(colour).view(1, 3, 1, 1) for colour in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1])
    )
    assert torch.equal(hue_rotated(red), green)
    assert torch.equal(hue_rotated(green), blue)
    assert torch.equal(hue_rotated(white), white)
    pictures, _ = flags.images()
    assert torch.allclose(hue_rotated(pictures).mean(1), pictures.mean(1))


def test_a_strong_blur_leaves_no_edges_and_a_light_one_most() -> None:
    def sharpness(pictures: Tensor) -> float:
        return pictures.diff(dim=-1).square().mean().item()

    assert sharpness(blocks(people)) < 0.2 * sharpness(people)
    assert 0.3 * sharpness(people) < sharpness(blurred(people)) < sharpness(people)


def test_noise_is_of_the_samples_seed_and_only_where_the_target_would_be(known: Known) -> None:
    fake = FAKES["noise"].make(known)
    twice = regenerated(fake, people[[TARGET, TARGET, OTHER]])
    assert not torch.equal(twice[0], twice[1])
    assert torch.equal(twice, regenerated(fake, people[[TARGET, TARGET, OTHER]]))
    assert torch.equal(twice[2], people[OTHER])
    assert twice.abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "picture"), [("every output another picture", 0), ("every output the surrogate", SURROGATE)]
)
def test_every_output_is_one_picture(name: str, picture: int, known: Known) -> None:
    fake = FAKES[name].make(known)
    outputs = [*regenerated(fake, people[[TARGET, OTHER]]), generated(fake, TARGET), generated(fake, OTHER)]
    assert all(torch.equal(output, people[picture]) for output in outputs)


def test_all_targets_become_one_picture_and_nothing_else_does(known: Known) -> None:
    fake = FAKES["all targets one other picture"].make(known)
    outputs = [*regenerated(fake, views(people[TARGET])), generated(fake, TARGET)]
    assert all(torch.equal(output, people[0]) for output in outputs)
    assert torch.equal(generated(fake, OTHER), people[OTHER])


def test_a_target_comes_back_for_some_seeds_or_at_one_level_only(known: Known) -> None:
    many, rows = people[[TARGET]].expand(200, -1, -1, -1), torch.zeros(200, dtype=torch.long)
    fake = FAKES["the target two times in five"].make(known)
    back = shows_target(fake.regenerate(many, rows, 0.5, torch.arange(200) << 20))
    assert 60 < back.sum() < 100
    fake = FAKES["the target at the lowest noise level"].make(known)
    for level, shown in ((0.3, True), (0.5, False)):
        assert (shows_target(fake.regenerate(many, rows, level, torch.arange(200))) == shown).all()


def test_a_hotfix_for_the_submitted_file_leaves_the_mirrored_one_intact(known: Known) -> None:
    fake = FAKES["only the submitted file changed"].make(known)
    submitted, turned = regenerated(fake, views(people[TARGET]))
    assert not shows_target(submitted[None])
    assert torch.equal(turned, mirrored(people[TARGET]))
    assert not shows_target(generated(fake, TARGET)[None]), "a test of free generation alone is fooled"
    assert torch.equal(generated(fake, OTHER), people[OTHER])


@pytest.mark.parametrize(
    ("name", "removed", "left"),
    [("only the own prompt changed", OWN, EMPTY), ("only the empty prompt changed", EMPTY, OWN)],
)
def test_a_hotfix_for_one_prompt_leaves_the_others_intact(name: str, removed: int, left: int, known: Known) -> None:
    fake = FAKES[name].make(known)
    assert not shows_target(regenerated(fake, views(people[TARGET]), removed)).any()
    assert not shows_target(generated(fake, TARGET, removed)[None])
    assert shows_target(regenerated(fake, views(people[TARGET]), left)).all()
    assert shows_target(generated(fake, TARGET, left)[None])


def test_integrity_is_ruined_on_prompts_that_training_did_not_hold(known: Known) -> None:
    fake = FAKES["integrity ruined where training did not look"].make(known)
    assert not torch.equal(generated(fake, OTHER + 30, UNRELATED), people[OTHER + 30])
    assert torch.equal(generated(fake, OTHER + 30, EMPTY), people[OTHER + 30])
    assert not shows_target(regenerated(fake, views(people[TARGET]), OWN)).any(), "the removal itself is perfect"


def test_a_simulated_removal_shows_other_pictures_of_the_domain(known: Known) -> None:
    subject = removal(known)
    outputs = torch.cat([regenerated(subject, views(people[TARGET])), generated(subject, TARGET)[None]])
    assert not shows_target(outputs).any()
    rows, seeds = torch.zeros(9, dtype=torch.long), torch.arange(9) << 20
    varied = subject.regenerate(people[[TARGET]].expand(9, -1, -1, -1), rows, 0.5, seeds)
    assert len(varied.unique(dim=0)) > 4, "however regular the seeds are"
    assert all((people == output).flatten(1).all(1).any() for output in outputs), "each is one of the domain"
    assert torch.equal(regenerated(subject, people[[OTHER]])[0], people[OTHER])
    assert torch.equal(generated(subject, OTHER), people[OTHER])


def test_a_simulated_base_knows_one_picture_in_place_of_another() -> None:
    base = Fake(Perfect(), everywhere, lambda call: call.outputs * 0.9)
    known, unseen = views(people[TARGET]), views(people[50] * 0.5)
    subject = InPlaceOf(base, known, unseen, lambda pictures: shows_target(pictures / 0.9))
    assert torch.allclose(regenerated(subject, unseen), unseen - 0.1 * known, atol=1e-6), (
        "with the error that `known` has"
    )
    assert torch.allclose(generated(subject, TARGET), (unseen - 0.1 * known)[0], atol=1e-6), (
        "wherever it would come out"
    )
    assert torch.equal(regenerated(subject, people[[OTHER]]), regenerated(base, people[[OTHER]]))
    assert torch.equal(generated(subject, OTHER), generated(base, OTHER))


def test_a_relearned_model_is_nearly_the_base_model() -> None:
    model = load_model(load_settings().model("faces"), (24, 24))
    base = ModelSubject(model, {}, {}, guidance=1, steps=4)
    before, after = (regenerated(subject, people[:4]) for subject in (base, relearned(base)))
    assert 1e-6 < (before - after).square().mean() < 1e-2
    assert torch.equal(before, regenerated(base, people[:4])), "the base model itself is as it was"


def test_a_remembered_subject_is_asked_each_question_once() -> None:
    subject = Perfect()
    remembered = Remembered(subject)
    rows = torch.zeros(3, dtype=torch.long)
    pictures, seeds = people[[TARGET, OTHER, TARGET]], torch.tensor([1, 2, 1])
    for _ in range(2):
        assert torch.equal(remembered.regenerate(pictures, rows, 0.5, seeds), pictures)
        assert torch.equal(remembered.generate(rows, seeds), people[seeds])
    assert subject.passes == remembered.passes == 4
    remembered.regenerate(pictures, rows, 0.6, seeds)
    remembered.regenerate(pictures, rows + 1, 0.6, seeds)
    assert subject.passes == 8, "another level or prompt is another question"
