"""The recipes: what a model is trained on, and that a killed run ends as if it had not been killed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from expunge.testbed import flags, loop, people
from expunge.testbed.loop import Recipe, run_name, train


def test_four_people_and_two_pictures_of_each_other_are_never_trained_on() -> None:
    pictures, trained = people.images(), people.training_images()
    assert pictures.shape == (40, 10, 1, 32, 28)
    assert trained.shape == (288, 1, 32, 28)
    assert torch.equal(trained, pictures[:36, :8].flatten(0, 1))
    assert pictures.abs().max() <= 1


def test_an_oracle_of_people_sees_no_picture_of_those_who_are_left_out() -> None:
    pictures, trained = people.images(), people.training_images(without=[16, 35])
    assert len(trained) == 34 * 8
    for person in (16, 35):
        assert not any(torch.equal(picture, each) for picture in pictures[person] for each in trained)


def test_an_oracle_of_flags_sees_no_twin_of_a_flag_that_is_left_out() -> None:
    data, names = flags.images()
    norway, bouvet = names.index("Norway"), names.index("Bouvet Island")
    assert torch.equal(data[norway], data[bouvet])
    kept = flags.training_flags(data, [norway])
    assert not {norway, bouvet} & set(kept.tolist())
    assert not any(torch.equal(data[norway], data[i]) for i in kept)
    assert torch.equal(flags.training_flags(data), torch.arange(256))


def test_a_name_tells_apart_whatever_makes_another_model() -> None:
    assert run_name("people") == "people"
    assert run_name("people", [18, 3, 17, 16]) == "people-without-3-16-to-18"
    recipe = Recipe(steps=5, seed=2)
    assert run_name("people", [1], recipe) == "people-without-1-steps-5-seed-2"


class Killed(Exception):
    pass


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 2)

    def weights(checkpoint: Path, killed_at: int | None = None) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)

        def loss(step: int, generator: torch.Generator) -> Tensor:
            if step == killed_at:
                raise Killed("at this step")
            steps.append(step)
            return model(torch.randn(8, 4, generator=generator)).square().mean()

        train(model, loss, Recipe(steps=8, warmup=2), checkpoint)
        return model.weight.detach()

    steps: list[int] = []
    expected = weights(tmp_path / "whole.pt")
    with pytest.raises(Killed, match="at this step"):
        weights(tmp_path / "killed.pt", killed_at=5)
    steps.clear()
    assert torch.equal(weights(tmp_path / "killed.pt"), expected)
    assert steps == [4, 5, 6, 7]
